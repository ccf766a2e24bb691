"""Per-token statistics in the two layouts the kernels use, and the types of results.

HBM holds one float per token, as rows [1, T]. Next to logits [queries, keys] a per-query statistic must be a column;
it is kept replicated over the 128 lanes, [T, 128], because broadcasting a single lane is a slow cross-lane operation.
"""

import functools

import jax
import jax.numpy as jnp

LANES = 128


def result(shape, dtype, like):
    """Result of a kernel; under `jax.shard_map` it varies over the mesh axes over which `like` does."""
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(like).manual_axis_type)


def is_diagonal():
    """Boolean identity matrix of one lane tile."""
    shape = (LANES, LANES)
    return jax.lax.broadcasted_iota(jnp.int32, shape, 0) == jax.lax.broadcasted_iota(jnp.int32, shape, 1)


def to_columns(row):
    """[1, T] -> [T, 128]."""
    diagonal = is_diagonal()
    tiles = []
    for start in range(0, row.shape[1], LANES):
        spread = jnp.where(diagonal, row[:, start : start + LANES], 0)
        tiles.append(jnp.broadcast_to(spread.sum(axis=1, keepdims=True), spread.shape))
    return jnp.concatenate(tiles, 0)


def to_integer_columns(row):
    """`to_columns` for int32; the sum over lanes is a float32 one, so 16 bits go at a time."""
    high, low = (to_columns(half.astype(jnp.float32)).astype(jnp.int32) for half in (row >> 16, row & 0xFFFF))
    return (high << 16) | low


def to_row(columns):
    """[T, 128] -> [1, T]: picks the diagonal of every tile, cheaper than a transposition."""
    diagonal = is_diagonal()
    tiles = []
    for start in range(0, columns.shape[0], LANES):
        spread = jnp.where(diagonal, columns[start : start + LANES], 0)
        tiles.append(spread.sum(axis=0, keepdims=True))
    return jnp.concatenate(tiles, 1)


def fold(x):
    """[T, width] -> [T, 128], sums of every 128th column: a sum over columns up to its last, cross-lane step."""
    return functools.reduce(jnp.add, [x[:, start : start + LANES] for start in range(0, x.shape[1], LANES)])


def widen(columns, width):
    """[T, 128] -> [T, width], width a multiple of 128."""
    return columns if width == LANES else jnp.tile(columns, (1, width // LANES))
