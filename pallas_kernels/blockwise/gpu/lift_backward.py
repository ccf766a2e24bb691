"""Cotangents of the lift on Hopper: two kernels in Pallas:Mosaic GPU, without atomics, hence deterministic.

The lift carries a tile along its chain of versions, y_s = y_{s-1} M (queries) or y_{s-1} M^T (keys), M the node of the
frame tree on the way to version s. With dy_s the cotangent of version s alone and g_s that of all that follows from it,

    g_{s-1} = dy_{s-1} + g_s M^T   dx = g_0   dM = y_{s-1}^T g_s    for queries,
    g_{s-1} = dy_{s-1} + g_s M     dx = g_0   dM = g_s^T y_{s-1}    for keys,

dM summed over all tiles and heads that pass the node:

* `lift_backward`, one thread block per tile and head, walks the chain back and writes down every g_s;
* `node_gradient`, one thread block per node and head of keys, sums dM over them.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.blockwise.gpu.layout import TILE, Geometry
from pallas_kernels.blockwise.gpu.primitives import (
    HALF,
    MATRIX,
    barriers,
    compiler_params,
    full,
    int32,
    interpret_mode,
    load,
    loop,
    swizzled,
)
from pallas_kernels.blockwise.gpu.products import product
from pallas_kernels.blockwise.gpu.tree import chains
from pallas_kernels.householder import frame_tree_levels


@functools.lru_cache
def node_users(num_tiles: int) -> np.ndarray:
    """Who passes each node: the tiles of the sibling segment, queries of the right one of a pair, keys of the left one.

    The tiles of a segment have the same chain above it, so their versions before the node are numbered consecutively,
    and so are those behind it.

    Returns:
      int32 [nodes, 4] of (1 for keys or 0 for queries, version before the node of the first of them, its version behind
      it, how many there are).
    """
    users = np.zeros((sum(num_tiles >> level for level in range(len(frame_tree_levels(num_tiles)))), 4), np.int32)
    for keys in (False, True):
        rows, _ = chains(num_tiles, keys)
        for row, (version, node) in enumerate(rows):
            if node < 0:
                continue
            if users[node, 3] == 0:
                users[node, :3] = keys, rows[row - 1, 0], version
            users[node, 3] += 1
    return users


def lift_backward(dversions, tree, size: Geometry, *, keys: bool):
    """Cotangents of versions, from those that the quadratic stage hands to each version.

    Args:
      dversions: [versions B, 128, heads H], 16-bit; like the output of `lift.lift_forward`.
      tree: see `tree.nodes`; dtype of dversions.
      keys: whether they are versions of keys.

    Returns:
      Like dversions, g of every version with a node on the way to it; the first of each chain is left unwritten. And
      dx [B tiles, 128, heads H] in the same dtype, 0 for tiles without versions.
    """
    rows, starts = chains(size.num_keys, keys)
    head_dim, num_heads = size.head_dim, size.num_kv_heads if keys else size.num_heads
    group = num_heads // size.num_kv_heads
    dtype = dversions.dtype

    def lift_backward_kernel(
        dy_hbm, tree_hbm, rows_hbm, starts_hbm, carried_hbm, dx_hbm, dy, node, dy_full, node_full, both
    ):
        head, tile, batch, warpgroup = (jax.lax.axis_index(name) for name in ("head", "tile", "batch", "warpgroup"))
        start = starts_hbm[tile]
        count = starts_hbm[tile + 1] - start
        columns = pl.ds(head * head_dim, head_dim)
        panel = pl.ds(jax.lax.div(head, int32(group)) * head_dim, head_dim)
        mine = pl.ds(warpgroup * HALF, HALF)
        slot_of = lambda step: jax.lax.rem(step, int32(2))

        def fetch(step):
            """Starts the copies of the cotangent of version `step` and of the node on the way to it."""
            slot = slot_of(step)

            @pl.when((warpgroup == 0) & (step >= 0))
            def copy_version():
                place = rows_hbm[start + step, 0] * size.batch + batch
                plgpu.copy_gmem_to_smem(dy_hbm.at[place, :, columns], dy.at[slot], dy_full.at[slot])

            @pl.when((warpgroup == 0) & (step >= 1))
            def copy_node():
                place = rows_hbm[start + step, 1] * size.batch + batch
                plgpu.copy_gmem_to_smem(tree_hbm.at[place, panel], node.at[slot], node_full.at[slot])

        def add_in_place(step, moved):
            """Turns dy of version `step` into g: what comes from the next version is added in float32."""
            slot = slot_of(step)
            plgpu.barrier_wait(dy_full.at[slot])
            g = moved + load(dy.at[slot, mine], MATRIX).astype(jnp.float32)
            dy.at[slot, mine][...] = g.astype(dtype)
            plgpu.commit_smem()

        def move(i, moved):
            """Writes down g of the version i before the last; returns it times the node on the way there."""
            step = count - 1 - i
            slot = slot_of(step)
            add_in_place(step, moved)
            place = rows_hbm[start + step, 0] * size.batch + batch
            plgpu.copy_smem_to_gmem(dy.at[slot, mine], carried_hbm.at[place, mine, columns])
            plgpu.barrier_wait(node_full.at[slot])
            matrix = node.at[slot]
            moved = product((HALF, head_dim), (dy.at[slot, mine], matrix if keys else matrix.T))
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            plgpu.barrier_arrive(both)
            plgpu.barrier_wait(both)
            fetch(step - 2)
            return moved

        zeros = full((HALF, head_dim), 0, MATRIX)
        first = dy.at[0, mine]

        @pl.when(count > 0)
        def walk():
            fetch(count - 1)
            fetch(count - 2)
            add_in_place(int32(0), loop(0, count - 1, move, zeros))

        @pl.when(count == 0)
        def clear():
            first[...] = zeros.astype(dtype)
            plgpu.commit_smem()

        plgpu.copy_smem_to_gmem(first, dx_hbm.at[batch * size.num_keys + tile, mine, columns])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    return plgpu.kernel(
        lift_backward_kernel,
        out_type=(
            jax.ShapeDtypeStruct(dversions.shape, dtype),
            jax.ShapeDtypeStruct((size.batch * size.num_keys, TILE, num_heads * head_dim), dtype),
        ),
        scratch_types=dict(
            dy=swizzled((2, TILE, head_dim), dtype),
            node=swizzled((2, head_dim, head_dim), dtype),
            dy_full=barriers(2),
            node_full=barriers(2),
            both=plgpu.Barrier(num_arrivals=2),
        ),
        grid=(num_heads, size.num_keys, size.batch),
        grid_names=("head", "tile", "batch"),
        num_threads=2,
        thread_name="warpgroup",
        compiler_params=compiler_params(),
        interpret=interpret_mode(size.interpret),
    )(dversions, tree, rows, starts)


def node_gradient(q_versions, q_carried, k_versions, k_carried, size: Geometry):
    """Cotangent of the nodes of the frame tree, float32 [nodes B, K H, H], 0 for nodes that nobody passes.

    Args:
      q_versions, k_versions: outputs of `lift.lift_forward`, [versions B, 128, N H] and [versions B, 128, K H].
      q_carried, k_carried: like them, see `lift_backward`.
    """
    users = node_users(size.num_keys)
    head_dim = size.head_dim
    group = size.num_heads // size.num_kv_heads
    dtype = q_versions.dtype
    warpgroups = head_dim // HALF  # of 64 rows of the result each

    def node_gradient_kernel(
        q_hbm, q_carried_hbm, k_hbm, k_carried_hbm, users_hbm, out_hbm, left, right, loaded, all_done
    ):
        kv_head, batch, warpgroup = (jax.lax.axis_index(name) for name in ("head", "batch", "warpgroup"))
        node = len(users) - 1 - jax.lax.axis_index("node")  # the one with the most tiles first
        are_keys, first_y, first_g, count = (users_hbm[node, i] for i in range(4))
        num_heads = jnp.where(are_keys == 1, int32(1), int32(group))
        steps = count * num_heads
        mine = pl.ds(warpgroup * HALF, HALF)

        def fetch(step):
            """Starts the copies of the factors of dM: y and g of queries, g and y of keys."""

            @pl.when((warpgroup == 0) & (step < steps))
            def copy():
                slot, user = jax.lax.rem(step, int32(2)), jax.lax.div(step, num_heads)
                y, g = ((first + user) * size.batch + batch for first in (first_y, first_g))

                def copy_both(left_hbm, right_hbm, head):
                    columns = pl.ds(head * head_dim, head_dim)
                    plgpu.copy_gmem_to_smem(left_hbm.at[:, columns], left.at[slot], loaded.at[slot])
                    plgpu.copy_gmem_to_smem(right_hbm.at[:, columns], right.at[slot], loaded.at[slot])

                @pl.when(are_keys == 0)
                def copy_queries():
                    copy_both(q_hbm.at[y], q_carried_hbm.at[g], kv_head * group + jax.lax.rem(step, num_heads))

                @pl.when(are_keys == 1)
                def copy_keys():
                    copy_both(k_carried_hbm.at[g], k_hbm.at[y], kv_head)

        def add(step, total):
            slot = jax.lax.rem(step, int32(2))
            plgpu.barrier_wait(loaded.at[slot])
            total += product((HALF, head_dim), (left.at[slot, :, mine].T, right.at[slot]))
            plgpu.barrier_arrive(all_done)
            plgpu.barrier_wait(all_done)
            fetch(step + 2)
            return total

        fetch(int32(0))
        fetch(int32(1))
        total = loop(0, steps, add, full((HALF, head_dim), 0, MATRIX))
        place = out_hbm.at[node * size.batch + batch, pl.ds(kv_head * head_dim + warpgroup * HALF, HALF)]
        plgpu.store(place, total, optimized=False)

    return plgpu.kernel(
        node_gradient_kernel,
        out_type=jax.ShapeDtypeStruct((len(users) * size.batch, size.num_kv_heads * head_dim, head_dim), jnp.float32),
        scratch_types=dict(
            left=swizzled((2, TILE, head_dim), dtype),
            right=swizzled((2, TILE, head_dim), dtype),
            loaded=barriers(2, arrivals=2),
            all_done=plgpu.Barrier(num_arrivals=warpgroups),
        ),
        grid=(size.num_kv_heads, len(users), size.batch),
        grid_names=("head", "node", "batch"),
        num_threads=warpgroups,
        thread_name="warpgroup",
        compiler_params=compiler_params(),
        interpret=interpret_mode(size.interpret),
    )(q_versions, q_carried, k_versions, k_carried, users)
