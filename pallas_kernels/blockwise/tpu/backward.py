"""Quadratic stage, backward: one fused pass, five products per tile.

One program instance per key/value head walks the steps of `schedule.backward_steps`: a key block stays in VMEM with the
float32 accumulators of its dk and dv while the queries of all heads of its group stream past, so group sums cost
nothing. dq is visited once per key block: its float32 sum lives in HBM and makes a round trip of 2 S H floats per step,
hidden behind the step's 5 * 2 S^2 H products, which keeps VMEM use independent of T.

Tiles are computed transposed, [keys, queries]: log-sum-exp and Delta are then rows, and no cross-lane work is left.

The gate's gradient adds up rows and columns of ds as computed; only then do their rounding errors cancel.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.blockwise.tpu import lanes, schedule
from pallas_kernels.blockwise.tpu.arithmetic import MASKED, NT, TN, dot
from pallas_kernels.blockwise.tpu.tiling import Tiling, when_masks_matter

_NOTHING, _SUM, _FINAL = 0, 1, 2  # what a query copy in flight carries


def _kernel(*refs, tiling, groups, has_gate, has_segments, has_bounds, dq_scale, dk_scale):
    refs = list(refs)
    take = lambda count: [refs.pop(0) for _ in range(count)]  # noqa: E731
    (steps,) = take(1)
    (first_block,) = take(1) if has_bounds else (None,)
    (uniform,) = take(1) if has_segments else (None,)
    (totals,) = take(1) if has_gate else (None,)
    q, k, v, dout, lse, delta = take(6)
    (tail,) = take(1) if has_gate else (None,)
    (inside,) = take(1) if has_gate and tiling.has_diagonal else (None,)
    key_ids, query_ids = take(2) if has_segments else (None, None)
    (dq,) = take(1)
    (dk,) = (dq,) if tiling.tree else take(1)
    dq_sums, dv = take(2)
    row_sums, column_sums = take(2) if has_gate else (None, None)
    dk_acc, dv_acc, dq_tile, dq_sum, dq_final, dk_final, in_flight, semaphores = take(8)
    columns, column_acc, between = take(3) if has_gate else (None, None, None)
    (ids,) = take(1) if has_segments else (None,)

    kv, n, g = (pl.program_id(axis) for axis in range(3))
    query, block, slot, flags = schedule.read(steps, n)
    S = tiling.superchunk
    position = query + tiling.offset
    head = kv * groups + g

    def has(flag):
        return flags & flag != 0

    # Copies between VMEM and HBM.
    read_sum, write_query, write_keys = (semaphores.at[i] for i in range(3))
    rows_in_hbm = pl.ds(query * S, S)
    sum_in = pltpu.make_async_copy(dq_sums.at[kv, g, rows_in_hbm], dq_sum, read_sum)
    sum_out = pltpu.make_async_copy(dq_sum, dq_sums.at[kv, g, rows_in_hbm], write_query)
    final_out = pltpu.make_async_copy(dq_final, dq.at[slot, kv, g, rows_in_hbm], write_query)
    halves_out = [
        pltpu.make_async_copy(
            dk_final.at[pl.ds(half * S, S)], dk.at[slot, kv, 0, pl.ds((2 * block + half) * S, S)], write_keys
        )
        for half in (0, 1)
    ]

    def wait_for_queries():
        pl.when(in_flight[0] == _SUM)(sum_out.wait)
        pl.when(in_flight[0] == _FINAL)(final_out.wait)
        in_flight[0] = _NOTHING

    def wait_for_keys():
        pl.when(in_flight[1] >= 1)(halves_out[0].wait)
        pl.when(in_flight[1] >= 2)(halves_out[1].wait)
        in_flight[1] = 0

    @pl.when((n == 0) & (g == 0))
    def _():
        in_flight[0] = _NOTHING
        in_flight[1] = 0
        if has_gate:
            row_sums[...] = jnp.zeros_like(row_sums)

    @pl.when(has(schedule.FIRST_OF_KEYS) & (g == 0))
    def _():
        dk_acc[...] = jnp.zeros_like(dk_acc)

    @pl.when(has(schedule.FIRST_OF_BLOCK) & (g == 0))
    def _():
        dv_acc[...] = jnp.zeros_like(dv_acc)
        if has_segments:
            ids[...] = lanes.to_integer_columns(key_ids[0])

    if has_gate:

        @pl.when(has(schedule.FIRST_OF_BLOCK))
        def _():
            columns[g] = lanes.to_columns(tail[0, pl.ds(g, 1)])
            column_acc[g] = jnp.zeros_like(column_acc[g])
            between[g] = 0.0

    needed = block >= first_block[head, query] if has_bounds else True

    def fetch_sum():
        """In the middle of a step: the previous step's copy has had the first half to finish."""
        wait_for_queries()
        pl.when(jnp.logical_not(has(schedule.FIRST)))(sum_in.start)

    def tile(rows, keys, distance, masked, bias, shift, is_first):
        """Adds one tile to the accumulators; `rows` of the queries' superchunk, `keys` of the key block."""
        x, key, value, dy = q[0, 0, 0, rows], k[0, 0, 0, keys], v[0, keys], dout[0, 0, rows]
        num_rows = rows.stop - rows.start
        shape = (keys.stop - keys.start, num_rows)
        s = dot(key, x, NT)
        if bias is not None:
            s = s + lanes.widen(bias, num_rows)
        mask = None
        if masked is not False:
            j, i = (jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
            if masked == "causal":
                mask = i - j + distance >= 0
            if tiling.window is not None:
                near = i - j < tiling.window - distance
                mask = near if mask is None else mask & near
            if has_segments:
                same = lanes.widen(ids[keys], num_rows) == query_ids[0, :, rows]
                same = same & (query_ids[0, :, rows] > 0)
                mask = same if mask is None else mask & same
        log_sum = lse[0, 0, :, rows]
        if shift is not None:
            log_sum = log_sum - shift * tiling.logit_scale
        s = s * tiling.logit_scale - log_sum
        p = jnp.exp2(s if mask is None else jnp.where(mask, s, MASKED))
        ds = p * (dot(value, dy, NT) - delta[0, 0, :, rows])
        dv_acc[keys] += dot(p.astype(v.dtype), dy)
        if has_gate:
            row_sums[0, g, pl.ds(query, 1), rows] += ds.sum(axis=0, keepdims=True)
            column_acc[g, keys] += lanes.fold(ds)
        ds = ds.astype(q.dtype)
        dk_acc[keys] += dot(ds, x)
        product = dot(ds, key, TN)
        dq_tile[rows] = product if is_first else dq_tile[rows] + product

    def diagonal(half):
        """The superchunk's own keys, left of the diagonal only."""
        bias = None if not has_gate else -lanes.to_columns(inside[0, pl.ds(g, 1)])
        dq_tile[...] = jnp.zeros_like(dq_tile)
        size = min(tiling.keys, 256)
        for start in range(0, S, size):
            keys = slice(half * S + start, half * S + start + size)
            own = None if bias is None else bias[start : start + size]
            tile(slice(start, S), keys, 0, "causal", own, None, False)

    def left(masked):
        for start in range(0, S, tiling.keys):
            keys = slice(start, start + tiling.keys)
            bias = None if not has_gate else columns[g, keys]
            tile(slice(0, S), keys, S - start, masked, bias, None, start == 0 and tiling.tree)

    def whole(masked):
        for start in range(0, 2 * S, tiling.keys):
            if start == S:
                fetch_sum()
            keys = slice(start, start + tiling.keys)
            bias = shift = None
            if has_gate:
                bias = columns[g, keys]
                shift = between[g] + (totals[head, 2 * block + 1] if start < S else 0.0)
            tile(slice(0, S), keys, (position - 2 * block) * S - start, masked, bias, shift, start == 0)

    choose = functools.partial(when_masks_matter, tiling=tiling, flags=flags, query=query, block=block, uniform=uniform)
    if tiling.has_diagonal:
        for half in (0, 1):
            pl.when(has(schedule.DIAGONAL) & (position & 1 == half))(functools.partial(diagonal, half))
    choose(has(schedule.LEFT) & needed, left)
    is_whole = has(schedule.WHOLE) & needed
    choose(is_whole, whole)

    # dq: add the stored sum and send the result back, as the final value after the last visit.
    is_first, is_last = has(schedule.FIRST), has(schedule.LAST)
    is_visit = (flags & schedule.TILE != 0) & (needed | is_first | is_last)
    pl.when(is_visit & jnp.logical_not(is_whole))(fetch_sum)
    if has_bounds:

        @pl.when(is_visit & jnp.logical_not(needed))
        def _():
            dq_tile[...] = jnp.zeros_like(dq_tile)

    @pl.when(is_visit & jnp.logical_not(is_first))
    def _():
        sum_in.wait()
        dq_tile[...] += dq_sum[...]

    @pl.when(is_visit & is_last)
    def _():
        dq_final[...] = (dq_tile[...] * dq_scale).astype(dq_final.dtype)
        final_out.start()
        in_flight[0] = _FINAL

    @pl.when(is_visit & jnp.logical_not(is_last))
    def _():
        dq_sum[...] = dq_tile[...]
        sum_out.start()
        in_flight[0] = _SUM

    if has_gate:

        @pl.when(has(schedule.WHOLE))
        def _():
            between[g] += totals[head, position]

    is_last_of_group = g == groups - 1

    @pl.when(has(schedule.LAST_OF_KEYS) & is_last_of_group)
    def _():
        wait_for_keys()
        dk_final[...] = (dk_acc[...] * dk_scale).astype(dk_final.dtype)
        halves_out[0].start()
        in_flight[1] = 1
        if tiling.tree:  # at slot 0 the right half holds queries
            is_both = slot > 0
        else:
            is_both = True

        @pl.when(is_both)
        def _():
            halves_out[1].start()
            in_flight[1] = 2

    @pl.when(has(schedule.LAST_OF_BLOCK) & is_last_of_group)
    def _():
        dv[0] = dv_acc[...].astype(dv.dtype)

    if has_gate:

        @pl.when(has(schedule.LAST_OF_BLOCK))
        def _():
            ones = jnp.ones((8, lanes.LANES), jnp.float32)
            column_sums[0, pl.ds(g, 1)] = dot(ones, column_acc[g], NT)[:1]

    @pl.when((n == pl.num_programs(1) - 1) & is_last_of_group)
    def _():
        wait_for_queries()
        wait_for_keys()


def attention_backward(
    q, k, v, dout, lse, delta, tiling: Tiling, *, gate=None, segments=None, first_block=None, dq_scale=1.0, dk_scale=1.0
):
    """Cotangents of `attention_forward`'s operands.

    Args:
      q, k, v, tiling, gate, segments: as for `attention_forward`.
      dout: [BK, G, Tq, Hv] in v's dtype.
      lse: [BK, G, 1, Tq] float32 as `attention_forward` returns it, but +1e30 for rows that see no key.
      delta: [BK, G, 1, Tq] float32, sum_v dout out - dlse.
      first_block: int32 [BK * G, query superchunks], the first key block a query superchunk needs, or None: all.
      dq_scale, dk_scale: factors of `sum_j ds k_j` and `sum_i ds q_i`, ds being the natural-unit cotangent of a logit.

    Returns:
      (dq, dk, dv, row sums, column sums): dq shaped like q and dk like k, in q's dtype; with a tree both are one array,
      of which only the parts that the schedule uses are written, and dv is float32; otherwise dv has v's dtype. With
      `tiling.apart` all are float32, for they are parts of sums. The gate's sums of ds are float32, over keys
      [BK, G, Tq] and over queries [BK, G, T], None without a gate.
    """
    S = tiling.superchunk
    slots, num_kv, groups, _, head_dim = q.shape
    length, value_dim = v.shape[1:]
    steps = schedule.backward_steps(tiling.num_queries, tiling.num_keys, S, tiling.tree, tiling.window, tiling.apart)
    dtype = jnp.float32 if tiling.apart else q.dtype
    has_gate, has_segments = gate is not None, segments is not None
    prefetch = [jnp.asarray(steps.ravel())]
    prefetch += [] if first_block is None else [first_block]
    prefetch += [segments.uniform] if has_segments else []
    prefetch += [gate.totals] if has_gate else []

    def spec(shape, index):
        """Block whose index is a function of (kv head, head in group, query superchunk, key block, slot)."""
        return pl.BlockSpec(shape, lambda kv, n, g, steps, *_: index(kv, g, *schedule.read(steps, n)[: schedule.FLAGS]))

    row = spec((1, 1, 1, S), lambda kv, g, a, b, u: (kv, g, 0, a))
    operands = [q, k, v, dout, lse, delta]
    in_specs = [
        spec((1, 1, 1, S, head_dim), lambda kv, g, a, b, u: (u, kv, g, a, 0)),
        spec((1, 1, 1, 2 * S, head_dim), lambda kv, g, a, b, u: (u, kv, 0, b, 0)),
        spec((1, 2 * S, value_dim), lambda kv, g, a, b, u: (kv, b, 0)),
        spec((1, 1, S, value_dim), lambda kv, g, a, b, u: (kv, g, a, 0)),
        row,
        row,
    ]
    in_hbm = pl.BlockSpec(memory_space=pl.ANY)
    out_specs = [in_hbm] * (2 if tiling.tree else 3) + [spec((1, 2 * S, value_dim), lambda kv, g, a, b, u: (kv, b, 0))]
    result = functools.partial(lanes.result, like=q)
    out_shape = [result(q.shape, dtype)]
    if not tiling.tree:
        out_shape.append(result(k.shape, dtype))
    out_shape += [result(q.shape[1:], jnp.float32), result(v.shape, jnp.float32 if tiling.tree else dtype)]
    scratch = [
        pltpu.VMEM((2 * S, head_dim), jnp.float32),
        pltpu.VMEM((2 * S, value_dim), jnp.float32),
        pltpu.VMEM((S, head_dim), jnp.float32),
        pltpu.VMEM((S, head_dim), jnp.float32),
        pltpu.VMEM((S, head_dim), dtype),
        pltpu.VMEM((2 * S, head_dim), dtype),
        pltpu.SMEM((2,), jnp.int32),
        pltpu.SemaphoreType.DMA((3,)),
    ]
    if has_gate:
        operands.append(gate.tail)
        in_specs.append(spec((1, groups, 2 * S), lambda kv, g, a, b, u: (kv, 0, b)))
        if tiling.has_diagonal:
            operands.append(gate.inside)
            in_specs.append(spec((1, groups, S), lambda kv, g, a, b, u: (kv, 0, a + tiling.offset)))
        out_specs += [
            spec((1, groups, tiling.num_queries, S), lambda kv, g, a, b, u: (kv, 0, 0, 0)),
            spec((1, groups, 2 * S), lambda kv, g, a, b, u: (kv, 0, b)),
        ]
        shapes = (num_kv, groups, tiling.num_queries, S), (num_kv, groups, length)
        out_shape += [result(shape, jnp.float32) for shape in shapes]
        scratch += [
            pltpu.VMEM((groups, 2 * S, lanes.LANES), jnp.float32),
            pltpu.VMEM((groups, 2 * S, lanes.LANES), jnp.float32),
            pltpu.SMEM((groups,), jnp.float32),
        ]
    if has_segments:
        kv_per_batch = num_kv // segments.ids.shape[0]
        operands += [segments.ids, segments.ids]
        in_specs += [
            spec((1, 1, 2 * S), lambda kv, g, a, b, u: (jax.lax.div(kv, kv_per_batch), 0, b)),
            spec((1, 1, S), lambda kv, g, a, b, u: (jax.lax.div(kv, kv_per_batch), 0, a + tiling.offset)),
        ]
        scratch.append(pltpu.VMEM((2 * S, lanes.LANES), jnp.int32))
    results = pl.pallas_call(
        functools.partial(
            _kernel,
            tiling=tiling,
            groups=groups,
            has_gate=has_gate,
            has_segments=has_segments,
            has_bounds=first_block is not None,
            dq_scale=dq_scale,
            dk_scale=dk_scale,
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(prefetch),
            grid=(num_kv, len(steps), groups),
            in_specs=in_specs,
            out_specs=out_specs,
            scratch_shapes=scratch,
        ),
        out_shape=out_shape,
        name="attention_backward",
        interpret=tiling.interpret,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=tiling.vmem_limit << 20
        ),
    )(*prefetch, *operands)
    sums = results[-2:] if has_gate else (None, None)
    if has_gate:
        sums = (sums[0].reshape(num_kv, groups, -1), sums[1])
    dq, dk = (results[0], results[0]) if tiling.tree else results[:2]
    return dq, dk, results[2 if tiling.tree else 3], *sums
