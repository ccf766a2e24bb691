"""Attention of new tokens to a cache: prefill, chunked prefill and single decode steps are one call.

New tokens are taken in rounds that stay inside one block of 64 (PaTH) or one page (FoX), so that a round meets at most
three kinds of keys: its own block by the UT transform, closed blocks of its superchunk one after the other, and closed
superchunks one after the other, the queries carried through each of them in turn. One softmax runs over all.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch, interpreter
from pallas_kernels.blockwise import pruning
from pallas_kernels.blockwise.pages import Softmax, logits_of
from pallas_kernels.cache import Cache, OpenSuperchunk
from pallas_kernels.call import Inputs, Options, make_call
from pallas_kernels.householder import BLOCK_SIZE, block_transform

_einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


def extend(
    cache: Cache,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K Hv"],
    w: Float[Array, "B T K H"] | None = None,
    beta: Float[Array, "B T K"] | None = None,
    log_forget: Float[Array, "B T N"] | None = None,
    *,
    lengths: Int[Array, "B"] | None = None,
    scale: float | None = None,
    gate_scale: float = 1.0,
    window: int | None = None,
    prune: float | str | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T N Hv"], Cache]:
    """Appends T >= 1 tokens to every row and attends from them to all tokens up to each.

    However a sequence is cut into calls, the outputs are those of `path_attention` or `forgetting_attention` on all of
    it, up to rounding.

    Args:
      cache: from `init_cache`, or an earlier call. Donate it under `jax.jit`.
      q, k, v, w, beta, log_forget, scale, gate_scale, window, prune: as in `path_attention` and `forgetting_attention`;
        the same of them must be given in every call. Closed superchunks that pruning rules out are not read.
      lengths: how many of a row's T tokens are there; the others are padding behind them. All by default.
      implementation: of the attention to closed superchunks: "xla", "tpu", "gpu", "triton", or None for the best on the
        platform.

    Returns:
      o [B, T, N, Hv] in q's dtype, 0 in padding; NaN in rows that have outgrown the cache or have no page to write to.
      The cache with the tokens in it.

    Raises:
      ValueError: for shapes or values that do not fit each other or the cache.
      NotImplementedError: when the named implementation cannot read the cache.
    """
    call = make_call(
        q, k, v, w, beta, log_forget,
        segment_ids=None, scale=scale, gate_scale=gate_scale, window=window, prune=prune,
    )  # fmt: skip
    lengths = _check(cache, call.inputs, lengths)
    dispatch.check_pages(implementation, cache.k, cache.v)
    # `make_call` takes a window longer than the call for none.
    window = None if window is None else int(window)
    options = dataclasses.replace(call.options, window=window, interpret=interpreter.active_mode())
    has_outgrown = cache.length + lengths > cache.max_length
    reach = cache.superchunk if cache.open is None else BLOCK_SIZE  # a round ends where a block or a page does
    width = min(q.shape[1], reach)
    num_rounds = 1 if q.shape[1] == 1 else (q.shape[1] + reach - 2) // reach + 1

    def take_round(_, carry):
        cache, out, done = carry
        count = jnp.minimum(lengths - done, reach - cache.length % reach)
        tokens = jax.tree.map(lambda x: _rows(x, done, width), call.inputs)
        part, cache = _extend_round(cache, tokens, jnp.clip(count, 0, width), options, implementation)
        return cache, _put_rows(out, part, done, count), done + jnp.clip(count, 0, width)

    out = jnp.zeros((*q.shape[:3], v.shape[3]), q.dtype)
    carry = (cache, out, jnp.zeros_like(lengths))
    if num_rounds == 1:
        cache, out, _ = take_round(0, carry)
    else:
        cache, out, _ = jax.lax.fori_loop(0, num_rounds, take_round, carry)
    return jnp.where(has_outgrown[:, None, None, None], jnp.nan, out), cache


def _check(cache, inputs, lengths):
    """Lengths of all rows, after checks of what the cache must agree with."""
    batch, length, num_heads, head_dim = inputs.q.shape
    num_kv_heads, v_head_dim = inputs.v.shape[2:]
    ours = (cache.length.shape[0], *cache.k.shape[1::2], cache.v.shape[3])
    if (batch, num_kv_heads, head_dim, v_head_dim) != ours:
        raise ValueError(f"q {inputs.q.shape} and v {inputs.v.shape} do not fit a cache of B, K, H, Hv = {ours}")
    for name, given, kept in (("w", inputs.w, cache.open), ("log_forget", inputs.log_forget, cache.gate)):
        if (given is None) != (kept is None):
            raise ValueError(f"{name} is {'missing' if given is None else 'given'}, but the cache was made otherwise")
    if cache.gate is not None and cache.gate.shape[1] != num_heads:
        raise ValueError(f"q has {num_heads} heads, the cache {cache.gate.shape[1]}")
    if lengths is None:
        return jnp.full(batch, length, jnp.int32)
    lengths = jnp.asarray(lengths)
    if lengths.shape != (batch,) or not jnp.issubdtype(lengths.dtype, jnp.integer):
        raise ValueError(f"lengths must be {batch} integers, got {lengths.dtype} {lengths.shape}")
    if not isinstance(lengths, jax.core.Tracer) and (
        (values := np.asarray(lengths)).min() < 0 or values.max() > length
    ):
        raise ValueError(f"lengths {values.tolist()} must be in [0, {length}]")
    return lengths.astype(jnp.int32)


def _rows(x, start, count):
    """[B, T, ...] -> [B, count, ...], `count` tokens of each row from its `start` on; past the end the last one."""
    index = jnp.minimum(start[:, None] + jnp.arange(count), x.shape[1] - 1)
    return jnp.take_along_axis(x, index.reshape(*index.shape, *[1] * (x.ndim - 2)), axis=1)


def _put_rows(x, values, start, count):
    """Writes the first `count` tokens of `values` [B, t, ...] to x [B, T, ...] from each row's `start` on."""
    index = jnp.arange(values.shape[1])
    index = jnp.where(index < count[:, None], start[:, None] + index, x.shape[1])
    return x.at[jnp.arange(x.shape[0])[:, None], index].set(values.astype(x.dtype), mode="drop")


def _heads(x, groups):
    """[B, T, N, ...] -> [B, K, G, T, ...]."""
    x = x.reshape(*x.shape[:2], -1, groups, *x.shape[3:])
    return jnp.moveaxis(x, 1, 3)


def _extend_round(cache: Cache, x: Inputs, count, options: Options, implementation):
    """`extend` by the first `count` of t tokens, which end no later than the open block (PaTH) or page (FoX)."""
    batch, width, num_heads, _ = x.q.shape
    groups, superchunk = num_heads // x.k.shape[2], cache.superchunk
    page, offset = cache.length // superchunk, cache.length % superchunk
    page_id = jnp.take_along_axis(cache.table, page[:, None], axis=1, mode="clip")[:, 0]
    page_id = jnp.where(page < cache.table.shape[1], page_id, cache.k.shape[0])  # full rows write nowhere
    # All writing comes before all reading, so that it can be done in place. What closes now is not yet read as closed.
    cache = _store(cache, x, page_id, offset, count)
    if cache.open is not None:
        cache = _close(cache, page_id, offset, count)
    dtype = cache.key_norm.dtype
    q = _heads(x.q.astype(dtype) * options.scale, groups)
    if cache.open is None:
        logits = logits_of(q, cache.k[page_id])
    else:
        q, logits = _own_superchunk(cache.open, q, offset, count)
    position, key = offset[:, None] + jnp.arange(width), jnp.arange(superchunk)
    gate = inside = None
    if cache.gate is not None:
        gate = cache.gate.reshape(*cache.k.shape[:2], groups, superchunk)
        inside = jnp.take_along_axis(gate[page_id], jnp.minimum(position, superchunk - 1)[:, None, None], axis=3)
        logits += options.gate_scale * (inside[..., None] - gate[page_id][:, :, :, None])
    is_visible = key <= position[..., None]
    if options.window is not None:
        is_visible &= position[..., None] - key < options.window
    state = Softmax.over_nothing(q.shape[:4], x.v.shape[3], dtype)
    state = state.add(jnp.where(is_visible[:, None, None], logits, -jnp.inf), cache.v[page_id])
    if cache.table.shape[1] > 1:
        pages, needed = _needed_pages(cache, q, gate, inside, position, page, page_id, options)
        out, lse = dispatch.attend_pages(
            implementation, q, cache.k, cache.v, cache.products, gate, inside, position, pages, needed,
            gate_scale=options.gate_scale, window=options.window, interpret=options.interpret,
        )  # fmt: skip
        state = state.merge(out, lse)
    out = jnp.moveaxis(state.result()[0], 3, 1).reshape(batch, width, num_heads, -1)
    out = jnp.where((page_id < cache.k.shape[0])[:, None, None, None], out, jnp.nan)
    out = jnp.where((jnp.arange(width) < count[:, None])[..., None, None], out, 0)
    return out, cache._replace(length=cache.length + count)


def _store(cache, x, page_id, offset, count):
    """Writes the new tokens where they stay until their block or superchunk closes."""
    batch, width = x.q.shape[:2]
    index = jnp.arange(width)
    is_new = index < count[:, None]
    slot = jnp.where(is_new, offset[:, None] + index, cache.superchunk)
    put = lambda pool, values: pool.at[page_id[:, None], :, slot].set(values.astype(pool.dtype), mode="drop")
    norm = jnp.linalg.norm(x.k.astype(cache.key_norm.dtype), axis=-1)
    norm = jnp.where(is_new[..., None], norm, 0).max(1)
    norm = jnp.maximum(norm, jnp.where(offset[:, None] > 0, cache.key_norm[page_id], 0))
    changes = {"v": put(cache.v, x.v), "key_norm": cache.key_norm.at[page_id].set(norm, mode="drop")}
    if cache.gate is not None:
        before = jnp.take_along_axis(cache.gate[page_id], jnp.maximum(offset - 1, 0)[:, None, None], axis=2)[..., 0]
        before = jnp.where(offset[:, None] > 0, before, 0)
        gates = jnp.where(is_new[..., None], x.log_forget.astype(cache.gate.dtype), 0)
        changes["gate"] = put(cache.gate, before[:, None] + jnp.cumsum(gates, axis=1))
    if cache.open is None:
        changes["k"] = put(cache.k, x.k)
    else:
        slot = jnp.where(is_new, offset[:, None] % BLOCK_SIZE + index, BLOCK_SIZE)
        rows = jnp.arange(batch)[:, None]
        append = lambda ours, values: ours.at[rows, :, slot].set(values.astype(ours.dtype), mode="drop")
        changes["open"] = cache.open._replace(
            k=append(cache.open.k, x.k),
            w=append(cache.open.w, x.w),
            beta=append(cache.open.beta, x.beta),
        )
    return cache._replace(**changes)


def _open_block(state: OpenSuperchunk, length):
    """Keys, directions and strengths of the open block, 0 from its `length` [B] on."""
    is_there = jnp.arange(BLOCK_SIZE) < length[:, None]
    return (
        jnp.where(is_there.reshape(-1, 1, BLOCK_SIZE, *[1] * (x.ndim - 3)), x, 0)
        for x in (state.k, state.w, state.beta)
    )


def _own_superchunk(state: OpenSuperchunk, q, offset, count):
    """Queries in the frame of the superchunk's start, and their logits with its keys.

    In the open block, with rows K, W and D = diag(beta) of it, Y = Q W^T up to each query's own token, and
    Z = Y (I + D tril(W W^T, -1))^-1 D: queries in the frame of the block's start are Q - Z W, logits
    Q K^T - Z tril(W K^T, -1).
    """
    start = offset % BLOCK_SIZE
    k, w, beta = _open_block(state, start + count)
    position, token = start[:, None] + jnp.arange(q.shape[3]), jnp.arange(BLOCK_SIZE)
    is_past = (token <= position[..., None])[:, None, None]
    y = jnp.where(is_past, _einsum("bkgth,bkuh->bkgtu", q, w), 0)
    mixing = jnp.eye(BLOCK_SIZE, dtype=q.dtype) + beta[..., None] * jnp.tril(_einsum("bkuh,bkvh->bkuv", w, w), -1)
    flat = y.reshape(*y.shape[:2], -1, BLOCK_SIZE)
    z = jax.lax.linalg.triangular_solve(mixing, flat, left_side=False, lower=True, unit_diagonal=True)
    z = z.reshape(y.shape) * beta[:, :, None, None]
    crossed = jnp.tril(_einsum("bkuh,bkvh->bkuv", w, k), -1)
    own = _einsum("bkgth,bkuh->bkgtu", q, k) - _einsum("bkgtu,bkuv->bkgtv", z, crossed)
    q = q - _einsum("bkgtu,bkuh->bkgth", z, w)

    num_closed = offset // BLOCK_SIZE
    logits = jnp.tile(own, state.block_products.shape[2])  # past the open block they are not visible

    def visit(i, carry):
        q, logits = carry
        block = last - i
        k = jax.lax.dynamic_slice_in_dim(state.block_k, BLOCK_SIZE * block, BLOCK_SIZE, axis=2)
        product = jax.lax.dynamic_index_in_dim(state.block_products, block, axis=2, keepdims=False)
        is_closed = (block < num_closed)[:, None, None, None, None]
        found = jnp.where(is_closed, _einsum("bkgth,bkuh->bkgtu", q, k), own)
        logits = jax.lax.dynamic_update_slice_in_dim(logits, found, BLOCK_SIZE * block, axis=4)
        return jnp.where(is_closed, _einsum("bkgth,bkhi->bkgti", q, product), q), logits

    last = num_closed.max() - 1
    return jax.lax.fori_loop(0, last + 1, visit, (q, logits))


def _needed_pages(cache, q, gate, inside, position, page, page_id, options):
    """Pages of closed superchunks [B, P], nearest first, and which of them each key head needs [B, K, P]."""
    steps = jnp.arange(cache.table.shape[1] - 1)
    earlier = page[:, None] - 1 - steps
    pages = jnp.take_along_axis(cache.table, jnp.maximum(earlier, 0), axis=1)
    needed = jnp.broadcast_to((earlier >= 0)[:, None], (len(page), cache.k.shape[1], len(steps)))
    if options.window is not None:
        nearest_key = position[:, :1] + steps * cache.superchunk + 1  # its distance from the first query
        needed &= (nearest_key < options.window)[:, None]
    if options.prune_mass is not None:
        totals = jnp.moveaxis(gate[pages, ..., -1], 1, 3)  # [B, K, G, P]
        between = jnp.cumsum(jnp.pad(totals[..., :-1], [(0, 0)] * 3 + [(1, 0)]), axis=3)
        norms = jnp.moveaxis(cache.key_norm[pages], 1, 2) + cache.key_norm[page_id][..., None]  # [B, K, P]
        needed &= pruning.may_carry(
            jnp.linalg.norm(q, axis=-1).max(3)[..., None],  # scaled; reflections do not lengthen
            norms[:, :, None],
            options.gate_scale * (inside[..., :1] + between),
            scale=1.0, mass=options.prune_mass, num_keys=cache.max_length,
        ).any(2)  # fmt: skip
    return pages, needed


def _close(cache: Cache, page_id, offset, count):
    """Freezes blocks and superchunks that are full."""
    state, num_blocks = cache.open, cache.open.block_products.shape[2]
    length = offset % BLOCK_SIZE + count
    block, is_full = offset // BLOCK_SIZE, length == BLOCK_SIZE

    def transform():
        k, w, beta = _open_block(state, length)
        result = block_transform(k[:, :, None][:, :, :0], k, w, beta)  # no queries
        return result.key, result.transition

    shapes = jax.eval_shape(transform)
    zeros = lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    key, product = jax.lax.cond(is_full.any(), transform, zeros)
    rows = jnp.arange(key.shape[0])
    block = jnp.where(is_full, block, num_blocks)
    tokens = BLOCK_SIZE * block[:, None] + jnp.arange(BLOCK_SIZE)
    block_k = state.block_k.at[rows[:, None], :, tokens].set(jnp.moveaxis(key, 2, 1), mode="drop")
    block_products = state.block_products.at[rows, :, block].set(product, mode="drop")
    is_full = (block == num_blocks - 1) & (page_id < cache.k.shape[0])
    full_rows = jnp.argsort(~is_full)

    def freeze(i, pools):
        k, products = pools
        row, identity = full_rows[i], jnp.eye(product.shape[-1], dtype=product.dtype)

        def visit(j, carry):  # `later`: product over the blocks behind this one
            keys, later = carry
            n = num_blocks - 1 - j
            key = jax.lax.dynamic_slice_in_dim(block_k[row], BLOCK_SIZE * n, BLOCK_SIZE, axis=1)
            keys = jax.lax.dynamic_update_slice_in_dim(
                keys, _einsum("kuh,kih->kui", key, later).astype(k.dtype), BLOCK_SIZE * n, axis=1
            )
            return keys, _einsum("khi,kij->khj", later, block_products[row, :, n])

        keys = jnp.zeros(k.shape[1:], k.dtype)
        keys, whole = jax.lax.fori_loop(0, num_blocks, visit, (keys, jnp.broadcast_to(identity, product.shape[1:])))
        put = lambda pool, x: jax.lax.dynamic_update_index_in_dim(pool, x, page_id[row], axis=0)
        return put(k, keys), put(products, whole)

    # A loop, seldom entered: unlike a branch, it changes its arrays in place.
    k, products = jax.lax.fori_loop(0, is_full.sum(), freeze, (cache.k, cache.products))
    state = state._replace(block_k=block_k, block_products=block_products)
    return cache._replace(k=k, products=products, open=state)
