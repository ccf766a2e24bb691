"""Backward pass of PaTH attention inside a superchunk on TPU: attention to its own keys, frame tree and UT transform.

One grid step per superchunk of S tokens and key/value head. It recomputes the linear stage of `chunk_forward` and walks
it backwards in VMEM. Cotangents of level-indexed queries and keys never go to HBM.

Attention, per tile of keys and queries, with p = exp2(s - lse): ds = p (dO V^T - Delta). Tiles are computed transposed,
[keys, queries], so that the per-query statistics are rows, and only the query gradient needs a transposed operand.

Frame tree, downwards, at a node with products P_l, P_r of its halves, queries x of the right half, keys y of the left:

    dx = dx' P_l^T    dy = dy' P_r    dP_l = P_r^T dP' + x^T dx'    dP_r = dP' P_l^T + dy'^T y

UT transform, in the notation of `transform`, with cotangents dQ', dK', dP of a block's results and dS of its logits:

    dU = -(Y^T dQ' + W dP)        dAG = -(Y^T dS + W dK'^T)        [X Z] = T^T [dU dAG]
    dbeta = rows of (X * U + Z * AG), summed, / beta
    X <- D X    Z <- D Z    dN = -tril(X U^T + Z AG^T, -1)    dG = tril(Z, -1)    dY = -tril(dQ' U^T + dS AG^T)
    dQ = dQ' + dS K + dY W        dK = dK' + dS^T Q + dG^T W
    dW = X + (dN + dN^T) W + dG K + dY^T Q - U dP^T - AG dK'

U and AG are proportional to beta, row by row, which makes the quotient well defined (beta is clamped to 1e-12) and free
of the cancellation between dT and dM. T, Y, dU and dAG enter their products as hi + lo: with correlated w those sums
cancel; so do dS, dY and dG where they yield dQ and dK, of which they are the last rounding. The rest is rounded once.

All cotangents are kept in units of ln 2, those of the base-2 logits' operands; the factor is applied to the results.
"""

import dataclasses
import functools
import itertools
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.blockwise.tpu import lanes, transform
from pallas_kernels.blockwise.tpu.arithmetic import LN2, LOG2E, MASKED, NT, TN, dot
from pallas_kernels.blockwise.tpu.chunk_call import ChunkGrid, pad_rows
from pallas_kernels.blockwise.tpu.transform import (
    BLOCK,
    PAIR,
    Versions,
    block_rows,
    iota,
    is_left,
    split,
    twice,
)

_TILE = 256  # keys of an attention tile
_PAIR_RATIO = 0.9  # steps of the attention inside pairs per step of the tree
_KEY_RATIO = 0.6  # steps of the keys' tree, backwards, per step of the queries' UT transform
_SMALLEST_BETA = 1e-12
_f32 = jnp.float32


def _add(ref, index, x, is_first):
    """Writes or accumulates one contribution of the query heads that share a key head."""
    ref[index] = x if is_first else ref[index] + x


def _own_lanes(block):
    """Lanes that hold a block in the [odd | even] order of the pair tiles."""
    return is_left() if block % 2 else ~is_left()


def _own_order(block, own, other):
    """Weights whose rows `own` meet the own lanes of a block, and `other` the other lanes."""
    return jnp.concatenate([other, own] if block % 2 == 0 else [own, other], 0)


def _swap_blocks(x):
    """Exchanges the rows of the two blocks of a pair."""
    return jnp.concatenate([x[BLOCK:], x[:BLOCK]], 0)


def _alternate(main, side, ratio):
    """Emits `side` spread over `main`, `ratio` steps of side per step of main, then the rest of it."""
    credit = 0.0
    for _ in main:
        yield
        credit += ratio
        while credit >= 1:
            credit -= 1
            yield from itertools.islice(side, 1)
    yield from side


@dataclasses.dataclass(frozen=True)
class _Head:
    """One query head in one superchunk: views of references named as in `chunk_backward`.

    Attributes:
      queries: `Versions` of its queries.
      selected: output [2, S / 128, 128, 128]: hi and lo of, per pair, the rows [dY_e^T | dS_o^T], [dS_e^T | dY_o^T].
      dgate: output [1, S] or None.
      is_first: whether this head initialises what the heads of a group accumulate.
    """

    q: Any
    lse: Any
    delta: Any
    dout: Any
    dq_top: Any
    dq: Any
    gate: Any
    dgate: Any
    selected: Any
    queries: Versions
    is_first: bool


def _tile_weights(s, dp, head, refs, keys, queries):
    """Weights p and ds [keys, queries] of a transposed tile, from its logits and V dO^T."""
    width = queries.stop - queries.start
    if head.gate is not None:
        s = s - lanes.widen(refs["gate_columns"][keys], width)
    if "segments" in refs:
        same = lanes.widen(refs["segment_columns"][keys], width) == refs["segments"][0, :, queries]
        s = jnp.where(same, s, MASKED)
    p = jnp.exp2(s - head.lse[:, queries])
    ds = p * (dp - head.delta[:, queries])
    if head.gate is not None:
        head.dgate[:, queries] += ds.sum(axis=0, keepdims=True)
        refs["dgate_columns"][keys] += lanes.fold(ds)
    return p, ds


def _level_attention(level, head, refs, keys):
    """Emits the attention of one level above the pairs: the queries of a right half see all keys of the left half."""
    dtype, width, v = head.q.dtype, BLOCK << level, refs["v"].at[0]

    def finish(s, dp, tokens, key_rows, query_tokens, query_rows):
        p, ds = _tile_weights(s, dp, head, refs, tokens, query_tokens)
        yield
        p, ds = p.astype(v.dtype), ds.astype(dtype)
        refs["dv_state"][tokens] += dot(p, head.dout[query_tokens])
        yield
        _add(refs["dkey_moving"], (level, key_rows), dot(ds, head.queries.moving[level, query_rows]), head.is_first)
        yield
        refs["dq_state"][query_tokens] += dot(ds, keys.moving[level, key_rows], TN)
        yield

    waiting = None
    for start in range(0, head.q.shape[0], 2 * width):
        first_query = start + width
        query_tokens = slice(first_query, first_query + width)
        query_rows = Versions.rows(level, first_query // BLOCK, 1 << level)
        first_key_row = Versions.rows(level, start // BLOCK, 1 << level).start
        size = min(width, _TILE)
        for offset in range(0, width, size):
            tokens = slice(start + offset, start + offset + size)
            key_rows = slice(first_key_row + offset, first_key_row + offset + size)
            s = dot(keys.moving[level, key_rows], head.queries.moving[level, query_rows], NT)
            yield
            dp = dot(v[tokens], head.dout[query_tokens], NT)
            yield
            if waiting is not None:
                yield from finish(*waiting)
            waiting = (s, dp, tokens, key_rows, query_tokens, query_rows)
    yield from finish(*waiting)


def _pair_attention(head, refs, scale):
    """Emits the attention inside the pairs: what it adds to keys and values, and dS, unscaled within the blocks."""
    dtype, v, left = head.q.dtype, refs["v"].at[0], is_left()
    corner = (iota((PAIR, PAIR), 0) >= BLOCK) & (iota((PAIR, PAIR), 1) >= BLOCK)

    def weigh(p, rows, dp):
        weights, ds = _tile_weights(_swap_blocks(refs["logits"][p].T), dp, head, refs, rows, rows)
        ds = _swap_blocks(ds)  # rows in the order of the columns of the pair tiles
        return p, rows, weights.astype(v.dtype), ds

    def finish(p, rows, weights, ds):
        refs["dv_state"][rows] += dot(weights, head.dout[rows])
        yield
        for i, part in enumerate(split(jnp.where(corner, ds, ds * scale), dtype)):
            refs["ds"][i, p] = part.astype(dtype).T
        to_key = jnp.where(left, 0.0, ds[BLOCK:]).astype(dtype)
        query = head.queries.moving[0, Versions.rows(0, 2 * p + 1)]
        _add(refs["dkey_moving"], (0, Versions.rows(0, 2 * p)), dot(to_key, twice(query)), head.is_first)
        yield

    waiting = None
    for p in range(refs["logits"].shape[0]):
        rows = slice(PAIR * p, PAIR * p + PAIR)
        dp = dot(v[rows], head.dout[rows], NT)
        yield
        weighed = weigh(p, rows, dp)
        yield
        if waiting is not None:
            yield from finish(*waiting)
        waiting = weighed
    yield from finish(*waiting)


def _corners_backward(head, refs, keys):
    """Emits what the even block of each pair adds to the queries of the odd block, below level 0 of the tree."""
    left = is_left()
    for p in range(refs["logits"].shape[0]):
        ds = jnp.where(left, 0.0, refs["ds"][0, p, BLOCK:].astype(_f32)).astype(head.q.dtype)
        refs["dq_state"][block_rows(2 * p + 1)] += dot(ds, twice(keys.moving[0, Versions.rows(0, 2 * p)]))
        yield


def _query_level_backward(level, head, refs):
    """Emits dx = dx' P_l^T in place and the queries' part of dP_l."""
    products, state = refs["products"], refs["dq_state"]
    (length, head_dim), dtype, count = state.shape, head.q.dtype, 1 << level
    num_blocks = length // BLOCK
    for s in range(num_blocks >> (level + 1)):
        block = 2 * count * s + count
        slot = transform.product_slot(level, 2 * s, num_blocks)
        dx = state[block_rows(block, count)].astype(dtype)
        state[block_rows(block, count)] = dot(dx, products[slot, :, :head_dim], NT)
        yield
        x = head.queries.moving[level, Versions.rows(level, block, count)]
        _add(refs["dproducts"], slot, dot(x, dx, TN), head.is_first)
        yield


def _query_transform_backward(head, refs, scale):
    """Emits dQ, the head's `selected` and its part of -dU and -dAG, from dQ' (in `dq_state`) and dS."""
    w, k, q, solved, ds = refs["w_before"], refs["k_before"], head.q, refs["solved"], refs["ds"]
    (length, head_dim), dtype, left = q.shape, q.dtype, is_left()
    pairs, blocks = range(length // PAIR), range(length // BLOCK)
    row, column = iota((BLOCK, PAIR), 0), iota((BLOCK, PAIR), 1) & (BLOCK - 1)

    def ds_rows(b, i=0):
        return ds[i, b // 2, block_rows(b % 2)]

    y_transposed = {}
    for p in pairs:
        rows = slice(PAIR * p, PAIR * p + PAIR)
        gram = dot(w[rows], q[rows], NT)
        yield
        gram = jnp.where(row <= column, jnp.where(left, gram[:BLOCK], gram[BLOCK:]), 0.0)
        y_transposed[2 * p], y_transposed[2 * p + 1] = transform.halves(gram, dtype)
    dq = {}
    for b in blocks:
        dq[b] = (refs["dq_state"][block_rows(b)] * scale).astype(dtype)
        operand = twice(jnp.concatenate([dq[b], ds_rows(b)], 1))
        _add(refs["dsolved"], b, dot(y_transposed[b], operand), head.is_first)
        yield
    dy = {}
    for b in blocks:
        operand = twice(jnp.concatenate([solved[b, :, :head_dim], refs["ag_own"][b]], 1))
        product = dot(jnp.concatenate([dq[b], ds_rows(b)], 1), operand, NT)
        dy[b] = jnp.where(column <= row, -product, 0.0)
        yield
    for p in pairs:
        both = []
        for b in (2 * p, 2 * p + 1):
            exact = ds_rows(b).astype(_f32) + ds_rows(b, 1).astype(_f32)
            selected = [x.astype(dtype) for x in split(jnp.where(_own_lanes(b), exact, dy[b]), dtype)]
            operand = twice(_own_order(b, k[block_rows(b)], w[block_rows(b)]))
            result = refs["dq_state"][block_rows(b)] * scale + dot(jnp.concatenate(selected, 1), operand)
            head.dq[block_rows(b)] = (result * LN2).astype(head.dq.dtype)
            both.append(selected)
            yield
        for i, parts in enumerate(zip(*both)):
            head.selected[i, p] = jnp.concatenate(parts, 0).T
        yield


def _levels(head, refs, keys):
    """Emits the tree upwards, for the first head also that of the keys, and down again, above the pairs."""
    products = refs["products"]
    for level in range(keys.num_levels - 1):
        query_steps = transform.query_level(level, head.queries, products)
        if head.is_first:
            yield from _alternate(transform.key_level(level, keys, products), query_steps, 0.5)
        else:
            yield from query_steps
    for level in reversed(range(1, keys.num_levels)):
        yield from _query_level_backward(level, head, refs)
        yield from _level_attention(level, head, refs, keys)


def _query_attention(head, refs, keys, scale):
    """Emits one query head as far as dQ' and dS, and what it adds to keys, values and products."""
    w, k, solved = (refs[name] for name in ("w_before", "k_before", "solved"))
    yield from transform.query_products(head.q, w, k, solved, keys, head.queries, refs["logits"], scale=scale)
    refs["dq_state"][...] = head.dq_top[...].astype(_f32)
    if head.gate is not None:
        refs["gate_columns"][...] = lanes.to_columns(head.gate[...])
        refs["dgate_columns"][...] = jnp.zeros(refs["dgate_columns"].shape, _f32)
        head.dgate[...] = jnp.zeros(head.dgate.shape, _f32)
    yield from _alternate(_levels(head, refs, keys), _pair_attention(head, refs, scale), _PAIR_RATIO)
    yield from _query_level_backward(0, head, refs)
    yield from _corners_backward(head, refs, keys)
    if head.gate is not None:
        for start in range(0, head.q.shape[0], PAIR):
            tokens = slice(start, start + PAIR)
            head.dgate[:, tokens] -= refs["dgate_columns"][tokens].T.sum(axis=0, keepdims=True)


def _key_levels_backward(refs, keys):
    """Emits dy and dP of all levels, from the top to the blocks."""
    products, dproducts, state = refs["products"], refs["dproducts"], refs["dk_state"]
    (length, head_dim), dtype = state.shape, products.dtype
    num_blocks = length // BLOCK
    for level in reversed(range(keys.num_levels)):
        count = 1 << level
        for s in range(num_blocks >> (level + 1)):
            slots = [transform.product_slot(level, 2 * s + i, num_blocks) for i in (0, 1)]
            left, right = (products[slot, :, :head_dim] for slot in slots)
            whole = transform.product_slot(level + 1, s, num_blocks)
            dproduct = refs["dtransition"][0, 0] if level + 1 == keys.num_levels else dproducts[whole]
            dproduct = dproduct.astype(dtype)
            rows, moving = block_rows(2 * count * s, count), Versions.rows(level, 2 * count * s, count)
            dy = state[rows].astype(dtype)
            dproducts[slots[0]] += dot(right, dproduct, TN)
            yield
            dproducts[slots[1]] = dot(dproduct, left, NT) + dot(dy, keys.moving[level, moving], TN)
            yield
            state[rows] = dot(dy, right) + refs["dkey_moving"][level, moving]
            yield


def _key_transform_backward(heads, refs, t_transposed):
    """Emits dK, dW and dbeta from dK' (in `dk_state`), dP, T^T and the heads' contributions."""
    w, k, solved = refs["w_before"], refs["k_before"], refs["solved"]
    (length, head_dim), dtype, left = w.shape, w.dtype, is_left()
    pairs, blocks = range(length // PAIR), range(length // BLOCK)
    row, column = iota((BLOCK, PAIR), 0), iota((BLOCK, PAIR), 1) & (BLOCK - 1)
    beta = refs["beta_before"][0, 0]
    beta_columns = beta.T

    def at_block(tiles, b):
        return tiles[b // 2][block_rows(b % 2)]

    dk, w_dk = {}, {}
    for p in pairs:
        rows = slice(PAIR * p, PAIR * p + PAIR)
        both = refs["dk_state"][rows].astype(dtype)
        dk[2 * p], dk[2 * p + 1] = both[:BLOCK], both[BLOCK:]
        w_dk[p] = dot(w[rows], _swap_blocks(both), NT)
        yield
    right_hand, dp = {}, {}
    for b in blocks:
        own = _own_lanes(b)
        dp[b] = refs["dproducts"][b].astype(dtype)
        du = split(refs["dsolved"][b, :, :head_dim] + dot(w[block_rows(b)], dp[b]), dtype)
        dag = jnp.where(own & (column < row), refs["dsolved"][b, :, head_dim:] + at_block(w_dk, b), 0.0)
        hi, lo = split(dag, dtype)
        right_hand[b] = jnp.concatenate([*du, hi + transform.roll(lo, BLOCK)], 1).astype(dtype)
        yield
    x, z = {}, {}
    for b in blocks:
        product = dot(t_transposed[b // 2, block_rows(b % 2)], twice(right_hand[b]))
        x[b] = product[:, :head_dim] + product[:, head_dim : 2 * head_dim]
        z[b] = product[:, 2 * head_dim :]
        z[b] += transform.roll(z[b], BLOCK)
        yield
    for p in pairs:
        sums = []
        for b in (2 * p, 2 * p + 1):
            u = solved[b, :, :head_dim].astype(_f32) + solved[b, :, head_dim : 2 * head_dim].astype(_f32)
            terms = x[b] * u
            terms = [terms[:, i : i + PAIR] for i in range(0, head_dim, PAIR)]
            sums.append(functools.reduce(jnp.add, terms, z[b] * refs["ag_own"][b].astype(_f32)))
        total = jnp.concatenate(sums, 0).T.sum(axis=0, keepdims=True)
        refs["dbeta"][0, 0, p : p + 1] = total * (-LN2 / beta[p : p + 1])
        yield
    dn, dg = {}, {}
    for b in blocks:
        scale = beta_columns[block_rows(b % 2), b // 2 : b // 2 + 1]
        x[b], z[b] = x[b] * scale, z[b] * scale
        operand = twice(jnp.concatenate([solved[b, :, :head_dim], refs["ag_own"][b]], 1))
        product = dot(jnp.concatenate([x[b], z[b]], 1).astype(dtype), operand, NT)
        dn[b] = jnp.where(column < row, product, 0.0)
        dg[b] = jnp.where(column < row, -z[b], 0.0)
        yield
    transposed = {}
    for p in pairs:
        even, odd = 2 * p, 2 * p + 1
        both = [jnp.where(left, dn[even], dg[odd]), jnp.where(left, dg[even], dn[odd])]
        transposed[p] = jnp.concatenate(both, 0).T  # [dN_e^T | dG_e^T], [dG_o^T | dN_o^T]
        yield
    for b in blocks:
        rows, own = block_rows(b), _own_lanes(b)
        own_transposed = at_block(transposed, b)
        gradient = jnp.where(own, dg[b], dn[b] + own_transposed).astype(dtype)
        dw = dot(gradient, _own_order(b, k[rows], w[rows])) - x[b] - dot(solved[b, :, :head_dim], dp[b], NT)
        dk_sum = refs["dk_state"][rows]
        for g, head in enumerate(heads):

            def selected(i, block, head=head):
                return head.selected[i, b // 2, block_rows(block)].astype(_f32)

            of_y, of_logits = selected(0, b % 2), selected(0, 1 - b % 2) + selected(1, 1 - b % 2)
            dag, key, other, weight = -refs["ag_own"][b].astype(_f32), dk[b], own_transposed, w[rows]
            if g:
                dag, other, key, weight = 0.0, 0.0, head.q[rows], head.q[rows]
            dw += dot(jnp.where(own, dag, of_y).astype(dtype), _own_order(b, key, head.q[rows]))
            parts = [x.astype(dtype) for x in split(jnp.where(own, other, of_logits), dtype)]
            dk_sum += dot(jnp.concatenate(parts, 1), twice(_own_order(b, weight, head.q[rows])))
        refs["dw"][0, rows] = (dw * LN2).astype(refs["dw"].dtype)
        refs["dk"][0, rows] = (dk_sum * LN2).astype(refs["dk"].dtype)
        yield


def _kernel(*refs, names, scale, base, ratio):
    refs = dict(zip(names, refs))
    for name in ("w_before", "k_before"):
        refs[name] = refs[name].at[0]
    group, w, k, slot = refs["q"].shape[1], refs["w_before"], refs["k_before"], pl.program_id(1) & 1
    keys = Versions(refs["key_moving"], refs["key_last"], 0)

    def head(g, is_first=False):
        view = lambda name: refs[name].at[0, g] if name in refs else None
        names = ("q", "lse", "delta", "dout", "dq_top", "dq", "gate", "dgate")
        queries = Versions(refs["query_moving"], refs["query_last"], 1)
        return _Head(**{n: view(n) for n in names}, selected=refs["selected"].at[g], queries=queries, is_first=is_first)

    def previous_superchunk():
        a, g, solved = refs["a"].at[slot], refs["g"].at[slot], refs["solved"]
        yield from transform.key_products(w, k, a, g, solved, refs["products"], keys)
        for b in range(w.shape[0] // BLOCK):
            ag = solved[b, :, 2 * w.shape[1] :].astype(_f32)
            ag = jnp.where(_own_lanes(b), jnp.where(is_left(), ag, transform.roll(ag, BLOCK)), 0.0)
            refs["ag_own"][b] = ag.astype(w.dtype)
        refs["dv_state"][...] = refs["dv_later"][0]
        refs["dk_state"][...] = refs["dk_top"][0].astype(_f32)
        if "segments" in refs:
            columns = lanes.to_integer_columns(refs["segments"][0])
            refs["segment_columns"][...] = jnp.where(columns > 0, columns, -1)  # padding matches nothing
        yield from _query_attention(head(0, True), refs, keys, scale)
        query_steps = _query_transform_backward(head(0, True), refs, scale)
        if group > 1:
            yield from query_steps
            query_steps = iter(())

            def other_head(g, carry):
                transform.drain(_query_attention(head(g), refs, keys, scale))
                transform.drain(_query_transform_backward(head(g), refs, scale))
                return carry

            lax.fori_loop(1, group, other_head, 0)
        yield from _alternate(query_steps, _key_levels_backward(refs, keys), _KEY_RATIO)
        refs["dv"][0] = refs["dv_state"][...].astype(refs["dv"].dtype)
        yield from _key_transform_backward([head(g) for g in range(group)], refs, refs["t_transposed"].at[slot])

    def inversion():
        w, k, beta = (refs[name].at[0] for name in ("w", "k", "beta"))
        inverses, grams = yield from transform.gram_inverse(w, k, beta[0], base=base)
        for p, (inverse, gram) in enumerate(zip(inverses, grams)):
            refs["t_transposed"][1 - slot, p] = jnp.concatenate(split(inverse, w.dtype), 0).astype(w.dtype).T
            refs["a"][1 - slot, p] = inverse * beta[0, p : p + 1]
            refs["g"][1 - slot, p] = gram
            yield

    transform.interleave(inversion(), previous_superchunk(), ratio)


def chunk_backward(
    q,
    k,
    v,
    w,
    beta,
    gate,
    segment_ids,
    lse,
    delta,
    dout,
    dq_top,
    dk_top,
    dtransition,
    dv,
    *,
    scale,
    superchunk,
    cores=1,
    vmem_limit=64,
    base=16,
    ratio=2.3,
    interpret=False,
):
    """Gradients of `chunk_forward`, and of its attention as part of the attention to all superchunks.

    In-superchunk weights are p_ij = exp2(s_ij - lse_i), with lse over all superchunks, and logits get the gradient
    ds_ij = p_ij (dout_i v_j^T - delta_i), in natural units.

    Args:
      q, k, v, w, beta, gate, segment_ids: as in `chunk_forward`.
      lse: float32 [BK, G, 1, T], base-2 log-sum-exp of whole rows, without the gate of the query; 1e30 in empty rows.
      delta: float32 [BK, G, 1, T], sum_v dout out - dlse, dlse the cotangent of the natural log-sum-exp.
      dout: [BK, G, T, Hv], dtype of v.
      dq_top, dk_top, dtransition: cotangents of the results of `chunk_forward` divided by ln 2, i.e. sums of ds times
        base-2 operands: [BK, G, T, H] and [BK, T, H] in the dtype of q, float32 [BK, T / S, H, H].
      dv: float32 [BK, T, Hv], contribution of the queries of later superchunks.
      scale, superchunk, cores, vmem_limit, base, interpret: as in `chunk_forward`.
      ratio: steps of the previous superchunk emitted per step of the inversion.

    Returns:
      dq [BK, G, T, H], dk, dw [BK, T, H], dv [BK, T, Hv] in the dtypes of the inputs, dbeta float32 [BK, T], and dgate
      float32 [BK, G, T]: row sums minus column sums of ds, or None without gate.
    """
    heads, group, length, head_dim = q.shape
    v_dim, dtype = v.shape[-1], q.dtype
    pairs, num_blocks = superchunk // PAIR, superchunk // BLOCK
    grid = ChunkGrid(heads, length, superchunk, cores)
    key_rows, value_rows = (grid.rows(width, 1) for width in (head_dim, v_dim))
    query_rows, out_rows = (grid.grouped_rows(group, width, 1) for width in (head_dim, v_dim))
    statistics = grid.block((1, group, 1, superchunk), lambda h, c: (h, 0, 0, c), 1)
    beta = pad_rows(grid.by_pair(jnp.maximum(beta, _SMALLEST_BETA)))
    inputs = {
        "w": (w, grid.rows(head_dim, 0)),
        "k": (k, grid.rows(head_dim, 0)),
        "beta": (beta, grid.matrices(*beta.shape[2:], 0)),
        "w_before": (w, key_rows),
        "k_before": (k, key_rows),
        "beta_before": (beta, grid.matrices(*beta.shape[2:], 1)),
        "q": (q, query_rows),
        "v": (v, value_rows),
        "lse": (lse, statistics),
        "delta": (delta, statistics),
        "dout": (dout, out_rows),
        "dq_top": (dq_top, query_rows),
        "dk_top": (dk_top, key_rows),
        "dtransition": (dtransition, grid.matrices(head_dim, head_dim, 1)),
        "dv_later": (dv, value_rows),
    }
    outputs = {
        "dq": (q.shape, dtype, query_rows),
        "dk": (k.shape, k.dtype, key_rows),
        "dw": (w.shape, w.dtype, key_rows),
        "dv": (v.shape, v.dtype, value_rows),
        "dbeta": ((heads, grid.num_chunks, pairs, PAIR), _f32, grid.matrices(pairs, PAIR, 1)),
    }
    tile, moving = (pairs, PAIR, PAIR), (num_blocks.bit_length() - 1, superchunk // 2, head_dim)
    scratch = {
        "t_transposed": ((2, *tile), dtype),
        "a": ((2, pairs, BLOCK, PAIR), _f32),
        "g": ((2, pairs, BLOCK, PAIR), _f32),
        "solved": (transform.solved_shape(num_blocks, head_dim), dtype),
        "ag_own": ((num_blocks, BLOCK, PAIR), dtype),
        "products": (transform.product_shape(num_blocks, head_dim, dtype), dtype),
        "key_moving": (moving, dtype),
        "key_last": ((superchunk, head_dim), dtype),
        "query_moving": (moving, dtype),
        "query_last": ((superchunk, head_dim), dtype),
        "logits": (tile, _f32),
        "ds": ((2, *tile), dtype),
        "selected": ((group, 2, *tile), dtype),
        "dsolved": ((num_blocks, BLOCK, head_dim + PAIR), _f32),
        "dproducts": ((2 * num_blocks - 2, head_dim, head_dim), _f32),
        "dkey_moving": (moving, _f32),
        "dq_state": ((superchunk, head_dim), _f32),
        "dk_state": ((superchunk, head_dim), _f32),
        "dv_state": ((superchunk, v_dim), _f32),
    }
    if gate is not None:
        inputs["gate"] = (gate[:, :, None], statistics)
        outputs["dgate"] = ((heads, group, 1, length), _f32, statistics)
        scratch["gate_columns"] = scratch["dgate_columns"] = ((superchunk, PAIR), _f32)
    if segment_ids is not None:
        per_row = heads // segment_ids.shape[0]
        index = lambda h, c: (lax.div(h, per_row), 0, c)
        inputs["segments"] = (segment_ids[:, None], grid.block((1, 1, superchunk), index, 1))
        scratch["segment_columns"] = ((superchunk, PAIR), jnp.int32)
    results = grid.call(
        _kernel,
        inputs,
        outputs,
        scratch,
        name="path_chunk_backward",
        like=q,
        vmem_limit=vmem_limit,
        interpret=interpret,
        scale=scale * LOG2E,
        base=base,
        ratio=ratio,
    )
    dq, dk, dw, dv, dbeta, *dgate = results.values()
    return dq, dk, dw, dv, dbeta.reshape(heads, length), dgate[0].reshape(heads, group, length) if dgate else None
