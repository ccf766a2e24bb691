"""Machines that a plan is for: a name such as v5e:16x16, its chip's public numbers, and its devices to compile for."""

import dataclasses
import importlib.util
import math
import os
import re

import jax
import numpy as np


@dataclasses.dataclass(frozen=True)
class Chip:
    """One accelerator, in the vendor's public numbers; rates are per second, of one chip.

    Attributes:
      peak: dense bf16 FLOP/s; memory: bytes of HBM, of a TPU those that libtpu gives to programs; bandwidth: bytes/s of
        HBM.
      link: bytes/s of one link in one direction; a TPU has two links for each axis of its torus, a GPU all of NVLink.
      network: bytes/s of a GPU's share of the network between hosts, in one direction.
      wraps: size from which on an axis of the TPU's torus is a ring.
    """

    peak: float
    memory: int
    bandwidth: float
    link: float
    network: float = 0.0
    wraps: int = 0


# Sources: cloud.google.com/tpu/docs/{v5e,v5p,v6e} (1600, 4800 and 3584 Gbit/s over 4, 6 and 4 links of a chip) and
# NVIDIA's data sheets of the H100 SXM5 80GB and of the DGX H100 (900 GB/s of NVLink in both directions, eight 400
# Gbit/s adapters).
CHIPS = {
    "v5e": Chip(peak=197e12, memory=int(15.75 * 2**30), bandwidth=819e9, link=50e9, wraps=16),
    "v5p": Chip(peak=459e12, memory=int(95.73 * 2**30), bandwidth=2765e9, link=100e9, wraps=4),
    "v6e": Chip(peak=918e12, memory=int(31.24 * 2**30), bandwidth=1640e9, link=112e9, wraps=16),
    "h100": Chip(peak=989e12, memory=80 * 2**30, bandwidth=3350e9, link=450e9, network=50e9),
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """A machine.

    Attributes:
      name: as given; kind: of CHIPS, or "cpu".
      shape: of a TPU's torus; (hosts, GPUs per host); (devices,) of the fake CPU devices.
    """

    name: str
    kind: str
    shape: tuple[int, ...]

    @property
    def num_devices(self) -> int:
        """Chips."""
        return math.prod(self.shape)

    @property
    def chip(self) -> Chip | None:
        """None for fake CPU devices, whose speed says nothing."""
        return CHIPS.get(self.kind)

    @property
    def is_tpu(self) -> bool:
        """Whether libtpu compiles for it."""
        return self.kind.startswith("v")

    @property
    def memory(self) -> int:
        """Bytes of one device; fake CPU devices share this host's."""
        if self.chip:
            return self.chip.memory
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // self.num_devices


def parse_topology(name: str) -> Topology:
    """The machine called "v5e:16x16", "v5p:8x8x8", "v6e:16x16", "h100:8x8" (hosts x GPUs) or "cpu:8".

    Raises:
      ValueError: for any other form.
    """
    kind, _, sizes = name.partition(":")
    axes = {"v5p": 3, "cpu": 1}.get(kind, 2)
    if kind not in (*CHIPS, "cpu") or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", sizes) or sizes.count("x") + 1 != axes:
        raise ValueError(f"topology {name!r} is not one of v5e:16x16, v5p:8x8x8, v6e:16x16, h100:HOSTSxGPUS and cpu:N")
    return Topology(name, kind, tuple(map(int, sizes.split("x"))))


def find_devices(topology: Topology) -> list:
    """Devices to compile for, none of which need be there.

    A TPU's come from libtpu; a GPU's are as many fake CPU devices, which must be asked for before JAX starts.

    Raises:
      ValueError: libtpu is not installed or does not know the topology, or JAX runs with too few CPU devices.
    """
    if topology.is_tpu:
        return _tpu_devices(topology)
    if not jax.config.jax_platforms:
        jax.config.update("jax_platforms", "cpu")
    try:
        jax.config.update("jax_num_cpu_devices", topology.num_devices)
    except RuntimeError:  # JAX has started
        pass
    devices = jax.devices("cpu")
    if len(devices) < topology.num_devices:
        raise ValueError(f"{topology.name} needs {topology.num_devices} CPU devices, JAX runs with {len(devices)}")
    return devices[: topology.num_devices]


def _tpu_devices(topology):
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError("plans for TPUs need libtpu: pip install path-jax[tpu]")
    from jax.experimental import topologies

    # libtpu asks for the machine it is on, unless it is told that it is on none.
    for name, value in {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_STDERR_LOG_LEVEL": "3",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # several compilations may run at once
    }.items():
        os.environ.setdefault(name, value)
    if not jax.config.jax_platforms:
        jax.config.update("jax_platforms", "cpu")  # leave an attached accelerator alone
    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=topology.name).devices
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"libtpu does not know the topology {topology.name}: {reason}") from error
    return list(devices)


def axis_bandwidths(topology: Topology, mesh: jax.sharding.Mesh) -> dict[str, float]:
    """Bytes/s that one device can send along each mesh axis of more than one device, by rings.

    TPU: both links of every axis of the torus along which the mesh axis runs; one, where that is no ring. GPU: NVLink,
    or the adapters of the GPUs that a group has on one host. Fake CPU devices: none.
    """
    chip, found = topology.chip, {}
    for number, axis in enumerate(mesh.axis_names):
        if not chip or mesh.devices.shape[number] == 1:
            continue
        line = np.moveaxis(mesh.devices, number, -1).reshape(-1, mesh.devices.shape[number])[0]
        if topology.is_tpu:
            places = np.array([device.coords for device in line])
            spans = [len(set(places[:, i])) for i in range(places.shape[1])]
            links = sum(2 if span >= chip.wraps else 1 for span in spans if span > 1)
            found[axis] = max(1, links) * chip.link
        else:
            hosts = np.array([device.id for device in line]) // topology.shape[1]
            neighbours = max(np.bincount(hosts))
            found[axis] = chip.link if neighbours == len(line) else min(chip.link, neighbours * chip.network)
    return found
