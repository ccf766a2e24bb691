"""Decoding with heads over devices, and what leaves operations as they are."""

import functools

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from path_jax.models import DecoderLM, ModelConfig
from path_jax.models.generate import generate
from path_jax.parallel import attention
from path_jax.parallel.mesh import make_mesh
from path_jax.parallel.sharding import tree_shardings


@pytest.mark.parametrize("mixer", ["path_fox", pytest.param("rope", marks=pytest.mark.slow)])
def test_generation_with_heads_over_devices(mixer):
    config = ModelConfig(23, 2, 16, 4, num_kv_heads=2, mlp_dim=32, mixer=mixer, scan_layers=False)
    model = DecoderLM(config)
    params = jax.jit(model.init)(jax.random.key(0), np.zeros((1, 4), np.int32))["params"]
    run = functools.partial(generate, model, prompt=[[1, 2, 3], [4, 5]], max_new_tokens=6)
    expected = np.asarray(run(params))
    mesh = make_mesh({"tensor": 2}, devices=jax.devices()[:2])
    with jax.set_mesh(mesh):
        found = run(jax.device_put(params, tree_shardings(params, mesh)))
        cache = jax.jit(lambda: attention.init_cache(2, 64, num_kv_heads=2, num_heads=4, head_dim=4, forget=True))()
    np.testing.assert_array_equal(found, expected)
    assert {x.data.shape for x in cache.k.addressable_shards} == {(2, 1, 64, 4)}
    assert {x.data.shape for x in cache.gate.addressable_shards} == {(2, 2, 64)}
    assert cache.table.sharding.is_fully_replicated


def test_inside_a_shard_map_arrays_are_a_device_s_own():
    q = jax.random.normal(jax.random.key(0), (2, 8, 2, 4))
    mesh = make_mesh({"data": 2}, devices=jax.devices()[:2])
    run = lambda q: attention.forgetting_attention(q, q, q)
    with jax.set_mesh(mesh):
        outside = jax.jit(run)(q)
        inside = jax.jit(jax.shard_map(run, in_specs=P("data"), out_specs=P("data"), check_vma=False))(q)
    np.testing.assert_allclose(inside, outside, atol=1e-6)
    np.testing.assert_allclose(inside, run(q), atol=1e-6)


def test_meshes_with_other_axes_are_left_to_the_compiler():
    q = jax.random.normal(jax.random.key(0), (2, 8, 2, 4))
    with jax.set_mesh(
        jax.make_mesh((2,), ("model",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    ):
        jaxpr = jax.make_jaxpr(attention.forgetting_attention)(q, q, q)
        assert "shard_map" not in str(jaxpr)
    with jax.set_mesh(make_mesh({"data": 2}, devices=jax.devices()[:2])):
        assert "shard_map" in str(jax.make_jaxpr(attention.forgetting_attention)(q, q, q))
