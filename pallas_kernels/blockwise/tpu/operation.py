"""One call on a TPU: brings the operands into the kernels' layout and runs the kernels, forward and backward.

Inside, logits are base 2 and rows lack their own gate, which cancels in the softmax; both come back in here. Cotangents
between the kernels lack the factor ln 2 that base-2 logits bring along.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.blockwise.tpu import bounds, layout, tuning
from pallas_kernels.blockwise.tpu.arithmetic import EMPTY, LOG2E
from pallas_kernels.blockwise.tpu.backward import attention_backward
from pallas_kernels.blockwise.tpu.chunk_backward import chunk_backward
from pallas_kernels.blockwise.tpu.chunk_forward import chunk_forward
from pallas_kernels.blockwise.tpu.forward import attention_forward
from pallas_kernels.blockwise.tpu.lift import lift_backward, lift_forward, stack_bytes
from pallas_kernels.blockwise.tpu.tiling import Gate, Segments, Tiling
from pallas_kernels.call import AttentionCall, Inputs, Options
from pallas_kernels.partition import run_backward, run_forward


def refuses(call: AttentionCall) -> str | None:
    """Why the kernels cannot serve the call, or None."""
    q, k, v, w = call.inputs[:4]
    if not q.dtype == k.dtype == v.dtype or q.dtype not in (jnp.bfloat16, jnp.float32):
        return f"q, k, v must all be bfloat16 or all float32, got {q.dtype}, {k.dtype}, {v.dtype}"
    if w is not None and w.dtype not in (jnp.bfloat16, jnp.float32):
        return f"w must be bfloat16 or float32, got {w.dtype}"
    if w is not None:
        chip, size = tuning.chip(), layout.geometry(call.inputs, tuning.superchunk(call.inputs))
        needed = stack_bytes(size.num_keys, layout.padded(k.shape[3])) / 2**20
        if needed > 0.7 * chip.vmem:
            return f"the tree over {k.shape[1]} tokens needs {needed:.0f} MiB, {chip.name} has {chip.vmem}"
    return None


class _Setting(NamedTuple):
    """What both directions derive from a call before they run a kernel."""

    chip: tuning.Chip
    size: layout.Geometry
    tiling: Tiling
    q: jax.Array  # [B K, G, query_length, H]
    k: jax.Array  # [B K, key_length, H]
    v: jax.Array  # [B K, key_length, Hv]
    gate: Gate | None
    segments: Segments | None
    first_block: jax.Array | None


def _setting(options: Options, sizes: tuning.Sizes, inputs: Inputs) -> _Setting:
    size = layout.geometry(inputs, sizes.superchunk)
    is_path = inputs.w is not None
    tiling = Tiling(
        superchunk=size.superchunk,
        keys=sizes.keys,
        num_queries=size.num_queries,
        num_keys=size.num_keys,
        tree=is_path,
        # Queries of the tree are scaled before they are rounded. Otherwise logits are: that takes a positive scale.
        logit_scale=1.0 if is_path or options.scale <= 0 else options.scale * LOG2E,
        window=options.window,
        vmem_limit=sizes.chip.vmem,
        interpret=options.interpret,
    )
    q = layout.per_query_head(inputs.q, size)
    if not is_path and options.scale <= 0:
        q = (q * (options.scale * LOG2E)).astype(q.dtype)
    k, v = (layout.per_key_head(x, size.key_length) for x in (inputs.k, inputs.v))
    gate = segments = None
    if inputs.log_forget is not None:
        gate = layout.gate_sums(inputs.log_forget, size, options.gate_scale * LOG2E / tiling.logit_scale)
    if inputs.segment_ids is not None:
        segments = layout.segments(inputs.segment_ids, size)
    first_block = bounds.first_block(options, inputs, size, tiling, gate, segments)
    return _Setting(sizes.chip, size, tiling, q, k, v, gate, segments, first_block)


def _chunk_arguments(options: Options, inputs: Inputs, setting: _Setting):
    """Positional arguments up to the segment ids, and keywords, of the superchunk kernels.

    Directions w in float32 are not rounded: the kernels then compute in float32 throughout.
    """
    size, (chip, gate, segments) = setting.size, (setting.chip, setting.gate, setting.segments)
    length = size.query_length
    dtype = jnp.promote_types(inputs.q.dtype, inputs.w.dtype)
    arguments = (
        setting.q.astype(dtype),
        setting.k[:, :length].astype(dtype),
        setting.v[:, :length].astype(dtype),
        layout.per_key_head(inputs.w, length).astype(dtype),
        layout.per_key_head(inputs.beta.astype(jnp.float32), length),
        None if gate is None else gate.inside[:, :, :length],
        None if segments is None else segments.ids[:, 0, :length],
    )
    keywords = {
        "scale": options.scale,
        "superchunk": size.superchunk,
        "cores": chip.cores,
        "vmem_limit": chip.vmem,
        "interpret": options.interpret,
    }
    return arguments, keywords


def _versions(setting: _Setting, q_top, k_top, transition):
    """Versions above the superchunk; None when there is only one superchunk."""
    size, tiling = setting.size, setting.tiling
    if size.num_keys == 1:
        return None
    q_top, k_top = (x.astype(setting.q.dtype) for x in (q_top, k_top))
    return lift_forward(
        q_top, k_top, transition, key_length=size.key_length, vmem_limit=tiling.vmem_limit, interpret=tiling.interpret
    )


def _path_forward(options, inputs, setting):
    arguments, keywords = _chunk_arguments(options, inputs, setting)
    *top, out, lse = chunk_forward(*arguments, **keywords)
    versions = _versions(setting, *top)
    if versions is not None:
        out, lse = _attention_forward(setting, versions, versions, (out, lse))
    kept = tuple(x.reshape(setting.size.batch, -1, *x.shape[1:]) for x in top) if options.keep_versions else None
    return out, lse, kept


def _attention_forward(setting, q, k, partial=None):
    return attention_forward(
        q,
        k,
        setting.v,
        setting.tiling,
        gate=setting.gate,
        segments=setting.segments,
        last_step=None if setting.first_block is None else bounds.last_step(setting.tiling, setting.first_block),
        partial=partial,
    )


def forward(options: Options, inputs: Inputs):
    """Output [B, T, N, Hv] in q's dtype, lse [B, N, T] float32, and what to keep of the superchunks' linear stage."""
    sizes = tuning.sizes(inputs, "forward")
    function = functools.partial(_forward, options, sizes)
    kept = (None, None)
    if options.keep_versions and inputs.w is not None:
        kept = (lambda inputs: _kept(inputs, layout.geometry(inputs, sizes.superchunk))), _KEPT_AXES
    return run_forward(_TARGET, function, options, inputs, kept)


def backward(options: Options, inputs: Inputs, *others):
    """Cotangents of the inputs."""
    function = functools.partial(_backward, options, tuning.sizes(inputs, "backward"))
    return run_backward(_TARGET, function, options, inputs, *others, kept_axes=_KEPT_AXES)


def _kept(inputs, size):
    """Types of the superchunks' queries, keys and transitions."""
    dtype, head_dim = jnp.promote_types(inputs.q.dtype, inputs.w.dtype), layout.padded(inputs.q.shape[3])
    group = size.num_heads // size.num_kv_heads
    shapes = (group, size.query_length, head_dim), (size.query_length, head_dim), (size.num_keys, head_dim, head_dim)
    return tuple(
        jax.ShapeDtypeStruct((size.batch, size.num_kv_heads, *shape), kind)
        for shape, kind in zip(shapes, (dtype, dtype, jnp.float32))
    )


_TARGET = "tpu", "tpu"
_KEPT_AXES = ("bk...", "bk..", "bk...")  # queries, keys and transition of each superchunk


def _forward(options, sizes, inputs):
    setting = _setting(options, sizes, inputs)
    size, kept = setting.size, None
    if setting.tiling.tree:
        out, lse, kept = _path_forward(options, inputs, setting)
    else:
        out, lse = _attention_forward(setting, setting.q[None], setting.k[None, :, None])
    is_empty = lse == EMPTY
    lse = lse / LOG2E + _own_gate(setting)
    lse = jnp.where(is_empty, -jnp.inf, lse).reshape(size.batch, size.num_heads, -1)
    out = layout.from_query_heads(out, size, inputs.v.shape[3]).astype(inputs.q.dtype)
    return out, lse[:, :, size.front : size.front + size.length], kept


def _own_gate(setting):
    """The queries' own gates since the start of their superchunk, natural [B K, G, 1, query_length]."""
    if setting.gate is None:
        return 0.0
    inside = setting.gate.inside[:, :, setting.size.query_positions]
    return (setting.tiling.logit_scale / LOG2E) * inside[:, :, None]


def _backward(options, sizes, inputs, out, lse, kept, dout, dlse):
    setting = _setting(options, sizes, inputs)
    size = setting.size
    delta = jnp.einsum("btnv,btnv->bnt", dout, out, preferred_element_type=jnp.float32)
    delta = delta - jnp.where(jnp.isneginf(lse), 0, dlse)
    delta, lse = (layout.per_query_head(x.swapaxes(1, 2), size)[:, :, None] for x in (delta, lse))
    # +1e30 makes every weight of an empty row 0.
    lse = jnp.where(jnp.isneginf(lse), -EMPTY, (lse - _own_gate(setting)) * LOG2E)
    dout = layout.per_query_head(dout.astype(inputs.v.dtype), size)
    if setting.tiling.tree:
        dq, dk, dv, dw, dbeta, gate_sums = _path_backward(options, inputs, setting, kept, lse, delta, dout)
    else:
        dw = dbeta = None
        dq, dk, dv, *gate_sums = _attention_backward(
            setting, setting.q[None], setting.k[None, :, None], lse, delta, dout,
            dq_scale=options.scale, dk_scale=options.scale if options.scale > 0 else 1 / LOG2E,
        )  # fmt: skip
        dq, dk = dq[0], dk[0, :, 0]
    dlog_forget = None
    if setting.gate is not None:
        dlog_forget = options.gate_scale * layout.gate_gradient(*gate_sums, inputs.log_forget, size)
    dq = layout.from_query_heads(dq, size, inputs.q.shape[3]).astype(inputs.q.dtype)
    dk, dv = layout.from_key_heads(dk, inputs.k), layout.from_key_heads(dv, inputs.v)
    return Inputs(dq, dk, dv, dw, dbeta, dlog_forget, None)


def _attention_backward(setting, q, k, lse, delta, dout, **scales):
    return attention_backward(
        q,
        k,
        setting.v,
        dout,
        lse,
        delta,
        setting.tiling,
        gate=setting.gate,
        segments=setting.segments,
        first_block=setting.first_block,
        **scales,
    )


def _path_backward(options, inputs, setting, kept, lse, delta, dout):
    """Recomputes the versions, then goes through the kernels in reverse."""
    size, tiling = setting.size, setting.tiling
    arguments, keywords = _chunk_arguments(options, inputs, setting)
    q, k, v = arguments[:3]
    if size.num_keys == 1:
        dq_top, dk_top = jnp.zeros_like(q), jnp.zeros_like(k)
        dtransition = jnp.zeros((k.shape[0], 1, k.shape[2], k.shape[2]), jnp.float32)
        dv, gate_sums = jnp.zeros(v.shape, jnp.float32), None
    else:
        if kept is None:
            top = chunk_forward(*arguments, **keywords)[:3]
        else:
            top = [x.reshape(-1, *x.shape[2:]) for x in kept]
        versions = _versions(setting, *top)
        dversions, _, dv, *gate_sums = _attention_backward(setting, versions, versions, lse, delta, dout)
        dq_top, dk_top, dtransition = lift_backward(
            versions, dversions, top[2], vmem_limit=tiling.vmem_limit, interpret=tiling.interpret
        )
    dq, dk, dw, dv, dbeta, dgate = chunk_backward(
        *arguments, lse, delta, dout.astype(v.dtype), dq_top.astype(q.dtype), dk_top.astype(k.dtype), dtransition,
        dv[:, : k.shape[1]], **keywords,
    )  # fmt: skip
    dw, dbeta = layout.from_key_heads(dw, inputs.w), layout.from_key_heads(dbeta, inputs.beta)
    if dgate is not None:
        row_sums, column_sums = gate_sums or (0.0, jnp.zeros(setting.gate.inside.shape, jnp.float32))
        gate_sums = (row_sums + dgate, column_sums)
    return dq, dk, dv, dw, dbeta, gate_sums
