"""One call in plain XLA: the linear stage as array code, then the quadratic stage of `xla.py`, forward and backward."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.blockwise import pruning, xla
from pallas_kernels.call import Inputs, Options
from pallas_kernels.householder import (
    BLOCK_SIZE,
    Frames,
    block_transform,
    frame_tree,
    from_tiles,
    group_heads,
    to_tiles,
)


def refuses(call) -> str | None:
    """Every legal call is served."""
    del call
    return None


def _settings(options: Options, inputs: Inputs) -> xla.Settings:
    return xla.Settings(
        scale=options.scale,
        gate_scale=options.gate_scale,
        tile_size=tile_size(inputs.q.shape[1]),
        use_tree=inputs.w is not None,
        window=options.window,
        prune_mass=options.prune_mass,
    )


def tile_size(length: int) -> int:
    """Tokens per tile of the xla implementation: 256, or less where padding the last tile would cost more than 15 %."""
    smallest = 8
    while smallest < min(length, 64):
        smallest *= 2
    candidates = (
        [size for size in (256, 128, 64) if size <= smallest or size < 2 * length] if smallest == 64 else [smallest]
    )

    def padded(size):
        return -(-length // size) * size

    return next(size for size in candidates if padded(size) <= 1.15 * min(map(padded, candidates)))


def _query_padding(settings, q, k):
    """Zero rows in front that align the first query with a tile of keys."""
    return (k.shape[1] - q.shape[1]) % settings.tile_size


def _query_tiles(settings, x, q, k):
    """[B, T, N, *H] -> [query tiles, B, K, G, C, *H], aligned with the tiles of the keys."""
    x = jnp.pad(x, [(0, 0), (_query_padding(settings, q, k), 0)] + [(0, 0)] * (x.ndim - 2))
    return group_heads(to_tiles(x, settings.tile_size), k.shape[2])


def _from_query_tiles(settings, x, q, k):
    """Inverse of _query_tiles."""
    x = x.reshape(*x.shape[:2], -1, *x.shape[4:])
    padding = _query_padding(settings, q, k)
    return from_tiles(x, padding + q.shape[1])[:, padding:]


def linear_stage(settings, q, k, w, beta):
    """The operands that q, k, w and beta turn into; linear in q and in k."""
    accumulator = jnp.promote_types(jnp.float32, q.dtype)
    if w is None:
        query, key = _query_tiles(settings, q, q, k), to_tiles(k, settings.tile_size)
        last = key[len(key) - len(query) :]
        local = jnp.einsum("nbkgqh,nbkch->nbkgqc", query, last, preferred_element_type=accumulator)
        return Frames(query, key, local)
    block_size = min(BLOCK_SIZE, settings.tile_size)
    padding = -q.shape[1] % settings.tile_size  # w = beta = 0: the identity

    def blocks(x):
        x = jnp.pad(x.astype(accumulator), [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2))
        return to_tiles(x, block_size)

    transformed = block_transform(group_heads(blocks(q), k.shape[2]), blocks(k), blocks(w), blocks(beta))
    return frame_tree(transformed, settings.tile_size, q.dtype)


def _operands(settings, frames, q, k, v, log_forget, segment_ids):
    tiles = functools.partial(to_tiles, size=settings.tile_size)
    norms = None
    if settings.prune_mass is not None:
        norms = pruning.tile_norms(_query_tiles(settings, q, q, k), tiles(k))
    if log_forget is not None:
        log_forget = group_heads(tiles(log_forget.astype(frames.local.dtype)), k.shape[2])
    if segment_ids is not None:
        segment_ids = tiles(segment_ids[:, :, None])[:, :, 0]
    return xla.Operands(frames, tiles(v), log_forget, segment_ids, norms)


def forward(options: Options, inputs: Inputs):
    """Output [B, T, N, Hv] in q's dtype, lse [B, N, T] in the accumulator dtype, and nothing else to keep."""
    settings = _settings(options, inputs)
    q, k, v, w, beta, log_forget, segment_ids = inputs
    frames = linear_stage(settings, q, k, w, beta)
    out, lse = xla.forward(_operands(settings, frames, q, k, v, log_forget, segment_ids), settings)
    out, lse = (_from_query_tiles(settings, x, q, k) for x in (out, lse))
    return out.astype(q.dtype), lse.swapaxes(1, 2), None


def backward(options: Options, inputs: Inputs, out, lse, kept, dout, dlse):
    """Cotangents of the inputs; recomputes the linear stage."""
    del kept
    settings = _settings(options, inputs)
    q, k, v, w, beta, log_forget, segment_ids = inputs
    frames, linear_vjp = jax.vjp(functools.partial(linear_stage, settings), q, k, w, beta)
    operands = _operands(settings, frames, q, k, v, log_forget, segment_ids)
    # Rows that pad a tile get cotangents 0, hence contribute nothing whatever their output and lse.
    out, dout = (_query_tiles(settings, x, q, k) for x in (out, dout))
    lse, dlse = (_query_tiles(settings, x.swapaxes(1, 2), q, k) for x in (lse, dlse))
    dframes, dv, dlog_forget = xla.backward(operands, settings, out, lse, dout, dlse)
    dq, dk, dw, dbeta = linear_vjp(jax.tree.map(lambda d, x: d.astype(x.dtype), dframes, frames))
    dv = from_tiles(dv, v.shape[1]).astype(v.dtype)
    if log_forget is not None:
        dlog_forget = dlog_forget.reshape(*dlog_forget.shape[:2], -1, dlog_forget.shape[-1])
        dlog_forget = from_tiles(dlog_forget, log_forget.shape[1]).astype(log_forget.dtype)
    return Inputs(dq, dk, dv, dw, dbeta, dlog_forget, None)
