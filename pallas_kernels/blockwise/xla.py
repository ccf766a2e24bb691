"""The quadratic stage in plain XLA: online-softmax attention over a list of tiles, forward and backward.

Runs on every platform and is what the other implementations fall back to. One `lax.scan` walks the tiles below the
diagonal; a tile names the row of the level-indexed queries and keys it multiplies, so PaTH (frame tree) and the
Forgetting Transformer (row = tile) share this code. Nothing of size T x T is stored: memory is O(T C) for the diagonal
tiles plus the operands. Tiles that segments, window or pruning rule out are skipped at run time; since one loop serves
the whole batch, a tile is skipped when no row of the batch and no head needs it.

Accumulators, logits, softmax statistics and gate sums are float32 (float64 for float64 inputs); operands of the big
products keep the inputs' dtype.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pallas_kernels.blockwise import pruning
from pallas_kernels.householder import Frames, frame_tree_rows

# Masked logits lie below the initial running maximum, so their exponentials are exactly 0 and never need a second mask.
_MASKED, _INITIAL_MAX = -2e30, -1e30


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is static in a call."""

    scale: float
    gate_scale: float = 1.0
    tile_size: int = 256
    use_tree: bool = True  # rows come from the frame tree; otherwise row = tile
    window: int | None = None  # query i sees keys i - window + 1 ... i
    prune_mass: float | None = None  # bound on the attention mass dropped per row


class Operands(NamedTuple):
    """Inputs of the quadratic stage. Queries are the last `query tiles` of the `tiles`."""

    frames: Frames  # local covers the query tiles
    value: Float[Array, "tiles B K C Hv"]
    log_forget: Float[Array, "tiles B K G C"] | None
    segment_ids: Int[Array, "tiles B C"] | None
    norms: pruning.Norms | None  # given when pruning


@functools.lru_cache
def tile_pairs(num_queries: int, num_keys: int, settings: Settings) -> np.ndarray:
    """Off-diagonal tiles a call may need: int rows (query tile, key tile, query row, key row).

    Query tile a is key tile `a + num_keys - num_queries`; tiles wholly outside the window are left out.
    """
    if settings.use_tree:
        return frame_tree_rows(num_keys)
    offset = num_keys - num_queries
    rows = [(a, b, a, b) for a in range(num_queries) for b in range(a + offset) if _in_window(a + offset - b, settings)]
    return np.array(rows, np.int32).reshape(-1, 4)


def _in_window(distance, settings):
    """Whether some query of a tile sees some key of the tile `distance` tiles earlier."""
    return settings.window is None or (distance - 1) * settings.tile_size + 1 < settings.window


def _gate(operands, settings, pairs, offset):
    """Cumulative log gates inside each tile, and per pair the sum of the tiles strictly between its two tiles."""
    if operands.log_forget is None:
        return None, None
    inside = settings.gate_scale * jnp.cumsum(operands.log_forget, axis=-1)
    return inside, pruning.gate_between(inside[..., -1], pairs, offset)


def _pair_is_needed(operands, settings, pairs, offset, between):
    """Per off-diagonal tile, whether any row of the batch needs it; None when all are."""
    if operands.segment_ids is None and operands.norms is None:
        return None
    needed = jnp.ones(len(pairs), bool)
    if operands.segment_ids is not None:
        needed &= pruning.documents_overlap(operands.segment_ids, pairs, offset).any(-1)
    if operands.norms is not None:
        first_gate = settings.gate_scale * operands.log_forget[pairs[:, 0] + offset, ..., 0]
        carries_mass = pruning.carries_mass(
            operands.norms,
            pairs,
            offset,
            scale=settings.scale,
            largest_gate=between + first_gate,
            mass=settings.prune_mass,
            num_keys=len(operands.value) * settings.tile_size,
        )
        needed &= carries_mass.any((-3, -2, -1))
    return needed


def _mask(settings, distance, query_ids, key_ids):
    """Mask [..., C, C] of a tile whose keys lie `distance` tiles before its queries; None if everything is visible."""
    mask = None
    if settings.window is not None:
        index = jnp.arange(settings.tile_size)
        mask = distance * settings.tile_size + index[:, None] - index[None, :] < settings.window
    if query_ids is not None:
        same = (query_ids[..., :, None] == key_ids[..., None, :]) & (query_ids[..., :, None] > 0)
        same = same[..., None, None, :, :]
        mask = same if mask is None else mask & same
    return mask


def _diagonal_logits(operands, settings, gate, offset):
    """Masked, scaled and gated logits of the diagonal tiles [tiles, B, K, G, C, C]."""
    local = operands.frames.local
    logits = local * settings.scale
    if gate is not None:
        logits += gate[offset:, ..., :, None] - gate[offset:, ..., None, :]
    ids = None if operands.segment_ids is None else operands.segment_ids[offset:]
    mask = np.tri(settings.tile_size, dtype=bool)
    extra = _mask(settings, 0, ids, ids)
    return jnp.where(mask if extra is None else mask & extra, logits, _MASKED)


def _pair_logits(operands, settings, gate, pair, offset):
    """Logits of one off-diagonal tile [B, K, G, C, C] with its operands, for forward and backward alike."""
    a, b, query_row, key_row = pair["index"]
    query, key = operands.frames.query[query_row], operands.frames.key[key_row]
    accumulator = operands.frames.local.dtype
    logits = settings.scale * jnp.einsum("bkgqh,bkch->bkgqc", query, key, preferred_element_type=accumulator)
    if gate is not None:
        ends = gate[a + offset] + pair["between"][..., None]  # [B, K, G, C]
        starts = gate[b][..., -1:] - gate[b]
        logits += ends[..., :, None] + starts[..., None, :]
    ids = operands.segment_ids
    mask = _mask(settings, a + offset - b, *((None, None) if ids is None else (ids[a + offset], ids[b])))
    return (logits if mask is None else jnp.where(mask, logits, _MASKED)), query, key


def _scan_pairs(operands, settings, pairs, offset, between, carry, step):
    """Runs step(carry slices of a tile) over the pairs; skipped tiles leave the carry as it is.

    `step` is split into read (slices of the carry), compute and write, so that the conditional passes slices only and
    the full carry is updated in place.
    """
    read, compute, write = step
    xs = {"index": tuple(jnp.asarray(column) for column in pairs.T)}
    if between is not None:
        xs["between"] = between
    needed = _pair_is_needed(operands, settings, pairs, offset, between)
    if needed is not None:
        xs["needed"] = needed

    def body(carry, pair):
        slices = read(carry, pair)
        if needed is None:
            slices = compute(slices, pair)
        else:
            slices = jax.lax.cond(pair["needed"], lambda s: compute(s, pair), lambda s: s, slices)
        return write(carry, pair, slices), None

    return jax.lax.scan(body, carry, xs)[0] if len(pairs) else carry


def forward(operands: Operands, settings: Settings):
    """Attention output and log-sum-exp.

    Returns:
      out [tiles, B, K, G, C, Hv] and lse [tiles, B, K, G, C] over the query tiles, both in the accumulator dtype. Rows
      that see no key: out 0, lse -inf.
    """
    frames, value = operands.frames, operands.value
    num_queries, num_keys = len(frames.local), len(value)
    offset = num_keys - num_queries
    pairs = tile_pairs(num_queries, num_keys, settings)
    gate, between = _gate(operands, settings, pairs, offset)
    accumulator = frames.local.dtype

    def online(maximum, logits, tile_value):
        new_maximum = jnp.maximum(maximum, logits.max(-1))
        weights = jnp.exp(logits - new_maximum[..., None])
        partial = jnp.einsum(
            "...kgqc,...kcv->...kgqv", weights.astype(value.dtype), tile_value, preferred_element_type=accumulator
        )
        return new_maximum, weights.sum(-1), partial

    logits = _diagonal_logits(operands, settings, gate, offset)
    carry = online(jnp.full(logits.shape[:-1], _INITIAL_MAX, accumulator), logits, value[offset:])

    def read(carry, pair):
        return tuple(x[pair["index"][0]] for x in carry)

    def compute(slices, pair):
        maximum, normaliser, out = slices
        logits, _, _ = _pair_logits(operands, settings, gate, pair, offset)
        new_maximum, tile_normaliser, partial = online(maximum, logits, value[pair["index"][1]])
        decay = jnp.exp(maximum - new_maximum)
        return new_maximum, normaliser * decay + tile_normaliser, out * decay[..., None] + partial

    def write(carry, pair, slices):
        return tuple(x.at[pair["index"][0]].set(s) for x, s in zip(carry, slices))

    maximum, normaliser, out = _scan_pairs(operands, settings, pairs, offset, between, carry, (read, compute, write))
    is_empty = normaliser == 0
    out = out / jnp.where(is_empty, 1, normaliser)[..., None]
    return out, jnp.where(is_empty, -jnp.inf, maximum + jnp.log(jnp.where(is_empty, 1, normaliser)))


def backward(operands: Operands, settings: Settings, out, lse, dout, dlse):
    """Cotangents (Frames, value, log_forget) of `forward`, from its results and their cotangents.

    One pass, five products per tile: with `Delta_i = sum(dout_i * out_i) - dlse_i`, p = exp(s - lse) and
    ds = p * (dout v^T - Delta). Rows of ds sum to dlse exactly, but the gate's gradient sums them as computed: only
    then do their rounding errors cancel those of the columns instead of piling up over the sequence.
    """
    frames, value = operands.frames, operands.value
    num_queries, num_keys = len(frames.local), len(value)
    offset = num_keys - num_queries
    pairs = tile_pairs(num_queries, num_keys, settings)
    gate, between = _gate(operands, settings, pairs, offset)
    accumulator = frames.local.dtype
    einsum = functools.partial(jnp.einsum, preferred_element_type=accumulator)
    is_empty = jnp.isneginf(lse)
    lse = jnp.where(is_empty, -_INITIAL_MAX, lse)  # +1e30: every weight of an empty row becomes 0
    dlse = jnp.where(is_empty, 0, dlse)
    delta = (dout * out).sum(-1) - dlse
    dout = dout.astype(value.dtype)

    def gradients(logits, lse, delta, dout, tile_value):
        weights = jnp.exp(logits - lse[..., None])
        dvalue = einsum("...kgqc,...kgqv->...kcv", weights.astype(value.dtype), dout)
        dlogits = weights * (einsum("...kgqv,...kcv->...kgqc", dout, tile_value) - delta[..., None])
        return dvalue, dlogits

    logits = _diagonal_logits(operands, settings, gate, offset)
    dlocal_value, dlogits = gradients(logits, lse, delta, dout, value[offset:])
    dvalue = jnp.zeros(value.shape, accumulator).at[offset:].set(dlocal_value)
    carry = (jnp.zeros(frames.query.shape, accumulator), jnp.zeros(frames.key.shape, accumulator), dvalue)
    if gate is not None:
        column_sums = jnp.zeros((num_keys, *lse.shape[1:]), accumulator).at[offset:].set(dlogits.sum(-2))
        carry += (column_sums, dlogits.sum(-1))

    def rows(pair):
        a, b, query_row, key_row = pair["index"]
        return query_row, key_row, b, b, a  # of the carry; the last two exist with a gate only

    def read(carry, pair):
        return tuple(x[row] for x, row in zip(carry, rows(pair)))

    def compute(slices, pair):
        a, b = pair["index"][:2]
        logits, query, key = _pair_logits(operands, settings, gate, pair, offset)
        dtile_value, dlogits = gradients(logits, lse[a], delta[a], dout[a], value[b])
        scaled = (settings.scale * dlogits).astype(query.dtype)
        dquery = einsum("bkgqc,bkch->bkgqh", scaled, key)
        dkey = einsum("bkgqc,bkgqh->bkch", scaled, query)
        tile = (dquery, dkey, dtile_value, dlogits.sum(-2), dlogits.sum(-1))
        return tuple(x + d for x, d in zip(slices, tile))

    def write(carry, pair, slices):
        return tuple(x.at[row].set(s) for x, row, s in zip(carry, rows(pair), slices))

    carry = _scan_pairs(operands, settings, pairs, offset, between, carry, (read, compute, write))
    dquery, dkey, dvalue, *gate_sums = carry
    dframes = Frames(dquery, dkey, settings.scale * dlogits)
    dlog_forget = None
    if gate_sums:
        column_sums, row_sums = gate_sums
        dcumulative = (-column_sums).at[offset:].add(row_sums)
        # reverse cumulative sum over the whole sequence: tiles x C
        merged = jnp.moveaxis(dcumulative, 0, -2)
        flat = merged.reshape(*merged.shape[:-2], -1)
        summed = jax.lax.cumsum(flat, axis=flat.ndim - 1, reverse=True).reshape(merged.shape)
        dlog_forget = settings.gate_scale * jnp.moveaxis(summed, -2, 0)
    return dframes, dvalue, dlog_forget
