"""Quadratic stage, forward: flash attention between superchunks on level-indexed queries and keys.

One program instance per query head walks the steps of `schedule.forward_steps`. Logits are base 2. Everything that a
call does not use (tree, gate, segments, window, pruning) is absent from the compiled kernel.

Gate: with c the cumulative gate of the query's superchunk and `tail` that from a key to the end of its own, a logit is
`raw + c_i + between + tail_j`, between being the sum over the superchunks in the middle. c_i is constant along a row,
so it cancels in the softmax and is left out here; tail_j + between is one row per key block, and `between` is a running
sum over the steps, so no difference of large sums is ever formed.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.blockwise.tpu import lanes, schedule
from pallas_kernels.blockwise.tpu.arithmetic import EMPTY, MASKED, NT, dot
from pallas_kernels.blockwise.tpu.tiling import Tiling, when_masks_matter


def _kernel(*refs, tiling, has_gate, has_segments, has_bounds):
    refs = list(refs)
    take = lambda count: [refs.pop(0) for _ in range(count)]  # noqa: E731
    (steps,) = take(1)
    (last_step,) = take(1) if has_bounds else (None,)
    (uniform,) = take(1) if has_segments else (None,)
    (totals,) = take(1) if has_gate else (None,)
    q, k, v = take(3)
    (tail,) = take(1) if has_gate else (None,)
    (inside,) = take(1) if has_gate and tiling.has_diagonal else (None,)
    key_ids, query_ids = take(2) if has_segments else (None, None)
    partial_out, partial_lse = take(2) if tiling.tree else (None, None)
    out, lse, maximum, normaliser, acc = take(5)
    (ids,) = take(1) if has_segments else (None,)
    (between,) = take(1) if has_gate else (None,)

    head, n = pl.program_id(0), pl.program_id(1)
    query, block, _, flags = schedule.read(steps, n)
    S, width = tiling.superchunk, acc.shape[1]
    position = query + tiling.offset

    def has(flag):
        return flags & flag != 0

    @pl.when(has(schedule.FIRST))
    def _():
        if has_segments:
            columns = lanes.to_integer_columns(query_ids[0])
            ids[...] = jnp.where(columns > 0, columns, -1)  # padding matches nothing
        if has_gate:
            between[0] = 0.0
        if tiling.tree:
            maximum[...] = lanes.to_columns(partial_lse[0, 0])
            normaliser[...] = jnp.where(maximum[...] > EMPTY, 1.0 / lanes.LANES, 0.0)
            acc[...] = partial_out[0, 0]
        if tiling.apart:
            maximum[...] = jnp.full_like(maximum, EMPTY)
            normaliser[...] = jnp.zeros_like(normaliser)
            acc[...] = jnp.zeros_like(acc)

    def visible(rows, keys, distance, masked):
        """Mask of a tile given slices of the superchunk's rows and of the key block; distance of the first pair."""
        shape = (rows.stop - rows.start, keys.stop - keys.start)
        mask = None
        if tiling.window is not None and masked:
            i = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
            j = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
            mask = i - j < tiling.window - distance
        if has_segments and masked:
            same = lanes.widen(ids[rows], shape[1]) == key_ids[0, :, keys]
            mask = same if mask is None else mask & same
        return mask

    def logits(rows, keys, distance, masked, bias=None):
        s = dot(q[0, 0, 0, rows], k[0, 0, 0, keys], NT)
        if bias is not None:
            s = s + bias
        mask = visible(rows, keys, distance, masked)
        return s if mask is None else jnp.where(mask, s, MASKED)

    def diagonal(half, masked):
        """The superchunk's own keys: one softmax per 128 rows over all keys up to them."""
        size = min(lanes.LANES, S)
        causal = jax.lax.broadcasted_iota(jnp.int32, (size, size), 0) >= jax.lax.broadcasted_iota(
            jnp.int32, (size, size), 1
        )
        tiles = []
        for start in range(0, S, size):
            rows, keys = slice(start, start + size), slice(half * S, half * S + start + size)
            bias = -inside[0, :, : start + size] if has_gate else None
            s = logits(rows, keys, start, masked, bias)
            own = jnp.where(causal, s[:, start:], MASKED)
            tiles.append((rows, keys, own if start == 0 else jnp.concatenate([s[:, :start], own], 1)))
        for rows, keys, s in tiles:
            peak = jnp.maximum(s.max(axis=1, keepdims=True), EMPTY)
            p = jnp.exp2((s - peak) * tiling.logit_scale)
            maximum[rows] = jnp.broadcast_to(peak, (size, lanes.LANES))
            normaliser[rows] = lanes.fold(p)
            acc[rows] = dot(p.astype(v.dtype), v[0, keys])

    def online(count, masked):
        """The first `count` superchunks of the key block."""
        rows = slice(0, S)
        for start in range(0, count * S, tiling.keys):
            keys = slice(start, start + tiling.keys)
            bias = None
            if has_gate:
                bias = tail[0, :, keys]
                if count == 2:
                    skipped = between[0] + (totals[head, 2 * block + 1] if start < S else 0.0)
                    bias = bias + skipped
            s = logits(rows, keys, (position - 2 * block) * S - start, masked, bias)
            before = maximum[...]
            peak = jnp.maximum(before, s.max(axis=1, keepdims=True))
            p = jnp.exp2((s - lanes.widen(peak, tiling.keys)) * tiling.logit_scale)
            decay = jnp.exp2((before - peak) * tiling.logit_scale)
            normaliser[...] = decay * normaliser[...] + lanes.fold(p)
            maximum[...] = peak
            acc[...] = lanes.widen(decay, width) * acc[...] + dot(p.astype(v.dtype), v[0, keys])

    choose = functools.partial(when_masks_matter, tiling=tiling, flags=flags, query=query, block=block, uniform=uniform)
    needed = True if not has_bounds else n <= last_step[head, query]
    if tiling.has_diagonal:
        for half in (0, 1):
            is_half = has(schedule.DIAGONAL) & (position & 1 == half)
            choose(is_half, functools.partial(diagonal, half))
    choose(has(schedule.LEFT) & needed, functools.partial(online, 1))
    choose(has(schedule.WHOLE) & needed, functools.partial(online, 2))
    if has_gate:

        @pl.when(has(schedule.LEFT))
        def _():
            between[0] += totals[head, 2 * block]

        @pl.when(has(schedule.WHOLE))
        def _():
            between[0] += totals[head, 2 * block + 1] + totals[head, 2 * block]

    @pl.when(has(schedule.LAST))
    def _():
        total = jnp.broadcast_to(normaliser[...].sum(axis=1, keepdims=True), maximum.shape)
        inverse = 1.0 / jnp.where(total == 0, 1.0, total)
        out[0, 0] = (acc[...] * lanes.widen(inverse, width)).astype(out.dtype)
        total, peak = lanes.to_row(total), lanes.to_row(maximum[...])
        log_sum = peak * tiling.logit_scale + jnp.log2(jnp.where(total == 0, 1.0, total))
        lse[0, 0] = jnp.where(total == 0, EMPTY, log_sum)


def attention_forward(q, k, v, tiling: Tiling, *, gate=None, segments=None, last_step=None, partial=None):
    """Output and relative log-sum-exp of every query.

    Args:
      q: [slots, BK, G, Tq, H] queries; with a tree the version of slot u, otherwise one slot.
      k: [slots, BK, >= 1, T, H] keys, at index 0 of the third axis; with a tree the same array as q.
      v: [BK, T, Hv].
      tiling: static switches. Lengths are multiples of the superchunk, and T of two superchunks.
      gate: `Gate` of the call or None.
      segments: `Segments` of the call or None.
      last_step: int32 [BK * G, query superchunks], the last step a query superchunk needs, or None: all.
      partial: with a tree (out [BK, G, Tq, Hv] float32, lse [BK, G, 1, Tq]) over the queries' own superchunk.

    Returns:
      out [BK, G, Tq, Hv] in v's dtype, or float32 with `tiling.apart` for it is a part of a sum, and lse
      [BK, G, 1, Tq] float32, base 2 and without the row's own gate c_i; rows that see no key have out 0 and lse -1e30.
    """
    S = tiling.superchunk
    _, num_kv, groups, _, head_dim = q.shape
    value_dim = v.shape[-1]
    steps = schedule.forward_steps(tiling.num_queries, tiling.num_keys, S, tiling.tree, tiling.window, tiling.apart)
    prefetch = [jnp.asarray(steps.ravel())]
    if last_step is not None:
        prefetch.append(last_step)
    if segments is not None:
        prefetch.append(segments.uniform)
    if gate is not None:
        prefetch.append(gate.totals)
    has_bounds = last_step is not None

    def spec(shape, index):
        """Block whose index is a function of (head, kv head, head in group, query superchunk, key block, slot)."""

        def index_map(h, n, steps, *bounds):
            if has_bounds:
                n = jnp.minimum(n, bounds[0][h, schedule.read(steps, n)[schedule.QUERY]])
            return index(h, jax.lax.div(h, groups), jax.lax.rem(h, groups), *schedule.read(steps, n)[: schedule.FLAGS])

        return pl.BlockSpec(shape, index_map)

    heads_per_batch = None if segments is None else num_kv * groups // segments.ids.shape[0]
    operands = [q, k, v]
    in_specs = [
        spec((1, 1, 1, S, head_dim), lambda h, kv, g, a, b, u: (u, kv, g, a, 0)),
        spec((1, 1, 1, 2 * S, head_dim), lambda h, kv, g, a, b, u: (u, kv, 0, b, 0)),
        spec((1, 2 * S, value_dim), lambda h, kv, g, a, b, u: (kv, b, 0)),
    ]
    if gate is not None:
        operands.append(gate.tail.reshape(num_kv * groups, 1, -1))
        in_specs.append(spec((1, 1, 2 * S), lambda h, kv, g, a, b, u: (h, 0, b)))
        if tiling.has_diagonal:
            operands.append(gate.inside.reshape(num_kv * groups, 1, -1))
            in_specs.append(spec((1, 1, S), lambda h, kv, g, a, b, u: (h, 0, a + tiling.offset)))
    if segments is not None:
        operands += [segments.ids, segments.ids]
        in_specs += [
            spec((1, 1, 2 * S), lambda h, kv, g, a, b, u: (jax.lax.div(h, heads_per_batch), 0, b)),
            spec((1, 1, S), lambda h, kv, g, a, b, u: (jax.lax.div(h, heads_per_batch), 0, a + tiling.offset)),
        ]
    row = spec((1, 1, 1, S), lambda h, kv, g, a, b, u: (kv, g, 0, a))
    if partial is not None:
        operands += list(partial)
        in_specs += [spec((1, 1, S, value_dim), lambda h, kv, g, a, b, u: (kv, g, a, 0)), row]
    scratch = [
        pltpu.VMEM((S, lanes.LANES), jnp.float32),
        pltpu.VMEM((S, lanes.LANES), jnp.float32),
        pltpu.VMEM((S, value_dim), jnp.float32),
    ]
    if segments is not None:
        scratch.append(pltpu.VMEM((S, lanes.LANES), jnp.int32))
    if gate is not None:
        scratch.append(pltpu.SMEM((1,), jnp.float32))
    length = tiling.num_queries * S
    return pl.pallas_call(
        functools.partial(
            _kernel,
            tiling=tiling,
            has_gate=gate is not None,
            has_segments=segments is not None,
            has_bounds=has_bounds,
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(prefetch),
            grid=(num_kv * groups, len(steps)),
            in_specs=in_specs,
            out_specs=[spec((1, 1, S, value_dim), lambda h, kv, g, a, b, u: (kv, g, a, 0)), row],
            scratch_shapes=scratch,
        ),
        out_shape=[
            lanes.result((num_kv, groups, length, value_dim), jnp.float32 if tiling.apart else v.dtype, q),
            lanes.result((num_kv, groups, 1, length), jnp.float32, q),
        ],
        name="attention_forward",
        interpret=tiling.interpret,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=tiling.vmem_limit << 20
        ),
    )(*prefetch, *operands)
