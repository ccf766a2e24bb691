"""The quadratic stage in Triton, forward and backward: the mathematics, operands and layouts of the Mosaic kernels.

For NVIDIA GPUs without wgmma, and as a second opinion on those that have it. Operands come in tiles of 128 tokens; a
program takes a block of rows of one tile and steps over the tiles of the other side in blocks. Tiles are visited from
the nearest to the farthest, so the gates between two tiles are a running sum and no difference of long sums is taken.

Logits are base 2 and lack the query's own gate, which cancels in the softmax. Products take operands in the inputs'
dtype and accumulate in float32. There are no atomics: results are deterministic.

Array arguments are described by `forward.attention_forward` and the functions of `backward`; those that a switch turns
off are never read. Static arguments:

  TREE, GATE, IDS, PRUNED: whether there are versions of tiles, forget gates, documents, first or last needed tiles.
  WINDOW: keys that a query sees; 0 = all.
  BATCH, HEADS, KV_HEADS, QUERIES, KEYS, ROWS: batch, heads, tiles of queries and of keys, rows of the table.
  HEAD_DIM, V_HEAD_DIM: 64 or 128.
  SCALE: of the raw products, log2 e included.
  BLOCK_M, BLOCK_N: queries and keys of a block of logits, at most 128.
"""

from typing import no_type_check  # jaxtyping's import hook would wrap what triton.jit must see as it is

import triton
import triton.language as tl

TILE = tl.constexpr(128)
HALF = tl.constexpr(64)
LOG2E = tl.constexpr(1.4426950408889634)
# Masked logits lie below the least running maximum, so their exponentials are exactly 0.
MASKED, LEAST = tl.constexpr(-2e30), tl.constexpr(-1e30)


@triton.jit
@no_type_check
def _block(array, tile, start, head, SIZE: tl.constexpr, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Pointers [SIZE, HEAD_DIM] to tokens start, start + 1, ... of a tile, of one head of [tiles, 128, heads HEAD_DIM].

    Only offsets inside a tile are sure to fit into 32 bits.
    """
    token, column = start + tl.arange(0, SIZE), head * HEAD_DIM + tl.arange(0, HEAD_DIM)
    base = array + tile.to(tl.int64) * (TILE * HEADS * HEAD_DIM)
    return base + (token[:, None] * (HEADS * HEAD_DIM) + column[None, :])


@triton.jit
@no_type_check
def _line(array, batch, head, tile, HEADS: tl.constexpr, TILES: tl.constexpr, WIDTH: tl.constexpr):
    """Pointer to the numbers of one tile, of [B, heads, tiles, WIDTH]."""
    return array + ((batch * HEADS + head) * TILES + tile).to(tl.int64) * WIDTH


@triton.jit
@no_type_check
def _version(version, batch, TREE: tl.constexpr, BATCH: tl.constexpr, TILES: tl.constexpr):
    """Index of a version of a tile: the batch is the inner axis of versions, and the outer one of plain tiles."""
    if TREE:
        return version * BATCH + batch
    else:
        return batch * TILES + version


@triton.jit
@no_type_check
def _visible(distance, row_ids, column_ids, WINDOW: tl.constexpr, IDS: tl.constexpr):
    """Mask of a block of logits, from the distances back from query to key and the documents; 0 is padding."""
    mask = distance >= 0
    if WINDOW > 0:
        mask = mask & (distance < WINDOW)
    if IDS:
        mask = mask & (row_ids[:, None] == column_ids[None, :]) & (row_ids[:, None] > 0)
    return mask


@triton.jit
@no_type_check
def _query_logits(
    q, k, gates, ids, query_ids, distance, column, IS_OWN: tl.constexpr, GATE: tl.constexpr, IDS: tl.constexpr,
    WINDOW: tl.constexpr, SCALE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Base-2 logits [BLOCK_M, BLOCK_N] without the gates between the tiles, MASKED where a query does not see a key.

    Args:
      q, k: [BLOCK_M, H] and [BLOCK_N, H].
      gates: pointer to the gates of the tile of keys: up to and with each in the queries' own, behind each elsewhere.
      ids: pointer to the documents of the tile of keys; query_ids: [BLOCK_M].
      distance: from the first query back to the tile's first key; column: first key in the tile.
    """
    columns = column + tl.arange(0, BLOCK_N)
    z = tl.dot(q, tl.trans(k)) * SCALE
    if GATE:
        gate = tl.load(gates + columns)
        if IS_OWN:
            z -= gate[None, :]
        else:
            z += gate[None, :]
    if IS_OWN or IDS or WINDOW > 0:
        key_ids = columns
        if IDS:
            key_ids = tl.load(ids + columns)
        rows = distance + tl.arange(0, BLOCK_M)
        z = tl.where(_visible(rows[:, None] - columns[None, :], query_ids, key_ids, WINDOW, IDS), z, MASKED)
    return z


@triton.jit
@no_type_check
def attention_forward(
    q_array, k_array, v_array, table, starts, inside, behind, between_array, ids, first_key, partial_out, partial_lse,
    out_array, lse_array,
    TREE: tl.constexpr, GATE: tl.constexpr, IDS: tl.constexpr, PRUNED: tl.constexpr, WINDOW: tl.constexpr,
    BATCH: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, V_HEAD_DIM: tl.constexpr, SCALE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Attention of BLOCK_M queries to the tiles of keys of their rows; see `forward.attention_forward`.

    Grid (heads, blocks of queries, batch); output [B query tiles, 128, N Hv], log-sum-exp [B, N, query tiles, 128].
    """
    head, batch = tl.program_id(0), tl.program_id(2)
    block = QUERIES * (TILE // BLOCK_M) - 1 - tl.program_id(1)  # the longest rows first
    tile, start = block // (TILE // BLOCK_M), block % (TILE // BLOCK_M) * BLOCK_M
    position = tile + KEYS - QUERIES  # of the queries' tile among the keys'
    lines = start + tl.arange(0, BLOCK_M)
    query_ids = lines
    if IDS:
        query_ids = tl.load(_line(ids, batch, 0, position, 1, KEYS, TILE) + lines)
    if TREE:
        # What the queries found in their own tile.
        acc = tl.load(_block(partial_out, batch * QUERIES + tile, start, head, BLOCK_M, HEADS, V_HEAD_DIM))
        maximum = tl.load(_line(partial_lse, batch, head, tile, HEADS, QUERIES, TILE) + lines)
        normaliser = tl.where(maximum > LEAST, 1.0, 0.0)
    else:
        acc = tl.zeros([BLOCK_M, V_HEAD_DIM], tl.float32)
        maximum = tl.full([BLOCK_M], LEAST, tl.float32)
        normaliser = tl.zeros([BLOCK_M], tl.float32)
    # Without the tree a tile has one row. Said with a loop, that would cost registers.
    if TREE:
        for row in range(tl.load(starts + tile), tl.load(starts + tile + 1)):
            acc, maximum, normaliser = _attend_row(
                acc, maximum, normaliser, query_ids, row, q_array, k_array, v_array, table, inside, behind,
                between_array, ids, first_key, tile, start, head, batch, TREE, GATE, IDS, PRUNED, WINDOW, BATCH, HEADS,
                KV_HEADS, QUERIES, KEYS, ROWS, HEAD_DIM, V_HEAD_DIM, SCALE, BLOCK_M, BLOCK_N,
            )  # fmt: skip
    else:
        acc, maximum, normaliser = _attend_row(
            acc, maximum, normaliser, query_ids, tile, q_array, k_array, v_array, table, inside, behind, between_array,
            ids, first_key, tile, start, head, batch, TREE, GATE, IDS, PRUNED, WINDOW, BATCH, HEADS, KV_HEADS, QUERIES,
            KEYS, ROWS, HEAD_DIM, V_HEAD_DIM, SCALE, BLOCK_M, BLOCK_N,
        )  # fmt: skip

    is_empty = normaliser == 0
    normaliser = tl.where(is_empty, 1.0, normaliser)
    lse = tl.where(is_empty, LEAST, maximum + tl.log2(normaliser))
    tl.store(_line(lse_array, batch, head, tile, HEADS, QUERIES, TILE) + lines, lse)
    out = (acc / normaliser[:, None]).to(out_array.dtype.element_ty)
    tl.store(_block(out_array, batch * QUERIES + tile, start, head, BLOCK_M, HEADS, V_HEAD_DIM), out)


@triton.jit
@no_type_check
def _attend_row(
    acc, maximum, normaliser, query_ids, row, q_array, k_array, v_array, table, inside, behind, between_array, ids,
    first_key, tile, start, head, batch,
    TREE: tl.constexpr, GATE: tl.constexpr, IDS: tl.constexpr, PRUNED: tl.constexpr, WINDOW: tl.constexpr,
    BATCH: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, V_HEAD_DIM: tl.constexpr, SCALE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The online softmax over the keys of one row of the table."""
    position, kv_head = tile + KEYS - QUERIES, head // (HEADS // KV_HEADS)
    version, first, stop = tl.load(table + 5 * row), tl.load(table + 5 * row + 2), tl.load(table + 5 * row + 3)
    first_version = tl.load(table + 5 * row + 4) - first
    q_tile = _version(version, batch, TREE, BATCH, QUERIES)
    q = tl.load(_block(q_array, q_tile, start, head, BLOCK_M, HEADS, HEAD_DIM))
    between = 0.0
    if GATE:
        between = tl.load(_line(between_array, batch, head, row, HEADS, ROWS, 1))
    if PRUNED:
        first = tl.maximum(first, tl.load(_line(first_key, batch, head, tile, HEADS, QUERIES, 1)))
    if not TREE:
        gates = _line(inside, batch, head, position, HEADS, KEYS, TILE)
        key_ids = _line(ids, batch, 0, position, 1, KEYS, TILE)
        k_tile = _version(first_version + position, batch, TREE, BATCH, KEYS)
        # `stop - position` is 1, but unknown to the compiler: it would unroll the loop and spill.
        for column in range(0, (stop - position) * (start + BLOCK_M), BLOCK_N):
            k = tl.load(_block(k_array, k_tile, column, kv_head, BLOCK_N, KV_HEADS, HEAD_DIM))
            v = tl.load(_block(v_array, batch * KEYS + position, column, kv_head, BLOCK_N, KV_HEADS, V_HEAD_DIM))
            z = _query_logits(
                q, k, gates, key_ids, query_ids, start, column, True, GATE, IDS, WINDOW, SCALE, BLOCK_M, BLOCK_N
            )
            acc, maximum, normaliser = _accumulate(acc, maximum, normaliser, z, v, 0.0, False)
        stop -= 1
    for i in range(0, tl.maximum(stop - first, 0) * (TILE // BLOCK_N)):
        step = stop * (TILE // BLOCK_N) - 1 - i
        key, column = step // (TILE // BLOCK_N), step % (TILE // BLOCK_N) * BLOCK_N
        gates = _line(behind, batch, head, key, HEADS, KEYS, TILE + 4)
        key_ids = _line(ids, batch, 0, key, 1, KEYS, TILE)
        k_tile = _version(first_version + key, batch, TREE, BATCH, KEYS)
        k = tl.load(_block(k_array, k_tile, column, kv_head, BLOCK_N, KV_HEADS, HEAD_DIM))
        v = tl.load(_block(v_array, batch * KEYS + key, column, kv_head, BLOCK_N, KV_HEADS, V_HEAD_DIM))
        z = _query_logits(
            q, k, gates, key_ids, query_ids, (position - key) * TILE + start, column, False, GATE, IDS, WINDOW,
            SCALE, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        acc, maximum, normaliser = _accumulate(acc, maximum, normaliser, z, v, between, GATE)
        if GATE:
            between += tl.where(column == 0, tl.load(gates + TILE), 0.0)
    return acc, maximum, normaliser


@triton.jit
@no_type_check
def _accumulate(acc, maximum, normaliser, z, v, between, GATE: tl.constexpr):
    """One step of the online softmax, with logits z + between: the scalar joins the maximum, not every element."""
    largest = tl.max(z, 1)
    if GATE:
        largest += between
    larger = tl.maximum(maximum, largest)
    shift = larger
    if GATE:
        shift = larger - between
    decay = tl.exp2(maximum - larger)
    weights = tl.exp2(z - shift[:, None])
    normaliser = normaliser * decay + tl.sum(weights, 1)
    acc = tl.dot(weights.to(v.dtype), v, acc * decay[:, None])
    return acc, larger, normaliser


@triton.jit
@no_type_check
def query_gradient(
    q_array, k_array, v_array, dout_array, lse_array, delta_array, table, order, inside, behind, between_array, ids,
    first_key, dq_array, sums_array,
    TREE: tl.constexpr, GATE: tl.constexpr, IDS: tl.constexpr, PRUNED: tl.constexpr, WINDOW: tl.constexpr,
    BATCH: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, V_HEAD_DIM: tl.constexpr, SCALE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Gradient of BLOCK_M queries of one row of the table, and row sums of ds; see `backward.query_gradient`.

    dq = ds k, ds = p (dout v^T - delta), p = exp2(z - lse). Grid (heads, rows x blocks of a tile, batch); `order`,
    int32 [ROWS], says which row comes when. dq is like q, the sums are [B, N, rows, 128].
    """
    head, batch = tl.program_id(0), tl.program_id(2)
    row, start = tl.load(order + tl.program_id(1) // (TILE // BLOCK_M)), tl.program_id(1) % (TILE // BLOCK_M) * BLOCK_M
    version, tile = tl.load(table + 5 * row), tl.load(table + 5 * row + 1)
    first, stop = tl.load(table + 5 * row + 2), tl.load(table + 5 * row + 3)
    first_version = tl.load(table + 5 * row + 4) - first
    if PRUNED:
        first = tl.maximum(first, tl.load(_line(first_key, batch, head, tile, HEADS, QUERIES, 1)))
    kv_head = head // (HEADS // KV_HEADS)
    position = tile + KEYS - QUERIES
    lines = start + tl.arange(0, BLOCK_M)
    query_ids = lines
    if IDS:
        query_ids = tl.load(_line(ids, batch, 0, position, 1, KEYS, TILE) + lines)
    q_tile = _version(version, batch, TREE, BATCH, QUERIES)
    q = tl.load(_block(q_array, q_tile, start, head, BLOCK_M, HEADS, HEAD_DIM))
    dout = tl.load(_block(dout_array, batch * QUERIES + tile, start, head, BLOCK_M, HEADS, V_HEAD_DIM))
    lse = tl.load(_line(lse_array, batch, head, tile, HEADS, QUERIES, TILE) + lines)
    delta = tl.load(_line(delta_array, batch, head, tile, HEADS, QUERIES, TILE) + lines)
    dq = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
    sums = tl.zeros([BLOCK_M], tl.float32)
    between = 0.0
    if GATE:
        between = tl.load(_line(between_array, batch, head, row, HEADS, ROWS, 1))
    if not TREE:
        gates = _line(inside, batch, head, position, HEADS, KEYS, TILE)
        key_ids = _line(ids, batch, 0, position, 1, KEYS, TILE)
        k_tile = _version(first_version + position, batch, TREE, BATCH, KEYS)
        # `stop - position` is 1, but unknown to the compiler: it would unroll the loop and spill.
        for column in range(0, (stop - position) * (start + BLOCK_M), BLOCK_N):
            k = tl.load(_block(k_array, k_tile, column, kv_head, BLOCK_N, KV_HEADS, HEAD_DIM))
            v = tl.load(_block(v_array, batch * KEYS + position, column, kv_head, BLOCK_N, KV_HEADS, V_HEAD_DIM))
            z = _query_logits(
                q, k, gates, key_ids, query_ids, start, column, True, GATE, IDS, WINDOW, SCALE, BLOCK_M, BLOCK_N
            )
            ds = tl.exp2(z - lse[:, None]) * (tl.dot(dout, tl.trans(v)) - delta[:, None])
            sums += tl.sum(ds, 1)
            dq = tl.dot(ds.to(k.dtype), k, dq)
        stop -= 1
    for i in range(0, tl.maximum(stop - first, 0) * (TILE // BLOCK_N)):
        step = stop * (TILE // BLOCK_N) - 1 - i
        key, column = step // (TILE // BLOCK_N), step % (TILE // BLOCK_N) * BLOCK_N
        gates = _line(behind, batch, head, key, HEADS, KEYS, TILE + 4)
        key_ids = _line(ids, batch, 0, key, 1, KEYS, TILE)
        k_tile = _version(first_version + key, batch, TREE, BATCH, KEYS)
        k = tl.load(_block(k_array, k_tile, column, kv_head, BLOCK_N, KV_HEADS, HEAD_DIM))
        v = tl.load(_block(v_array, batch * KEYS + key, column, kv_head, BLOCK_N, KV_HEADS, V_HEAD_DIM))
        z = _query_logits(
            q, k, gates, key_ids, query_ids, (position - key) * TILE + start, column, False, GATE, IDS, WINDOW,
            SCALE, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        ds = tl.exp2(z + (between - lse)[:, None]) * (tl.dot(dout, tl.trans(v)) - delta[:, None])
        sums += tl.sum(ds, 1)
        dq = tl.dot(ds.to(k.dtype), k, dq)
        if GATE:
            between += tl.where(column == 0, tl.load(gates + TILE), 0.0)
    tl.store(_line(sums_array, batch, head, row, HEADS, ROWS, TILE) + lines, sums)
    dq = (dq * (SCALE / LOG2E)).to(dq_array.dtype.element_ty)
    tl.store(_block(dq_array, q_tile, start, head, BLOCK_M, HEADS, HEAD_DIM), dq)


@triton.jit
@no_type_check
def key_gradient(
    q_array, k_array, v_array, dout_array, vectors, table, starts, inside, behind, between_array, ids, last_query,
    dk_array, dv_array, sums_array,
    TREE: tl.constexpr, GATE: tl.constexpr, IDS: tl.constexpr, PRUNED: tl.constexpr, WINDOW: tl.constexpr,
    BATCH: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, V_HEAD_DIM: tl.constexpr, SCALE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Gradient of BLOCK_N keys and their values, and column sums of ds; see `backward.key_gradient`.

    dk = ds^T q per row of the table, dv = p^T dout, both summed over the query heads of a group inside the program.
    Grid (key heads, blocks of keys, batch). dk is like k, dv like v, the sums are [B, N, key tiles, 128].
    """
    kv_head, batch = tl.program_id(0), tl.program_id(2)
    tile = tl.program_id(1) // (TILE // BLOCK_N)  # the first ones have the most queries
    start = tl.program_id(1) % (TILE // BLOCK_N) * BLOCK_N
    lines = start + tl.arange(0, BLOCK_N)
    key_ids = lines
    if IDS:
        key_ids = tl.load(_line(ids, batch, 0, tile, 1, KEYS, TILE) + lines)
    v = tl.load(_block(v_array, batch * KEYS + tile, start, kv_head, BLOCK_N, KV_HEADS, V_HEAD_DIM))
    dv = tl.zeros([BLOCK_N, V_HEAD_DIM], tl.float32)
    for g in range(HEADS // KV_HEADS):
        head = kv_head * (HEADS // KV_HEADS) + g
        tl.store(_line(sums_array, batch, head, tile, HEADS, KEYS, TILE) + lines, tl.zeros([BLOCK_N], tl.float32))

    if TREE:
        for row in range(tl.load(starts + tile), tl.load(starts + tile + 1)):
            dv = _row_gradient(
                dv, v, key_ids, row, q_array, k_array, dout_array, vectors, table, inside, behind, between_array, ids,
                last_query, dk_array, sums_array, tile, start, kv_head, batch, TREE, GATE, IDS, PRUNED, WINDOW, BATCH,
                HEADS, KV_HEADS, QUERIES, KEYS, ROWS, HEAD_DIM, V_HEAD_DIM, SCALE, BLOCK_M, BLOCK_N,
            )  # fmt: skip
    else:
        dv = _row_gradient(
            dv, v, key_ids, tile, q_array, k_array, dout_array, vectors, table, inside, behind, between_array, ids,
            last_query, dk_array, sums_array, tile, start, kv_head, batch, TREE, GATE, IDS, PRUNED, WINDOW, BATCH,
            HEADS, KV_HEADS, QUERIES, KEYS, ROWS, HEAD_DIM, V_HEAD_DIM, SCALE, BLOCK_M, BLOCK_N,
        )  # fmt: skip
    dv_tile = _block(dv_array, batch * KEYS + tile, start, kv_head, BLOCK_N, KV_HEADS, V_HEAD_DIM)
    tl.store(dv_tile, dv.to(dv_array.dtype.element_ty))


@triton.jit
@no_type_check
def _row_gradient(
    dv, v, key_ids, row, q_array, k_array, dout_array, vectors, table, inside, behind, between_array, ids, last_query,
    dk_array, sums_array, tile, start, kv_head, batch,
    TREE: tl.constexpr, GATE: tl.constexpr, IDS: tl.constexpr, PRUNED: tl.constexpr, WINDOW: tl.constexpr,
    BATCH: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, V_HEAD_DIM: tl.constexpr, SCALE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Stores dk of one row of the table, adds the row's part to the sums, and returns dv with it."""
    lines = start + tl.arange(0, BLOCK_N)
    version, first, end = tl.load(table + 5 * row), tl.load(table + 5 * row + 2), tl.load(table + 5 * row + 3)
    first_version = tl.load(table + 5 * row + 4) - first
    k_tile = _version(version, batch, TREE, BATCH, KEYS)
    k = tl.load(_block(k_array, k_tile, start, kv_head, BLOCK_N, KV_HEADS, HEAD_DIM))
    dk = tl.zeros([BLOCK_N, HEAD_DIM], tl.float32)
    for g in range(HEADS // KV_HEADS):
        head = kv_head * (HEADS // KV_HEADS) + g
        stop = end
        if PRUNED:
            stop = tl.minimum(stop, tl.load(_line(last_query, batch, head, tile, HEADS, KEYS, 1)) + 1)
        gate = tl.zeros([BLOCK_N], tl.float32)
        if GATE:
            gate = tl.load(_line(behind, batch, head, tile, HEADS, KEYS, TILE) + lines)
            gate += tl.load(_line(between_array, batch, head, row, HEADS, ROWS, 1))
        sums = tl.zeros([BLOCK_N], tl.float32)
        nearest = first
        if not TREE:
            # The nearest tile may be the keys' own: then there is nothing between, nor behind the keys.
            is_own = first + KEYS - QUERIES == tile
            own_gate = gate
            if GATE:
                own = -tl.load(_line(inside, batch, head, tile, HEADS, KEYS, TILE) + lines)
                own_gate = tl.where(is_own, own, gate)
            distance = (first + KEYS - QUERIES - tile) * TILE - start
            for i in range(tl.where(is_own, start // BLOCK_M, 0), TILE // BLOCK_M):
                dk, dv, sums = _accumulate_keys(
                    dk, dv, sums, k, v, own_gate, q_array, dout_array, vectors, ids, key_ids, first, first_version,
                    i * BLOCK_M, distance + i * BLOCK_M, head, batch, True, TREE, IDS, WINDOW, BATCH, HEADS,
                    QUERIES, KEYS, HEAD_DIM, V_HEAD_DIM, SCALE, BLOCK_M, BLOCK_N,
                )  # fmt: skip
            if GATE:
                passed = tl.load(_line(vectors, batch, head, 2 * first + 1, HEADS, 2 * QUERIES, TILE + 4) + TILE)
                gate += tl.where(is_own, 0.0, passed)
            nearest += 1
        for i in range(0, tl.maximum(stop - nearest, 0) * (TILE // BLOCK_M)):
            step = nearest * (TILE // BLOCK_M) + i
            query, line = step // (TILE // BLOCK_M), step % (TILE // BLOCK_M) * BLOCK_M
            dk, dv, sums = _accumulate_keys(
                dk, dv, sums, k, v, gate, q_array, dout_array, vectors, ids, key_ids, query, first_version, line,
                (query + KEYS - QUERIES - tile) * TILE + line - start, head, batch, False, TREE, IDS, WINDOW,
                BATCH, HEADS, QUERIES, KEYS, HEAD_DIM, V_HEAD_DIM, SCALE, BLOCK_M, BLOCK_N,
            )  # fmt: skip
            if GATE:
                passed = tl.load(_line(vectors, batch, head, 2 * query + 1, HEADS, 2 * QUERIES, TILE + 4) + TILE)
                gate += tl.where(line == TILE - BLOCK_M, passed, 0.0)
        target = _line(sums_array, batch, head, tile, HEADS, KEYS, TILE) + lines
        # Another thread may have stored what this one loads.
        tl.debug_barrier()
        sums += tl.load(target)
        tl.debug_barrier()
        tl.store(target, sums)
    dk = (dk * (SCALE / LOG2E)).to(dk_array.dtype.element_ty)
    tl.store(_block(dk_array, k_tile, start, kv_head, BLOCK_N, KV_HEADS, HEAD_DIM), dk)
    return dv


@triton.jit
@no_type_check
def _accumulate_keys(
    dk, dv, sums, k, v, gate, q_array, dout_array, vectors, ids, key_ids, query, first_version, line, distance, head,
    batch, IS_NEAREST: tl.constexpr, TREE: tl.constexpr, IDS: tl.constexpr, WINDOW: tl.constexpr,
    BATCH: tl.constexpr, HEADS: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, HEAD_DIM: tl.constexpr,
    V_HEAD_DIM: tl.constexpr, SCALE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Adds what the queries line ... line + BLOCK_M of a tile contribute to dk, dv and the sums of ds.

    Args:
      k, v: [BLOCK_N, H] and [BLOCK_N, Hv]. gate: [BLOCK_N] from each key to the tile of queries.
      vectors: of 64 queries each, their lse, delta and more.
      distance: from the first query back to the first key.
    """
    lines = line + tl.arange(0, BLOCK_M)
    numbers = _line(vectors, batch, head, 2 * query, HEADS, 2 * QUERIES, TILE + 4)
    numbers += lines // HALF * (TILE + 4) + lines % HALF
    q_tile = _version(first_version + query, batch, TREE, BATCH, QUERIES)
    q = tl.load(_block(q_array, q_tile, line, head, BLOCK_M, HEADS, HEAD_DIM))
    dout = tl.load(_block(dout_array, batch * QUERIES + query, line, head, BLOCK_M, HEADS, V_HEAD_DIM))
    lse, delta = tl.load(numbers), tl.load(numbers + HALF)
    weights = tl.exp2(tl.dot(k, tl.trans(q)) * SCALE + gate[:, None] - lse[None, :])
    if IS_NEAREST or IDS or WINDOW > 0:
        query_ids = lines
        if IDS:
            query_ids = tl.load(_line(ids, batch, 0, query + KEYS - QUERIES, 1, KEYS, TILE) + lines)
        passed = distance + tl.arange(0, BLOCK_M)[None, :] - tl.arange(0, BLOCK_N)[:, None]
        weights = tl.where(_visible(passed, key_ids, query_ids, WINDOW, IDS), weights, 0.0)
    dv = tl.dot(weights.to(dout.dtype), dout, dv)
    ds = weights * (tl.dot(v, tl.trans(dout)) - delta[None, :])
    sums += tl.sum(ds, 1)
    dk = tl.dot(ds.to(q.dtype), q, dk)
    return dk, dv, sums
