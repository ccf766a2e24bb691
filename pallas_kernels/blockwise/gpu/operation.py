"""One call on an NVIDIA GPU: the linear stage as array code or kernels, the quadratic stage as kernels of one's choice.

With the frame tree the quadratic stage sees what lies between tiles of 128 tokens; what a tile's queries find in their
own tile belongs to the linear stage. Kernels do the latter where the directions w have the dtype of q, k and v, and
round to that dtype what leaves them; for float32 directions it is float32 array code.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.blockwise import xla, xla_operation
from pallas_kernels.blockwise.gpu import layout, linear, schedule
from pallas_kernels.blockwise.gpu.layout import LEAST, LOG2E, TILE, Geometry
from pallas_kernels.call import AttentionCall, Inputs, Options
from pallas_kernels.householder import Frames, from_tiles, group_heads, to_tiles
from pallas_kernels.partition import run_backward, run_forward


class Kernels(NamedTuple):
    """See the functions of these names. Without those of the linear stage it is array code."""

    attention_forward: Callable
    query_gradient: Callable
    key_gradient: Callable
    tile_forward: Callable | None = None
    lift_forward: Callable | None = None
    lift_backward: Callable | None = None
    node_gradient: Callable | None = None
    block_backward: Callable | None = None


def refuses(call: AttentionCall) -> str | None:
    """Why no kernels can serve the call, or None."""
    q, k, v = call.inputs[:3]
    if not q.dtype == k.dtype == v.dtype or q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"q, k, v must all be bfloat16 or all float16, got {q.dtype}, {k.dtype}, {v.dtype}"
    if max(q.shape[3], v.shape[3]) > 128:
        return f"heads of at most 128 numbers, got {q.shape[3]} and {v.shape[3]}"
    return None


def forward(name: str, kernels: Callable[[], Kernels], options: Options, inputs: Inputs):
    """Output [B, T, N, Hv] in q's dtype, lse [B, N, T] float32, and nothing else to keep.

    Args:
      name: of the implementation.
      kernels: returns them; called where they are about to be traced.
    """
    return run_forward(("cuda", name), functools.partial(_forward, kernels, options), options, inputs)


def backward(name: str, kernels: Callable[[], Kernels], options: Options, inputs: Inputs, *others):
    """Cotangents of the inputs; see `forward`."""
    return run_backward(("cuda", name), functools.partial(_backward, kernels, options), options, inputs, *others)


class _Setting(NamedTuple):
    """What both directions derive from a call before they run a kernel."""

    size: Geometry
    v: jax.Array  # [B tiles, 128, K Hv]
    inside: jax.Array | None  # base-2 gates up to and with each token [B, N, key tiles, 128]
    behind: jax.Array | None
    totals: jax.Array | None
    ids: jax.Array | None
    first_key: jax.Array | None


def _setting(options: Options, inputs: Inputs) -> _Setting:
    q, k, v, w, _, log_forget, segment_ids = inputs
    num_keys = layout.num_tiles(k.shape[1])
    size = Geometry(
        batch=q.shape[0],
        num_heads=q.shape[2],
        num_kv_heads=k.shape[2],
        num_queries=layout.num_tiles(layout.front(inputs) + q.shape[1]),
        num_keys=num_keys,
        head_dim=layout.padded(q.shape[3]),
        v_head_dim=layout.padded(v.shape[3]),
        logit_scale=options.scale * LOG2E,
        tree=w is not None,
        window=options.window,
        interpret=options.interpret,
    )
    inside = behind = totals = None
    if log_forget is not None:
        inside, behind, totals = layout.gate_sums(log_forget, options.gate_scale * LOG2E)
    return _Setting(
        size, layout.key_tiles(v), inside, behind, totals,
        None if segment_ids is None else layout.segment_tiles(segment_ids),
        layout.first_key(options, inputs, totals, inside),
    )  # fmt: skip


def _tile_settings(options):
    return xla.Settings(scale=options.scale, gate_scale=options.gate_scale, tile_size=TILE, window=options.window)


def _own_tiles(options: Options, inputs: Inputs, frames: Frames):
    """Operands and settings of attention inside tiles: every tile is a batch row of its own."""
    _, k, v, _, _, log_forget, segment_ids = inputs
    rows = lambda x: x.reshape(1, -1, *x.shape[2:])
    tiles = lambda x: rows(to_tiles(x, TILE))
    if log_forget is not None:
        log_forget = group_heads(tiles(log_forget.astype(jnp.float32)), k.shape[2])
    if segment_ids is not None:
        segment_ids = tiles(segment_ids[:, :, None])[:, :, 0]
    frames = Frames(rows(frames.query)[:, :0], rows(frames.key)[:, :0], rows(frames.local))
    return xla.Operands(frames, tiles(v), log_forget, segment_ids, None), _tile_settings(options)


def _by_head(x, size):
    """[1, tiles B, K, G, 128] -> [B, N, tiles, 128]."""
    return jnp.moveaxis(x.reshape(-1, size.batch, size.num_heads, TILE), 0, 2)


def _from_head(x, size):
    """Inverse of `_by_head`."""
    return jnp.moveaxis(x, 2, 0).reshape(1, -1, size.num_kv_heads, size.num_heads // size.num_kv_heads, TILE)


def _own_attention(options, inputs, setting, frames):
    """What each query finds in its own tile: output and log-sum-exp as `attention_forward` takes them."""
    size = setting.size
    out, lse = xla.forward(*_own_tiles(options, inputs, frames))
    out = jnp.moveaxis(out.reshape(-1, size.batch, size.num_heads, *out.shape[-2:]), (0, 2), (1, 3))
    out = out.reshape(size.batch, -1, *out.shape[3:])  # [B, T, N, Hv]
    lse = LOG2E * _by_head(lse, size)
    lse = jnp.where(jnp.isneginf(lse), LEAST, lse if setting.inside is None else lse - setting.inside)
    return layout.key_tiles(out), lse


def _linear_stage(options, inputs):
    """(q, k, w, beta) -> Frames, as array code."""
    return functools.partial(xla_operation.linear_stage, _tile_settings(options)), inputs[:2] + inputs[3:5]


def _tiles(inputs, frames):
    """Queries and keys as the kernels of the quadratic stage take them; with the tree their versions."""
    if frames is None:
        return layout.query_tiles(inputs.q, inputs), layout.key_tiles(inputs.k)
    return layout.version_tiles(frames.query), layout.version_tiles(frames.key)


def _forward_operands(kernels, options, inputs, setting):
    """q, k and `partial` of `attention_forward`."""
    if not setting.size.tree:
        return *_tiles(inputs, None), None
    if not _is_fast(kernels, inputs):
        stage, arguments = _linear_stage(options, inputs)
        frames = stage(*arguments)
        return *_tiles(inputs, frames), _own_attention(options, inputs, setting, frames)
    versions, partial = linear.run_tiles(kernels, inputs, setting.inside, setting.ids, setting.size)
    return versions.q, versions.k, partial


def _is_fast(kernels, inputs):
    """Whether kernels do the linear stage."""
    return inputs.w is not None and kernels.tile_forward is not None and inputs.w.dtype == inputs.q.dtype


def _forward(kernels, options, inputs):
    setting, kernels = _setting(options, inputs), kernels()
    size = setting.size
    q, k, partial = _forward_operands(kernels, options, inputs, setting)
    if size.tree and size.num_keys == 1:
        out, lse = partial[0].astype(inputs.v.dtype), partial[1]
    else:
        out, lse = kernels.attention_forward(
            q, k, setting.v, _query_gate(setting), setting.ids, setting.first_key, partial, size
        )
    is_empty = lse <= LEAST
    lse = lse / LOG2E if setting.inside is None else (lse + setting.inside[:, :, size.offset :]) / LOG2E
    lse = jnp.where(is_empty, -jnp.inf, lse).reshape(size.batch, size.num_heads, -1)
    start, length = layout.front(inputs), inputs.q.shape[1]
    out = layout.from_tiles(out, size.batch, start, length, size.num_heads, inputs.v.shape[3])
    return out, lse[:, :, start : start + length], None


def _query_gate(setting):
    """`gate` of the kernels that go through the keys of queries."""
    size = setting.size
    if setting.inside is None:
        return None
    table = schedule.query_rows(size.num_queries, size.num_keys, size.tree, size.window).table
    if size.tree:
        between = layout.between(setting.totals, table[:, [1, 3]] - [[0, 1]], size.offset)
    else:
        between = jnp.zeros((size.batch, size.num_heads, len(table)), jnp.float32)
    return setting.inside, layout.widened(setting.behind, setting.totals), between


def _key_gate(setting):
    """`gate` of the kernel that goes through the queries of keys."""
    size = setting.size
    if setting.inside is None:
        return None
    table = schedule.key_rows(size.num_queries, size.num_keys, size.tree, size.window).table
    is_own = table[:, 2] + size.offset == table[:, 1]
    pairs = table[:, [2, 1]] - np.stack([np.zeros_like(is_own), is_own], axis=1)  # of the own tile: never looked at
    between = layout.between(setting.totals, pairs, size.offset)
    return setting.inside, setting.behind, jnp.where(is_own, 0, between)


def _backward(kernels, options, inputs, out, lse, kept, dout, dlse):
    del kept  # recomputes the linear stage
    setting, kernels = _setting(options, inputs), kernels()
    size, (q, k, v), log_forget = setting.size, inputs[:3], inputs.log_forget
    before = layout.front(inputs)
    rows = lambda x: layout.rows_of_heads(x.swapaxes(1, 2), before)  # [B, N, T] -> [B, N, query tiles, 128]
    is_empty = jnp.isneginf(lse)
    delta = (dout * out.astype(jnp.float32)).sum(-1).swapaxes(1, 2) - jnp.where(is_empty, 0, dlse)
    delta = rows(delta)
    natural_lse = rows(jnp.where(is_empty, -LEAST, lse))
    base2_lse = LOG2E * natural_lse
    if setting.inside is not None:
        base2_lse = base2_lse - setting.inside[:, :, size.offset :]
    dout_tiles = layout.query_tiles(dout.astype(v.dtype), inputs)
    is_fast, frames = _is_fast(kernels, inputs), None
    if is_fast:
        cotangents = dout_tiles, base2_lse, delta
        versions, (kept,) = linear.run_tiles(kernels, inputs, setting.inside, setting.ids, size, cotangents)
        arguments = versions.q, versions.k, setting.v, dout_tiles
    else:
        if size.tree:
            stage, linear_arguments = _linear_stage(options, inputs)
            frames, linear_vjp = jax.vjp(stage, *linear_arguments)
        arguments = *_tiles(inputs, frames), setting.v, dout_tiles
    if size.tree and size.num_keys == 1:
        dq, dk = (x if x is None else jnp.zeros_like(x) for x in arguments[:2])
        dv = jnp.zeros_like(setting.v)
        row_sums = column_sums = jnp.zeros(delta.shape, jnp.float32)
    else:
        dq, row_sums = kernels.query_gradient(
            *arguments, base2_lse, delta, _query_gate(setting), setting.ids, setting.first_key, size
        )
        row_sums = _over_rows(row_sums, schedule.query_rows(size.num_queries, size.num_keys, size.tree, size.window))
        dk, dv, column_sums = kernels.key_gradient(
            *arguments, _vectors(setting, base2_lse, delta), _key_gate(setting), setting.ids, _last_query(setting), size
        )
    if is_fast:
        found = linear.gradient(kernels, inputs, versions, kept, dq, dk, size, options.scale)
        dv = (dv.astype(jnp.float32) + found.v).astype(v.dtype)
        row_sums, column_sums = row_sums + found.row_sums, column_sums + found.column_sums
    dv = layout.from_tiles(dv, size.batch, 0, v.shape[1], size.num_kv_heads, v.shape[3])
    dw = dbeta = dlog_forget = None
    if is_fast:
        dq, dk, dw, dbeta = found[:4]
    elif size.tree:
        dlocal, dv_own, dgate_own = _own_gradient(options, inputs, setting, frames, natural_lse, delta, dout_tiles)
        dv = (dv.astype(jnp.float32) + dv_own).astype(v.dtype)
        dframes = Frames(layout.from_version_tiles(dq, frames.query), layout.from_version_tiles(dk, frames.key), dlocal)
        dq, dk, dw, dbeta = linear_vjp(dframes)
    else:
        dq = layout.from_tiles(dq, size.batch, before, q.shape[1], size.num_heads, q.shape[3])
        dk = layout.from_tiles(dk, size.batch, 0, k.shape[1], size.num_kv_heads, k.shape[3])
    if log_forget is not None:
        # A gate moves the logits of all paths across it.
        dcumulative = (-column_sums).at[:, :, size.offset :].add(row_sums)
        dcumulative = dcumulative.reshape(size.batch, size.num_heads, -1)
        dlog_forget = options.gate_scale * jax.lax.cumsum(dcumulative, axis=2, reverse=True)
        dlog_forget = dlog_forget[:, :, : k.shape[1]].swapaxes(1, 2)
        if size.tree and not is_fast:
            dlog_forget += dgate_own
        dlog_forget = dlog_forget.astype(log_forget.dtype)
    return Inputs(dq, dk, dv, dw, dbeta, dlog_forget, None)


def _over_rows(x, rows):
    """[B, N, rows, 128] -> [B, N, tiles, 128], summed over the rows of a tile in their order, unlike by a scatter."""
    row = rows.starts[:-1, None] + np.arange(np.diff(rows.starts).max())
    is_there = row < rows.starts[1:, None]
    return jnp.where(is_there[..., None], x[:, :, np.where(is_there, row, 0)], 0).sum(3)


def _vectors(setting, lse, delta):
    """`vectors` of `key_gradient`."""
    size = setting.size
    halves = lambda x: x.reshape(size.batch, size.num_heads, -1, TILE // 2)
    passed = jnp.zeros((size.batch, size.num_heads, size.num_queries))
    if setting.totals is not None:
        passed = setting.totals[:, :, size.offset :]
    passed = jnp.stack([jnp.zeros_like(passed), passed], axis=-1).reshape(size.batch, size.num_heads, -1)
    return layout.widened(jnp.concatenate([halves(lse), halves(delta)], axis=-1), passed)


def _last_query(setting):
    """Last tile of queries that needs each tile of keys."""
    first, size = setting.first_key, setting.size
    if first is None:
        return None
    needs = first[:, :, None] <= jnp.arange(size.num_keys)[:, None]
    return jnp.where(needs, jnp.arange(size.num_queries), -1).max(-1).astype(jnp.int32)


def _own_gradient(options, inputs, setting, frames, lse, delta, dout):
    """Cotangents of the tiles' own logits, of v and of log_forget from what queries find in their own tile."""
    size, (_, _, v, _, _, log_forget, _) = setting.size, inputs
    operands, settings = _own_tiles(options, inputs, frames)
    tokens = size.num_keys * TILE
    dout = layout.from_tiles(dout, size.batch, 0, tokens, size.num_heads, v.shape[3])
    dout = group_heads(to_tiles(dout, TILE), size.num_kv_heads)
    dout = dout.reshape(1, -1, *dout.shape[2:])
    # delta is already there: the output itself is not needed.
    zeros = jnp.zeros(dout.shape, jnp.float32)
    dframes, dv, dgate = xla.backward(operands, settings, zeros, _from_head(lse, size), dout, -_from_head(delta, size))
    tiles = lambda x: x.reshape(size.num_keys, size.batch, *x.shape[2:])
    if log_forget is not None:
        dgate = tiles(dgate)
        dgate = from_tiles(dgate.reshape(*dgate.shape[:2], -1, TILE), log_forget.shape[1])
    return tiles(dframes.local), from_tiles(tiles(dv), v.shape[1]), dgate
