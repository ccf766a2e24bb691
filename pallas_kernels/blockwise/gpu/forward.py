"""The quadratic stage on Hopper, forward: flash attention on level-indexed operands, in Pallas:Mosaic GPU.

One thread block per head, tile of 128 queries and batch row. Warpgroups 0 and 1 compute 64 rows each and take turns on
the tensor core; warpgroup 2 copies tiles by TMA, some stages ahead. Keys are visited from the nearest to the farthest,
so the gates between two tiles are a running sum and no difference of long sums is ever taken.

Logits are base 2 and lack the query's own gate, which cancels in the softmax: that is added to the log-sum-exp outside.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.blockwise.gpu import schedule
from pallas_kernels.blockwise.gpu.layout import LEAST, MASKED, TILE, Geometry
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


def attention_forward(q, k, v, gate, segment_ids, first_key, partial, size: Geometry, *, stages: int = 2):
    """Attention of tiles of queries to the tiles of keys of their rows.

    Args:
      q: [query versions x B, 128, N H]; k: [key versions x B, 128, K H], 16-bit; see Geometry for their order.
      v: [B key tiles, 128, K Hv].
      gate: None, or a tuple of sums of base-2 gates over parts of a tile: up to and with each key
        [B, N, key tiles, 128], behind each key and over the tile [B, N, key tiles, 132] (128 + 1, padded), and between
        the nearest key tile of each row of queries and its queries [B, N, rows].
      segment_ids: int32 [B, key tiles, 128], or None.
      first_key: first tile of keys that each tile of queries needs, int32 [B, N, query tiles], or None.
      partial: with the tree, what each query found in its own tile: output float32 [B query tiles, 128, N Hv] and
        base-2 log-sum-exp [B, N, query tiles, 128], LEAST where it found nothing.

    Returns:
      Output like `partial`'s in v's dtype, and log-sum-exp, base 2, LEAST where there is no key.
    """
    rows = schedule.query_rows(size.num_queries, size.num_keys, size.tree, size.window)
    num_buffers = 2 if size.tree else 1
    group = size.num_heads // size.num_kv_heads
    has_gate, has_ids, has_first, tree = gate is not None, segment_ids is not None, first_key is not None, size.tree
    has_window = size.window is not None
    operands = dict(q=q, k=k, v=v, table=rows.table, starts=rows.starts)
    if has_gate:
        operands |= dict(zip(("inside", "behind", "between"), gate))
    operands |= dict(ids=segment_ids) if has_ids else {}
    operands |= dict(first=first_key) if has_first else {}
    operands |= dict(zip(("partial_out", "partial_lse"), partial)) if tree else {}
    operands |= dict(columns=np.arange(TILE, dtype=np.int32)) if has_window else {}
    names = tuple(operands)

    def attention_forward_kernel(*refs, **s):
        hbm = dict(zip(names, refs))
        out_hbm, lse_hbm = refs[len(names) :]
        head, batch, warpgroup = (jax.lax.axis_index(name) for name in ("head", "batch", "warpgroup"))
        tile = size.num_queries - 1 - jax.lax.axis_index("tile")  # the longest first
        kv_head = jax.lax.div(head, int32(group))
        position = tile + size.offset  # of the queries' tile among the keys'
        start, end = hbm["starts"][tile], hbm["starts"][tile + 1]

        def each_row(body, carry):
            """body(row, count, carry) over the rows; visits keys `last - i` for i < count."""

            def visit(row, carry):
                first = hbm["table"][row, 2]
                bound = jnp.maximum(first, hbm["first"][batch, head, tile]) if has_first else first
                return body(row, jnp.maximum(hbm["table"][row, 3] - bound, 0), carry)

            return loop(start, end, visit, carry)

        @pl.when(warpgroup == 2)
        def produce():
            plgpu.set_max_registers(24, action="decrease")
            own = s.get("own_full") if tree else s["q_full"].at[0]
            if not tree and has_gate:
                plgpu.copy_gmem_to_smem(hbm["inside"].at[batch, head, position], s["inside"], own)
            if has_ids:
                plgpu.copy_gmem_to_smem(hbm["ids"].at[batch, position], s["query_ids"], own)
            if has_window:
                plgpu.copy_gmem_to_smem(hbm["columns"], s["columns"], own)

            def copy_row(row, count, step):
                buffer, last = jax.lax.rem(row - start, int32(num_buffers)), hbm["table"][row, 3] - 1
                if tree:
                    pl.when(row - start >= num_buffers)(lambda: plgpu.barrier_wait(s["q_free"].at[buffer]))
                panel = pl.ds(head * size.head_dim, size.head_dim)
                version = size.query_tile(hbm["table"][row, 0], batch)
                plgpu.copy_gmem_to_smem(hbm["q"].at[version, :, panel], s["q"].at[buffer], s["q_full"].at[buffer])
                first_version = hbm["table"][row, 4] - hbm["table"][row, 2]

                @pl.loop(0, count)
                def copy_keys(i):
                    slot, key = jax.lax.rem(step + i, int32(stages)), last - i
                    pl.when(step + i >= stages)(lambda: await_reuse(s["k_free"].at[slot]))
                    full_keys = s["k_full"].at[slot]
                    if has_gate:
                        plgpu.copy_gmem_to_smem(hbm["behind"].at[batch, head, key], s["behind"].at[slot], full_keys)
                    if has_ids:
                        plgpu.copy_gmem_to_smem(hbm["ids"].at[batch, key], s["key_ids"].at[slot], full_keys)
                    panel = pl.ds(kv_head * size.head_dim, size.head_dim)
                    version = size.key_tile(first_version + key, batch)
                    plgpu.copy_gmem_to_smem(hbm["k"].at[version, :, panel], s["k"].at[slot], full_keys)
                    pl.when(step + i >= stages)(lambda: await_reuse(s["v_free"].at[slot]))
                    panel = pl.ds(kv_head * size.v_head_dim, size.v_head_dim)
                    plgpu.copy_gmem_to_smem(
                        hbm["v"].at[batch * size.num_keys + key, :, panel], s["v"].at[slot], s["v_full"].at[slot]
                    )

                return step + count

            steps = each_row(copy_row, int32(0))

            drain(steps, stages, s["k_free"], s["v_free"])
            if tree:
                drain(end - start, num_buffers, s["q_free"])

        @pl.when(warpgroup < 2)
        def compute():
            plgpu.set_max_registers(240, action="increase")
            base = warpgroup * HALF
            mine = pl.ds(base, HALF)

            def take_turn():
                plgpu.barrier_arrive(s["turn"])
                plgpu.barrier_wait(s["turn"])

            if not tree:
                plgpu.barrier_wait(s["q_full"].at[0])
            elif has_ids:
                plgpu.barrier_wait(s["own_full"])
            query_ids = no_padding(load(s["query_ids"].at[mine], ROWS)) if has_ids else None
            pl.when(warpgroup == 1)(take_turn)

            def attend(slot, buffer, key, carry, is_own):
                """One tile of keys; `is_own` (static): that of the queries."""
                acc, maximum, normaliser, between = carry
                plgpu.barrier_wait(s["k_full"].at[slot])

                def product(ref):
                    plgpu.wgmma(ref, s["q"].at[buffer].at[mine], s["k"].at[slot].T)
                    take_turn()
                    return ref[...]

                z = pl.run_scoped(product, plgpu.ACC((HALF, TILE), jnp.float32)) * size.logit_scale
                shift = between
                if has_gate:
                    if is_own:
                        z = z - along(load(s["inside"], COLUMNS), 1, z)
                    else:
                        z = z + along(load(s["behind"].at[slot, pl.ds(0, TILE)], COLUMNS), 1, z)
                        between = between + s["behind"][slot, TILE]
                spots = ids = None
                if is_own or has_window:
                    query_places = places(HALF, base, ROWS)
                    columns = places(TILE, 0, COLUMNS) if is_own else load(s["columns"], COLUMNS)
                    key_places = columns + (key - position) * TILE
                    spots = along(query_places, 0, z), along(key_places, 1, z)
                if has_ids:
                    ids = along(query_ids, 0, z), along(load(s["key_ids"].at[slot], COLUMNS), 1, z)
                z = hide(z, MASKED, spots, size.window, ids)
                plgpu.barrier_arrive(s["k_free"].at[slot])
                # The gates between the tiles join the maximum, not every element.
                larger = jnp.maximum(maximum, z.max(axis=1) + shift)
                decay = jnp.exp2(maximum - larger)
                weights = jnp.exp2(z - along(larger - shift, 0, z))
                normaliser = normaliser * decay + weights.sum(axis=1)
                acc = acc * along(decay, 0, acc)
                weights = weights.astype(v.dtype)
                acc, normaliser, larger, weights = jax.lax.optimization_barrier((acc, normaliser, larger, weights))
                plgpu.barrier_wait(s["v_full"].at[slot])
                take_turn()
                (acc,) = accumulate(size.interpret, (acc, weights, s["v"].at[slot]))
                plgpu.barrier_arrive(s["v_free"].at[slot])
                return acc, larger, normaliser, between

            def attend_row(row, count, carry):
                *carry, step = carry
                buffer, last = jax.lax.rem(row - start, int32(num_buffers)), hbm["table"][row, 3] - 1
                if tree:
                    plgpu.barrier_wait(s["q_full"].at[buffer])
                between = hbm["between"][batch, head, row] if has_gate else jnp.float32(0)
                carry = (*carry, between)
                visit = lambda i, carry, is_own: attend(
                    jax.lax.rem(step + i, int32(stages)), buffer, last - i, carry, is_own
                )
                if not tree:
                    carry = visit(int32(0), carry, True)
                carry = loop(0 if tree else 1, count, functools.partial(visit, is_own=False), carry)
                if tree:
                    plgpu.barrier_arrive(s["q_free"].at[buffer])
                return *carry[:3], step + count

            if tree:
                tile_index = batch * size.num_queries + tile
                columns = pl.ds(head * size.v_head_dim, size.v_head_dim)
                acc = load(hbm["partial_out"].at[tile_index, mine, columns], MATRIX, optimized=False)
                maximum = load(hbm["partial_lse"].at[batch, head, tile, mine], ROWS, optimized=False)
                normaliser = jnp.where(maximum > LEAST, 1.0, 0.0)
            else:
                acc = full((HALF, size.v_head_dim), 0, MATRIX)
                maximum, normaliser = full((HALF,), LEAST, ROWS), full((HALF,), 0, ROWS)
            acc, maximum, normaliser, _ = each_row(attend_row, (acc, maximum, normaliser, int32(0)))
            pl.when(warpgroup == 0)(take_turn)

            is_empty = normaliser == 0
            normaliser = jnp.where(is_empty, 1.0, normaliser)
            s["lse"][mine] = jnp.where(is_empty, LEAST, maximum + jnp.log2(normaliser))
            # Both are done with the values: their first buffer takes the output.
            take_turn()
            out = s["v"].at[0].at[mine]
            out[...] = (acc * along(1 / normaliser, 0, acc)).astype(v.dtype)
            plgpu.commit_smem()
            columns = pl.ds(head * size.v_head_dim, size.v_head_dim)
            plgpu.copy_smem_to_gmem(out, out_hbm.at[batch * size.num_queries + tile, mine, columns])
            plgpu.copy_smem_to_gmem(s["lse"].at[mine], lse_hbm.at[batch, head, tile, mine])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    scratch = dict(
        q=swizzled((num_buffers, TILE, size.head_dim), q.dtype),
        k=swizzled((stages, TILE, size.head_dim), k.dtype),
        v=swizzled((stages, TILE, size.v_head_dim), v.dtype),
        lse=vector(TILE),
        q_full=barriers(num_buffers, 1 if tree else 1 + has_gate + has_ids + has_window),
        k_full=barriers(stages, 1 + has_gate + has_ids),
        v_full=barriers(stages),
        k_free=barriers(stages, 2),
        v_free=barriers(stages, 2),
        turn=plgpu.Barrier(num_arrivals=2),
    )
    if tree:
        scratch |= dict(q_free=barriers(num_buffers, 2))
        scratch |= dict(own_full=plgpu.Barrier(num_arrivals=1)) if has_ids else {}
    if has_window:
        scratch |= dict(columns=vector(TILE, dtype=jnp.int32))
    if has_gate:
        scratch |= dict(behind=vector(stages, TILE + 4))
        scratch |= {} if tree else dict(inside=vector(TILE))
    if has_ids:
        scratch |= dict(key_ids=vector(stages, TILE, dtype=jnp.int32), query_ids=vector(TILE, dtype=jnp.int32))
    num_tiles = size.batch * size.num_queries
    return plgpu.kernel(
        attention_forward_kernel,
        out_type=(
            jax.ShapeDtypeStruct((num_tiles, TILE, size.num_heads * size.v_head_dim), v.dtype),
            jax.ShapeDtypeStruct((size.batch, size.num_heads, size.num_queries, TILE), jnp.float32),
        ),
        scratch_types=scratch,
        grid=(size.num_heads, size.num_queries, size.batch),
        grid_names=("head", "tile", "batch"),
        num_threads=3,
        thread_name="warpgroup",
        compiler_params=compiler_params(),
        interpret=interpret_mode(size.interpret),
    )(*operands.values())
