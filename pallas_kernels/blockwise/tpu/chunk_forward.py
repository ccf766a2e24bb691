"""Forward pass of PaTH attention inside a superchunk on TPU: linear stage and attention to the superchunk's own keys.

One grid step per superchunk of S tokens and key/value head keeps everything of the superchunk in VMEM. What leaves it:
the queries in the frame of the superchunk's start and the keys in that of its end, the product of its Householder
matrices, and the normalised attention over its own keys, which the kernel between superchunks continues.

A 128-row block of queries sees its pair tile and, per set bit of its index, one sibling segment of the frame tree with
that level's versions: a single softmax, no mask off the diagonal, 56 % of the logits of a square for S = 1024.

The steps are software pipelined. Step i inverts the triangular matrices of superchunk i, which is bound by latency, in
one instruction stream with the tree and the attention of superchunk i - 1, which are bound by the matrix unit; then it
forms the block products of superchunk i. With G > 1 the other query heads of the group follow in loops.

The emission order and its constants were chosen by the compiler's static schedule for TPU v5e, v5p and v6e (bfloat16,
S = 1024, G = 1). Shorter superchunks have too little work next to the inversion: S = 512 takes about 1.3 times as long.
"""

import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.blockwise.tpu import lanes
from pallas_kernels.blockwise.tpu.arithmetic import EMPTY, LOG2E, MASKED, NT, dot
from pallas_kernels.blockwise.tpu.chunk_call import ChunkGrid, pad_rows
from pallas_kernels.blockwise.tpu.transform import (
    BLOCK,
    PAIR,
    Versions,
    drain,
    gram_inverse,
    interleave,
    key_level,
    key_products,
    pipeline,
    product_shape,
    query_level,
    query_products,
    solved_shape,
)

_DISTANCE = 2  # pairs between the logits, the softmax and the output of a pair
_COST = 6  # of each of these stages, on average
_f32 = jnp.float32


def _siblings(pair, num_levels):
    """(level, first row of the queries, first row of the keys, first token, width) of the segments a pair sees."""
    for level in range(1, num_levels):
        if pair >> (level - 1) & 1:
            first_block = (2 * pair >> (level + 1)) << (level + 1)
            query_rows = Versions.rows(level, 2 * pair, 2)
            key_rows = Versions.rows(level, first_block, 1 << level)
            yield level, query_rows, key_rows, BLOCK * first_block, BLOCK << level


def _reduce_lanes(function, parts):
    """Reduces [128, width] arrays to one [128, 128], so that only one slow reduction over lanes follows."""
    tiles = [x[:, i : i + PAIR] for x in parts for i in range(0, x.shape[1], PAIR)]
    return functools.reduce(function, tiles)


def _attention(queries, keys, logits, v, gate, segments, out, lse):
    """Emits the attention of a superchunk's queries of one head to its own keys.

    Args:
      queries, keys: `Versions` of all levels.
      logits: float32 [S / 128, 128, 128] of the pairs, keys as [odd | even].
      v: [S, Hv].
      gate: float32 [S / 128, 128] or None.
      segments: int32 [at least 8, 128] or None.
      out, lse: output references [S, Hv] and [S / 128, 128].
    """
    segment_columns = None if segments is None else segments[...].T

    def visible(pair, x, key_pair, swap):
        """Applies gate and segments to 128 columns, the keys of `key_pair` (odd block first if `swap`)."""
        shift = BLOCK if swap else 0
        if gate is not None:
            row = gate[key_pair : key_pair + 1]
            x = x - (pltpu.roll(row, shift, 1) if swap else row)
        if segments is not None:
            row = segments[key_pair : key_pair + 1]
            row = pltpu.roll(row, shift, 1) if swap else row
            x = jnp.where(segment_columns[:, pair : pair + 1] == row, x, MASKED)
        return x

    as_row = lambda column: lanes.to_row(jnp.broadcast_to(column, (PAIR, PAIR)))
    scores, weights, totals = {}, {}, {}

    def multiply(pair):
        parts = [visible(pair, logits[pair], pair, True)]
        for level, query_rows, key_rows, start, width in _siblings(pair, queries.num_levels):
            x = dot(queries.moving[level, query_rows], keys.moving[level, key_rows], NT)
            if gate is not None or segments is not None:
                slabs = [visible(pair, x[:, i : i + PAIR], (start + i) // PAIR, False) for i in range(0, width, PAIR)]
                x = jnp.concatenate(slabs, 1)
            parts.append(x)
        scores[pair] = parts

    def normalise(pair):
        parts = scores.pop(pair)
        maximum = _reduce_lanes(jnp.maximum, parts).max(axis=1, keepdims=True)
        weights[pair] = [jnp.exp2(x - maximum) for x in parts]
        total = _reduce_lanes(jnp.add, weights[pair]).sum(axis=1, keepdims=True)
        weights[pair] = [x.astype(v.dtype) for x in weights[pair]]
        totals[pair] = maximum, total

    def output(pair):
        rows = slice(PAIR * pair, PAIR * pair + PAIR)
        middle = PAIR * pair + BLOCK
        values = [jnp.concatenate([v[middle : rows.stop], v[rows.start : middle]], 0)]
        values += [v[start : start + width] for *_, start, width in _siblings(pair, queries.num_levels)]
        o = 0.0
        for p, x in zip(weights.pop(pair), values):
            o += dot(p, x)
        maximum, total = totals.pop(pair)
        o = o * (1.0 / total)
        if segments is not None:
            o = jnp.where(segment_columns[:, pair : pair + 1] > 0, o, 0.0)
        out[rows] = o
        # The logarithm is taken of rows, which are 128 times smaller than columns.
        row_lse = as_row(maximum) + jnp.log2(as_row(total))
        if segments is not None:
            row_lse = jnp.where(segments[pair : pair + 1] > 0, row_lse, EMPTY)
        lse[pair : pair + 1] = row_lse

    yield from pipeline([multiply, normalise, output], queries.top.shape[0] // PAIR, _DISTANCE, _COST)


def _kernel(*refs, names, scale, base, ratio):
    refs = dict(zip(names, refs))
    group = refs["q"].shape[1]
    w, k = refs["w"].at[0], refs["k"].at[0]
    keys = Versions(refs["key_moving"], refs["k_top"].at[0], 0, refs["key_fixed"])

    def queries_of(g):
        return Versions(refs["query_moving"].at[g], refs["q_top"].at[0, g], 1, refs["query_fixed"].at[g])

    def attention_of(g):
        return _attention(
            queries_of(g),
            keys,
            refs["logits"].at[g],
            refs["v"].at[0],
            refs["gate"].at[0, g, 0] if "gate" in refs else None,
            refs["segments"].at[0, 0] if "segments" in refs else None,
            refs["out"].at[0, g],
            refs["lse"].at[0, g, 0],
        )

    def previous_superchunk():
        for level in range(keys.num_levels):
            yield from key_level(level, keys, refs["products"], refs["transition"].at[0, 0])
            yield from query_level(level, queries_of(0), refs["products"])
        yield from attention_of(0)

    def previous_superchunk_of(g):
        for level in range(keys.num_levels):
            yield from query_level(level, queries_of(g), refs["products"])
        yield from attention_of(g)

    def products_of(g):
        return query_products(
            refs["q"].at[0, g], w, k, refs["solved"], keys, queries_of(g), refs["logits"].at[g], scale=scale
        )

    beta = refs["beta"][0, 0]
    inverses, grams = interleave(gram_inverse(w, k, beta, base=base), previous_superchunk(), ratio)
    _for_other_heads(previous_superchunk_of, group)
    a = [inverse * beta[p : p + 1] for p, inverse in enumerate(inverses)]
    drain(key_products(w, k, a, grams, refs["solved"], refs["products"], keys))
    drain(products_of(0))
    _for_other_heads(products_of, group)


def _for_other_heads(steps_of, group):
    """Runs the steps of heads 1, 2, ... of the group as a loop: unrolled, the code would grow with the group."""
    if group > 1:
        lax.fori_loop(1, group, lambda g, _: drain(steps_of(g)), None)


def chunk_forward(
    q,
    k,
    v,
    w,
    beta,
    gate=None,
    segment_ids=None,
    *,
    scale,
    superchunk,
    cores=1,
    vmem_limit=64,
    base=16,
    ratio=1.8,
    interpret=False,
):
    """Linear stage of every superchunk, and attention of its queries to its own keys.

    With H_t = I - beta_t w_t^T w_t and raw_ij = q_i H_i ... H_{j+1} k_j^T, the base-2 logits are
    s_ij = scale log2(e) raw_ij - c_j for i, j of one superchunk, j <= i and equal positive segment ids.

    Args:
      q: [BK, G, T, H], bfloat16 or float32 like k, w and v; T a multiple of `superchunk`, H of 128. bfloat16 rounds the
        versions and the softmax weights, but not the UT transform; float32 uses float32 products throughout.
      k, w: [BK, T, H], beta |w|^2 <= 2.
      v: [BK, T, Hv], Hv a multiple of 128.
      beta: float32 [BK, T].
      gate: float32 [BK, G, T], c, the inclusive sum of base-2 log gates since the start of the superchunk; or None.
      segment_ids: int32 [B, T], rows b of q, k, v belong to segment row b // (BK / B); or None.
      scale: of the logits, natural units.
      superchunk: S, a power of two, at least 128.
      cores: cores that share the list of (head, superchunk); 1 if it does not divide.
      vmem_limit: MiB of VMEM the compiler may use.
      base: size of the triangular blocks inverted by substitution, 16 or 32.
      ratio: work on the previous superchunk emitted per step of the inversion.
      interpret: runs in the interpreter.

    Returns:
      q_top [BK, G, T, H]: scale log2(e) q in the frame of the superchunk's start, dtype of q.
      k_top [BK, T, H]: k in the frame of its end, dtype of q.
      transition: float32 [BK, T / S, H, H], H_last ... H_first of the superchunk (for row vectors).
      out: float32 [BK, G, T, Hv], normalised; 0 in rows that see no key.
      lse: float32 [BK, G, 1, T], base-2 log-sum-exp of s; -1e30 in rows that see no key.
    """
    heads, group, length, head_dim = q.shape
    v_dim, dtype = v.shape[-1], q.dtype
    pairs, num_blocks = superchunk // PAIR, superchunk // BLOCK
    num_levels = num_blocks.bit_length() - 1
    grid = ChunkGrid(heads, length, superchunk, cores)
    by_pair = (1, group, 1, pairs, PAIR), lambda h, c: (h, 0, c, 0, 0)
    beta = pad_rows(grid.by_pair(beta))
    inputs = {
        "w": (w, grid.rows(head_dim, 0)),
        "k": (k, grid.rows(head_dim, 0)),
        "beta": (beta, grid.matrices(*beta.shape[2:], 0)),
        "q": (q, grid.grouped_rows(group, head_dim, 0)),
        "v": (v, grid.rows(v_dim, 1)),
    }
    if gate is not None:
        inputs["gate"] = (grid.by_pair(gate), grid.block(*by_pair, 1))
    if segment_ids is not None:
        per_row, ids = heads // segment_ids.shape[0], pad_rows(grid.by_pair(segment_ids))
        index = lambda h, c: (lax.div(h, per_row), c, 0, 0)
        inputs["segments"] = (ids, grid.block((1, 1, *ids.shape[2:]), index, 1))
    outputs = {
        "q_top": (q.shape, dtype, grid.grouped_rows(group, head_dim, 1)),
        "k_top": (k.shape, dtype, grid.rows(head_dim, 1)),
        "transition": ((heads, grid.num_chunks, head_dim, head_dim), _f32, grid.matrices(head_dim, head_dim, 1)),
        "out": ((heads, group, length, v_dim), _f32, grid.grouped_rows(group, v_dim, 1)),
        "lse": ((heads, group, grid.num_chunks, pairs, PAIR), _f32, grid.block(*by_pair, 1)),
    }
    scratch = {
        "solved": (solved_shape(num_blocks, head_dim), dtype),
        "products": (product_shape(num_blocks, head_dim, dtype), dtype),
        "key_moving": ((num_levels, superchunk // 2, head_dim), dtype),
        "key_fixed": ((BLOCK, head_dim), dtype),
        "query_moving": ((group, num_levels, superchunk // 2, head_dim), dtype),
        "query_fixed": ((group, BLOCK, head_dim), dtype),
        "logits": ((group, pairs, PAIR, PAIR), _f32),
    }
    *results, lse = grid.call(
        _kernel,
        inputs,
        outputs,
        scratch,
        name="path_chunk_forward",
        like=q,
        vmem_limit=vmem_limit,
        interpret=interpret,
        scale=scale * LOG2E,
        base=base,
        ratio=ratio,
    ).values()
    return (*results, lse.reshape(heads, group, 1, length))
