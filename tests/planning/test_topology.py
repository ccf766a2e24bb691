"""Names of machines, and the rates of their networks."""

import types

import jax
import numpy as np
import pytest

from path_jax.planning.collectives import Collective
from path_jax.planning.estimate import step_time
from path_jax.planning.topology import CHIPS, axis_bandwidths, find_devices, parse_topology


@pytest.mark.parametrize("name", ["v5e", "v5e:16", "v5p:8x8", "cpu:2x2", "h100:0x8", "a100:8x8", "v5e:16x16x1", "cpu:"])
def test_other_names_are_refused(name):
    with pytest.raises(ValueError, match="is not one of"):
        parse_topology(name)


def test_shapes_and_memory():
    topology = parse_topology("v5p:8x8x8")
    assert (topology.kind, topology.shape, topology.num_devices) == ("v5p", (8, 8, 8), 512)
    assert topology.memory == CHIPS["v5p"].memory
    assert parse_topology("cpu:4").memory * 4 <= parse_topology("cpu:1").memory


def test_more_devices_than_jax_runs_with():
    jax.devices()
    with pytest.raises(ValueError, match="4096 CPU devices"):
        find_devices(parse_topology("cpu:4096"))


def test_a_missing_compiler_names_its_extra(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"path-jax\[tpu\]"):
        find_devices(parse_topology("v5e:2x2"))


def mesh_of(devices, **axes):
    return types.SimpleNamespace(axis_names=tuple(axes), devices=np.array(devices).reshape(*axes.values()))


def tpus(*shape):
    found = np.empty(len(list(np.ndindex(*shape))), object)
    found[:] = [types.SimpleNamespace(coords=(*place, 0)) for place in np.ndindex(*shape)]
    return found


def test_axes_of_a_tpu_have_the_links_that_they_run_along():
    link = CHIPS["v5e"].link
    torus = parse_topology("v5e:16x16")
    assert axis_bandwidths(torus, mesh_of(tpus(16, 16), fsdp=256, tensor=1)) == {"fsdp": 4 * link}
    assert axis_bandwidths(torus, mesh_of(tpus(16, 16), data=16, fsdp=16)) == {"data": 2 * link, "fsdp": 2 * link}
    mesh = mesh_of(tpus(4, 4), data=4, fsdp=4)  # too small for rings
    assert axis_bandwidths(parse_topology("v5e:4x4"), mesh) == {"data": link, "fsdp": link}


def gpus(count):
    found = np.empty(count, object)
    found[:] = [types.SimpleNamespace(id=number) for number in range(count)]
    return found


def test_axes_of_gpus_run_within_hosts_or_between_them():
    chip, topology = CHIPS["h100"], parse_topology("h100:8x8")
    mesh = mesh_of(gpus(64), data=8, tensor=8)
    assert axis_bandwidths(topology, mesh) == {"data": chip.network, "tensor": chip.link}
    assert axis_bandwidths(topology, mesh_of(gpus(64), fsdp=64)) == {"fsdp": 8 * chip.network}


def test_the_slowest_of_three_bounds_a_step():
    topology, chip = parse_topology("h100:1x8"), CHIPS["h100"]
    mesh = mesh_of(gpus(8), fsdp=8)
    gather = Collective("all-gather", "fsdp", 8, 10, 8 * 10**9, "")
    times = step_time(topology, mesh, flops=8 * chip.peak, hbm_bytes=chip.bandwidth / 2, collectives=[gather])
    assert (times.compute, times.hbm) == (1.0, 0.5)
    assert times.network == pytest.approx(7 * 10**10 / chip.link)
    assert times.bound == "compute" and times.overlapped == 1.0
    assert times.in_turn == pytest.approx(1.5 + times.network)
    assert step_time(parse_topology("cpu:8"), mesh, flops=1, hbm_bytes=1, collectives=[]) is None
