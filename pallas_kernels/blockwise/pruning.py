"""Which key tiles a call may skip: documents that do not overlap, and adaptive computation pruning.

A logit is at most `U_ab + gate` and a row's own key has at least `-U_aa`, with `U_ab = scale * max|q_a| * max|k_b|`:
reflections with unit w and beta in [0, 2] never lengthen a key, so the bound holds for PaTH as for plain dot products.
Hence a key of tile b carries at most `exp(U_ab + U_aa + D_ab)` of a row's attention mass, D_ab being the largest gate
difference in the tile pair, and dropping every pair below `mass / S` drops at most `mass` per row.

Source: Lin et al., "Adaptive Computation Pruning for the Forgetting Transformer". The published threshold uses one
norm bound per head; a bound per tile is as safe and skips more.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

AUTO_MASS = math.exp(-10.0)
_ROUNDING = 1.01  # versions of q and k rounded to bfloat16 may be longer than the originals by 2^-8


class Norms(NamedTuple):
    """Largest norm in each tile of the queries and keys as given."""

    query: Float[Array, "query_tiles B K G"]
    key: Float[Array, "tiles B K"]


def tile_norms(query: Float[Array, "query_tiles B K G C H"], key: Float[Array, "tiles B K C H"]) -> Norms:
    """Norms in float32."""
    largest = (jnp.linalg.norm(x.astype(jnp.float32), axis=-1).max(-1) for x in (query, key))
    return Norms(*largest)


def gate_between(totals: Float[Array, "tiles *heads"], pairs, offset: int) -> Float[Array, "pairs *heads"]:
    """Per pair the sum of the tiles' gates strictly between its two tiles.

    Gate differences are assembled from sums over the tiles they span, never as a difference of two sums over the whole
    sequence, so their rounding error does not grow with T.

    Args:
      pairs: int rows (query tile, key tile, ...).
      offset: number of key tiles before the first query tile.
    """
    num_tiles = totals.shape[0]
    before = np.tri(num_tiles, k=-1, dtype=bool).reshape(num_tiles, num_tiles, *[1] * (totals.ndim - 1))
    after_b = jax.lax.cumsum(jnp.where(before, totals, 0), axis=1, reverse=True)  # [a, b]: tiles b ... a - 1
    return after_b[pairs[:, 0] + offset, pairs[:, 1]] - totals[pairs[:, 1]]


def documents_overlap(segment_ids: Int[Array, "tiles B C"], pairs, offset: int) -> Bool[Array, "pairs B"]:
    """Whether the ranges of ids of the two tiles of a pair meet, padding aside."""
    largest = segment_ids.max(-1)
    smallest = jnp.where(segment_ids > 0, segment_ids, jnp.iinfo(segment_ids.dtype).max).min(-1)
    query, key = pairs[:, 0] + offset, pairs[:, 1]
    return (smallest[query] <= largest[key]) & (smallest[key] <= largest[query])


def carries_mass(
    norms: Norms, pairs, offset: int, *, scale: float, largest_gate, mass: float, num_keys: int
) -> Bool[Array, "pairs B K G"]:
    """Whether some key of the pair may carry more than `mass / num_keys` of a row's attention.

    Args:
      pairs, offset: as for `gate_between`.
      scale: logit scale.
      largest_gate: [pairs, B, K, G], gate from the last key to the first query of the pair, the least decay in it.
      mass: attention mass that may be dropped per row.
      num_keys: keys of a row.
    """
    a, b = pairs[:, 0], pairs[:, 1]
    reach = (norms.key[b] + norms.key[a + offset])[..., None]
    return may_carry(norms.query[a], reach, largest_gate, scale=scale, mass=mass, num_keys=num_keys)


def may_carry(query_norm, reach, largest_gate, *, scale: float, mass: float, num_keys: int):
    """`carries_mass` from the largest norm of queries and the sum of those of the keys and of the queries' own keys."""
    log_bound = _ROUNDING * abs(scale) * query_norm * reach + largest_gate
    return log_bound > math.log(mass) - math.log(num_keys)
