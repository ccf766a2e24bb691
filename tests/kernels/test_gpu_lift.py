"""The lift of the frame tree as Mosaic GPU kernels in interpret mode, both directions, against float64 array code."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernels.recurrence import TOLERANCE, enable_x64, relative_error

from pallas_kernels.blockwise.gpu import layout, tree
from pallas_kernels.blockwise.gpu.lift import lift_forward
from pallas_kernels.blockwise.gpu.lift_backward import lift_backward, node_gradient, node_users
from pallas_kernels.householder import BlockTransform, frame_tree

is_old = tuple(int(part) for part in jax.__version__.split(".")[:2]) < (0, 11)
needs_interpreter = pytest.mark.skipif(is_old, reason="the kernels need JAX 0.11 or later")


@pytest.mark.parametrize("num_tiles", [2, 3, 5, 8, 13, 64])
def test_users_of_the_nodes_are_those_of_the_chains(num_tiles):
    expected = set()
    for keys in (False, True):
        rows, _ = tree.chains(num_tiles, keys)
        for (before, _), (version, node) in zip(rows[:-1].tolist(), rows[1:].tolist()):
            if node >= 0:
                expected.add((node, int(keys), before, version))
    found = [
        (node, are_keys, before + i, version + i)
        for node, (are_keys, before, version, count) in enumerate(node_users(num_tiles).tolist())
        for i in range(count)
    ]
    assert len(found) == len(expected) and set(found) == expected


def versions(q, k, transition, size):
    """Those of `householder.frame_tree`, from the operands of the kernels."""

    def heads(x):
        x = x.reshape(size.batch, size.num_keys, layout.TILE, size.num_kv_heads, -1, size.head_dim)
        return jnp.transpose(x, (1, 0, 3, 4, 2, 5))

    transition = transition.reshape(size.batch, size.num_keys, size.num_kv_heads, size.head_dim, size.head_dim)
    q, k = heads(q), heads(k)
    logits = jnp.zeros((*q.shape[:-1], layout.TILE), q.dtype)
    frames = frame_tree(BlockTransform(q, k[:, :, :, 0], transition.swapaxes(0, 1), logits), layout.TILE, q.dtype)
    return layout.version_tiles(frames.query), layout.version_tiles(frames.key)


def kernels(q, k, transition, dq, dk, size):
    """Versions, and the cotangents of the operands; that of the transitions through the array code of the tree."""
    nodes = tree.nodes(transition, size)
    q_versions, k_versions = (lift_forward(x, nodes, size, keys=keys) for x, keys in ((q, False), (k, True)))
    q_carried, dq = lift_backward(dq, nodes, size, keys=False)
    k_carried, dk = lift_backward(dk, nodes, size, keys=True)
    dnodes = node_gradient(q_versions, q_carried, k_versions, k_carried, size)
    _, pull_back = jax.vjp(lambda x: tree.nodes(x, size), transition.astype(jnp.float32))
    return (q_versions, k_versions), (dq, dk, *pull_back(dnodes)), dnodes


def assert_accurate(num_tiles, heads, kv_heads, head_dim, dtype, interpret=True):
    batch = 2
    size = layout.Geometry(
        batch, heads, kv_heads, num_tiles, num_tiles, head_dim, head_dim, 1.0, tree=True, window=None,
        interpret=interpret,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    tiles = lambda rows, heads: jnp.asarray(rng.standard_normal((rows, layout.TILE, heads * head_dim)), dtype)
    q, k = tiles(batch * num_tiles, heads), tiles(batch * num_tiles, kv_heads)
    noise = rng.standard_normal((batch * num_tiles, kv_heads * head_dim, head_dim)) / head_dim
    transition = jnp.asarray(noise + np.tile(np.eye(head_dim), (kv_heads, 1)), dtype)
    dq, dk = (tiles(batch * len(tree.chains(num_tiles, keys)[0]), n) for keys, n in ((False, heads), (True, kv_heads)))

    out, gradients, dnodes = jax.jit(lambda *xs: kernels(*xs, size))(q, k, transition, dq, dk)
    with enable_x64():
        exact = [jnp.asarray(np.asarray(x, np.float64)) for x in (q, k, transition, dq, dk)]
        expected, pull_back = jax.vjp(lambda *xs: versions(*xs, size), *exact[:3])
        expected_gradients = pull_back(tuple(exact[3:]))
    for actual, desired in zip(out, expected):
        assert relative_error(actual, desired) <= TOLERANCE["bfloat16"]["output"]
    for name, actual, desired in zip(("q", "k", "transition"), gradients, expected_gradients):
        assert actual.shape == desired.shape
        if num_tiles == 2 and name == "transition":
            assert not np.any(actual) and not np.any(desired)  # there are versions, but none that is carried
        else:
            assert relative_error(actual, desired) <= TOLERANCE["bfloat16"]["output"], name
    first, last = (np.reshape(x, (batch, num_tiles, -1))[:, i] for x, i in zip(gradients[:2], (0, -1)))
    assert not np.any(first) and not np.any(last)  # tiles without versions
    dnodes = np.reshape(dnodes, (-1, batch, kv_heads * head_dim * head_dim))
    np.testing.assert_array_equal(dnodes.any(axis=(1, 2)), node_users(num_tiles)[:, 3] > 0)


slow = lambda *arguments: pytest.param(*arguments, marks=pytest.mark.slow)


@needs_interpreter
@pytest.mark.parametrize(
    "num_tiles, heads, kv_heads, head_dim, dtype",
    [
        (2, 2, 1, 64, "bfloat16"),
        (3, 4, 2, 64, "float16"),
        (8, 2, 1, 64, "bfloat16"),
        slow(4, 4, 2, 64, "bfloat16"),
        slow(8, 2, 1, 64, "float16"),
        slow(13, 3, 1, 64, "bfloat16"),
        slow(3, 2, 1, 128, "float16"),
        slow(8, 2, 2, 128, "bfloat16"),
    ],
)
def test_both_directions(num_tiles, heads, kv_heads, head_dim, dtype):
    assert_accurate(num_tiles, heads, kv_heads, head_dim, dtype)


@needs_interpreter
@pytest.mark.slow
@pytest.mark.parametrize("head_dim", [64, 128])
def test_without_races(head_dim):
    from jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call import get_races
    from jax.experimental.pallas import mosaic_gpu as plgpu

    assert_accurate(5, 3, 1, head_dim, "bfloat16", plgpu.InterpretGPUParams(detect_races=True))
    assert not get_races().races_found
