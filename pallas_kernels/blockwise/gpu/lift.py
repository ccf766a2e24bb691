"""Versions of queries and keys in the frame tree on Hopper, from those of their own tiles.

A query of a right sibling is carried through the product of the left sibling, a key of a left sibling through that of
the right one: x -> x M and x -> x M^T, level by level, M a node of the binary tree of products. One thread block walks
the chain of one tile and head; the next node is on its way while one is being multiplied.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.blockwise.gpu.layout import TILE, Geometry
from pallas_kernels.blockwise.gpu.primitives import (
    HALF,
    barriers,
    compiler_params,
    int32,
    interpret_mode,
    swizzled,
)
from pallas_kernels.blockwise.gpu.tree import chains


def lift_forward(x, tree, size: Geometry, *, keys: bool):
    """All versions [versions B, 128, heads H] of x.

    Args:
      x: queries in the frames of their tiles' starts [B tiles, 128, N H], or keys in those of their ends [.., K H].
      tree: see `tree.nodes`; dtype of x.
      keys: whether x are keys.
    """
    rows, starts = chains(size.num_keys, keys)
    head_dim, num_heads = size.head_dim, size.num_kv_heads if keys else size.num_heads
    group = num_heads // size.num_kv_heads

    def lift_forward_kernel(x_hbm, tree_hbm, rows_hbm, starts_hbm, out_hbm, x, node, x_full, node_full, both):
        head, tile, batch, warpgroup = (jax.lax.axis_index(name) for name in ("head", "tile", "batch", "warpgroup"))
        start = starts_hbm[tile]
        count = starts_hbm[tile + 1] - start
        columns = pl.ds(head * head_dim, head_dim)
        panel = pl.ds(jax.lax.div(head, int32(group)) * head_dim, head_dim)
        mine = pl.ds(warpgroup * HALF, HALF)

        def fetch(step):
            """Starts the copy of the node on the way to version `step`."""

            @pl.when((warpgroup == 0) & (step < count))
            def copy():
                slot = jax.lax.rem(step, int32(2))
                place = rows_hbm[start + step, 1] * size.batch + batch
                plgpu.copy_gmem_to_smem(tree_hbm.at[place, panel], node.at[slot], node_full.at[slot])

        def store(step):
            plgpu.commit_smem()
            place = rows_hbm[start + step, 0] * size.batch + batch
            plgpu.copy_smem_to_gmem(x.at[mine], out_hbm.at[place, mine, columns])

        @pl.when(count > 0)
        def walk():
            @pl.when(warpgroup == 0)
            def load():
                plgpu.copy_gmem_to_smem(x_hbm.at[batch * size.num_keys + tile, :, columns], x, x_full)

            fetch(int32(1))
            fetch(int32(2))
            plgpu.barrier_wait(x_full)
            store(int32(0))

            @pl.loop(int32(1), count)
            def multiply(step):
                slot = jax.lax.rem(step, int32(2))
                plgpu.barrier_wait(node_full.at[slot])

                def product(accumulator):
                    matrix = node.at[slot]
                    plgpu.wgmma(accumulator, x.at[mine], matrix.T if keys else matrix)
                    return accumulator[...]

                moved = pl.run_scoped(product, plgpu.ACC((HALF, head_dim), jnp.float32))
                plgpu.barrier_arrive(both)
                plgpu.barrier_wait(both)
                fetch(step + 2)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                x[mine] = moved.astype(x.dtype)
                store(step)

            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    return plgpu.kernel(
        lift_forward_kernel,
        out_type=jax.ShapeDtypeStruct((len(rows) * size.batch, TILE, num_heads * head_dim), x.dtype),
        scratch_types=dict(
            x=swizzled((TILE, head_dim), x.dtype),
            node=swizzled((2, head_dim, head_dim), x.dtype),
            x_full=plgpu.Barrier(num_arrivals=1),
            node_full=barriers(2),
            both=plgpu.Barrier(num_arrivals=2),
        ),
        grid=(num_heads, size.num_keys, size.batch),
        grid_names=("head", "tile", "batch"),
        num_threads=2,
        thread_name="warpgroup",
        compiler_params=compiler_params(),
        interpret=interpret_mode(size.interpret),
    )(x, tree, rows, starts)
