"""Meshes, the table of parameter partitions, optimizer state and activations."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from path_jax.models import DecoderLM, ModelConfig
from path_jax.parallel.mesh import AXES, make_mesh
from path_jax.parallel.sharding import batch_sharding, constrain, parameter_spec, path_name, tree_shardings

CONFIG = dict(vocab_size=64, num_layers=3, embed_dim=32, num_heads=4, mlp_dim=48, mixer="path_fox")


@pytest.fixture(scope="module")
def mesh():
    return make_mesh({"fsdp": 2, "tensor": 4})


def test_make_mesh():
    assert dict(make_mesh({"fsdp": 2, "tensor": 4}).shape) == {"data": 1, "fsdp": 2, "sequence": 1, "tensor": 4}
    assert make_mesh({"data": 2, "fsdp": -1}).shape["fsdp"] == 4
    assert make_mesh({"data": -1}).axis_names == AXES
    assert make_mesh({}, devices=jax.devices()[:1]).size == 1
    assert make_mesh({"tensor": -1}, devices=jax.devices()[:2]).shape["tensor"] == 2


@pytest.mark.parametrize(
    "shape, message",
    [
        ({"model": 8}, r"unknown mesh axes \['model'\]"),
        ({"data": -1, "fsdp": -1}, "at most one -1"),
        ({"data": 0}, "must be positive"),
        ({"data": -2}, "must be positive"),
        ({"data": 3}, r"\{'data': 3\} does not fit 8 devices"),
        ({"data": 3, "fsdp": -1}, "does not fit 8 devices"),
        ({}, "does not fit 8 devices"),
    ],
)
def test_make_mesh_errors(shape, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(shape)


# Name inside a layer, shape inside a layer, partition inside a layer.
LAYER_TABLE = [
    ("mixer/q_proj/kernel", (32, 32), ("fsdp", "tensor")),
    ("mixer/o_proj/kernel", (32, 32), ("tensor", "fsdp")),
    ("mixer/w_proj_down/kernel", (32, 16), ("fsdp", "tensor")),
    ("mixer/w_proj_up/kernel", (16, 32), (None, "tensor")),
    ("mixer/w_conv/kernel", (3, 32), (None, "tensor")),
    ("mixer/conv/kernel", (4, 32), (None, "tensor")),
    ("mixer/dt_proj/kernel", (2, 32), (None, "tensor")),
    ("mixer/out_proj/kernel", (64, 32), ("tensor", "fsdp")),
    ("mixer/beta_proj/kernel", (32, 4), ("fsdp", "tensor")),
    ("mixer/beta_proj/bias", (4,), ()),
    ("mixer/q_norm/scale", (8,), ()),
    ("mixer_norm/scale", (32,), ()),
    ("mlp/gate_proj/kernel", (32, 48), ("fsdp", "tensor")),
    ("mlp/down_proj/kernel", (48, 32), ("tensor", "fsdp")),
    # Sizes that a mesh axis does not divide stay whole, each axis on its own.
    ("mixer/forget_proj/kernel", (32, 6), ("fsdp", None)),
    ("mixer/k_proj/kernel", (31, 32), (None, "tensor")),
    ("mlp/down_proj/kernel", (50, 31), (None, None)),
]


@pytest.mark.parametrize("name, shape, axes", LAYER_TABLE)
def test_parameters_of_layers(mesh, name, shape, axes):
    """The axis of a scanned stack, in front, is never split, even where the mesh would divide it."""
    assert parameter_spec(f"layers_2/{name}", shape, mesh) == P(*axes)
    scanned = P(None, *axes) if axes else P()
    assert parameter_spec(f"layers/{name}", (8, *shape), mesh) == scanned
    assert parameter_spec(f"0/mu/layers/{name}", (8, *shape), mesh) == scanned


@pytest.mark.parametrize(
    "name, shape, spec",
    [
        ("embed/embedding", (64, 32), P("tensor", "fsdp")),
        ("embed/embedding", (257, 32), P(None, "fsdp")),
        ("lm_head/kernel", (32, 64), P("fsdp", "tensor")),
        ("final_norm/scale", (32,), P()),
        ("step", (), P()),
    ],
)
def test_parameters_outside_layers(mesh, name, shape, spec):
    assert parameter_spec(name, shape, mesh) == spec


@pytest.mark.parametrize("scan_layers", [True, False])
def test_optimizer_state_lives_with_its_parameters(mesh, scan_layers):
    model = DecoderLM(ModelConfig(**CONFIG, scan_layers=scan_layers))
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    state = jax.eval_shape(optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)).init, params)
    expected = tree_shardings(params, mesh)
    (adam,) = [
        node
        for node in jax.tree.leaves(tree_shardings(state, mesh), is_leaf=lambda x: hasattr(x, "mu"))
        if hasattr(node, "mu")
    ]
    assert adam.mu == adam.nu == expected
    assert adam.count.spec == P()
    names = {path_name(path) for path, x in jax.tree_util.tree_leaves_with_path(expected) if x.is_fully_replicated}
    assert {name.rpartition("/")[2] for name in names} == {"scale", "bias"}


def test_shardings_place_every_shard(mesh):
    params = {"embed": {"embedding": jnp.arange(64.0 * 32).reshape(64, 32)}, "final_norm": {"scale": jnp.ones(32)}}
    placed = jax.device_put(params, tree_shardings(params, mesh))
    assert {shard.data.shape for shard in placed["embed"]["embedding"].addressable_shards} == {(16, 16)}
    assert {shard.data.shape for shard in placed["final_norm"]["scale"].addressable_shards} == {(32,)}
    jax.tree.map(np.testing.assert_array_equal, placed, params)


def test_rows_of_a_batch_are_split_over_both_data_axes():
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    batch = jax.device_put(jnp.zeros((8, 5)), batch_sharding(mesh))
    assert {shard.data.shape for shard in batch.addressable_shards} == {(2, 5)}


def test_constrain_without_a_mesh_returns_its_argument():
    x = jnp.ones((4, 6, 8))
    assert constrain(x, "batch", "length", "embed") is x
    jaxpr = jax.make_jaxpr(lambda x: constrain(x, "batch", "length", "heads"))(x)
    assert "sharding_constraint" not in str(jaxpr)


def test_constrain_pins_activations_inside_a_mesh():
    x = jnp.arange(8.0 * 6 * 4 * 5).reshape(8, 6, 4, 5)
    with jax.set_mesh(make_mesh({"data": 2, "sequence": 2, "tensor": 2})):
        y = jax.jit(lambda x: constrain(x, "batch", "length", "heads", None))(x)
    assert {shard.data.shape for shard in y.addressable_shards} == {(4, 3, 2, 5)}
    np.testing.assert_array_equal(y, x)
