"""Backward pass of the UT transform of a block of 64 tokens on Hopper, in Pallas:Mosaic GPU.

With the names of `tile_forward`, cotangents marked d, and sums over the query heads of a group where Q takes part:

    dY = -tril(dQ' U^T + dS G^T)         dU = -W dP - Y^T dQ'        dG = -W dK'^T - Y^T dS
    dA = tril(dU W^T + dG g^T)           dg = tril(A^T dG, -1)       where g = tril(W K^T, -1), G = A g
    R = X^T dA        dM = -tril(R D X^T, -1)        dbeta_i = R_ii + (dM * W W^T) 1_i        E = D dM
    dQ = dQ' + dY W + dS K
    dW = -U dP^T - G dK' + dY^T Q + A^T dU + dg K + (E + E^T) W
    dK = dK' + dS^T Q + dg^T W

One warpgroup per block and key head; everything small stays in shared memory, split into hi + lo.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.blockwise.gpu.layout import Geometry
from pallas_kernels.blockwise.gpu.primitives import (
    COLUMNS,
    HALF,
    MATRIX,
    ROWS,
    along,
    compiler_params,
    full,
    interpret_mode,
    load,
    loop,
    places,
    swizzled,
)
from pallas_kernels.blockwise.gpu.products import crossed, product, split


def block_backward(q, k, w, beta, inverse, dq, dk, dproducts, dlogits, size: Geometry):
    """Cotangents of the inputs of the UT transform, from those of its results.

    Args:
      q, k, w: [B blocks, 64, heads H], 16-bit; blocks = 2 tiles.
      beta: float32 [B, K, blocks, 64].
      inverse: X as hi, lo [B blocks, K, 2, 64, 64].
      dq, dk: of Q' and K', like q and k; dproducts: of P [B blocks, K H, H]; dlogits: of S [B blocks, N, 64, 64]; all
        in q's dtype.

    Returns:
      dq like q; dg^T W float32 like k, the part of dk that is left; dw float32 like w; dbeta like beta.
    """
    group = size.num_heads // size.num_kv_heads
    head_dim, num_blocks = size.head_dim, 2 * size.num_keys
    square, wide = (HALF, HALF), (HALF, size.head_dim)
    operands = dict(q=q, k=k, w=w, beta=beta, inverse=inverse, dq=dq, dk=dk, dproducts=dproducts, dlogits=dlogits)

    def block_backward_kernel(*refs, panel, **s):
        hbm = dict(zip(operands, refs))
        dq_hbm, dk_hbm, dw_hbm, dbeta_hbm = refs[len(operands) :]
        head, block, batch = (jax.lax.axis_index(name) for name in ("head", "block", "batch"))
        index = batch * num_blocks + block
        columns = pl.ds(head * head_dim, head_dim)
        pair = lambda name: (s[name].at[0], s[name].at[1])
        transposed = lambda refs: tuple(ref.T for ref in refs)
        a, u, g, gram_wk, y, dy = map(pair, ("a", "u", "g", "gram_wk", "y", "dy"))
        w, k, dk, ds = (s[name] for name in ("w", "k", "dk", "ds"))
        # Of the panel P takes all, then q and dq of one head after the other.
        dp, q, dq = panel.at[pl.ds(0, head_dim)], panel.at[pl.ds(0, HALF)], panel.at[pl.ds(HALF, HALF)]

        def load_inverse(refs, barrier):
            for i, ref in enumerate(refs):
                plgpu.copy_gmem_to_smem(hbm["inverse"].at[index, head, i], ref, barrier)

        for name in ("w", "k", "dk"):
            plgpu.copy_gmem_to_smem(hbm[name].at[index, :, columns], s[name], s["loaded"])
        plgpu.copy_gmem_to_smem(hbm["dproducts"].at[index, columns], dp, s["loaded"])
        load_inverse(y, s["loaded"])
        beta_of = lambda layout: load(hbm["beta"].at[batch, head, block], layout, optimized=False)
        zeros = full(square, 0, MATRIX)
        row, column = along(places(HALF, 0, ROWS), 0, zeros), along(places(HALF, 0, COLUMNS), 1, zeros)
        lower = lambda x: jnp.where(row >= column, x, 0.0)
        below = lambda x: jnp.where(row > column, x, 0.0)
        plgpu.barrier_wait(s["loaded"])

        x = load(y[0], MATRIX).astype(jnp.float32) + load(y[1], MATRIX).astype(jnp.float32)
        split(a, x * along(beta_of(COLUMNS), 1, x))
        split(u, product(wide, (a[0], w), (a[1], w)))
        split(gram_wk, below(product(square, (w, k.T))))
        split(g, product(square, *crossed(a, gram_wk)))
        du = -product(wide, (w, dp))
        dw = -product(wide, (u[0], dp.T), (u[1], dp.T), (g[0], dk), (g[1], dk))
        dg = -product(square, (w, dk.T))

        def visit(i, carry):
            """One query head of the group."""
            du, dw, dg = carry
            query_head = head * group + i
            query_columns = pl.ds(query_head * head_dim, head_dim)
            plgpu.copy_gmem_to_smem(hbm["q"].at[index, :, query_columns], q, s["head_loaded"])
            plgpu.copy_gmem_to_smem(hbm["dq"].at[index, :, query_columns], dq, s["head_loaded"])
            plgpu.copy_gmem_to_smem(hbm["dlogits"].at[index, query_head], ds, s["head_loaded"])
            plgpu.barrier_wait(s["head_loaded"])
            split(y, lower(product(square, (q, w.T))))
            split(dy, -lower(product(square, (dq, u[0].T), (dq, u[1].T), (ds, g[0].T), (ds, g[1].T))))
            du = du - product(wide, (y[0].T, dq), (y[1].T, dq))
            dg = dg - product(square, (y[0].T, ds), (y[1].T, ds))
            dw = dw + product(wide, (dy[0].T, q), (dy[1].T, q))
            moved = load(dq, MATRIX).astype(jnp.float32) + product(wide, (dy[0], w), (dy[1], w), (ds, k))
            plgpu.store(dq_hbm.at[index, :, query_columns], moved.astype(dq.dtype), optimized=False)
            plgpu.commit_smem()  # dq was read by ordinary loads, and is overwritten by the next copy
            return du, dw, dg

        du, dw, dg = loop(0, group, visit, (du, dw, dg))
        load_inverse(y, s["inverse_loaded"])
        split(u, du)
        split(g, dg)
        dw = dw + product(wide, *crossed(transposed(a), u))
        da = lower(product(square, (u[0], w.T), (u[1], w.T), *crossed(g, transposed(gram_wk))))
        split(dy, below(product(square, *crossed(transposed(a), g))))
        dw = dw + product(wide, (dy[0], k), (dy[1], k))
        rest = product(wide, (dy[0].T, w), (dy[1].T, w))
        plgpu.store(dk_hbm.at[index, :, columns], rest, optimized=False)
        split(g, da)
        plgpu.barrier_wait(s["inverse_loaded"])
        r = product(square, *crossed(transposed(y), g))
        dbeta = jnp.where(row == column, r, 0.0).sum(axis=1)
        split(g, r * along(beta_of(COLUMNS), 1, r))
        dm = -below(product(square, *crossed(g, transposed(y))))
        dbeta = dbeta + (dm * product(square, (w, w.T))).sum(axis=1)
        split(dy, dm * along(beta_of(ROWS), 0, dm))
        dw = dw + product(wide, (dy[0], w), (dy[1], w), (dy[0].T, w), (dy[1].T, w))
        plgpu.store(dw_hbm.at[index, :, columns], dw, optimized=False)
        plgpu.store(dbeta_hbm.at[batch, head, block], dbeta, optimized=False)

    dtype = q.dtype
    like = lambda x, dtype=jnp.float32: jax.ShapeDtypeStruct(x.shape, dtype)
    return plgpu.kernel(
        block_backward_kernel,
        out_type=(like(q, dtype), like(k), like(w), like(beta)),
        scratch_types=dict(
            panel=swizzled((2 * HALF, head_dim), dtype),
            ds=swizzled(square, dtype),
            **{name: swizzled(wide, dtype) for name in ("w", "k", "dk")},
            **{name: swizzled((2, *square), dtype) for name in ("a", "g", "gram_wk", "y", "dy")},
            u=swizzled((2, *wide), dtype),
            loaded=plgpu.Barrier(num_arrivals=6),
            head_loaded=plgpu.Barrier(num_arrivals=3),
            inverse_loaded=plgpu.Barrier(num_arrivals=2),
        ),
        grid=(size.num_kv_heads, num_blocks, size.batch),
        grid_names=("head", "block", "batch"),
        num_threads=1,
        thread_name="warpgroup",
        compiler_params=compiler_params(),
        interpret=interpret_mode(size.interpret),
    )(*operands.values())
