"""Adaptive computation pruning: which key tiles a decay bound lets us skip.

A logit is at most `U_ab + gate` and a row's own key has at least `-U_aa`, with `U_ab = scale * max|q_a| * max|k_b|`:
reflections with unit w and beta in [0, 2] never lengthen a key, so the bound holds for PaTH as for plain dot products.
Hence a key of tile b carries at most `exp(U_ab + U_aa + D_ab)` of a row's attention mass, D_ab being the largest gate
difference in the tile pair, and dropping every pair below `mass / S` drops at most `mass` per row.

Source: Lin et al., "Adaptive Computation Pruning for the Forgetting Transformer". The published threshold uses one
norm bound per head; a bound per tile is as safe and skips more.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

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


def log_threshold(mass: float, num_keys: int) -> float:
    """Log mass of a single key below which its tile may be dropped."""
    return math.log(mass) - math.log(num_keys)


def log_mass_bound(norms: Norms, pairs, offset: int, scale: float, largest_gate) -> Float[Array, "pairs B K G"]:
    """Upper bound on the log attention mass of any single key, for each off-diagonal tile.

    Args:
      pairs: int rows (query tile, key tile, ...).
      offset: number of key tiles before the first query tile.
      scale: logit scale.
      largest_gate: [pairs, B, K, G], gate from the last key to the first query of the pair, the least decay in it.
    """
    a, b = pairs[:, 0], pairs[:, 1]
    reach = norms.key[b] + norms.key[a + offset]
    return _ROUNDING * abs(scale) * norms.query[a] * reach[..., None] + largest_gate
