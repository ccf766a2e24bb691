"""The linear stage: triangular inverse, UT transform and frame tree against explicit products."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernels.recurrence import enable_x64

from pallas_kernels import householder_transform
from pallas_kernels.householder import (
    block_transform,
    frame_tree,
    frame_tree_levels,
    frame_tree_rows,
    group_heads,
    to_tiles,
    unit_lower_inverse,
)


def make_inputs(length, num_heads=2, num_kv_heads=1, head_dim=6, seed=0):
    rng = np.random.default_rng(seed)
    w = rng.standard_normal((1, length, num_kv_heads, head_dim))
    w /= np.linalg.norm(w, axis=-1, keepdims=True)
    q = rng.standard_normal((1, length, num_heads, head_dim))
    return q, rng.standard_normal(w.shape), w, rng.uniform(0, 2, w.shape[:3])


def product(w, beta, first, last):
    """H_last ... H_first of one head."""
    result = np.eye(w.shape[-1])
    for t in range(first, last + 1):
        result = (np.eye(len(result)) - beta[t] * np.outer(w[t], w[t])) @ result
    return result


@pytest.mark.parametrize("size", [1, 2, 8, 16, 32, 64, 128])
@pytest.mark.parametrize("cosine", [0.0, 0.98, 1.0])
def test_inverse_is_exact_for_correlated_directions(size, cosine):
    rng = np.random.default_rng(size)
    w = cosine**0.5 * rng.standard_normal((1, 24)) + (1 - cosine) ** 0.5 * rng.standard_normal((size, 24))
    w /= np.linalg.norm(w, axis=1, keepdims=True)
    m = np.tril(rng.uniform(1.9, 2, (size, 1)) * (w @ w.T), -1).astype(np.float32)
    expected = np.linalg.inv(np.eye(size) + m.astype(np.float64))
    found = unit_lower_inverse(jnp.asarray(m)[None])[0]
    # Substitution is backward stable: the error is of the order of size times the unit roundoff, however correlated w.
    assert np.linalg.norm(found - expected) <= size * 2**-23 * np.linalg.norm(expected)
    assert np.abs(np.tril(found, -1)).max(initial=0) <= 2 + 1e-4  # bounded by beta


def test_gradient_of_the_inverse():
    rng = np.random.default_rng(0)
    with enable_x64():
        m = jnp.asarray(np.tril(rng.standard_normal((3, 32, 32)), -1) / 4)
        weights = jnp.asarray(rng.standard_normal(m.shape))
        found = jax.grad(lambda m: jnp.sum(weights * unit_lower_inverse(m)))(m)
        expected = jax.grad(lambda m: jnp.sum(weights * jnp.linalg.inv(jnp.eye(32) + jnp.tril(m, -1))))(m)
        np.testing.assert_allclose(found, expected, atol=1e-11)


@pytest.mark.parametrize("length, block_size", [(7, 8), (16, 8), (37, 16), (5, 1)])
def test_transform_equals_explicit_products(length, block_size):
    q, k, w, beta = make_inputs(length)
    with enable_x64():
        blocks = householder_transform(*map(jnp.asarray, (q, k, w, beta)), block_size=block_size)
    for start in range(0, length, block_size):
        block, stop = start // block_size, min(start + block_size, length)
        head = lambda x: x[0, :, 0]
        for i in range(start, stop):
            carried = q[0, i] @ product(head(w), head(beta), start, i)
            np.testing.assert_allclose(blocks.query[block, 0, 0, :, i - start], carried, atol=1e-12)
            carried = head(k)[i] @ product(head(w), head(beta), i + 1, stop - 1).T
            np.testing.assert_allclose(blocks.key[block, 0, 0, i - start], carried, atol=1e-12)
            for j in range(start, i + 1):
                logit = q[0, i] @ product(head(w), head(beta), j + 1, i) @ head(k)[j]
                np.testing.assert_allclose(blocks.logits[block, 0, 0, :, i - start, j - start], logit, atol=1e-12)
        expected = product(head(w), head(beta), start, stop - 1)
        np.testing.assert_allclose(blocks.transition[block, 0, 0], expected, atol=1e-12)


def test_transform_refuses_other_block_sizes():
    with pytest.raises(ValueError, match="block_size=12 must be a power of two"):
        householder_transform(*(jnp.asarray(x, jnp.float32) for x in make_inputs(8)), block_size=12)


SLOW_TILES = [pytest.param(number, marks=pytest.mark.slow) for number in (2, 5, 8)]


@pytest.mark.parametrize("num_tiles", [1, 3, 11, *SLOW_TILES])
def test_every_pair_of_tiles_meets_in_a_frame_between_them(num_tiles):
    """Each off-diagonal pair is listed once, and its row of queries times its row of keys gives its logits."""
    tile_size = 8
    q, k, w, beta = make_inputs(num_tiles * tile_size)
    rows = frame_tree_rows(num_tiles)
    assert {(a, b) for a, b, *_ in rows.tolist()} == {(a, b) for a in range(num_tiles) for b in range(a)}
    with enable_x64():
        tiles = lambda x: to_tiles(jnp.asarray(x), 4)
        blocks = block_transform(group_heads(tiles(q), 1), tiles(k), tiles(w), tiles(beta))
        frames = frame_tree(blocks, tile_size, jnp.float64)
    frames = jax.tree.map(np.asarray, frames)
    used = sum(len(queries) for queries, _ in frame_tree_levels(num_tiles))
    assert len(frames.query) == used <= num_tiles / 2 * max(1, num_tiles).bit_length()
    for a, b, query_row, key_row in rows:
        i, j = a * tile_size + 3, b * tile_size + 5
        expected = q[0, i] @ product(w[0, :, 0], beta[0, :, 0], j + 1, i) @ k[0, j, 0]
        found = frames.query[query_row, 0, 0, :, 3] @ frames.key[key_row, 0, 0, 5]
        np.testing.assert_allclose(found, expected, atol=1e-12)
