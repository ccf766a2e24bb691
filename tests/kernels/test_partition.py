"""Under `jax.jit` with sharded arguments the kernels run on shards of batch and heads, without communication."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from kernels.recurrence import TOLERANCE, assert_close, cast, random_cotangents, random_inputs

import pallas_kernels
from pallas_kernels import forgetting_attention, path_attention

COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")


def both_directions(op, inputs, dout):
    out, pull_back = jax.vjp(lambda inputs: op(**inputs, implementation="tpu"), inputs)
    return out, pull_back(dout)[0]


def on_mesh(op):
    """(result on one device, result on a mesh, optimised program of the latter)."""
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("data", "model"))
    sharding = NamedSharding(mesh, PartitionSpec("data", None, "model"))
    inputs = cast(random_inputs(0, 140, batch=2, heads=4, kv_heads=2, path=op is path_attention), "float32")
    dout = jnp.asarray(random_cotangents(1, inputs)[0], "float32")
    function = jax.jit(lambda inputs, dout: both_directions(op, inputs, dout))
    with pallas_kernels.interpret():
        expected = function(inputs, dout)
        sharded = jax.device_put((inputs, dout), sharding)
        compiled = function.lower(*sharded).compile()
        return expected, compiled(*sharded), compiled.as_text()


@pytest.mark.parametrize("op", [forgetting_attention, pytest.param(path_attention, marks=pytest.mark.slow)])
def test_batch_and_heads_stay_on_their_devices(op):
    expected, actual, program = on_mesh(op)
    assert not [name for name in COLLECTIVES if f" {name}(" in program or f" {name}-start(" in program]
    assert actual[0].sharding.spec[:3] == ("data", None, "model")
    jax.tree.map(lambda a, e: assert_close(a, e, TOLERANCE["float32"]["output"]), actual, expected)
