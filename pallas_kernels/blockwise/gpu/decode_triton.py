"""Attention of decode steps to parts of pages in Triton: what `decode_mosaic` does on Hopper, for all head dims.

A program takes a tile of query rows and steps over the keys of one part of one page. Products take operands in the
pools' dtype and accumulate in float32; of float32 operands they are exact.
"""

from typing import no_type_check  # jaxtyping's import hook would wrap what triton.jit must see as it is

import triton
import triton.language as tl

from pallas_kernels.blockwise.gpu.triton_kernels import LEAST, LOG2E, MASKED


@triton.jit
@no_type_check
def _place(base, row, is_row, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Pointers [rows, BLOCK] to rows of WIDTH numbers, and which of the numbers are there."""
    column = tl.arange(0, BLOCK)
    return base + row[:, None] * WIDTH + column[None, :], is_row[:, None] & (column[None, :] < WIDTH)


@triton.jit
@no_type_check
def _load(base, row, is_row, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """[rows, BLOCK] from rows of WIDTH numbers; 0 where there are none."""
    pointers, is_there = _place(base, row, is_row, WIDTH, BLOCK)
    return tl.load(pointers, mask=is_there, other=0.0)


@triton.jit
@no_type_check
def attend_parts(
    q_array, k_array, v_array, gates, totals, limits, pages, needed, out_array, lse_array,
    GATE: tl.constexpr, WINDOW: tl.constexpr, BATCH: tl.constexpr, KV_HEADS: tl.constexpr, PAGES: tl.constexpr,
    SUPERCHUNK: tl.constexpr, PARTS: tl.constexpr, VERSIONS: tl.constexpr, TILES: tl.constexpr, GROUPS: tl.constexpr,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, MOST_ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, V_HEAD_DIM: tl.constexpr,
    GATE_FACTOR: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    """See `decode_mosaic.attend_parts` for the arrays, `decode.Geometry` for what is static.

    Grid (key heads x tiles, pages x parts, batch). MOST_ROWS: of `limits`, per batch row. BLOCK_M, BLOCK_N, BLOCK_H,
    BLOCK_V: ROWS, the keys of a step, HEAD_DIM and V_HEAD_DIM up to powers of 2.
    """
    head, tile = tl.program_id(0) // TILES, tl.program_id(0) % TILES
    page, part, batch = tl.program_id(1) // PARTS, tl.program_id(1) % PARTS, tl.program_id(2)
    if tl.load(needed + (batch * KV_HEADS + head) * PAGES + page) != 0:
        row, place = tl.arange(0, BLOCK_M), (batch * KV_HEADS + head) * TILES + tile
        is_row = row < ROWS
        version = place
        if VERSIONS > 1:
            version += page * (BATCH * KV_HEADS * TILES)
        q = _load(q_array + version.to(tl.int64) * (ROWS * HEAD_DIM), row, is_row, HEAD_DIM, BLOCK_H)
        source = tl.load(pages + batch * PAGES + page).to(tl.int64) * KV_HEADS + head
        keys, values = k_array + source * (SUPERCHUNK * HEAD_DIM), v_array + source * (SUPERCHUNK * V_HEAD_DIM)
        group = tile * GROUPS + tl.minimum(row // WIDTH, GROUPS - 1)
        total, limit = tl.zeros([BLOCK_M], tl.float32), row
        if GATE:
            total = tl.load(totals + ((batch * PAGES + page) * KV_HEADS + head) * (TILES * GROUPS) + group)
        if WINDOW:
            limit = tl.load(limits + batch * MOST_ROWS + row) + (page + 1) * SUPERCHUNK
        acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
        maximum, normaliser = tl.full([BLOCK_M], LEAST, tl.float32), tl.zeros([BLOCK_M], tl.float32)
        for start in range(part * (SUPERCHUNK // PARTS), (part + 1) * (SUPERCHUNK // PARTS), BLOCK_N):
            key = start + tl.arange(0, BLOCK_N)
            k = _load(keys, key, key >= 0, HEAD_DIM, BLOCK_H)
            v = _load(values, key, key >= 0, V_HEAD_DIM, BLOCK_V)
            z = tl.dot(q, tl.trans(k), input_precision="ieee") * LOG2E
            if GATE:
                lines = gates + source * (TILES * GROUPS * SUPERCHUNK)
                gate = tl.load(lines + group[:, None] * SUPERCHUNK + key[None, :])
                z += GATE_FACTOR * (total[:, None] - gate)
            if WINDOW:
                z = tl.where(key[None, :] > limit[:, None], z, MASKED)
            larger = tl.maximum(maximum, tl.max(z, 1))
            decay, weights = tl.exp2(maximum - larger), tl.exp2(z - larger[:, None])
            normaliser = normaliser * decay + tl.sum(weights, 1)
            acc = tl.dot(weights.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")
            maximum = larger
        is_empty = normaliser == 0
        normaliser = tl.where(is_empty, 1.0, normaliser)
        target = tl.program_id(1).to(tl.int64) * (BATCH * KV_HEADS * TILES) + place
        tl.store(lse_array + target * ROWS + row, tl.where(is_empty, LEAST, maximum + tl.log2(normaliser)), mask=is_row)
        pointers, is_there = _place(out_array + target * (ROWS * V_HEAD_DIM), row, is_row, V_HEAD_DIM, BLOCK_V)
        tl.store(pointers, acc / normaliser[:, None], mask=is_there)
