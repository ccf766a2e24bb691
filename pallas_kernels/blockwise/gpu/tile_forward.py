"""The linear stage of one tile of 128 tokens on Hopper, and attention inside the tile, in Pallas:Mosaic GPU.

One thread block per query head, tile and batch row; its two warpgroups take a block of 64 tokens each. Per block, with
rows Q, K, W and D = diag(beta),

    X = (I + D tril(W W^T, -1))^-1     A = X D     U = A W     G = A tril(W K^T, -1)     Y = tril(Q W^T)
    P = I - W^T U     Q' = Q - Y U     K' = K - G^T W     S = tril(Q K^T) - Y G

and over the tile, of blocks 0 and 1, P = P1 P0, Q'1 -> Q'1 P0, K'0 -> K'0 P1^T, with logits Q'1 K'0^T between them. The
heads of a group do the work of their keys anew: what that costs per query head is the same with and without grouping.

X comes from doubling: the inverse X of the diagonal blocks of s rows and M, what is left of the matrix in the diagonal
blocks of 2 s, give X - X M X. Like `householder.unit_lower_inverse`, and unlike a Neumann series, this grows no
intermediate. Operands of these products that are not rounded anyway are split into hi + lo of 16 bits each.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.blockwise.gpu.layout import LEAST, MASKED, TILE, Geometry
from pallas_kernels.blockwise.gpu.primitives import (
    COLUMNS,
    HALF,
    MATRIX,
    ROWS,
    along,
    compiler_params,
    full,
    int32,
    interpret_mode,
    load,
    places,
    swizzled,
)
from pallas_kernels.blockwise.gpu.products import crossed, product, split


class Kept(NamedTuple):
    """What the backward pass of the linear stage starts from; see `tile_forward`. Rows of heads are together."""

    q_inner: jax.Array  # Q' of block 1 [B tiles, 64, N H]
    k_inner: jax.Array  # K' of block 0 [B tiles, 64, K H]
    products: jax.Array  # P of each block [B tiles, 2, K H, H]
    inverse: jax.Array  # X as hi, lo [B tiles, 2, K, 2, 64, 64]
    dlogits: jax.Array  # of the logits S of each block, and of block 1 with 0 [B tiles, 3, N, 64, 64]
    dv: jax.Array  # float32, by query head [B tiles, 128, N Hv]


def _hidden(segment_ids):
    """MASKED where a query does not see a key, else 0: of the blocks of each tile, and of block 1 with 0.

    Float32 [B tiles, 3, 64, 64]. There is no shared memory for the documents, and Mosaic cannot infer the layouts of
    comparisons of what comes from global memory.
    """
    ids = segment_ids.reshape(-1, TILE)
    sees = (ids[:, :, None] == ids[:, None, :]) & (ids[:, :, None] > 0)
    first, second = slice(0, HALF), slice(HALF, TILE)
    parts = [sees[:, rows, columns] for rows, columns in ((first, first), (second, second), (second, first))]
    return jnp.where(jnp.stack(parts, 1), 0.0, MASKED)


def tile_forward(q, k, v, w, beta, inside, segment_ids, size: Geometry, cotangents=None):
    """Linear stage and attention inside tiles, or the latter's gradient.

    Args:
      q: [B tiles, 128, N H]; k, w: [B tiles, 128, K H]; v: [B tiles, 128, K Hv]; all of one 16-bit dtype.
      beta: float32 [B, K, tiles, 128].
      inside: sums of base-2 gates up to and with each token of a tile [B, N, tiles, 128], or None.
      segment_ids: int32 [B, tiles, 128], or None.
      cotangents: None, or dout [B tiles, 128, N Hv] in v's dtype, and lse and delta [B, N, tiles, 128] of the whole
        attention; lse is large where a query sees nothing.

    Returns:
      q in the frame of its tile's start and k in that of its end, like q and k; the product of the tile's Householder
      matrices [B tiles, K H, H] (rows of a head together) in q's dtype; and then without cotangents the output float32
      [B tiles, 128, N Hv] and base-2 log-sum-exp without the query's gate [B, N, tiles, 128], LEAST where a query sees
      nothing; with them `Kept`, the gradient of logits without the factor `scale` and in q's dtype like all but dv.
    """
    group = size.num_heads // size.num_kv_heads
    has_gate, forward = inside is not None, cotangents is None
    head_dim, v_head_dim = size.head_dim, size.v_head_dim
    square = (HALF, HALF)
    operands = dict(q=q, k=k, v=v, w=w, beta=beta)
    operands |= dict(inside=inside) if has_gate else {}
    operands |= dict(hidden=_hidden(segment_ids)) if segment_ids is not None else {}
    operands |= {} if forward else dict(zip(("dout", "lse", "delta"), cotangents))
    names = tuple(operands)
    borrows = head_dim == 128  # the values of a block take the place of w or z, which are done by then

    def tile_forward_kernel(*refs, **s):
        hbm = dict(zip(names, refs))
        q_top, k_bottom, transition, *results = refs[len(names) :]
        head, tile, batch, warpgroup = (jax.lax.axis_index(name) for name in ("head", "tile", "batch", "warpgroup"))
        kv_head = jax.lax.div(head, int32(group))
        is_first = jax.lax.rem(head, int32(group)) == 0
        index = batch * size.num_keys + tile
        columns, kv_columns = (pl.ds(h * head_dim, head_dim) for h in (head, kv_head))
        block = pl.ds(warpgroup * HALF, HALF)
        w, k, q = (s[name].at[block] for name in ("w", "k", "q"))
        x, z = ((s[name].at[warpgroup, 0], s[name].at[warpgroup, 1]) for name in ("x", "z"))
        u = tuple(s["u"].at[warpgroup, pl.ds(HALF * i, HALF)] for i in range(2))
        matrices = tuple(s["u"].at[i, pl.ds(0, head_dim)] for i in range(2))  # P of each block, where U was

        def meet():
            plgpu.barrier_arrive(s["both"])
            plgpu.barrier_wait(s["both"])

        def values(i):
            """Of the tokens of a block."""
            if borrows and v_head_dim == HALF:
                return s["z"].at[i, 0]
            return s["w" if borrows else "v"].at[pl.ds(i * HALF, HALF)]

        def douts(i):
            """Cotangents of a block's output; they borrow from u or z, later than the values do."""
            if borrows:
                return s["z"].at[i, 1] if v_head_dim == HALF else s["u"].at[i, pl.ds(0, HALF)]
            return s["dout"].at[pl.ds(i * HALF, HALF)]

        def load_values():
            v_columns = pl.ds(kv_head * v_head_dim, v_head_dim)
            for i in range(2):
                plgpu.copy_gmem_to_smem(hbm["v"].at[index, pl.ds(HALF * i, HALF), v_columns], values(i), s["v_full"])

        def load_cotangents():
            v_columns = pl.ds(head * v_head_dim, v_head_dim)
            for i in range(2):
                rows = pl.ds(HALF * i, HALF)
                plgpu.copy_gmem_to_smem(hbm["dout"].at[index, rows, v_columns], douts(i), s["dout_full"])

        # Vectors come from global memory: of shared memory nothing is left.
        kept = None if forward else Kept(*results)
        near = lambda name, head, tokens, layout: load(hbm[name].at[*head, tokens], layout, optimized=False)
        beta_of = functools.partial(near, "beta", (batch, kv_head, tile), block)

        @pl.when(warpgroup == 0)
        def load_inputs():
            for name, panel in (("w", kv_columns), ("k", kv_columns), ("q", columns)):
                plgpu.copy_gmem_to_smem(hbm[name].at[index, :, panel], s[name], s["loaded"])
            if not borrows:
                load_values()
                if not forward:
                    load_cotangents()

        plgpu.barrier_wait(s["loaded"])
        zeros = full(square, 0, MATRIX)
        row, column = along(places(HALF, 0, ROWS), 0, zeros), along(places(HALF, 0, COLUMNS), 1, zeros)
        below = lambda a: jnp.where(row > column, a, 0.0)

        m = below(product(square, (w, w.T)) * along(beta_of(ROWS), 0, zeros))
        apart = row ^ column  # its highest bit: the level at which row and column part
        inverse = jnp.where(row == column, 1.0, 0.0) - jnp.where(apart < 2, m, 0.0)
        for size_below in (2, 4, 8, 16, 32):
            split(z, jnp.where((apart >= size_below) & (apart < 2 * size_below), m, 0.0))
            split(x, inverse)
            split(z, product(square, *crossed(x, z)))
            inverse = inverse - product(square, *crossed(z, x))
        if not forward:
            split(x, inverse)

            @pl.when(is_first)
            def keep_inverse():
                for i, part in enumerate(x):
                    plgpu.copy_smem_to_gmem(part, kept.inverse.at[index, warpgroup, kv_head, i])

            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        split(x, inverse * along(beta_of(COLUMNS), 1, zeros))
        split(u, product((HALF, head_dim), (x[0], w), (x[1], w)))
        split(z, below(product(square, (w, k.T))))
        g = product(square, *crossed(x, z))
        split(z, g)
        split(x, jnp.where(row >= column, product(square, (q, w.T)), 0.0))
        own = product(square, (q, k.T)) - product(square, *crossed(x, z))

        wide = (HALF, head_dim)
        moved_q = load(q, MATRIX).astype(jnp.float32) - product(wide, *crossed(x, u))
        q[...] = moved_q.astype(q.dtype)
        moved_k = load(k, MATRIX).astype(jnp.float32) - product(wide, (z[0].T, w), (z[1].T, w))
        k[...] = moved_k.astype(k.dtype)
        parts = []
        for i in range(head_dim // HALF):
            across = w.at[:, pl.ds(HALF * i, HALF)].T
            part = -product(wide, (across, u[0]), (across, u[1]))
            at_row = along(places(HALF, HALF * i, ROWS), 0, part)
            part = jnp.where(at_row == along(places(head_dim, 0, COLUMNS), 1, part), part + 1, part)
            parts.append(part.astype(q.dtype))
        for i, part in enumerate(parts):
            s["u"].at[warpgroup, pl.ds(HALF * i, HALF)][...] = part
        plgpu.commit_smem()
        if not forward:

            @pl.when(is_first)
            def keep_products():
                for i in range(head_dim // HALF):
                    rows = pl.ds(HALF * i, HALF)
                    place = kept.products.at[index, warpgroup, pl.ds(kv_head * head_dim + HALF * i, HALF)]
                    plgpu.copy_smem_to_gmem(s["u"].at[warpgroup, rows], place)

            @pl.when(is_first & (warpgroup == 0))
            def keep_keys():
                plgpu.copy_smem_to_gmem(k, kept.k_inner.at[index, :, kv_columns])

            @pl.when(warpgroup == 1)
            def keep_queries():
                plgpu.copy_smem_to_gmem(q, kept.q_inner.at[index, :, columns])

            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        meet()
        if borrows:
            pl.when(warpgroup == 0)(load_values)

        across = product(square, (q, s["k"].at[pl.ds(0, HALF)].T))

        @pl.when(warpgroup == 0)
        def move_keys():
            moved = product(wide, (k, matrices[1].T))
            meet()
            k[...] = moved.astype(k.dtype)

        @pl.when(warpgroup == 1)
        def move_queries():
            moved = product(wide, (q, matrices[0]))
            meet()
            q[...] = moved.astype(q.dtype)

        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q, q_top.at[index, block, columns])

        @pl.when(is_first)
        def store_shared():
            plgpu.copy_smem_to_gmem(k, k_bottom.at[index, block, kv_columns])

        @pl.when(is_first & (warpgroup < head_dim // HALF))
        def store_transition():
            rows = pl.ds(warpgroup * HALF, HALF)
            total = product(wide, (matrices[1].at[rows], matrices[0]))
            place = transition.at[index, pl.ds(kv_head * head_dim + warpgroup * HALF, HALF)]
            plgpu.store(place, total.astype(q.dtype), optimized=False)

        def logits(raw, part, keys, keep):
            raw = raw * size.logit_scale
            if has_gate:
                raw = raw - along(near("inside", (batch, head, tile), keys, COLUMNS), 1, raw)
            if "hidden" in hbm:
                raw = raw + load(hbm["hidden"].at[index, part], MATRIX, optimized=False)
            return jnp.where(keep, raw, MASKED)

        first = pl.ds(0, HALF)
        own = logits(own, warpgroup, block, row >= column)
        across = logits(across, 2, first, row + warpgroup * TILE >= TILE)  # the first block has no other before it

        def attend():
            out_hbm, lse_hbm = results
            largest = jnp.maximum(jnp.maximum(own.max(axis=1), across.max(axis=1)), LEAST)
            weights = [jnp.exp2(logits - along(largest, 0, logits)) for logits in (own, across)]
            normaliser = weights[0].sum(axis=1) + weights[1].sum(axis=1)
            for ref, part in zip(x, weights):
                ref[...] = part.astype(q.dtype)
            plgpu.commit_smem()
            plgpu.barrier_wait(s["v_full"])
            out = product((HALF, v_head_dim), (x[0], values(warpgroup)), (x[1], values(0)))
            is_empty = normaliser == 0
            normaliser = jnp.where(is_empty, 1.0, normaliser)
            lse = jnp.where(is_empty, LEAST, largest + jnp.log2(normaliser))
            plgpu.store(lse_hbm.at[batch, head, tile, block], lse, optimized=False)
            place = out_hbm.at[index, block, v_columns]
            plgpu.store(place, out * along(1 / normaliser, 0, out), optimized=False)

        def differentiate():
            if borrows:
                meet()  # both are done with what the cotangents take the place of
                pl.when(warpgroup == 0)(load_cotangents)
            lse, delta = (near(name, (batch, head, tile), block, ROWS) for name in ("lse", "delta"))
            weights = [jnp.exp2(logits - along(lse, 0, logits)) for logits in (own, across)]
            for ref, part in zip(x, weights):
                ref[...] = part.astype(q.dtype)
            plgpu.commit_smem()
            plgpu.barrier_wait(s["v_full"])
            plgpu.barrier_wait(s["dout_full"])
            dout = douts(warpgroup)

            def dlogits(part, i):
                return part * (product(square, (dout, values(i).T)) - along(delta, 0, part))

            place = kept.dlogits.at[index, warpgroup, head]
            plgpu.store(place, dlogits(weights[0], warpgroup).astype(q.dtype), optimized=False)
            meet()  # the weights of the second block are there
            tall = (HALF, v_head_dim)

            @pl.when(warpgroup == 0)
            def values_of_first():
                terms = (x[0].T, dout), (s["x"].at[1, 1].T, douts(1))
                plgpu.store(kept.dv.at[index, block, v_columns], product(tall, *terms), optimized=False)

            @pl.when(warpgroup == 1)
            def values_of_second():
                plgpu.store(kept.dv.at[index, block, v_columns], product(tall, (x[0].T, dout)), optimized=False)
                place = kept.dlogits.at[index, 2, head]
                plgpu.store(place, dlogits(weights[1], 0).astype(q.dtype), optimized=False)

        v_columns = pl.ds(head * v_head_dim, v_head_dim)
        attend() if forward else differentiate()
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    dtype = q.dtype
    scratch = dict(
        q=swizzled((TILE, head_dim), dtype),
        k=swizzled((TILE, head_dim), dtype),
        w=swizzled((TILE, head_dim), dtype),
        u=swizzled((2, TILE, head_dim), dtype),
        x=swizzled((2, 2, HALF, HALF), dtype),
        z=swizzled((2, 2, HALF, HALF), dtype),
        loaded=plgpu.Barrier(num_arrivals=3),
        v_full=plgpu.Barrier(num_arrivals=2),
        both=plgpu.Barrier(num_arrivals=2),
    )
    if not borrows:
        scratch |= dict(v=swizzled((TILE, v_head_dim), dtype))
        scratch |= {} if forward else dict(dout=swizzled((TILE, v_head_dim), dtype))
    if not forward:
        scratch |= dict(dout_full=plgpu.Barrier(num_arrivals=2))
    num_tiles, num_heads, num_kv_heads = size.batch * size.num_keys, size.num_heads, size.num_kv_heads
    result = lambda *shape, dtype=dtype: jax.ShapeDtypeStruct((num_tiles, *shape), dtype)
    if forward:
        results = (
            result(TILE, num_heads * v_head_dim, dtype=jnp.float32),
            jax.ShapeDtypeStruct((size.batch, num_heads, size.num_keys, TILE), jnp.float32),
        )
    else:
        results = Kept(
            q_inner=result(HALF, num_heads * head_dim),
            k_inner=result(HALF, num_kv_heads * head_dim),
            products=result(2, num_kv_heads * head_dim, head_dim),
            inverse=result(2, num_kv_heads, 2, HALF, HALF),
            dlogits=result(3, num_heads, HALF, HALF),
            dv=result(TILE, num_heads * v_head_dim, dtype=jnp.float32),
        )
    q_top, k_bottom, transition, *results = plgpu.kernel(
        tile_forward_kernel,
        out_type=(result(*q.shape[1:]), result(*k.shape[1:]), result(num_kv_heads * head_dim, head_dim), *results),
        scratch_types=scratch,
        grid=(size.num_heads, size.num_keys, size.batch),
        grid_names=("head", "tile", "batch"),
        num_threads=2,
        thread_name="warpgroup",
        compiler_params=compiler_params(),
        interpret=interpret_mode(size.interpret),
    )(*operands.values())
    return q_top, k_bottom, transition, *(results if forward else [Kept(*results)])
