"""Layout of a call on a TPU: one head after the other, heads of whole lanes, whole superchunks, base-2 gates."""

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels.blockwise.tpu import lanes
from pallas_kernels.blockwise.tpu.tiling import Gate, Segments
from pallas_kernels.call import Inputs


@dataclasses.dataclass(frozen=True)
class Geometry:
    """Sizes of a call in superchunks, and its padding."""

    superchunk: int
    length: int  # of the queries as given
    kv_length: int  # of the keys as given
    batch: int
    num_heads: int
    num_kv_heads: int

    @property
    def front(self):
        """Zero queries in front, which align the first query with a superchunk of keys."""
        return (self.kv_length - self.length) % self.superchunk

    @property
    def num_keys(self):
        """Superchunks of keys."""
        return -(-self.kv_length // self.superchunk)

    @property
    def num_queries(self):
        """Superchunks of queries: the last of the keys' superchunks."""
        return self.num_keys - (self.kv_length - self.length) // self.superchunk

    @property
    def query_length(self):
        """Length of the padded queries."""
        return self.num_queries * self.superchunk

    @property
    def key_length(self):
        """Length of the padded keys: they come in blocks of two superchunks."""
        return -(-self.num_keys // 2) * 2 * self.superchunk

    @property
    def query_positions(self):
        """Where the padded queries lie among the padded keys."""
        end = self.num_keys * self.superchunk
        return slice(end - self.query_length, end)


def geometry(inputs: Inputs, superchunk: int) -> Geometry:
    """Geometry of a call."""
    (batch, length, num_heads, _), (kv_length, num_kv_heads) = inputs.q.shape, inputs.k.shape[1:3]
    return Geometry(superchunk, length, kv_length, batch, num_heads, num_kv_heads)


def padded(head_dim: int) -> int:
    """Head dim in whole lanes."""
    return -(-head_dim // lanes.LANES) * lanes.LANES


def pad(x, axis, before, total):
    """Zeros around x along one axis, up to a length of `total`."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (before, total - before - x.shape[axis])
    return jnp.pad(x, widths) if max(widths[axis]) else x


def per_key_head(x, length: int):
    """[B, S, heads, *H] -> [B heads, length, *H]; H, if there, padded to whole lanes."""
    x = jnp.moveaxis(pad(x, 1, 0, length), 2, 1)
    x = x.reshape(-1, *x.shape[2:])
    return pad(x, 2, 0, padded(x.shape[2])) if x.ndim == 3 else x


def per_query_head(x, size: Geometry):
    """[B, T, N, *H] -> [B K, G, query_length, *H], with zero queries in front."""
    x = per_key_head(pad(x, 1, size.front, size.query_length), size.query_length)
    return x.reshape(size.batch * size.num_kv_heads, -1, *x.shape[1:])


def from_query_heads(x, size: Geometry, head_dim: int):
    """[B K, G, query_length, padded H] -> [B, T, N, H]."""
    x = x[:, :, size.front : size.front + size.length, :head_dim]
    return jnp.moveaxis(x.reshape(size.batch, size.num_heads, size.length, head_dim), 1, 2)


def from_key_heads(x, like):
    """[B K, padded S, *padded H] -> the shape [B, S, K, *H] and dtype of `like`."""
    x = x[:, : like.shape[1], *(slice(n) for n in like.shape[3:])]
    x = x.reshape(like.shape[0], like.shape[2], like.shape[1], *like.shape[3:])
    return jnp.moveaxis(x, 1, 2).astype(like.dtype)


def gate_sums(log_forget, size: Geometry, factor: float) -> Gate:
    """Sums over parts of superchunks of `factor * log_forget`, each formed on its own, none as a difference."""
    x = factor * per_key_head(log_forget.astype(jnp.float32), size.key_length)
    chunks = x.reshape(x.shape[0], -1, size.superchunk)
    inside = jnp.cumsum(chunks, axis=-1)
    tail = jax.lax.cumsum(jnp.pad(chunks[..., 1:], [(0, 0), (0, 0), (0, 1)]), axis=2, reverse=True)
    rows = (size.batch * size.num_kv_heads, -1, size.key_length)
    return Gate(inside.reshape(rows), tail.reshape(rows), inside[..., -1])


def gate_gradient(row_sums, column_sums, log_forget, size: Geometry):
    """Cotangent of `gate_scale * log_forget`: a gate moves the logits of all paths across it.

    Args:
      row_sums: [B K, G, query_length], sums of ds over keys; column_sums: [B K, G, key_length], over queries.
    """
    positions = size.query_positions
    dcumulative = (-column_sums[:, :, : positions.stop]).at[:, :, positions].add(row_sums)
    dlog_forget = jax.lax.cumsum(dcumulative, axis=2, reverse=True)
    dlog_forget = dlog_forget.reshape(size.batch, size.num_heads, -1)[:, :, : size.kv_length]
    return dlog_forget.swapaxes(1, 2).astype(log_forget.dtype)


def segments(segment_ids, size: Geometry) -> Segments:
    """Padded segment ids, and which superchunks lie in one segment."""
    return whole_segments(pad(segment_ids, 1, 0, size.key_length), size.superchunk)


def whole_segments(ids, superchunk: int) -> Segments:
    """`segments` of ids [B, T] of whole superchunks."""
    ids = ids.astype(jnp.int32)
    chunks = ids.reshape(ids.shape[0], -1, superchunk)
    smallest, largest = chunks.min(-1), chunks.max(-1)
    return Segments(ids[:, None], jnp.where(smallest == largest, largest, 0))
