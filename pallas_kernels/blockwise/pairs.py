"""Attention of queries to keys that all come before them: what sequences cut into chunks need between two chunks.

The interface of all implementations, and the one in plain XLA, which holds the logits of a tile of keys at a time.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

_MASKED, _INITIAL_MAX = -2e30, -1e30  # masked logits lie below the first maximum: their exponentials are 0
_TILES = (512, 256, 128, 64)  # keys at a time, while the logits of all queries are there


class Pair(NamedTuple):
    """Queries, and keys before them.

    Logits are `scale query key^T + query_gate + key_gate`, float32 (float64 for float64 operands). Queries and keys are
    those of one frame: PaTH's reflections between the two have been applied.
    """

    query: Float[Array, "B K G L H"]
    key: Float[Array, "B K M H"]
    value: Float[Array, "B K M Hv"]
    query_gate: Float[Array, "B K G L"] | None  # natural log gate between a place behind all keys and the query
    key_gate: Float[Array, "B K G M"] | None  # between the key and that place
    query_ids: Int[Array, "B L"] | None  # segments, 0 = padding
    key_ids: Int[Array, "B M"] | None
    distance: Int[Array, ""]  # positions from the first key to the first query


class PairGradients(NamedTuple):
    """Cotangents of a pair's arrays, in the dtype of its logits."""

    query: Float[Array, "B K G L H"]
    key: Float[Array, "B K M H"]
    value: Float[Array, "B K M Hv"]
    query_gate: Float[Array, "B K G L"] | None
    key_gate: Float[Array, "B K G M"] | None


@dataclasses.dataclass(frozen=True)
class PairOptions:
    """What is static."""

    scale: float
    window: int | None = None  # query i sees keys i - window + 1 ... i of the whole sequence
    interpret: object = False  # how to interpret accelerator kernels, or False


def tile_size(length: int) -> int | None:
    """Keys at a time; None for a number of keys that is above 512 and no multiple of 64, which nothing here serves."""
    return length if length <= _TILES[0] else next((size for size in _TILES if length % size == 0), None)


def result_types(pair: Pair, has_gradients: bool):
    """What `forward_pair` or `backward_pair` returns, as `jax.ShapeDtypeStruct`."""
    dtype = jnp.promote_types(jnp.float32, pair.query.dtype)
    shaped = lambda x: None if x is None else jax.ShapeDtypeStruct(x.shape, dtype)
    if has_gradients:
        return PairGradients(*map(shaped, pair[: len(PairGradients._fields)]))
    rows = pair.query.shape[:-1]
    return jax.ShapeDtypeStruct((*rows, pair.value.shape[-1]), dtype), jax.ShapeDtypeStruct(rows, dtype)


def forward_pair(options: PairOptions, pair: Pair):
    """Output [B, K, G, L, Hv] and log-sum-exp [B, K, G, L] of every query; 0 and -inf where it sees no key."""
    out_type, lse_type = result_types(pair, has_gradients=False)
    dtype = lse_type.dtype

    def step(sums, start):
        maximum, normaliser, out = sums
        logits, _, value = _logits(options, pair, start, dtype)
        new_maximum = jnp.maximum(maximum, logits.max(-1))
        weights, decay = jnp.exp(logits - new_maximum[..., None]), jnp.exp(maximum - new_maximum)
        partial = jnp.einsum("bkgqc,bkcv->bkgqv", weights.astype(value.dtype), value, preferred_element_type=dtype)
        return (new_maximum, normaliser * decay + weights.sum(-1), out * decay[..., None] + partial), None

    zeros = lambda kind: jnp.zeros(kind.shape, dtype)
    sums = (jnp.full(lse_type.shape, _INITIAL_MAX, dtype), zeros(lse_type), zeros(out_type))
    (maximum, normaliser, out), _ = jax.lax.scan(step, sums, _starts(pair))
    is_empty = normaliser == 0
    normaliser = jnp.where(is_empty, 1, normaliser)
    return out / normaliser[..., None], jnp.where(is_empty, -jnp.inf, maximum + jnp.log(normaliser))


def backward_pair(options: PairOptions, pair: Pair, lse, delta, dout) -> PairGradients:
    """Cotangents of a pair that is one of several which queries attend to.

    Args:
      options, pair: as in `forward_pair`.
      lse: [B, K, G, L] log-sum-exp over all keys of all pairs, -inf where there are none.
      delta: [B, K, G, L], sum_v dout_v out_v over the whole output.
      dout: [B, K, G, L, Hv], rounded to value's dtype.
    """
    dtype = lse.dtype
    lse = jnp.where(jnp.isneginf(lse), -_INITIAL_MAX, lse)  # +1e30: every weight of an empty row becomes 0
    einsum = functools.partial(jnp.einsum, preferred_element_type=dtype)

    def step(sums, start):
        dquery, row_sums = sums
        logits, key, value = _logits(options, pair, start, dtype)
        weights = jnp.exp(logits - lse[..., None])
        dvalue = einsum("bkgqc,bkgqv->bkcv", weights.astype(value.dtype), dout)
        dlogits = weights * (einsum("bkgqv,bkcv->bkgqc", dout, value) - delta[..., None])
        scaled = (options.scale * dlogits).astype(key.dtype)
        dquery += einsum("bkgqc,bkch->bkgqh", scaled, key)
        dkey = einsum("bkgqc,bkgqh->bkch", scaled, pair.query)
        return (dquery, row_sums + dlogits.sum(-1)), (dkey, dvalue, dlogits.sum(-2))

    sums = (jnp.zeros(pair.query.shape, dtype), jnp.zeros(lse.shape, dtype))
    (dquery, row_sums), (dkey, dvalue, column_sums) = jax.lax.scan(step, sums, _starts(pair))
    join = lambda x, axis: jnp.moveaxis(x, 0, axis).reshape(*x.shape[1 : axis + 1], -1, *x.shape[axis + 2 :])
    gates = (None, None) if pair.key_gate is None else (row_sums, join(column_sums, 3))
    return PairGradients(dquery, join(dkey, 2), join(dvalue, 2), *gates)


def _starts(pair):
    length = pair.key.shape[2]
    return jnp.arange(0, length, tile_size(length))


def _logits(options, pair, start, dtype):
    """Masked logits [B, K, G, L, C] of the keys from `start` on, with those keys and values."""
    size = tile_size(pair.key.shape[2])
    cut = lambda x, axis: jax.lax.dynamic_slice_in_dim(x, start, size, axis)
    key, value = cut(pair.key, 2), cut(pair.value, 2)
    logits = options.scale * jnp.einsum("bkgqh,bkch->bkgqc", pair.query, key, preferred_element_type=dtype)
    if pair.query_gate is not None:
        logits += pair.query_gate[..., None] + cut(pair.key_gate, 3)[..., None, :]
    if options.window is not None:
        keys = start + jnp.arange(size)
        distance = pair.distance + jnp.arange(pair.query.shape[3])[:, None] - keys
        logits = jnp.where(distance < options.window, logits, _MASKED)
    if pair.query_ids is not None:
        ids = cut(pair.key_ids, 1)[:, None, :]
        same = (pair.query_ids[..., None] == ids) & (ids > 0)
        logits = jnp.where(same[:, None, None], logits, _MASKED)
    return logits, key, value
