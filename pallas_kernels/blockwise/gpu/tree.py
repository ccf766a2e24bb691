"""The frame tree over tiles: in which order versions arise, and the products that carry them."""

import functools

import jax.numpy as jnp
import numpy as np

from pallas_kernels.blockwise.gpu.layout import Geometry
from pallas_kernels.householder import frame_tree_levels


@functools.lru_cache
def chains(num_tiles: int, keys: bool) -> tuple[np.ndarray, np.ndarray]:
    """Versions in the order in which they arise.

    Args:
      keys: those of keys instead of queries.

    Returns:
      int32 [rows, 2] of (version as numbered in `schedule`, node multiplied by on the way to it; -1 for none), sorted
      by tile, and the first row of each tile, int32 [tiles + 1].
    """
    found = [[] for _ in range(num_tiles)]
    carried = [-1] * num_tiles
    version = first_node = 0
    for level, tiles in enumerate(frame_tree_levels(num_tiles)):
        for tile in tiles[1 if keys else 0]:
            found[tile].append((version, carried[tile]))
            carried[tile] = first_node + (tile >> level) + (1 if keys else -1)
            version += 1
        first_node += num_tiles >> level
    rows = np.array([row for rows in found for row in rows], np.int32).reshape(-1, 2)
    return rows, np.cumsum([0, *map(len, found)]).astype(np.int32)


def einsum(size: Geometry, equation: str, *operands):
    """Float32 result of 16-bit operands. CPUs, where kernels are interpreted, have no such product for all shapes."""
    if size.interpret:
        operands = [x.astype(jnp.float32) for x in operands]
    return jnp.einsum(equation, *operands, preferred_element_type=jnp.float32)


def nodes(transition, size: Geometry):
    """Products over the segments of the tree, [nodes B, K H, H]: all tiles, then all pairs, fours, ...

    Args:
      transition: [B tiles, K H, H], of tiles.
    """
    head_dim = transition.shape[-1]
    level = transition.reshape(size.batch, size.num_keys, size.num_kv_heads, head_dim, head_dim)
    level = level.swapaxes(0, 1)
    levels = []
    for _ in frame_tree_levels(size.num_keys):
        levels.append(level)
        full = len(level) // 2 * 2
        level = einsum(size, "nbkij,nbkjh->nbkih", level[1:full:2], level[:full:2]).astype(transition.dtype)
    return jnp.concatenate(levels).reshape(-1, size.num_kv_heads * head_dim, head_dim)
