"""Attention of decode steps to parts of pages on Hopper, in Pallas:Mosaic GPU.

One thread block per tile of query rows, part of a page, and batch row. Warpgroup 0 computes, its 64 rows mostly
padding, which costs nothing: the time is that of reading keys and values, which warpgroup 1 copies by TMA, some stages
ahead. Blocks whose page is not needed do nothing.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.blockwise.gpu.decode import KEYS, TILE_ROWS, Geometry
from pallas_kernels.blockwise.gpu.layout import LEAST, LOG2E, MASKED
from pallas_kernels.blockwise.gpu.primitives import (
    COLUMNS,
    MATRIX,
    ROWS,
    accumulate,
    along,
    await_reuse,
    barriers,
    compiler_params,
    drain,
    full,
    int32,
    interpret_mode,
    load,
    loop,
    places,
    swizzled,
    vector,
)


def attend_parts(q, k, v, gates, limits, pages, needed, size: Geometry, *, stages: int = 4):
    """Attention of tiles of query rows to each part of each page.

    Args:
      q: [versions x B x K x tiles, rows, H] in k's dtype.
      k, v: pools [pool, K, S, H] and [pool, K, S, Hv], 16-bit.
      gates: None, or the pool of sums of gates [pool, K, G, S] and the last of each of the pages [B, P, K, G].
      limits: None, or int32 [B, 64]: position of each row less the window, in the queries' superchunk.
      pages, needed: int32 [B, P] and, 0 or 1, [B, K, P].

    Returns:
      Normalised output float32 [P x parts x B x K x tiles, rows, Hv] and base-2 log-sum-exp [.., rows] without the
      gates behind the page, LEAST where a row sees no key. Where a page is not needed nothing is written.
    """
    num_groups, num_steps, num_kv_heads = size.num_groups, size.num_steps, size.num_kv_heads
    has_gate, has_window = gates is not None, limits is not None
    operands = dict(q=q, k=k.reshape(-1, *k.shape[2:]), v=v.reshape(-1, *v.shape[2:]), pages=pages, needed=needed)
    if has_gate:
        operands |= dict(gate=gates[0].reshape(-1, *gates[0].shape[2:]), totals=gates[1])
    operands |= dict(limits=limits) if has_window else {}
    names = tuple(operands)

    def attend_parts_kernel(*refs, **s):
        hbm = dict(zip(names, refs))
        out_hbm, lse_hbm = refs[len(names) :]
        tile, part, batch, warpgroup = (jax.lax.axis_index(name) for name in ("tile", "part", "batch", "warpgroup"))
        head, page = jax.lax.div(tile, int32(size.num_tiles)), jax.lax.div(part, int32(size.num_parts))
        first_group = jax.lax.rem(tile, int32(size.num_tiles)) * num_groups
        place = batch * (num_kv_heads * size.num_tiles) + tile  # among the tiles of one version or part
        num_places = size.batch * num_kv_heads * size.num_tiles
        start = jax.lax.rem(part, int32(size.num_parts)) * (num_steps * KEYS)
        count = hbm["needed"][batch, head, page] * num_steps

        @pl.when((warpgroup == 1) & (count > 0))
        def produce():
            version = page * num_places + place if size.num_versions > 1 else place
            plgpu.copy_gmem_to_smem(hbm["q"].at[version], s["q"].at[pl.ds(0, size.rows)], s["q_full"])
            source = hbm["pages"][batch, page] * num_kv_heads + head

            @pl.loop(int32(0), count)
            def copy(step):
                slot, keys = jax.lax.rem(step, int32(stages)), pl.ds(start + step * KEYS, KEYS)
                pl.when(step >= stages)(lambda: await_reuse(s["k_free"].at[slot]))
                full_keys = s["k_full"].at[slot]
                if has_gate:
                    groups = pl.ds(first_group, num_groups)
                    plgpu.copy_gmem_to_smem(hbm["gate"].at[source, groups, keys], s["gate"].at[slot], full_keys)
                plgpu.copy_gmem_to_smem(hbm["k"].at[source, keys], s["k"].at[slot], full_keys)
                pl.when(step >= stages)(lambda: plgpu.barrier_wait(s["v_free"].at[slot]))
                plgpu.copy_gmem_to_smem(hbm["v"].at[source, keys], s["v"].at[slot], s["v_full"].at[slot])

            drain(count, stages, s["k_free"], s["v_free"])

        @pl.when((warpgroup == 0) & (count > 0))
        def compute():
            if has_gate:
                totals = [hbm["totals"][batch, page, head, first_group + g] for g in range(num_groups)]
            if has_window:
                limits = load(hbm["limits"].at[batch], ROWS, optimized=False) + (page + 1) * size.superchunk
            plgpu.barrier_wait(s["q_full"])

            def gates_of(slot, z):
                """From each key to the end of the page, of the query head of each row."""
                lines = [
                    size.gate_factor * (total - load(s["gate"].at[slot, g], COLUMNS)) for g, total in enumerate(totals)
                ]
                spread = along(lines[0], 1, z)
                for g, line in enumerate(lines[1:], 1):
                    # Here, since numbers that are not used defeat the inference of layouts.
                    row = along(places(TILE_ROWS, 0, ROWS), 0, z)
                    spread = jnp.where(row >= g * size.width, along(line, 1, z), spread)
                return spread

            def attend(step, carry):
                acc, maximum, normaliser = carry
                slot = jax.lax.rem(step, int32(stages))
                plgpu.barrier_wait(s["k_full"].at[slot])

                def product(ref):
                    plgpu.wgmma(ref, s["q"], s["k"].at[slot].T)
                    return ref[...]

                z = pl.run_scoped(product, plgpu.ACC((TILE_ROWS, KEYS), jnp.float32)) * LOG2E
                if has_gate:
                    z = z + gates_of(slot, z)
                if has_window:
                    keys = places(KEYS, start + step * KEYS, COLUMNS)
                    z = jnp.where(along(keys, 1, z) > along(limits, 0, z), z, MASKED)
                plgpu.barrier_arrive(s["k_free"].at[slot])
                larger = jnp.maximum(maximum, z.max(axis=1))
                decay = jnp.exp2(maximum - larger)
                weights = jnp.exp2(z - along(larger, 0, z))
                normaliser = normaliser * decay + weights.sum(axis=1)
                acc = acc * along(decay, 0, acc)
                plgpu.barrier_wait(s["v_full"].at[slot])
                (acc,) = accumulate(size.interpret, (acc, weights.astype(v.dtype), s["v"].at[slot]))
                plgpu.barrier_arrive(s["v_free"].at[slot])
                return acc, larger, normaliser

            carry = (
                full((TILE_ROWS, size.v_head_dim), 0, MATRIX),
                full((TILE_ROWS,), LEAST, ROWS),
                full((TILE_ROWS,), 0, ROWS),
            )
            acc, maximum, normaliser = loop(0, count, attend, carry)
            is_empty = normaliser == 0
            normaliser = jnp.where(is_empty, 1.0, normaliser)
            s["lse"][...] = jnp.where(is_empty, LEAST, maximum + jnp.log2(normaliser))
            s["out"][...] = acc * along(1 / normaliser, 0, acc)
            plgpu.commit_smem()
            rows, target = pl.ds(0, size.rows), part * num_places + place
            plgpu.copy_smem_to_gmem(s["out"].at[rows], out_hbm.at[target])
            plgpu.copy_smem_to_gmem(s["lse"].at[rows], lse_hbm.at[target])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    scratch = dict(
        q=swizzled((TILE_ROWS, size.head_dim), q.dtype),
        k=swizzled((stages, KEYS, size.head_dim), k.dtype),
        v=swizzled((stages, KEYS, size.v_head_dim), v.dtype),
        out=swizzled((TILE_ROWS, size.v_head_dim), jnp.float32),
        lse=vector(TILE_ROWS),
        q_full=plgpu.Barrier(num_arrivals=1),
        k_full=barriers(stages, 1 + has_gate),
        v_full=barriers(stages),
        k_free=barriers(stages),
        v_free=barriers(stages),
    )
    scratch |= dict(gate=vector(stages, num_groups, KEYS)) if has_gate else {}
    num_parts = size.num_pages * size.num_parts
    num_results = num_parts * size.batch * num_kv_heads * size.num_tiles
    return plgpu.kernel(
        attend_parts_kernel,
        out_type=(
            jax.ShapeDtypeStruct((num_results, size.rows, size.v_head_dim), jnp.float32),
            jax.ShapeDtypeStruct((num_results, size.rows), jnp.float32),
        ),
        scratch_types=scratch,
        grid=(num_kv_heads * size.num_tiles, num_parts, size.batch),
        grid_names=("tile", "part", "batch"),
        num_threads=2,
        thread_name="warpgroup",
        compiler_params=compiler_params(),
        interpret=interpret_mode(size.interpret),
    )(*operands.values())
