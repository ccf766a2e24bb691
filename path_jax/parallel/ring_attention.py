"""PaTH, PaTH-FoX and FoX attention over sequences that are sharded along their length.

Call it inside `jax.shard_map`; `parallel.attention` does. Each of R shards takes two chunks of a sequence, as
`zigzag.py` lays them out, so that all have the same work; the result goes back. Then
1.  each chunk attends to itself, by the kernels of `pallas_kernels`, and is carried to its borders (`span_frames`);
2.  transitions P (H x H) and sums of log gates of all chunks are gathered. A query of chunk c meets a key of an
    earlier chunk b as `query_c Pi_cb key_b^T`, `Pi_cb = P_{c-1} ... P_{b+1}`, so chunks may arrive in any order;
3.  keys, values and what goes with them move around the ring. At each of R - 1 hops a shard multiplies two pairs of
    chunks: its later chunk with the arriving earlier one, and the earlier two or the later two, whichever are in order
    (`pallas_kernels.blockwise.pairs`, on TPUs by kernels). Partial results are merged by their log-sum-exp.

The backward pass goes around once more, with the gradients of keys and values travelling behind their chunks, and keeps
nothing of the size of the whole sequence. Besides keys and values in collective-permutes, a device receives R K H^2
numbers of P, twice.

Logits, statistics and sums are float32 (float64 for float64 inputs); queries and keys are rounded to their own dtype.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import forgetting_attention, path_attention
from pallas_kernels.blockwise.pairs import Pair, PairOptions, result_types, tile_size
from pallas_kernels.dispatch import backward_pair, forward_pair
from pallas_kernels.householder import span_frames
from pallas_kernels.interpreter import active_mode
from path_jax.parallel.zigzag import from_zigzag, gather_chunks, to_zigzag

_einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


@dataclasses.dataclass(frozen=True)
class _Settings:
    """What is static."""

    axis_name: str
    num_shards: int
    implementation: str | None
    pair: PairOptions


class _Chunks(NamedTuple):
    """What moves around the ring: the two chunks of a shard, earlier one first."""

    key: Float[Array, "2 B K L H"]  # in the frame of the chunk's end
    value: Float[Array, "2 B K L Hv"]
    decay: Float[Array, "2 B K G L"] | None  # gate between the key and the chunk's end
    segment_ids: Int[Array, "2 B L"] | None


class _Operands(NamedTuple):
    """Inputs of the stage between chunks."""

    query: Float[Array, "2 B K G L H"]  # in the frame of the chunk's start
    chunks: _Chunks
    decay: Float[Array, "2 B K G L"] | None  # gate between the chunk's start and the query
    path: Float[Array, "R 2 B K H H"] | None  # Pi of the two pairs of each hop
    between: Float[Array, "R 2 B K G"] | None  # gate of the chunks between the two of a pair
    out: Float[Array, "2 B K G L Hv"]  # of each chunk's attention to itself
    lse: Float[Array, "2 B K G L"]


def ring_attention(
    q: Float[Array, "B t N H"],
    k: Float[Array, "B t K H"],
    v: Float[Array, "B t K Hv"],
    w: Float[Array, "B t K H"] | None = None,
    beta: Float[Array, "B t K"] | None = None,
    log_forget: Float[Array, "B t N"] | None = None,
    *,
    axis_name: str,
    scale: float | None = None,
    gate_scale: float = 1.0,
    window: int | None = None,
    prune: float | str | None = None,
    segment_ids: Int[Array, "B t"] | None = None,
    implementation: str | None = None,
) -> Float[Array, "B t N Hv"]:
    """This shard's part of `path_attention`, or of `forgetting_attention` without w and beta.

    Args:
      q, k, v, w, beta, log_forget, segment_ids: this shard's T / R consecutive tokens.
      axis_name: mesh axis of R >= 2 devices that the length is sharded over.
      scale, gate_scale: see `pallas_kernels.path_attention`.
      prune: matters inside chunks only.
      implementation: between chunks XLA stands in for one that has no kernels for that.
      window: see `pallas_kernels.forgetting_attention`.

    Raises:
      ValueError: if t does not halve, or half of it is more than 512 and no multiple of 64.

    Source: the ring is that of Liu et al., "Ring Attention with Blockwise Transformers"; transitions that travel with
    it are ours.
    """
    num_shards = jax.lax.axis_size(axis_name)
    length = q.shape[1] // 2
    if q.shape[1] % 2 or not tile_size(length):
        raise ValueError(
            f"{q.shape[1] * num_shards} tokens on {num_shards} sequence shards are {2 * num_shards} chunks of "
            f"{q.shape[1] / 2:g}; a chunk must have at most 512 tokens or a multiple of 64"
        )
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    settings = _Settings(axis_name, num_shards, implementation, PairOptions(scale, window, active_mode()))
    # Chunks become rows of a batch [2 B, L, ...] for all that happens inside of them.
    q, k, v, w, beta, log_forget, segment_ids = jax.tree.map(
        lambda x: to_zigzag(x, axis_name).reshape(-1, length, *x.shape[2:]),
        (q, k, v, w, beta, log_forget, segment_ids),
    )
    options = dict(
        scale=scale, gate_scale=gate_scale, prune=prune, segment_ids=segment_ids, implementation=implementation,
        return_lse=True,
    )  # fmt: skip
    heads = functools.partial(_to_heads, num_kv_heads=k.shape[2])
    path = None
    if w is None:
        out, lse = forgetting_attention(q, k, v, log_forget, window=window, **options)
    else:
        out, lse = path_attention(q, k, v, w, beta, log_forget, **options)
        q, k, transitions = jax.checkpoint(span_frames)(q, k, w, beta)
        path = _paths_of_pairs(settings, gather_chunks(transitions.reshape(2, -1, *transitions.shape[1:]), axis_name))
    decay = key_decay = between = None
    if log_forget is not None:
        decay, key_decay, between = _gates(settings, heads(gate_scale * log_forget.astype(lse.dtype)))
    ids = None if segment_ids is None else segment_ids.reshape(2, -1, length)
    chunks = _Chunks(heads(k)[:, :, :, 0], heads(v)[:, :, :, 0], key_decay, ids)
    own_out, own_lse = heads(out).astype(lse.dtype), heads(lse.swapaxes(1, 2))
    out = _across(settings, _Operands(heads(q), chunks, decay, path, between, own_out, own_lse))
    out = jnp.moveaxis(out.astype(q.dtype), 4, 2)  # [2, B, L, K, G, Hv]
    return from_zigzag(out.reshape(*out.shape[:3], -1, out.shape[-1]), axis_name)


def _to_heads(x: Float[Array, "2B L N *H"], num_kv_heads: int) -> Float[Array, "2 B K G L *H"]:
    x = x.reshape(2, -1, x.shape[1], num_kv_heads, x.shape[2] // num_kv_heads, *x.shape[3:])
    return jnp.moveaxis(x, 2, 4)


def _arriving(settings):
    """For all hops at once: the shard whose chunks are here, and whether it comes before this one."""
    shard = jax.lax.axis_index(settings.axis_name)
    source = (shard - jnp.arange(settings.num_shards)) % settings.num_shards
    return source, source < shard


def _of_pairs(settings, earlier, later):
    """Picks from tables over key chunks, of this shard's chunks, what the two pairs of each hop need: [R, 2, ...]."""
    source, is_before = _arriving(settings)
    is_before = is_before.reshape(-1, *[1] * (later.ndim - 1))
    second = jnp.where(is_before, earlier[source], later[2 * settings.num_shards - 1 - source])
    return jnp.stack([later[source], second], axis=1)


def _paths_of_pairs(settings, transitions: Float[Array, "2R B K H H"]) -> Float[Array, "R 2 B K H H"]:
    """Pi of the pairs of each hop."""
    num, shard = settings.num_shards, jax.lax.axis_index(settings.axis_name)
    identity = jnp.broadcast_to(jnp.eye(transitions.shape[-1], dtype=transitions.dtype), transitions.shape[1:])

    def paths(chunk, num_chunks):
        def extend(path, item):
            index, transition = item
            longer = _einsum("bkij,bkjh->bkih", path, transition)
            return jnp.where(index < chunk, longer, path), path

        items = (jnp.arange(num_chunks), transitions[:num_chunks])
        return jax.lax.scan(extend, identity, items, reverse=True)[1]

    return _of_pairs(settings, paths(shard, num), paths(2 * num - 1 - shard, 2 * num))


def _gates(settings, gates: Float[Array, "2 B K G L"]):
    """Sums of log gates from the chunk's start to queries, from keys to its end, and over the chunks of `between`."""
    num, shard = settings.num_shards, jax.lax.axis_index(settings.axis_name)
    axis = gates.ndim - 1
    behind = jnp.pad(gates[..., 1:], [(0, 0)] * axis + [(0, 1)])
    totals = gather_chunks(gates.sum(-1), settings.axis_name)
    index = jnp.arange(2 * num)

    def between(chunk):
        is_between = (index > index[:, None]) & (index < chunk)  # [key chunk, chunk]
        return jnp.where(is_between[..., None, None, None], totals, 0).sum(1)

    pairs = _of_pairs(settings, between(shard), between(2 * num - 1 - shard))
    return jnp.cumsum(gates, axis), jax.lax.cumsum(behind, axis, reverse=True), pairs


def _pairs(settings, operands, chunks, hop):
    """(index of the queries' chunk, of the keys' chunk, `Pair`) of each pair of a hop; the first has the number 0."""
    num, shard = settings.num_shards, jax.lax.axis_index(settings.axis_name)
    source = (shard - hop) % num
    index = jnp.where(source < shard, 0, 1)
    indices = [(1, 0, 2 * num - 1 - shard - source), (index, index, jnp.abs(shard - source))]
    take = lambda tree, i: jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), tree)
    for number, (query_index, key_index, num_chunks) in enumerate(indices[: 1 if _is_first(hop) else 2]):
        query, decay, ids = take((operands.query, operands.decay, operands.chunks.segment_ids), query_index)
        if operands.path is not None:
            moved = _einsum("bkgqh,bkhj->bkgqj", query.astype(operands.path.dtype), operands.path[hop, number])
            query = moved.astype(query.dtype)
        if decay is not None:
            decay += operands.between[hop, number, ..., None]
        chunk = take(chunks, key_index)
        distance = num_chunks * query.shape[3]
        pair = Pair(query, chunk.key, chunk.value, decay, chunk.decay, ids, chunk.segment_ids, distance)
        yield query_index, key_index, pair


def _is_first(hop):
    """Whether the chunks are still at home, where the second pair would be a chunk and itself."""
    return isinstance(hop, int) and hop == 0


def _is_needed(settings, pair):
    """Whether any query of a pair sees any key; None if every one does."""
    needed = None
    if settings.pair.window is not None:
        needed = pair.distance - pair.key.shape[2] + 1 < settings.pair.window
    if pair.query_ids is not None:
        ids, queries = pair.key_ids, pair.query_ids
        largest = jnp.iinfo(ids.dtype).max
        overlap = (ids.max(1) >= jnp.where(queries > 0, queries, largest).min(1)) & (ids.max(1) > 0)
        needed = overlap.any() if needed is None else needed & overlap.any()
    return needed


def _where_needed(settings, pair, function, otherwise):
    """`function()` of a pair, or `otherwise` if none of its queries sees any of its keys."""
    needed = _is_needed(settings, pair)
    return function() if needed is None else jax.lax.cond(needed, function, lambda: otherwise)


def _around(settings, chunks, carry, visit):
    """Takes `carry, new = visit(carry, chunks, hop)` around the ring; `new` is added up behind the chunks it is of.

    The next chunks are sent before the present ones are used, so that the transfer has all of a hop's time.

    Returns:
      carry, and the sums of `new`, at home.
    """
    num = settings.num_shards
    send = functools.partial(
        jax.lax.ppermute, axis_name=settings.axis_name, perm=[(shard, (shard + 1) % num) for shard in range(num)]
    )
    send = functools.partial(jax.tree.map, send)

    def hop(state, number, is_last=False):
        carry, chunks, gradients = state
        following, arrived = chunks if is_last else send(chunks), send(gradients)
        carry, new = visit(carry, chunks, number)
        return (carry, following, jax.tree.map(jnp.add, arrived, new)), None

    following = send(chunks)
    carry, gradients = visit(carry, chunks, 0)
    state, _ = jax.lax.scan(hop, (carry, following, gradients), jnp.arange(1, num - 1))
    (carry, _, gradients), _ = hop(state, num - 1, is_last=True)
    return carry, send(gradients)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _across(settings: _Settings, operands: _Operands) -> Float[Array, "2 B K G L Hv"]:
    """Each chunk's attention to itself, completed by that to all chunks before it."""
    return _forward(settings, operands)[0]


def _forward(settings, operands):
    def visit(state, chunks, hop):
        for index, _, pair in _pairs(settings, operands, chunks, hop):
            slices = tuple(x[index] for x in state)
            add = lambda: _merge(slices, forward_pair(settings.implementation, settings.pair, pair))
            slices = _where_needed(settings, pair, add, slices)
            state = tuple(x.at[index].set(new) for x, new in zip(state, slices))
        return state, ()

    return _around(settings, operands.chunks, (operands.out, operands.lse), visit)[0]


def _merge(*parts):
    """(out, lse) over the keys of two parts together."""
    (_, first), (_, second) = parts
    lse = jnp.logaddexp(first, second)
    weight = lambda own: jnp.where(jnp.isneginf(own), 0, jnp.exp(own - lse))[..., None]
    return sum(weight(own) * out for out, own in parts), lse


def _across_fwd(settings, operands):
    out, lse = _forward(settings, operands)
    return out, (operands, out, lse)


def _across_bwd(settings, residuals, dout):
    """With `Delta_i = sum(dout_i * out_i)`, p = exp(s - lse) and ds = p * (dout v^T - Delta), as for one device."""
    operands, out, lse = residuals
    dtype = lse.dtype
    delta = (dout * out).sum(-1)
    own_weight = jnp.where(jnp.isneginf(operands.lse), 0, jnp.exp(operands.lse - lse))
    down_lse = own_weight * ((dout * operands.out).sum(-1) - delta)
    rounded = dout.astype(operands.chunks.value.dtype)
    zeros = functools.partial(jax.tree.map, lambda x: jnp.zeros(x.shape, dtype))

    def visit(carry, chunks, hop):
        dquery, ddecay, dpath, dbetween = carry
        new = zeros(chunks._replace(segment_ids=None))
        for number, (query_index, key_index, pair) in enumerate(_pairs(settings, operands, chunks, hop)):
            rows = tuple(jax.lax.dynamic_index_in_dim(x, query_index, keepdims=False) for x in (lse, delta, rounded))
            gradients = lambda: backward_pair(settings.implementation, settings.pair, pair, *rows)
            found = _where_needed(settings, pair, gradients, zeros(result_types(pair, has_gradients=True)))
            at = lambda x, i, d: None if x is None else x.at[i].add(d)
            new = _Chunks(
                at(new.key, key_index, found.key), at(new.value, key_index, found.value),
                at(new.decay, key_index, found.key_gate), None,
            )  # fmt: skip
            dmoved, row_sums = found.query, found.query_gate
            if dpath is not None:
                query, path = operands.query[query_index].astype(dtype), operands.path[hop, number]
                dpath = dpath.at[hop, number].set(_einsum("bkgqh,bkgqj->bkhj", query, dmoved))
                dmoved = _einsum("bkgqj,bkhj->bkgqh", dmoved, path)
            dquery = dquery.at[query_index].add(dmoved)
            ddecay = at(ddecay, query_index, row_sums)
            dbetween = None if dbetween is None else dbetween.at[hop, number].set(row_sums.sum(-1))
        return (dquery, ddecay, dpath, dbetween), new

    carry = zeros((operands.query, operands.decay, operands.path, operands.between))
    (dquery, ddecay, dpath, dbetween), dchunks = _around(settings, operands.chunks, carry, visit)
    cotangents = _Operands(dquery, dchunks, ddecay, dpath, dbetween, own_weight[..., None] * dout, down_lse)
    return (
        jax.tree.map(
            lambda d, x: d.astype(x.dtype),
            cotangents,
            operands._replace(chunks=operands.chunks._replace(segment_ids=None)),
        ),
    )


_across.defvjp(_across_fwd, _across_bwd)
