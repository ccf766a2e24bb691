"""The quadratic stage on Hopper, backward: two kernels in Pallas:Mosaic GPU, without atomics, hence deterministic.

With p = exp2(z - lse) and ds = p * (dout v^T - delta), both base-2 logits and log-sum-exp without the query's own gate:

* `query_gradient`, one thread block per version of a tile of queries: dq = ds k, and the row sums of ds;
* `key_gradient`, one thread block per tile of keys: dk = ds^T q per version, dv = p^T dout and the column sums of ds,
  summed over the query heads of a group in registers.

Rows of ds sum to the cotangent of the log-sum-exp. The gate's gradient takes the sums as computed nevertheless: only
then do their rounding errors cancel those of the columns.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.blockwise.gpu import schedule
from pallas_kernels.blockwise.gpu.layout import LOG2E, TILE, Geometry
from pallas_kernels.blockwise.gpu.primitives import (
    COLUMNS,
    HALF,
    MATRIX,
    ROWS,
    accumulate,
    along,
    await_reuse,
    barriers,
    compiler_params,
    drain,
    full,
    hide,
    int32,
    interpret_mode,
    load,
    loop,
    no_padding,
    places,
    swizzled,
    vector,
)


def query_gradient(q, k, v, dout, lse, delta, gate, segment_ids, first_key, size: Geometry, *, stages: int = 2):
    """Returns dq, like q, and row sums of ds [B, N, rows of queries, 128], 0 without a gate.

    Args:
      q, k, v, gate, segment_ids, first_key: see `forward.attention_forward`.
      dout: [B query tiles, 128, N Hv] in v's dtype.
      lse, delta: [B, N, query tiles, 128]; lse is large where a query sees nothing.
    """
    rows = schedule.query_rows(size.num_queries, size.num_keys, size.tree, size.window)
    group = size.num_heads // size.num_kv_heads
    has_gate, has_ids, has_first, tree = gate is not None, segment_ids is not None, first_key is not None, size.tree
    # The longest rows first; each says which it is.
    order = (rows.table[:, 2] - rows.table[:, 3]).argsort(kind="stable")
    table = np.column_stack([rows.table, np.arange(len(order), dtype=np.int32)])[order]
    operands = dict(q=q, k=k, v=v, dout=dout, lse=lse, delta=delta, table=table)
    if has_gate:
        operands |= dict(zip(("inside", "behind", "between"), gate))
    operands |= dict(ids=segment_ids) if has_ids else {}
    operands |= dict(first=first_key) if has_first else {}
    names = tuple(operands)

    def query_gradient_kernel(*refs, **s):
        hbm = dict(zip(names, refs))
        dq_hbm, sums_hbm = refs[len(names) :]
        head, batch, warpgroup = (jax.lax.axis_index(name) for name in ("head", "batch", "warpgroup"))
        kv_head = jax.lax.div(head, int32(group))
        panel = pl.ds(head * size.head_dim, size.head_dim)

        def this_row():
            """The row in the table, and how many tiles of keys it meets.

            Read by each role, and again where it is needed late: what is kept meanwhile would be spilled.
            """
            entries = tuple(hbm["table"][jax.lax.axis_index("row"), i] for i in range(6))
            _, tile, first, end, *_ = entries
            bound = jnp.maximum(first, hbm["first"][batch, head, tile]) if has_first else first
            return *entries, jnp.maximum(end - bound, 0)

        @pl.when(warpgroup == 2)
        def produce():
            plgpu.set_max_registers(24, action="decrease")
            version, tile, first, end, first_version, _, count = this_row()
            position, target = tile + size.offset, size.query_tile(version, batch)
            own = s["own_full"]
            plgpu.copy_gmem_to_smem(hbm["lse"].at[batch, head, tile], s["rows"].at[0], own)
            plgpu.copy_gmem_to_smem(hbm["delta"].at[batch, head, tile], s["rows"].at[1], own)
            if has_gate and not tree:
                plgpu.copy_gmem_to_smem(hbm["inside"].at[batch, head, position], s["inside"], own)
            if has_ids:
                plgpu.copy_gmem_to_smem(hbm["ids"].at[batch, position], s["query_ids"], own)
            plgpu.copy_gmem_to_smem(hbm["q"].at[target, :, panel], s["q"], own)
            v_panel = pl.ds(head * size.v_head_dim, size.v_head_dim)
            plgpu.copy_gmem_to_smem(hbm["dout"].at[batch * size.num_queries + tile, :, v_panel], s["dout"], own)

            @pl.loop(0, count)
            def copy_keys(i):
                slot, key = jax.lax.rem(i, int32(stages)), end - 1 - i
                pl.when(i >= stages)(lambda: await_reuse(s["v_free"].at[slot]))
                panel = pl.ds(kv_head * size.v_head_dim, size.v_head_dim)
                tile = hbm["v"].at[batch * size.num_keys + key, :, panel]
                plgpu.copy_gmem_to_smem(tile, s["v"].at[slot], s["v_full"].at[slot])
                pl.when(i >= stages)(lambda: await_reuse(s["k_free"].at[slot]))
                full_keys = s["k_full"].at[slot]
                if has_gate:
                    plgpu.copy_gmem_to_smem(hbm["behind"].at[batch, head, key], s["behind"].at[slot], full_keys)
                if has_ids:
                    plgpu.copy_gmem_to_smem(hbm["ids"].at[batch, key], s["key_ids"].at[slot], full_keys)
                panel = pl.ds(kv_head * size.head_dim, size.head_dim)
                tile = hbm["k"].at[size.key_tile(first_version + key - first, batch), :, panel]
                plgpu.copy_gmem_to_smem(tile, s["k"].at[slot], full_keys)

            drain(count, stages, s["k_free"], s["v_free"])

        @pl.when(warpgroup < 2)
        def compute():
            plgpu.set_max_registers(240, action="increase")
            _, tile, _, end, _, row, count = this_row()
            position = tile + size.offset
            base = warpgroup * HALF
            mine = pl.ds(base, HALF)
            plgpu.barrier_wait(s["own_full"])
            delta = load(s["rows"].at[1, mine], ROWS)
            query_ids = no_padding(load(s["query_ids"].at[mine], ROWS)) if has_ids else None

            def visit(i, carry, is_own):
                dq, sums, shift = carry
                slot, key = jax.lax.rem(i, int32(stages)), end - 1 - i
                plgpu.barrier_wait(s["k_full"].at[slot])
                plgpu.barrier_wait(s["v_full"].at[slot])

                def products(z_ref, dp_ref):
                    plgpu.wgmma(z_ref, s["q"].at[mine], s["k"].at[slot].T)
                    plgpu.wgmma(dp_ref, s["dout"].at[mine], s["v"].at[slot].T)
                    z = plgpu.wgmma_accumulator_load(z_ref, wait_n=1)  # the second product runs on
                    z = z * size.logit_scale + along(shift, 0, z)
                    if has_gate and is_own:
                        z = z - along(load(s["inside"], COLUMNS), 1, z)
                    elif has_gate:
                        z = z + along(load(s["behind"].at[slot, pl.ds(0, TILE)], COLUMNS), 1, z)
                    return jnp.exp2(z), dp_ref[...]

                accumulator = plgpu.ACC((HALF, TILE), jnp.float32)
                weights, dp = pl.run_scoped(products, accumulator, accumulator)
                plgpu.barrier_arrive(s["v_free"].at[slot])
                ds = weights * (dp - along(delta, 0, dp))
                spots = ids = None
                if is_own or size.window is not None:
                    query_places = places(HALF, base, ROWS)
                    key_places = places(TILE, (key - position) * TILE, COLUMNS)
                    spots = along(query_places, 0, ds), along(key_places, 1, ds)
                if has_ids:
                    ids = along(query_ids, 0, ds), along(load(s["key_ids"].at[slot], COLUMNS), 1, ds)
                ds = hide(ds, 0.0, spots, size.window, ids)
                if has_gate:
                    sums = sums + ds.sum(axis=1)
                if has_gate and not is_own:
                    shift = shift + s["behind"][slot, TILE]
                (dq,) = accumulate(size.interpret, (dq, ds.astype(k.dtype), s["k"].at[slot]))
                plgpu.barrier_arrive(s["k_free"].at[slot])
                return dq, sums, shift

            shift = -load(s["rows"].at[0, mine], ROWS)  # of the logits: gates up to the tile of keys, and -lse
            if has_gate:
                shift = shift + hbm["between"][batch, head, row]
            carry = full((HALF, size.head_dim), 0, MATRIX), full((HALF,), 0, ROWS), shift
            if not tree:
                carry = visit(int32(0), carry, True)
            dq, sums, _ = loop(0 if tree else 1, count, lambda i, carry: visit(i, carry, False), carry)
            s["rows"][0, mine] = sums
            out = s["q"].at[mine]
            out[...] = (dq * (size.logit_scale / LOG2E)).astype(q.dtype)
            plgpu.commit_smem()
            version, _, _, _, _, row, _ = this_row()
            plgpu.copy_smem_to_gmem(out, dq_hbm.at[size.query_tile(version, batch), mine, panel])
            plgpu.copy_smem_to_gmem(s["rows"].at[0, mine], sums_hbm.at[batch, head, row, mine])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    scratch = dict(
        q=swizzled((TILE, size.head_dim), q.dtype),
        dout=swizzled((TILE, size.v_head_dim), v.dtype),
        k=swizzled((stages, TILE, size.head_dim), k.dtype),
        v=swizzled((stages, TILE, size.v_head_dim), v.dtype),
        rows=vector(2, TILE),
        own_full=plgpu.Barrier(num_arrivals=4 + (has_gate and not tree) + has_ids),
        k_full=barriers(stages, 1 + has_gate + has_ids),
        v_full=barriers(stages),
        k_free=barriers(stages, 2),
        v_free=barriers(stages, 2),
    )
    if has_gate:
        scratch |= dict(behind=vector(stages, TILE + 4))
        scratch |= {} if tree else dict(inside=vector(TILE))
    if has_ids:
        scratch |= dict(key_ids=vector(stages, TILE, dtype=jnp.int32), query_ids=vector(TILE, dtype=jnp.int32))
    return plgpu.kernel(
        query_gradient_kernel,
        out_type=(
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((size.batch, size.num_heads, len(order), TILE), jnp.float32),
        ),
        scratch_types=scratch,
        grid=(size.num_heads, len(order), size.batch),
        grid_names=("head", "row", "batch"),
        num_threads=3,
        thread_name="warpgroup",
        compiler_params=compiler_params(),
        interpret=interpret_mode(size.interpret),
    )(*operands.values())


def key_gradient(q, k, v, dout, vectors, gate, segment_ids, last_query, size: Geometry):
    """Returns dk, like k; dv like v; column sums of ds [B, N, key tiles, 128], 0 without a gate.

    Args:
      q, k, v, segment_ids: see `forward.attention_forward`. dout: see `query_gradient`.
      vectors: [B, N, 2 x query tiles, 132], of 64 queries each: lse, delta, and the gates that the queries of the next
        tile have passed more (the tile's sum, in its second half).
      gate: None, or (inside, behind [B, N, key tiles, 128], and the gates between each row's keys and its first queries
        [B, N, rows of keys]).
      last_query: last tile of queries that needs each tile of keys, int32 [B, N, key tiles], or None.
    """
    rows = schedule.key_rows(size.num_queries, size.num_keys, size.tree, size.window)
    group = size.num_heads // size.num_kv_heads
    has_gate, has_ids, has_last, tree = gate is not None, segment_ids is not None, last_query is not None, size.tree
    has_window = size.window is not None
    parts = stages = TILE // HALF  # alike, so that a slot holds the same half of every tile
    num_buffers = 2 if tree else 1
    operands = dict(q=q, k=k, v=v, dout=dout, vectors=vectors, table=rows.table, starts=rows.starts)
    if has_gate:
        operands |= dict(zip(("inside", "behind", "between"), gate))
    if has_ids:
        operands |= dict(ids=segment_ids, query_ids=segment_ids.reshape(size.batch, -1, HALF))
    operands |= dict(last=last_query) if has_last else {}
    operands |= dict(columns=np.arange(HALF, dtype=np.int32)) if has_window else {}
    names = tuple(operands)

    def key_gradient_kernel(*refs, **s):
        hbm = dict(zip(names, refs))
        dk_hbm, dv_hbm, sums_hbm = refs[len(names) :]
        kv_head, batch, warpgroup = (jax.lax.axis_index(name) for name in ("head", "batch", "warpgroup"))
        tile = jax.lax.axis_index("tile")  # the first ones have the most queries
        panel, v_panel = (pl.ds(kv_head * n, n) for n in (size.head_dim, size.v_head_dim))
        rows_of_tile = lambda: (hbm["starts"][tile], hbm["starts"][tile + 1])  # read by each role, as above

        def queries(row, head):
            """First tile of queries of a row, and how many; without the tree at least one."""
            first, stop = hbm["table"][row, 2], hbm["table"][row, 3]
            if has_last:
                stop = jnp.minimum(stop, hbm["last"][batch, head, tile] + 1)
            return first, jnp.maximum(stop - first, 0 if tree else 1)

        @pl.when(warpgroup == 2)
        def produce():
            plgpu.set_max_registers(24, action="decrease")
            own = s["own_full"]
            plgpu.copy_gmem_to_smem(hbm["v"].at[batch * size.num_keys + tile, :, v_panel], s["v"], own)
            if has_gate:
                for g in range(group):
                    for i, name in enumerate(("inside", "behind")):
                        source = hbm[name].at[batch, kv_head * group + g, tile]
                        plgpu.copy_gmem_to_smem(source, s["gate"].at[g, i], own)
            if has_ids:
                plgpu.copy_gmem_to_smem(hbm["ids"].at[batch, tile], s["key_ids"], own)
            if has_window:
                plgpu.copy_gmem_to_smem(hbm["columns"], s["columns"], own)

            start, end = rows_of_tile()

            def copy_row(row, step):
                buffer = jax.lax.rem(row - start, int32(num_buffers))
                pl.when(row - start >= num_buffers)(lambda: await_reuse(s["k_free"].at[buffer]))
                version = size.key_tile(hbm["table"][row, 0], batch)
                plgpu.copy_gmem_to_smem(hbm["k"].at[version, :, panel], s["k"].at[buffer], s["k_full"].at[buffer])

                def copy_head(g, step):
                    head = kv_head * group + g
                    first, count = queries(row, head)
                    first_version = hbm["table"][row, 4] - hbm["table"][row, 2]
                    columns, v_columns = (pl.ds(head * n, n) for n in (size.head_dim, size.v_head_dim))

                    @pl.loop(0, count * parts)
                    def copy_queries(i):
                        slot = jax.lax.rem(step + i, int32(stages))
                        query, part = first + jax.lax.div(i, int32(parts)), jax.lax.rem(i, int32(parts))
                        lines = pl.ds(part * HALF, HALF)
                        pl.when(step + i >= stages)(lambda: await_reuse(s["q_free"].at[slot]))
                        full_queries = s["q_full"].at[slot]
                        source = hbm["vectors"].at[batch, head, parts * query + part]
                        plgpu.copy_gmem_to_smem(source, s["vectors"].at[slot], full_queries)
                        if has_ids:
                            source = hbm["query_ids"].at[batch, parts * (query + size.offset) + part]
                            plgpu.copy_gmem_to_smem(source, s["query_ids"].at[slot], full_queries)
                        version = size.query_tile(first_version + query, batch)
                        plgpu.copy_gmem_to_smem(hbm["q"].at[version, lines, columns], s["q"].at[slot], full_queries)
                        source = hbm["dout"].at[batch * size.num_queries + query, lines, v_columns]
                        plgpu.copy_gmem_to_smem(source, s["dout"].at[slot], full_queries)

                    return step + count * parts

                return loop(0, group, copy_head, step)

            steps = loop(start, end, copy_row, int32(0))

            drain(steps, stages, s["q_free"])
            drain(end - start, num_buffers, s["k_free"])

        @pl.when(warpgroup < 2)
        def compute():
            plgpu.set_max_registers(240, action="increase")
            base = warpgroup * HALF
            mine = pl.ds(base, HALF)
            plgpu.barrier_wait(s["own_full"])
            key_ids = no_padding(load(s["key_ids"].at[mine], ROWS)) if has_ids else None
            s_sums = s["sums"]
            for g in range(group):
                s_sums[g, mine] = full((HALF,), 0, ROWS)

            def attend(i, carry, g, buffer, first, is_nearest):
                """64 queries; the nearest tile may be that of the keys."""
                dk, dv, sums, between = carry
                slot = jax.lax.rem(i, int32(stages))
                query = first + jax.lax.div(i, int32(parts))
                is_own = query + size.offset == tile
                plgpu.barrier_wait(s["q_full"].at[slot])

                def products(z_ref, dp_ref):
                    plgpu.wgmma(z_ref, s["k"].at[buffer].at[mine], s["q"].at[slot].T)
                    plgpu.wgmma(dp_ref, s["v"].at[mine], s["dout"].at[slot].T)
                    z = plgpu.wgmma_accumulator_load(z_ref, wait_n=1)
                    row = full((HALF,), 0, ROWS) + between
                    if has_gate:
                        row = row + load(s["gate"].at[g, 1, mine], ROWS)
                        if is_nearest:
                            # A product, as Mosaic has no choice between vectors by a scalar.
                            own = is_own.astype(jnp.float32)
                            row = (1 - own) * row - own * load(s["gate"].at[g, 0, mine], ROWS)
                    lse = load(s["vectors"].at[slot, pl.ds(0, HALF)], COLUMNS)
                    weights = jnp.exp2(z * size.logit_scale + along(row, 0, z) - along(lse, 1, z))
                    spots = ids = None
                    if is_nearest or has_window:
                        before = (query + size.offset - tile) * TILE + jax.lax.rem(i, int32(parts)) * HALF
                        columns = places(HALF, 0, COLUMNS) if is_nearest else load(s["columns"], COLUMNS)
                        query_places, key_places = columns + before, places(HALF, base, ROWS)
                        spots = along(query_places, 1, z), along(key_places, 0, z)
                    if has_ids:
                        ids = along(load(s["query_ids"].at[slot], COLUMNS), 1, z), along(key_ids, 0, z)
                    weights = hide(weights, 0.0, spots, size.window, ids)
                    return weights, dp_ref[...]

                accumulator = plgpu.ACC((HALF, HALF), jnp.float32)
                weights, dp = pl.run_scoped(products, accumulator, accumulator)
                delta = load(s["vectors"].at[slot, pl.ds(HALF, HALF)], COLUMNS)
                ds = weights * (dp - along(delta, 1, dp))
                if has_gate:
                    sums = sums + ds.sum(axis=1)
                    # Behind the keys' own tile nothing lies between it and the next.
                    between = between + jnp.where(is_own, 0.0, s["vectors"][slot, 2 * HALF])
                dv, dk = accumulate(
                    size.interpret,
                    (dv, weights.astype(v.dtype), s["dout"].at[slot]),
                    (dk, ds.astype(q.dtype), s["q"].at[slot]),
                )
                plgpu.barrier_arrive(s["q_free"].at[slot])
                return dk, dv, sums, between

            start, end = rows_of_tile()

            def attend_row(row, dv):
                buffer = jax.lax.rem(row - start, int32(num_buffers))
                plgpu.barrier_wait(s["k_full"].at[buffer])

                def attend_head(g, carry):
                    dk, dv = carry
                    head = kv_head * group + g
                    first, count = queries(row, head)
                    between = hbm["between"][batch, head, row] if has_gate else jnp.float32(0)
                    visit = lambda is_nearest: lambda i, carry: attend(i, carry, g, buffer, first, is_nearest)
                    carry = dk, dv, full((HALF,), 0, ROWS), between
                    if not tree:
                        carry = loop(0, parts, visit(True), carry)
                    dk, dv, sums, _ = loop(0 if tree else parts, count * parts, visit(False), carry)
                    s_sums[g, mine] = load(s_sums.at[g, mine], ROWS) + sums
                    return dk, dv

                dk, dv = loop(0, group, attend_head, (full((HALF, size.head_dim), 0, MATRIX), dv))
                out = s["k"].at[buffer].at[mine]
                out[...] = (dk * (size.logit_scale / LOG2E)).astype(k.dtype)
                plgpu.commit_smem()
                version = size.key_tile(hbm["table"][row, 0], batch)
                plgpu.copy_smem_to_gmem(out, dk_hbm.at[version, mine, panel])
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                plgpu.barrier_arrive(s["k_free"].at[buffer])
                return dv

            dv = loop(start, end, attend_row, full((HALF, size.v_head_dim), 0, MATRIX))
            out = s["v"].at[mine]
            out[...] = dv.astype(v.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out, dv_hbm.at[batch * size.num_keys + tile, mine, v_panel])
            for g in range(group):
                target = sums_hbm.at[batch, kv_head * group + g, tile, mine]
                plgpu.copy_smem_to_gmem(s_sums.at[g, mine], target)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    scratch = dict(
        q=swizzled((stages, HALF, size.head_dim), q.dtype),
        dout=swizzled((stages, HALF, size.v_head_dim), v.dtype),
        k=swizzled((num_buffers, TILE, size.head_dim), k.dtype),
        v=swizzled((TILE, size.v_head_dim), v.dtype),
        vectors=vector(stages, 2 * HALF + 4),
        sums=vector(group, TILE),
        own_full=plgpu.Barrier(num_arrivals=1 + 2 * group * has_gate + has_ids + has_window),
        k_full=barriers(num_buffers),
        q_full=barriers(stages, 3 + has_ids),
        k_free=barriers(num_buffers, 2),
        q_free=barriers(stages, 2),
    )
    if has_gate:
        scratch |= dict(gate=vector(group, 2, TILE))
    if has_ids:
        scratch |= dict(query_ids=vector(stages, HALF, dtype=jnp.int32), key_ids=vector(TILE, dtype=jnp.int32))
    scratch |= dict(columns=vector(HALF, dtype=jnp.int32)) if has_window else {}
    return plgpu.kernel(
        key_gradient_kernel,
        out_type=(
            jax.ShapeDtypeStruct(k.shape, k.dtype),
            jax.ShapeDtypeStruct(v.shape, v.dtype),
            jax.ShapeDtypeStruct((size.batch, size.num_heads, size.num_keys, TILE), jnp.float32),
        ),
        scratch_types=scratch,
        grid=(size.num_kv_heads, size.num_keys, size.batch),
        grid_names=("head", "tile", "batch"),
        num_threads=3,
        thread_name="warpgroup",
        compiler_params=compiler_params(),
        interpret=interpret_mode(size.interpret),
    )(*operands.values())
