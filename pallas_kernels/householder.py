"""Products of generalised Householder reflections: the linear stage of PaTH attention.

With `H_t = I - beta_t w_t^T w_t` (row vectors) a PaTH logit is `q_i H_i H_{i-1} ... H_{j+1} k_j^T`. This file turns
these products into plain dot products:

1.  Inside a block of U tokens the UT transform gives all of them from one triangular inverse.
2.  Across blocks a *frame* is a token boundary. A query carried back to a frame and a key carried forward to it meet in
    a plain dot product, for any frame between them. The *frame tree* picks, for two tiles, the midpoint of their lowest
    common ancestor in the binary tree over the sequence, so every query and every key needs one version per level and
    the quadratic stage is ordinary flash attention on level-indexed operands.

Everything is ordinary differentiable array code in at least float32; only the triangular inverse has its own rule.
The products here are the numerically sensitive part of PaTH attention (rounding them to bfloat16 multiplies the error
by 3 to 5 when beta is near 2), hence the highest matmul precision throughout. Reflections are only ever multiplied,
never inverted: at beta = 1 they are singular.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

BLOCK_SIZE = 64  # the UT transform costs O(U) per token and level 0 of the tree is U wide; 64 balances the two
_SUBSTITUTION_SIZE = 16  # below this, forward substitution; above, block doubling with matmuls

_einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


class BlockTransform(NamedTuple):
    """Result of the UT transform, for blocks of U consecutive tokens."""

    query: Float[Array, "*blocks G U H"]  # q_i H_i ... H_first: queries in the frame of their block's start
    key: Float[Array, "*blocks U H"]  # k_j (H_last ... H_{j+1})^T: keys in the frame of their block's end
    transition: Float[Array, "*blocks H H"]  # H_last ... H_first, the product over the block
    logits: Float[Array, "*blocks G U U"]  # q_i H_i ... H_{j+1} k_j^T for j <= i inside the block, else 0


class Frames(NamedTuple):
    """Operands of the quadratic stage: level-indexed versions of q and k, one row per (level, tile) that is used."""

    query: Float[Array, "query_rows B K G C H"]
    key: Float[Array, "key_rows B K C H"]
    local: Float[Array, "tiles B K G C C"]  # raw logits of the diagonal tiles; entries above the diagonal are ignored


@jax.custom_vjp
def unit_lower_inverse(m: Float[Array, "*batch U U"]) -> Float[Array, "*batch U U"]:
    """Inverse of `I + M` for strictly lower triangular M, U a power of two.

    Forward substitution on small diagonal blocks, then `inv([[a, 0], [m, b]]) = [[a', 0], [-b' m a', b']]`. Unlike the
    Neumann product `(I - M)(I + M^2)...` no intermediate grows: each is a sub-inverse, bounded by beta, times a Gram
    block, so correlated w are safe.
    """
    size = m.shape[-1]
    base = min(size, _SUBSTITUTION_SIZE)
    # All diagonal blocks of `base` rows at once: [..., size / base, base, base].
    tiled = m.reshape(*m.shape[:-2], size // base, base, size // base, base)
    index = np.arange(size // base)
    inverse = _substitute(jnp.moveaxis(tiled[..., index, :, index, :], 0, -3))
    while base < size:
        pairs = inverse.reshape(*m.shape[:-2], size // (2 * base), 2, base, base)
        first, second = pairs[..., 0, :, :], pairs[..., 1, :, :]
        tiled = m.reshape(*m.shape[:-2], size // (2 * base), 2, base, size // (2 * base), 2, base)
        index = np.arange(size // (2 * base))
        below = jnp.moveaxis(tiled[..., index, 1, :, index, 0, :], 0, -3)
        # (b' m) a' rather than b' (m a'): about half the error on blocks of 64 equal w with beta near 2.
        below = -_einsum("...ij,...jk->...ik", _einsum("...ij,...jk->...ik", second, below), first)
        inverse = _stack_lower(first, below, second)
        base *= 2
    return inverse.reshape(m.shape)


def _substitute(m):
    """Inverse of I + M row by row: x_i = e_i - sum_{j<i} M_ij x_j. A loop: unrolled it would dominate compilation."""

    def solve_row(i, x):
        coefficients = jax.lax.dynamic_index_in_dim(m, i, axis=m.ndim - 2, keepdims=False)
        return x.at[..., i, :].add(-jnp.sum(coefficients[..., :, None] * x, axis=-2))

    size = m.shape[-1]
    return jax.lax.fori_loop(1, size, solve_row, jnp.broadcast_to(jnp.eye(size, dtype=m.dtype), m.shape))


def _stack_lower(first, below, second):
    """[[first, 0], [below, second]] on the last two axes."""
    top = jnp.concatenate([first, jnp.zeros_like(first)], axis=-1)
    return jnp.concatenate([top, jnp.concatenate([below, second], axis=-1)], axis=-2)


def _unit_lower_inverse_fwd(m):
    inverse = unit_lower_inverse(m)
    return inverse, inverse


def _unit_lower_inverse_bwd(inverse, dinverse):
    dm = _einsum("...ji,...jk,...lk->...il", inverse, dinverse, inverse)
    return (-jnp.tril(dm, -1),)


unit_lower_inverse.defvjp(_unit_lower_inverse_fwd, _unit_lower_inverse_bwd)


def block_transform(
    q: Float[Array, "*blocks G U H"],
    k: Float[Array, "*blocks U H"],
    w: Float[Array, "*blocks U H"],
    beta: Float[Array, "*blocks U"],
) -> BlockTransform:
    """UT transform of one block of U tokens; `transition = I - W^T A W` with `A = (I + diag(beta) tril(W W^T, -1))^-1
    diag(beta)`, and the three other results share A, `A W` and `A tril(W K^T, -1)`."""
    gram = jnp.tril(_einsum("...ih,...jh->...ij", w, w), -1)
    a = unit_lower_inverse(beta[..., :, None] * gram) * beta[..., None, :]
    u = _einsum("...ij,...jh->...ih", a, w)
    a_wk = _einsum("...ij,...jl->...il", a, jnp.tril(_einsum("...ih,...jh->...ij", w, k), -1))
    qw = jnp.tril(_einsum("...gih,...jh->...gij", q, w))
    return BlockTransform(
        query=q - _einsum("...gij,...jh->...gih", qw, u),
        key=k - _einsum("...ji,...jh->...ih", a_wk, w),
        transition=jnp.eye(q.shape[-1], dtype=q.dtype) - _einsum("...ih,...ij->...hj", w, u),
        logits=jnp.tril(_einsum("...gih,...jh->...gij", q, k)) - _einsum("...gij,...jl->...gil", qw, a_wk),
    )


def _merge_pairs(blocks: BlockTransform) -> BlockTransform:
    """Joins neighbouring blocks (leading axis, even length) into blocks twice as long."""
    pairs = jax.tree.map(lambda x: x.reshape(x.shape[0] // 2, 2, *x.shape[1:]), blocks)
    left, right = (jax.tree.map(lambda x, i=i: x[:, i], pairs) for i in (0, 1))
    cross = _einsum("...gih,...jh->...gij", right.query, left.key)
    return BlockTransform(
        query=jnp.concatenate([left.query, _einsum("...gih,...hj->...gij", right.query, left.transition)], axis=-2),
        key=jnp.concatenate([_einsum("...ih,...jh->...ij", left.key, right.transition), right.key], axis=-2),
        transition=_einsum("...ij,...jk->...ik", right.transition, left.transition),
        logits=_stack_lower(left.logits, cross, right.logits),
    )


@functools.lru_cache
def frame_tree_levels(num_tiles: int) -> tuple[tuple[np.ndarray, np.ndarray], ...]:
    """Per level l of the tree over tiles: the tiles whose query version (bit l of the index set) and whose key version
    (bit l clear, and a right sibling exists) the quadratic stage reads."""
    levels = []
    for level in range((num_tiles - 1).bit_length()):
        tiles = np.arange(num_tiles, dtype=np.int32)  # int64 would be another constant with x64 enabled
        right = (tiles >> level) & 1 == 1
        has_sibling = ((tiles >> level) + 1) << level < num_tiles
        levels.append((tiles[right], tiles[~right & has_sibling]))
    return tuple(levels)


@functools.lru_cache
def frame_tree_rows(num_tiles: int) -> np.ndarray:
    """Off-diagonal tiles in the order of their queries: int rows (query tile, key tile, query row, key row), the last
    two indexing `Frames.query` and `Frames.key`. Tiles a > b meet at level `msb(a xor b)`."""
    levels = frame_tree_levels(num_tiles)
    query_start = np.cumsum([0] + [len(queries) for queries, _ in levels])
    key_start = np.cumsum([0] + [len(keys) for _, keys in levels])
    rows = []
    for a in range(num_tiles):
        for b in range(a):
            level = (a ^ b).bit_length() - 1
            queries, keys = levels[level]
            rows.append(
                (a, b, query_start[level] + np.searchsorted(queries, a), key_start[level] + np.searchsorted(keys, b))
            )
    return np.array(rows, np.int32).reshape(-1, 4)


def frame_tree(blocks: BlockTransform, tile_size: int, dtype) -> Frames:
    """Carries the blocks (leading axis: position in the sequence) up the frame tree.

    Blocks are first merged into tiles of `tile_size` tokens, whose logits become `local`; then each level hands out the
    versions that are read there and carries on those that are read higher up: a query of a right sibling through the
    left sibling's product, a key of a left sibling through the right sibling's. A partial segment at the end of the
    sequence is never a left sibling, so its product is never needed. Versions are rounded to `dtype` once, here.
    """
    while blocks.query.shape[-2] < tile_size:
        blocks = _merge_pairs(blocks)
    query, key, transition = blocks.query, blocks.key, blocks.transition
    levels = frame_tree_levels(query.shape[0])
    query_rows, key_rows = [query[:0].astype(dtype)], [key[:0].astype(dtype)]
    for level, (query_tiles, key_tiles) in enumerate(levels):
        query_rows.append(query[query_tiles].astype(dtype))
        key_rows.append(key[key_tiles].astype(dtype))
        if level + 1 == len(levels):
            break
        move = query_tiles[query_tiles >> (level + 1) > 0]
        carried = _einsum("nbkgih,nbkhj->nbkgij", query[move], transition[(move >> level) - 1])
        query = query.at[move].set(carried)
        needed_above = functools.reduce(np.union1d, (keys for _, keys in levels[level + 1 :]))
        move = np.intersect1d(key_tiles, needed_above)
        carried = _einsum("nbkih,nbkjh->nbkij", key[move], transition[(move >> level) + 1])
        key = key.at[move].set(carried)
        full = transition.shape[0] // 2 * 2
        transition = _einsum("nbkij,nbkjh->nbkih", transition[1:full:2], transition[0:full:2])
    return Frames(jnp.concatenate(query_rows), jnp.concatenate(key_rows), blocks.logits)


def householder_transform(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    w: Float[Array, "B T K H"],
    beta: Float[Array, "B T K"],
    *,
    block_size: int = BLOCK_SIZE,
) -> BlockTransform:
    """The linear stage by itself, for people who build their own attention or delta rule.

    Splits the sequence into blocks of `block_size` tokens and returns, per block, the queries in the frame of its
    start, the keys in the frame of its end, the product of its reflections and its logits:

        query_i = q_i H_i ... H_first,  key_j = k_j (H_last ... H_{j+1})^T,  transition = H_last ... H_first,
        logits_ij = q_i H_i ... H_{j+1} k_j^T  (j <= i, else 0),   H_t = I - beta_t w_t^T w_t.

    Args:
      q: queries; k, w: keys and reflection directions, N a multiple of K. w is used as given (unit norm is the caller's
        duty).
      beta: reflection strengths in [0, 2].
      block_size: tokens per block U, a power of two.

    Returns:
      BlockTransform in float32 (float64 for float64 inputs), with leading axes [num_blocks, B, K]; the last block is
      padded with the identity (w = 0, beta = 0), queries and keys with zeros.

    Raises:
      ValueError: if block_size is not a power of two.

    Source: Yang et al., "PaTH Attention", section 3 (UT transform).
    """
    if block_size < 1 or block_size & (block_size - 1):
        raise ValueError(f"{block_size=} must be a power of two")
    dtype = jnp.promote_types(jnp.float32, q.dtype)
    tiles = functools.partial(to_tiles, size=block_size)
    q, k, w, beta = (x.astype(dtype) for x in (q, k, w, beta))
    return block_transform(group_heads(tiles(q), k.shape[2]), tiles(k), tiles(w), tiles(beta))


class SpanFrames(NamedTuple):
    """A stretch of a sequence as the tokens behind it and before it see it."""

    query: Float[Array, "B T N H"]  # q_i H_i ... H_first: queries in the frame of the stretch's start
    key: Float[Array, "B T K H"]  # k_j (H_last ... H_{j+1})^T: keys in the frame of its end
    transition: Float[Array, "B K H H"]  # H_last ... H_first, float32


def span_frames(
    q: Float[Array, "B T N H"], k: Float[Array, "B T K H"], w: Float[Array, "B T K H"], beta: Float[Array, "B T K"]
) -> SpanFrames:
    """The linear stage carried to the ends of the whole sequence, for attention across the borders of shards.

    A key of an earlier stretch b and a query of a later one c meet in `query_c P_{c-1} ... P_{b+1} key_b^T`, P being
    the transitions of the stretches between. Neighbours are joined level by level, T H^2 products each.

    Returns:
      SpanFrames; queries and keys are rounded to their own dtypes once, at the end.
    """
    blocks = householder_transform(q, k, w, beta)
    query, key, transition = blocks.query, blocks.key, blocks.transition
    while len(transition) > 1:
        if len(transition) % 2:  # a block of padding behind the last one, which moves nothing
            pad = lambda x: jnp.pad(x, [(0, 1)] + [(0, 0)] * (x.ndim - 1))
            identity = jnp.broadcast_to(jnp.eye(q.shape[-1], dtype=transition.dtype), transition[:1].shape)
            query, key, transition = pad(query), pad(key), jnp.concatenate([transition, identity])
        left, right = transition[0::2], transition[1::2]
        later = _einsum("nbkgih,nbkhj->nbkgij", query[1::2], left)
        earlier = _einsum("nbkih,nbkjh->nbkij", key[0::2], right)
        query = jnp.concatenate([query[0::2], later], axis=-2)
        key = jnp.concatenate([earlier, key[1::2]], axis=-2)
        transition = _einsum("nbkij,nbkjh->nbkih", right, left)
    query = query.reshape(1, q.shape[0], q.shape[2], *query.shape[-2:])
    return SpanFrames(
        from_tiles(query, q.shape[1]).astype(q.dtype), from_tiles(key, k.shape[1]).astype(k.dtype), transition[0]
    )


def to_tiles(x: Shaped[Array, "B T N *H"], size: int) -> Shaped[Array, "tiles B N C *H"]:
    """Cuts the length axis into tiles of `size` tokens, zero-padded at the end, with tile and head axes in front."""
    padding = -x.shape[1] % size
    x = jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2))
    x = x.reshape(x.shape[0], -1, size, *x.shape[2:])
    return jnp.moveaxis(x, (1, 3), (0, 2))


def from_tiles(x: Shaped[Array, "tiles B N C *H"], length: int) -> Shaped[Array, "B T N *H"]:
    """Inverse of to_tiles; keeps the first `length` tokens."""
    x = jnp.moveaxis(x, (0, 2), (1, 3))
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]


def group_heads(x: Shaped[Array, "tiles B N C *H"], num_kv_heads: int) -> Shaped[Array, "tiles B K G C *H"]:
    """Splits query heads into (key/value head, position in its group)."""
    return x.reshape(*x.shape[:2], num_kv_heads, -1, *x.shape[3:])
