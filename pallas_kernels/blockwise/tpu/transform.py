"""The linear stage of one superchunk on TPU: blocks of 64 tokens, UT transform and frame tree, on VMEM references.

Per block, with rows Q, K, W and D = diag(beta),

    T = (I + D tril(W W^T, -1))^-1     A = T D     U = A W     G = tril(W K^T, -1)     Y = tril(Q W^T)
    P = I - W^T U     Q' = Q - Y U (block-start frame)     K' = K - (A G)^T W (block-end frame)
    S = tril(Q K^T) - Y (A G)

and per level of the tree, x -> x P_left for queries, x -> x P_right^T for keys, P -> P_right P_left.

Two blocks, a pair, share the 128 lanes: [even | odd]. Everything is written for a `dtype` of the matrix operands. With
bfloat16, an operand that must not be rounded is split into hi + lo. A contraction over the 64 tokens of a block fills
half of the depth of the matrix unit, so the other half carries lo for free: [x_hi | x_lo] @ [y; y]. With float32 the
same program runs with lo = 0 and float32 products.

Long functions are generators that yield between groups of operations. The compiler's scheduler nearly keeps the order
of emission, so independent work has to be interleaved by the program: stage after stage over all pairs, and latency
bound stages step by step with matrix-unit bound ones (`interleave`).
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.blockwise.tpu.arithmetic import MASKED, NT, TN, dot

BLOCK, PAIR = 64, 128

_f32 = jnp.float32


def split(x, dtype):
    """Float32 x as hi + lo, both float32; hi and, up to 2^-17 |x|, lo are representable in `dtype`."""
    hi = x.astype(dtype).astype(_f32)
    return hi, x - hi


def iota(shape, dimension):
    """Int32 index along one dimension."""
    return lax.broadcasted_iota(jnp.int32, shape, dimension)


def roll(x, shift):
    """Lane i of x moves to lane i + shift (cyclic); 32-bit types only."""
    return pltpu.roll(x, shift % x.shape[1], 1)


def twice(x):
    """[x; x]: the weights that an operand [hi | lo] multiplies."""
    return jnp.concatenate([x, x], 0)


def is_left(rows=BLOCK):
    """Mask [rows, 128] of the lanes of the left block."""
    return iota((rows, PAIR), 1) < BLOCK


def halves(x, dtype):
    """[a | b] float32 -> [a_hi | a_lo], [b_hi | b_lo] in `dtype`, with a single lane rotation."""
    return _pack_halves(*split(x, dtype), dtype)


def _pack_halves(hi, lo, dtype):
    """`halves` of hi + lo."""
    left = is_left(hi.shape[0])
    swapped = roll(jnp.where(left, lo, hi), BLOCK)  # [b_hi | a_lo]
    return jnp.where(left, hi, swapped).astype(dtype), jnp.where(left, swapped, lo).astype(dtype)


def _add_halves(even, odd):
    """[a | a'], [b | b'] -> [a + a' | b + b'], with a single lane rotation."""
    left = is_left(even.shape[0])
    return jnp.where(left, even, odd) + roll(jnp.where(left, odd, even), BLOCK)


def block_rows(block, count=1):
    """Rows of `count` consecutive blocks of a superchunk."""
    return slice(BLOCK * block, BLOCK * (block + count))


def drain(steps):
    """Runs a generator to its end and returns its value."""
    try:
        while True:
            next(steps)
    except StopIteration as end:
        return end.value


def interleave(main, side, ratio):
    """Emits `side` spread over `main`, then the rest of it; returns main's value.

    A step of `side` yields its cost, in products of 64 rows with [128, 128] (None: 1); `ratio` is the cost to emit per
    step of `main`.
    """
    credit, finished = 0.0, object()
    try:
        while True:
            next(main)
            credit += ratio
            while credit > 0:
                cost = next(side, finished)
                credit -= credit if cost is finished else cost or 1
    except StopIteration as end:
        drain(side)
        return end.value


def pipeline(stages, count, distance, cost=1):
    """Emits stages of `count` independent items, stage s of an item `distance` items after stage s - 1.

    A small distance keeps few intermediate results alive; a large one leaves more time for each of them. `cost` is that
    of a stage in `interleave`.
    """
    for step in range(count + distance * (len(stages) - 1)):
        for s in reversed(range(len(stages))):
            if 0 <= step - s * distance < count:
                stages[s](step - s * distance)
                yield cost


def _each(function, *lists):
    """Emits one operation for every pair before the next operation starts."""
    results = []
    for arguments in zip(*lists):
        results.append(function(*arguments))
        yield
    return results


# Triangular inverse of all pairs. Compact layout: block i of size s in rows 0 ... s - 1, lanes s i ... s (i + 1) - 1.


def _compact(matrix, size, offset):
    """Diagonal blocks (offset 0) or their left neighbours (offset = size) of [even | odd] [64, 128] as [size, 128]."""
    step = 2 * size if offset else size
    segment = (iota((size, PAIR), 1) & (BLOCK - 1)) >> (step.bit_length() - 1)
    out = matrix[offset : offset + size]
    for i in range(1, BLOCK // step):
        out = jnp.where(segment == i, matrix[step * i + offset : step * i + offset + size], out)
    return out


def _substitute(matrices, size):
    """Inverses of unit lower triangular blocks [size, 128] by forward substitution, on the vector unit."""
    row, column = iota((size, PAIR), 0), iota((size, PAIR), 1)
    identity = jnp.where(row == (column & (size - 1)), 1.0, 0.0).astype(_f32)
    first_lane = iota((8, PAIR), 1) & (PAIR - size)
    inverses = [[identity[8 * i : 8 * i + 8] for i in range(size // 8)] for _ in matrices]
    for j in range(size - 1):
        for n, (matrix, inverse) in enumerate(zip(matrices, inverses)):
            pivot = jnp.broadcast_to(inverse[j // 8][j % 8 : j % 8 + 1], (8, PAIR))
            for i in range((j + 1) // 8, size // 8):
                factor = jnp.take_along_axis(matrix[8 * i : 8 * i + 8], first_lane + j, axis=1)
                inverse[i] = inverse[i] - factor * pivot
            if n % 4 == 3:
                yield
    return [jnp.concatenate(inverse, 0) for inverse in inverses]


def _merge(inverses, corners, size, dtype):
    """Compact inverses a, b and corners m of size s -> compact inverses of [[a, 0], [m, b]], lower left -b m a.

    hi and lo of the operands occupy the lanes that the compact layout leaves to the other block, so that the products
    of all blocks of a pair, each from four passes, are one matrix product.
    """
    odd = (iota((size, PAIR), 1) & size) != 0
    shift = (2 * size).bit_length() - 1
    packed = size if dtype == _f32 else size // 2
    segment = iota((packed, PAIR), 1) >> shift

    def weights(x):
        """Block diagonal [128, 128] from a compact [size, 128]: blocks i of 2 size rows and lanes are [x_i; x_i]."""
        x = x.astype(dtype)
        x = pltpu.bitcast(x, jnp.int32) if dtype != _f32 else x  # selects are 32-bit
        tiles = [jnp.where(segment == i, x, 0) for i in range(PAIR // (2 * size)) for _ in range(2)]
        x = jnp.concatenate(tiles, 0)
        return pltpu.bitcast(x, dtype) if dtype != _f32 else x

    t = [split(x, dtype) for x in inverses]
    m = [split(x, dtype) for x in corners]
    a = yield from _each(lambda t: weights(jnp.where(odd, roll(t[1], size), t[0])), t)  # [a_hi | a_lo]
    m = yield from _each(lambda m: jnp.where(odd, roll(m[1], size), m[0]).astype(dtype), m)  # [m_hi | m_lo]
    ma = yield from _each(dot, m, a)  # [m a_hi | m a_lo]
    b = yield from _each(lambda t: jnp.where(odd, t[0], roll(t[1], -size)).astype(dtype), t)  # [b_lo | b_hi]
    ma = yield from _each(lambda x: split(x + roll(x, size), dtype), ma)  # in odd lanes
    ma = yield from _each(lambda x: weights(jnp.where(odd, x[0], roll(x[1], -size))), ma)
    bma = yield from _each(dot, b, ma)
    bma = yield from _each(lambda x: x + roll(x, -size), bma)  # in even lanes
    return [jnp.concatenate([jnp.where(odd, 0.0, x), jnp.where(odd, x, -y)], 0) for x, y in zip(inverses, bma)]


def _inverse(matrices, base, dtype):
    """(I + M)^-1 for strictly lower triangular M, a list of pairs [64, 128]; blocks of `base` by substitution."""
    inverses = yield from _substitute([_compact(x, base, 0) for x in matrices], base)
    size = base
    while size < BLOCK:
        inverses = yield from _merge(inverses, [_compact(x, size, size) for x in matrices], size, dtype)
        size *= 2
    return inverses


def gram_inverse(w, k, beta, *, base=16):
    """Emits T and G of every pair of a superchunk.

    Args:
      w, k: [S, H] references or arrays.
      beta: float32 [at least 8, 128], row p belongs to pair p.
      base: size of the blocks that are inverted by substitution, 16 or 32.

    Returns:
      Lists over pairs of float32 [64, 128]: T as [even | odd], and G as [odd | even].
    """
    column, row, left = iota((BLOCK, PAIR), 1) & (BLOCK - 1), iota((BLOCK, PAIR), 0), is_left()
    beta_columns = beta.T
    matrices, grams, pairs = [], [], range(w.shape[0] // PAIR)
    products = []
    for p in pairs:
        even, odd = block_rows(2 * p), block_rows(2 * p + 1)
        products.append((
            dot(w[even], jnp.concatenate([w[even], k[even]], 0), NT),
            dot(w[odd], jnp.concatenate([k[odd], w[odd]], 0), NT),
        ))  # fmt: skip
        yield
    for p, (even, odd) in zip(pairs, products):
        scale = jnp.where(left, beta_columns[:BLOCK, p : p + 1], beta_columns[BLOCK:, p : p + 1])
        matrices.append(jnp.where(column < row, jnp.where(left, even, odd), 0.0) * scale)
        grams.append(jnp.where(column < row, jnp.where(left, odd, even), 0.0))
        yield
    inverses = yield from _inverse(matrices, base, w.dtype)
    return inverses, grams


@dataclasses.dataclass(frozen=True)
class Versions:
    """Queries or keys of a superchunk in the frames of the tree, rounded to the operands' dtype.

    A block moves at level l, by x P_left or x P_right^T, if bit l of its index is `moving_bit`: 1 for queries (towards
    the start of the superchunk), 0 for keys (towards its end). `moving[l]` holds the rows that move at level l before
    they do so, which are the operands of the tiles of level l, in the order of their blocks; `top` holds the result.

    Attributes:
      moving: reference [log2(S / 64), S / 2, H].
      top: reference [S, H].
      moving_bit: 1 for queries, 0 for keys.
      fixed: reference [64, H] that keeps the one block that never moves until level 0 copies it to `top`; None if
        `top` may be written before.
    """

    moving: Any
    top: Any
    moving_bit: int
    fixed: Any = None

    @property
    def num_levels(self):
        """Levels of the tree below the superchunk."""
        return self.moving.shape[0]

    @staticmethod
    def rows(level, block, count=1):
        """Rows of `moving[level]` that hold `count` consecutive blocks."""
        start = BLOCK * ((block >> (level + 1) << level) + (block & ((1 << level) - 1)))
        return slice(start, start + BLOCK * count)

    def store(self, level, block, x):
        """Stores consecutive blocks from `block` on that have passed all levels below `level` where they next move."""
        count, first = x.shape[0] // BLOCK, level
        while level < self.num_levels and (block >> level & 1) != self.moving_bit:
            level += 1
        if first == 0 and level == self.num_levels and self.fixed is not None:
            self.fixed[...] = x.astype(self.fixed.dtype)
        elif level == self.num_levels:
            self.top[block_rows(block, count)] = x.astype(self.top.dtype)
        else:
            self.moving[level, self.rows(level, block, count)] = x.astype(self.moving.dtype)

    def place_fixed(self):
        """Copies the block that never moves to the result."""
        if self.fixed is not None:
            self.top[block_rows((self.moving_bit ^ 1) * ((1 << self.num_levels) - 1))] = self.fixed[...]


def product_slot(level, segment, num_blocks):
    """Index in `products` of the product of a segment of 2^level blocks."""
    return 2 * num_blocks - (2 * num_blocks >> level) + segment


def store_product(products, slot, product):
    """Stores a float32 [H, H] as [hi | lo] if the reference is bfloat16, as it is if float32."""
    head_dim = product.shape[0]
    hi, lo = split(product, products.dtype)
    products[slot, :, :head_dim] = hi.astype(products.dtype)
    if products.dtype != _f32:
        products[slot, :, head_dim:] = lo.astype(products.dtype)


def product_shape(num_blocks, head_dim, dtype):
    """Shape of the reference `products`: those of all segments below the superchunk."""
    return (2 * num_blocks - 2, head_dim, head_dim if dtype == _f32 else 2 * head_dim)


def solved_shape(num_blocks, head_dim):
    """Shape of the reference `solved`: [U_hi | U_lo | AG_hi | AG_lo] of every block."""
    return (num_blocks, BLOCK, 2 * head_dim + PAIR)


def key_stages(w, k, a, g, solved, products, keys):
    """Stages per pair of `key_products`."""
    head_dim, dtype = w.shape[1], w.dtype
    identity = jnp.where(iota((head_dim, head_dim), 0) == iota((head_dim, head_dim), 1), 1.0, 0.0).astype(_f32)
    operands, results, transposed = {}, {}, {}

    def operands_of(p):
        a_even, a_odd = halves(a[p], dtype)
        g_odd, g_even = halves(g[p], dtype)
        operands[2 * p], operands[2 * p + 1] = (a_even, g_even), (a_odd, g_odd)

    def multiply(p):
        for b in (2 * p, 2 * p + 1):
            left, right = operands.pop(b)
            results[b] = dot(left, jnp.concatenate([twice(w[block_rows(b)]), twice(right)], 1))

    def store_solved(p):
        pair = [results.pop(b) for b in (2 * p, 2 * p + 1)]
        hi, lo = split(_add_halves(*[x[:, head_dim:] for x in pair]), dtype)
        transposed[p] = jnp.concatenate([hi, lo], 0).astype(dtype).T
        for i, (x, ag) in enumerate(zip(pair, _pack_halves(hi, lo, dtype))):
            u_hi, u_lo = split(x[:, :head_dim], dtype)
            solved[2 * p + i, :, :head_dim] = u_hi.astype(dtype)
            solved[2 * p + i, :, head_dim : 2 * head_dim] = u_lo.astype(dtype)
            solved[2 * p + i, :, 2 * head_dim :] = ag

    def finish(p):
        ag = transposed.pop(p)
        for i, b in enumerate((2 * p, 2 * p + 1)):
            twice_w = twice(w[block_rows(b)])
            u = jnp.concatenate([solved[b, :, :head_dim], solved[b, :, head_dim : 2 * head_dim]], 0)
            store_product(products, b, identity - dot(twice_w, u, TN))
            keys.store(0, b, k[block_rows(b)].astype(_f32) - dot(ag[block_rows(i)], twice_w))

    return [operands_of, multiply, store_solved, finish]


def key_products(w, k, a, g, solved, products, keys):
    """Emits U, AG, P and K' of every block.

    Args:
      w, k: [S, H] references.
      a, g: float32 references [S / 128, 64, 128] or lists of [64, 128], A as [even | odd] and G as [odd | even].
      solved: output reference of `solved_shape`.
      products: output reference of `product_shape`; level 0 is written.
      keys: `Versions`; receives K'.
    """
    pairs = w.shape[0] // PAIR
    return pipeline(key_stages(w, k, a, g, solved, products, keys), pairs, pairs)


def query_stages(q, w, k, solved, keys, queries, logits, *, scale):
    """Stages per pair of `query_products`; stage 2 needs `solved`, stage 3 the keys."""
    head_dim, dtype, left = w.shape[1], w.dtype, is_left()
    visible = (iota((BLOCK, PAIR), 1) & (BLOCK - 1)) <= iota((BLOCK, PAIR), 0)
    grams, y, results = {}, {}, {}

    def gram(p):
        even, odd = block_rows(2 * p), block_rows(2 * p + 1)
        grams[p] = (
            dot(q[even], jnp.concatenate([w[even], k[even]], 0), NT),
            dot(q[odd], jnp.concatenate([k[odd], w[odd]], 0), NT),
        )

    def operands_of(p):
        even, odd = grams[p]
        y[p] = halves(jnp.where(visible, jnp.where(left, even, odd), 0.0), dtype)
        grams[p] = jnp.where(left, odd, even)

    def multiply(p):
        results[p] = [dot(x, twice(solved[2 * p + i])) for i, x in enumerate(y.pop(p))]

    def finish(p):
        pair = results.pop(p)
        for i, x in enumerate(pair):
            b = 2 * p + i
            y_u = x[:, :head_dim] + x[:, head_dim : 2 * head_dim]
            query = (q[block_rows(b)].astype(_f32) - y_u) * scale
            queries.store(0, b, query)
        corner = dot(query.astype(dtype), twice(keys.moving[0, Versions.rows(0, 2 * p)]), NT)
        y_ag = _add_halves(*[x[:, 2 * head_dim :] for x in reversed(pair)])
        local = jnp.where(visible, (grams.pop(p) - y_ag) * scale, MASKED)
        logits[p, :BLOCK] = jnp.where(left, MASKED, local)
        logits[p, BLOCK:] = jnp.where(left, local, corner)

    return [gram, operands_of, multiply, finish]


def query_products(q, w, k, solved, keys, queries, logits, *, scale):
    """Emits Q' of every block and the logits of every pair.

    Args:
      q, w, k: [S, H] references.
      solved: reference written by `key_products`.
      keys: `Versions` with K' of the even blocks at level 0.
      queries: `Versions`; receives scale Q'.
      logits: output reference float32 [S / 128, 128, 128], scale raw_ij of the pair's queries (natural order) and keys
        (odd block first), causal mask applied.
      scale: multiplies the queries.
    """
    pairs = w.shape[0] // PAIR
    return pipeline(query_stages(q, w, k, solved, keys, queries, logits, scale=scale), pairs, pairs)


def key_level(level, keys, products, transition=None):
    """Emits one level for the keys and the products of the next level; the last goes to `transition` [H, H] only."""
    num_blocks, head_dim, dtype = 1 << keys.num_levels, keys.top.shape[1], products.dtype
    if level == 0:
        keys.place_fixed()
    for s in range(num_blocks >> (level + 1)):
        left, right = (products[product_slot(level, 2 * s + i, num_blocks)] for i in (0, 1))
        if dtype == _f32:
            product = dot(right, left)
        else:
            both = dot(right[:, :head_dim], left)
            product = both[:, :head_dim] + (both[:, head_dim:] + dot(right[:, head_dim:], left[:, :head_dim]))
        if level + 1 == keys.num_levels:
            if transition is not None:
                transition[...] = product
        else:
            store_product(products, product_slot(level + 1, s, num_blocks), product)
        yield 6
        count = 1 << level
        block = 2 * count * s
        x = dot(keys.moving[level, keys.rows(level, block, count)], right[:, :head_dim], NT)
        keys.store(level + 1, block, x)
        yield count


def query_level(level, queries, products):
    """Emits one level for the queries."""
    num_blocks, head_dim, count = 1 << queries.num_levels, queries.top.shape[1], 1 << level
    if level == 0:
        queries.place_fixed()
    for s in range(num_blocks >> (level + 1)):
        left = products[product_slot(level, 2 * s, num_blocks), :, :head_dim]
        block = 2 * count * s + count
        queries.store(level + 1, block, dot(queries.moving[level, queries.rows(level, block, count)], left))
        yield count
