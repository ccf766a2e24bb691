"""Stick-breaking attention: each query breaks its stick at the keys before it, the nearest first.

The pure function comes first; it is ordinary differentiable array code that accumulates in at least float32. There are
no positions: the order of the keys is in the breaking. Not here: skipping keys beyond which nothing of the stick is
left, or keys after the query's block.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import weighted_values
from path_jax.mixers.state import RecurrentState, init_recurrent_state, lengths_of
from path_jax.nn.layers import linear
from path_jax.nn.taps import Tap

BLOCK_SIZE = 128


def stick_breaking_weights(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    is_seen: Bool[Array, "B T S"],
    *,
    scale: float | None = None,
) -> tuple[Float[Array, "B N T S"], Float[Array, "B N T"]]:
    """Weights A_ij of `stick_breaking_attention` and what is left of each stick, dense, in float32 at least.

    Args:
      is_seen: the keys at which a query breaks its stick, in their order from the last to the first.
    """
    (batch, length, num_heads, head_dim), (size, num_kv_heads) = q.shape, k.shape[1:3]
    dtype = jnp.promote_types(jnp.float32, q.dtype)
    scale = head_dim**-0.5 if scale is None else scale
    grouped = q.reshape(batch, length, num_kv_heads, -1, head_dim)
    is_seen = is_seen[:, None, None]
    logits = scale * jnp.einsum("btkgh,bskh->bkgts", grouped, k, preferred_element_type=dtype)
    log_kept = jnp.where(is_seen, nn.log_sigmoid(-logits), 0)
    # What the keys from j on leave of the stick; not a difference of sums, which would lose digits.
    log_left = jax.lax.cumsum(log_kept, axis=log_kept.ndim - 1, reverse=True)
    log_before = jnp.pad(log_left[..., 1:], [(0, 0)] * (log_left.ndim - 1) + [(0, 1)])
    weights = jnp.where(is_seen, jnp.exp(nn.log_sigmoid(logits) + log_before), 0)
    return weights.reshape(batch, num_heads, length, size), jnp.exp(log_left[..., 0]).reshape(batch, num_heads, length)


def _is_seen(index, size: int, segment, segment_ids, attend_current: bool) -> Bool[Array, "B T S"]:
    """Which of `size` keys the queries at `index` [B, T], of the documents `segment` [B, T], break their sticks at."""
    is_seen = jnp.arange(size) <= (index if attend_current else index - 1)[..., None]
    if segment_ids is not None:
        is_seen &= (segment[..., None] == segment_ids[:, None]) & (segment[..., None] > 0)
    return is_seen


def stick_breaking_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K P"],
    segment_ids: Int[Array, "B T"] | None = None,
    *,
    starts: Int[Array, "B"] | None = None,
    scale: float | None = None,
    attend_current: bool = False,
    block_size: int = BLOCK_SIZE,
) -> tuple[Float[Array, "B T N P"], Float[Array, "B T N"]]:
    """Attention with weights that break a stick of length 1, from the latest key to the first.

        z_ij = scale q_i k_j,   A_ij = sigmoid(z_ij) prod_{j < m < i} (1 - sigmoid(z_im)),   o_i = sum_{j < i} A_ij v_j

    Products are sums of log-sigmoids. Memory is O(block_size S) per head, backward pass (which computes the weights
    again) included; the work is T S.

    Args:
      q, k, v: query i sees keys j < i, of its own document.
      segment_ids: contiguous packed documents, 0 is padding; needs S = T.
      starts: index among the keys of each row's first query, 0 by default.
      scale: of the logits, H ** -0.5 by default.
      attend_current: query i also sees key i, first of all.
      block_size: queries whose weights are in memory at once.

    Returns:
      o in v's dtype, and what is left of the stick, prod_{j < i} (1 - sigmoid(z_ij)), in float32 at least; both 0 in
      padding.

    Raises:
      ValueError: if a size does not fit.

    Source: Tan et al., "Scaling Stick-Breaking Attention", section 3.
    """
    (batch, length, num_heads), (size, num_kv_heads) = q.shape[:3], k.shape[1:3]
    if num_heads % num_kv_heads:
        raise ValueError(f"{num_heads=} is not a multiple of {num_kv_heads=}")
    if block_size < 1:
        raise ValueError(f"{block_size=} must be positive")
    if segment_ids is not None and size != length:
        raise ValueError(f"segment_ids are of {length} queries, but there are {size} keys")
    dtype = jnp.promote_types(jnp.float32, q.dtype)
    block_size = min(block_size, length)
    index = jnp.broadcast_to(jnp.arange(length), (batch, length))
    index = index if starts is None else index + starts[:, None]

    @jax.checkpoint
    def attend(block):
        q, index, segment = block  # [B, C, ...]
        is_seen = _is_seen(index, size, segment, segment_ids, attend_current)
        weights, left = stick_breaking_weights(q, k, is_seen, scale=scale)
        weights = weights.astype(v.dtype).reshape(batch, num_kv_heads, -1, *weights.shape[2:])
        out = jnp.einsum("bkgcs,bskp->bckgp", weights, v, preferred_element_type=dtype)
        left = jnp.moveaxis(left, -1, 1)
        left = left if segment_ids is None else jnp.where((segment > 0)[..., None], left, 0)
        return out.astype(v.dtype).reshape(*q.shape[:3], -1), left

    def to_blocks(x):  # [B, T, ...] -> [blocks, B, C, ...]
        x = jnp.pad(x, [(0, 0), (0, -length % block_size)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(batch, -1, block_size, *x.shape[2:]), 1, 0)

    blocks = (q, index, index if segment_ids is None else segment_ids)
    out, left = jax.lax.map(attend, jax.tree.map(to_blocks, blocks))
    join = lambda x, *shape: jnp.moveaxis(x, 0, 1).reshape(batch, -1, num_heads, *shape)[:, :length]
    return join(out, v.shape[-1]), join(left)


class StickBreakingAttention(nn.Module):
    """Multi-head stick-breaking attention.

        y = o_proj(stick_breaking_attention(q_proj x, k_proj x, v_proj x))

    Args:
      num_heads: query heads N; num_kv_heads: N by default; head_dim: D // N by default.
      attend_current: a token breaks the stick at itself first. By default it does not see itself.
      remainder: gives what is left of the stick to the token's own value; by default it is lost.
      expose_weights: computes the weights densely in the tap `attn_probs` [B, N, T, S], where the diagonal has the
        remainder too: for analysis, the parameters are the same.
      dtype: compute dtype, the input's by default.

    Source: Tan et al., "Scaling Stick-Breaking Attention", and published code.
    """

    num_heads: int
    num_kv_heads: int | None = None
    head_dim: int | None = None
    attend_current: bool = False
    remainder: bool = False
    expose_weights: bool = False
    dtype: jnp.dtype | None = None

    def init_state(self, batch: int, max_length: int, embed_dim: int, **cache_options) -> RecurrentState:
        """State for rows of up to `max_length` tokens: all keys and values, in float32 at least."""
        shape = (max_length, self.num_kv_heads or self.num_heads, self.head_dim or embed_dim // self.num_heads)
        return init_recurrent_state(
            batch, histories={}, memories={"k": shape, "v": shape}, **{"dtype": self.dtype} | cache_options
        )

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        cache: RecurrentState | None = None,
        lengths: Int[Array, "B"] | None = None,
    ):
        """Rows that outgrow the cache become NaN; raises NotImplementedError for one where weights are exposed."""
        del positions  # the order of the keys is in the breaking
        if self.expose_weights and cache is not None:
            raise NotImplementedError("expose_weights has no decode cache: decode with expose_weights=False")
        lengths = lengths_of(x, cache, segment_ids, lengths)
        dtype = x.dtype if self.dtype is None else self.dtype
        num_kv_heads = self.num_kv_heads or self.num_heads
        head_dim = self.head_dim or x.shape[-1] // self.num_heads
        heads = lambda y: y.reshape(*y.shape[:2], -1, head_dim)
        q = Tap(name="q")(heads(linear(self.num_heads * head_dim, "q_proj", dtype=dtype)(x)))
        k = Tap(name="k")(heads(linear(num_kv_heads * head_dim, "k_proj", dtype=dtype)(x)))
        v = Tap(name="v")(heads(linear(num_kv_heads * head_dim, "v_proj", dtype=dtype)(x)))

        options = dict(attend_current=self.attend_current)
        if self.expose_weights:
            weights = Tap(name="attn_probs")(self._weights(q, k, segment_ids))
            out = weighted_values(weights, v).astype(v.dtype)
        elif cache is None:
            out, left = stick_breaking_attention(q, k, v, segment_ids, **options)
        else:
            memory = {name: _write(cache.memory[name], y, cache.length, lengths) for name, y in (("k", k), ("v", v))}
            out, left = stick_breaking_attention(q, memory["k"], memory["v"], starts=cache.length, **options)
            has_outgrown = cache.length + lengths > memory["k"].shape[1]
            out = jnp.where(has_outgrown[:, None, None, None], jnp.nan, out)
            cache = RecurrentState(cache.length + lengths, {}, memory)
        if self.remainder and not self.expose_weights:
            out += left[..., None] * jnp.repeat(v, self.num_heads // num_kv_heads, axis=2)
        out = Tap(name="head_out")(out).astype(dtype).reshape(*x.shape[:2], -1)
        return linear(x.shape[-1], "o_proj", dtype=dtype)(out), cache

    def _weights(self, q, k, segment_ids) -> Float[Array, "B N T T"]:
        """Of every key, the remainder of a token's stick being the weight of its own."""
        batch, length = q.shape[:2]
        index = jnp.broadcast_to(jnp.arange(length), (batch, length))
        is_seen = _is_seen(index, length, segment_ids, segment_ids, self.attend_current)
        weights, left = stick_breaking_weights(q, k, is_seen)
        if self.remainder:
            left = left if segment_ids is None else jnp.where((segment_ids > 0)[:, None], left, 0)
            weights += left[..., None] * jnp.eye(length)
        return weights


def _write(memory: Float[Array, "B S K H"], x: Float[Array, "B T K H"], starts, lengths) -> Float[Array, "B S K H"]:
    """Puts the first `lengths[b]` tokens of row b at `starts[b]`; what does not fit is dropped."""
    index = jnp.arange(x.shape[1])
    index = jnp.where(index < lengths[:, None], starts[:, None] + index, memory.shape[1])
    rows = jnp.arange(len(x))[:, None]
    return memory.at[rows, index].set(x.astype(memory.dtype), mode="drop")
