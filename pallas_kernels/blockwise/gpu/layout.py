"""Layout of a call on a GPU: whole tiles of 128 tokens, heads side by side and as wide as wgmma takes them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.blockwise import pruning
from pallas_kernels.call import Inputs, Options

TILE = 128
LOG2E = float(np.log2(np.e))
# Masked logits lie below the least running maximum, so their exponentials are exactly 0.
MASKED, LEAST = -2e30, -1e30


@dataclasses.dataclass(frozen=True)
class Geometry:
    """What is static in a call of a kernel."""

    batch: int
    num_heads: int
    num_kv_heads: int
    num_queries: int  # tiles; the last of the keys' tiles
    num_keys: int  # tiles
    head_dim: int
    v_head_dim: int
    logit_scale: float  # of the raw products, log2 e included
    tree: bool
    window: int | None
    interpret: object  # as in Options

    @property
    def offset(self):
        """Tiles of keys before the first query."""
        return self.num_keys - self.num_queries

    def query_tile(self, version, batch):
        """Index of a version of a tile in [tiles, 128, N H]."""
        return version * self.batch + batch if self.tree else batch * self.num_queries + version

    def key_tile(self, version, batch):
        """Index of a version of a tile in [tiles, 128, K H]."""
        return version * self.batch + batch if self.tree else batch * self.num_keys + version


def padded(head_dim: int) -> int:
    """Head dims of 64 and 128 are compiled."""
    return 64 if head_dim <= 64 else 128


def num_tiles(length: int) -> int:
    """Tiles that hold so many tokens."""
    return -(-length // TILE)


def _pad(x, axis, before, total):
    widths = [(0, 0)] * x.ndim
    widths[axis] = (before, total - before - x.shape[axis])
    return jnp.pad(x, widths)


def front(inputs: Inputs) -> int:
    """Zero queries in front, which align the first query with a tile of keys."""
    return (inputs.k.shape[1] - inputs.q.shape[1]) % TILE


def key_tiles(x):
    """[B, S, heads, H] -> [B tiles, 128, heads padded H]."""
    x = _pad(_pad(x, 1, 0, TILE * num_tiles(x.shape[1])), 3, 0, padded(x.shape[3]))
    return x.reshape(-1, TILE, x.shape[2] * x.shape[3])


def query_tiles(x, inputs: Inputs):
    """[B, T, N, H] -> [B tiles, 128, N padded H]."""
    return key_tiles(_pad(x, 1, front(inputs), front(inputs) + x.shape[1]))


def from_tiles(x, batch, start, length, num_heads, head_dim):
    """[B tiles, 128, heads padded H] -> [B, length, heads, H], the tokens from `start` on."""
    x = x.reshape(batch, -1, num_heads, x.shape[2] // num_heads)
    return x[:, start : start + length, :, :head_dim]


def version_tiles(x):
    """[versions, B, K, *G, 128, H] -> [versions B, 128, heads padded H]."""
    x = _pad(x, x.ndim - 1, 0, padded(x.shape[-1]))
    versions, batch, *heads, _, head_dim = x.shape
    num_heads = int(np.prod(heads))
    x = jnp.moveaxis(x.reshape(versions, batch, num_heads, TILE, head_dim), 2, 3)
    return x.reshape(versions * batch, TILE, num_heads * head_dim)


def from_version_tiles(x, like):
    """Inverse of `version_tiles`, to the shape of `like`."""
    versions, batch, *heads, _, head_dim = like.shape
    x = x.reshape(versions, batch, TILE, int(np.prod(heads)), padded(head_dim))[..., :head_dim]
    return jnp.moveaxis(x, 3, 2).reshape(like.shape)


def rows_of_heads(x, before=0):
    """[B, S, N] -> [B, N, tiles, 128]; numbers of padding are 0."""
    x = _pad(x.swapaxes(1, 2), 2, before, TILE * num_tiles(before + x.shape[1]))
    return x.reshape(*x.shape[:2], -1, TILE)


def gate_sums(log_forget, factor: float):
    """Sums over parts of tiles of `factor * log_forget`, each formed on its own, none as a difference.

    Returns:
      Up to and with each token, behind each token, both [B, N, tiles, 128], and over tiles [B, N, tiles].
    """
    x = factor * rows_of_heads(log_forget.astype(jnp.float32))
    inside = jnp.cumsum(x, axis=-1)
    behind = jax.lax.cumsum(_pad(x[..., 1:], 3, 0, TILE), axis=3, reverse=True)
    return inside, behind, inside[..., -1]


def between(totals, pairs, offset: int):
    """Sum of the tiles' gates strictly between the tiles of pairs (query tile, key tile), [B, N, pairs]."""
    return jnp.moveaxis(pruning.gate_between(jnp.moveaxis(totals, 2, 0), pairs, offset), 0, 2)


def first_key(options: Options, inputs: Inputs, totals, inside):
    """First tile of keys that each tile of queries needs, int32 [B, N, query tiles]; None when all do."""
    if inputs.segment_ids is None and options.prune_mass is None:
        return None
    batch, length, num_heads, _ = inputs.q.shape
    num_kv_heads, tiles = inputs.k.shape[2], num_tiles(inputs.k.shape[1])
    queries = num_tiles(front(inputs) + length)
    offset = tiles - queries
    pairs = [(a, b) for a in range(queries) for b in range(a + offset)]
    pairs = np.array(pairs, np.int32).reshape(-1, 2)
    needed = jnp.ones((len(pairs), batch, num_heads), bool)
    if inputs.segment_ids is not None:
        ids = segment_tiles(inputs.segment_ids)
        needed &= pruning.documents_overlap(jnp.moveaxis(ids, 1, 0), pairs, offset)[:, :, None]
    if options.prune_mass is not None:
        largest = lambda x, before: jnp.moveaxis(
            rows_of_heads(jnp.linalg.norm(x.astype(jnp.float32), axis=-1), before).max(-1), 2, 0
        )
        grouped = (-1, batch, num_kv_heads, num_heads // num_kv_heads)
        norms = pruning.Norms(largest(inputs.q, front(inputs)).reshape(grouped), largest(inputs.k, 0))
        gate = between(totals, pairs, offset) + inside[:, :, pairs[:, 0] + offset, 0]
        needed &= pruning.carries_mass(
            norms, pairs, offset, scale=options.scale, mass=options.prune_mass, num_keys=tiles * TILE,
            largest_gate=jnp.moveaxis(gate / LOG2E, 2, 0).reshape(grouped),
        ).reshape(len(pairs), batch, num_heads)  # fmt: skip
    own = np.arange(queries)[:, None, None] + offset
    first = jnp.broadcast_to(own, (queries, batch, num_heads))
    first = first.at[pairs[:, 0]].min(jnp.where(needed, pairs[:, 1, None, None], tiles))
    return jnp.moveaxis(first, 0, 2).astype(jnp.int32)


def segment_tiles(segment_ids):
    """int32 [B, tiles, 128]; padding is 0, as in the documents."""
    return rows_of_heads(segment_ids[:, :, None].astype(jnp.int32))[:, 0]


def widened(x, *columns):
    """[..., n] -> [..., n + 4]: with up to four more numbers [...] in each row, which are then copied along."""
    more = jnp.stack([*columns, *[jnp.zeros_like(columns[0])] * (4 - len(columns))], axis=-1)
    return jnp.concatenate([x, more], axis=-1)
