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
    hide,
    int32,
    interpret_mode,
    load,
    no_padding,
    places,
    swizzled,
)


def _product(shape, *terms):
    """Sum of a @ b over (a, b) in shared memory, float32."""

    def run(accumulator):
        for a, b in terms:
            plgpu.wgmma(accumulator, a, b)
        return accumulator[...]

    return pl.run_scoped(run, plgpu.ACC(shape, jnp.float32))


def _split(refs, x):
    """Writes x as hi + lo."""
    hi, lo = refs
    rounded = x.astype(hi.dtype)
    hi[...] = rounded
    lo[...] = (x - rounded.astype(jnp.float32)).astype(hi.dtype)
    plgpu.commit_smem()


def _crossed(a, b):
    """Terms of (a_hi + a_lo) @ (b_hi + b_lo), without what is below their rounding."""
    return (a[0], b[0]), (a[1], b[0]), (a[0], b[1])


def tile_forward(q, k, v, w, beta, inside, segment_ids, size: Geometry):
    """Linear stage and attention inside tiles.

    Args:
      q: [B tiles, 128, N H]; k, w: [B tiles, 128, K H]; v: [B tiles, 128, K Hv]; all of one 16-bit dtype.
      beta: float32 [B, K, tiles, 128].
      inside: sums of base-2 gates up to and with each token of a tile [B, N, tiles, 128], or None.
      segment_ids: int32 [B, tiles, 128], or None.

    Returns:
      q in the frame of its tile's start and k in that of its end, like q and k; the product of the tile's Householder
      matrices [B tiles, K H, H] (rows of a head together) in q's dtype; output float32 [B tiles, 128, N Hv] and base-2
      log-sum-exp without the query's gate [B, N, tiles, 128], LEAST where a query sees nothing.
    """
    group = size.num_heads // size.num_kv_heads
    has_gate, has_ids = inside is not None, segment_ids is not None
    head_dim, v_head_dim = size.head_dim, size.v_head_dim
    square = (HALF, HALF)
    operands = dict(q=q, k=k, v=v, w=w, beta=beta)
    operands |= dict(inside=inside) if has_gate else {}
    operands |= dict(ids=segment_ids) if has_ids else {}
    names = tuple(operands)
    borrows = head_dim == 128  # the values of a block take the place of w or z, which are done by then

    def tile_forward_kernel(*refs, **s):
        hbm = dict(zip(names, refs))
        q_top, k_bottom, transition, out_hbm, lse_hbm = refs[len(names) :]
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

        def load_values():
            v_columns = pl.ds(kv_head * v_head_dim, v_head_dim)
            for i in range(2):
                plgpu.copy_gmem_to_smem(hbm["v"].at[index, pl.ds(HALF * i, HALF), v_columns], values(i), s["v_full"])

        # Vectors come from global memory: of shared memory nothing is left.
        near = lambda name, head, tokens, layout: load(hbm[name].at[*head, tokens], layout, optimized=False)
        beta_of = functools.partial(near, "beta", (batch, kv_head, tile), block)

        @pl.when(warpgroup == 0)
        def load_inputs():
            for name, panel in (("w", kv_columns), ("k", kv_columns), ("q", columns)):
                plgpu.copy_gmem_to_smem(hbm[name].at[index, :, panel], s[name], s["loaded"])
            if not borrows:
                load_values()

        plgpu.barrier_wait(s["loaded"])
        zeros = full(square, 0, MATRIX)
        row, column = along(places(HALF, 0, ROWS), 0, zeros), along(places(HALF, 0, COLUMNS), 1, zeros)
        below = lambda a: jnp.where(row > column, a, 0.0)

        m = below(_product(square, (w, w.T)) * along(beta_of(ROWS), 0, zeros))
        apart = row ^ column  # its highest bit: the level at which row and column part
        inverse = jnp.where(row == column, 1.0, 0.0) - jnp.where(apart < 2, m, 0.0)
        for size_below in (2, 4, 8, 16, 32):
            _split(z, jnp.where((apart >= size_below) & (apart < 2 * size_below), m, 0.0))
            _split(x, inverse)
            product = _product(square, *_crossed(x, z))
            _split(z, product)
            inverse = inverse - _product(square, *_crossed(z, x))
        _split(x, inverse * along(beta_of(COLUMNS), 1, zeros))
        _split(u, _product((HALF, head_dim), (x[0], w), (x[1], w)))
        _split(z, below(_product(square, (w, k.T))))
        g = _product(square, *_crossed(x, z))
        _split(z, g)
        _split(x, jnp.where(row >= column, _product(square, (q, w.T)), 0.0))
        own = _product(square, (q, k.T)) - _product(square, *_crossed(x, z))

        wide = (HALF, head_dim)
        moved_q = load(q, MATRIX).astype(jnp.float32) - _product(wide, *_crossed(x, u))
        q[...] = moved_q.astype(q.dtype)
        moved_k = load(k, MATRIX).astype(jnp.float32) - _product(wide, (z[0].T, w), (z[1].T, w))
        k[...] = moved_k.astype(k.dtype)
        parts = []
        for i in range(head_dim // HALF):
            across = w.at[:, pl.ds(HALF * i, HALF)].T
            part = -_product(wide, (across, u[0]), (across, u[1]))
            at_row = along(places(HALF, HALF * i, ROWS), 0, part)
            part = jnp.where(at_row == along(places(head_dim, 0, COLUMNS), 1, part), part + 1, part)
            parts.append(part.astype(q.dtype))
        for i, part in enumerate(parts):
            s["u"].at[warpgroup, pl.ds(HALF * i, HALF)][...] = part
        plgpu.commit_smem()
        meet()
        if borrows:
            pl.when(warpgroup == 0)(load_values)

        across = _product(square, (q, s["k"].at[pl.ds(0, HALF)].T))

        @pl.when(warpgroup == 0)
        def move_keys():
            moved = _product(wide, (k, matrices[1].T))
            meet()
            k[...] = moved.astype(k.dtype)

        @pl.when(warpgroup == 1)
        def move_queries():
            moved = _product(wide, (q, matrices[0]))
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
            total = _product(wide, (matrices[1].at[rows], matrices[0]))
            place = transition.at[index, pl.ds(kv_head * head_dim + warpgroup * HALF, HALF)]
            plgpu.store(place, total.astype(q.dtype), optimized=False)

        def logits(raw, keys, keep):
            raw = raw * size.logit_scale
            if has_gate:
                raw = raw - along(near("inside", (batch, head, tile), keys, COLUMNS), 1, raw)
            ids = None
            if has_ids:
                query_ids = no_padding(near("ids", (batch, tile), block, ROWS))
                ids = along(query_ids, 0, raw), along(near("ids", (batch, tile), keys, COLUMNS), 1, raw)
            return hide(jnp.where(keep, raw, MASKED), MASKED, None, None, ids)

        first = pl.ds(0, HALF)
        own = logits(own, block, row >= column)
        across = logits(across, first, row + warpgroup * TILE >= TILE)  # the first block has no other before it
        largest = jnp.maximum(jnp.maximum(own.max(axis=1), across.max(axis=1)), LEAST)
        own, across = (jnp.exp2(z - along(largest, 0, z)) for z in (own, across))
        normaliser = own.sum(axis=1) + across.sum(axis=1)
        x[0][...] = own.astype(q.dtype)
        x[1][...] = across.astype(q.dtype)
        plgpu.commit_smem()
        plgpu.barrier_wait(s["v_full"])
        out = _product((HALF, v_head_dim), (x[0], values(warpgroup)), (x[1], values(0)))
        is_empty = normaliser == 0
        normaliser = jnp.where(is_empty, 1.0, normaliser)
        lse = jnp.where(is_empty, LEAST, largest + jnp.log2(normaliser))
        plgpu.store(lse_hbm.at[batch, head, tile, block], lse, optimized=False)
        place = out_hbm.at[index, block, pl.ds(head * v_head_dim, v_head_dim)]
        plgpu.store(place, out * along(1 / normaliser, 0, out), optimized=False)
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
    scratch |= {} if borrows else dict(v=swizzled((TILE, v_head_dim), dtype))
    num_tiles = size.batch * size.num_keys
    return plgpu.kernel(
        tile_forward_kernel,
        out_type=(
            jax.ShapeDtypeStruct(q.shape, dtype),
            jax.ShapeDtypeStruct(k.shape, dtype),
            jax.ShapeDtypeStruct((num_tiles, size.num_kv_heads * head_dim, head_dim), dtype),
            jax.ShapeDtypeStruct((num_tiles, TILE, size.num_heads * v_head_dim), jnp.float32),
            jax.ShapeDtypeStruct((size.batch, size.num_heads, size.num_keys, TILE), jnp.float32),
        ),
        scratch_types=scratch,
        grid=(size.num_heads, size.num_keys, size.batch),
        grid_names=("head", "tile", "batch"),
        num_threads=2,
        thread_name="warpgroup",
        compiler_params=compiler_params(),
        interpret=interpret_mode(size.interpret),
    )(*operands.values())
