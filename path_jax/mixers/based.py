"""Based: linear attention whose weights are the second-order Taylor expansion of the softmax weights."""

import math

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from path_jax.mixers.state import RecurrentState, init_recurrent_state, lengths_of
from path_jax.nn.chunks import scan_chunks
from path_jax.nn.layers import ShortConv, append, linear
from path_jax.nn.taps import Tap


def taylor_size(feature_dim: int) -> int:
    """Length P of `taylor_features` of R numbers: 1 + R + R (R + 1) / 2."""
    return 1 + feature_dim + feature_dim * (feature_dim + 1) // 2


def taylor_features(x: Float[Array, "*batch R"]) -> Float[Array, "*batch P"]:
    """Features with features(x) . features(y) = 1 + s + s^2 / 2, s = x . y / sqrt(R).

    Products of two coordinates appear once, so they have about half the length of the full outer product.
    """
    size = x.shape[-1]
    x = x * size**-0.25
    first, second = np.tril_indices(size)
    pairs = x[..., first] * x[..., second] * np.where(first == second, math.sqrt(0.5), 1).astype(x.dtype)
    return jnp.concatenate([jnp.ones_like(x[..., :1]), x, pairs], axis=-1)


def linear_attention(
    q: Float[Array, "B T N R"],
    k: Float[Array, "B T K R"],
    v: Float[Array, "B T K H"],
    *,
    eps: float = 1e-12,
    segment_ids: Int[Array, "B T"] | None = None,
    lengths: Int[Array, "B"] | None = None,
    memory: Float[Array, "B K P H1"] | None = None,
    chunk_size: int = 64,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B K P H1"]]:
    """o_t = sum_{j <= t} w_tj v_j / (sum_{j <= t} w_tj + eps), w = 1 + s + s^2 / 2, s = q_t . k_j / sqrt(R).

    Within a chunk the weights are computed, what precedes it is a sum over features. In float32 at least.

    Args:
      q, k, v: N query heads in K groups of consecutive ones that share a key head.
      segment_ids: packed documents do not see each other.
      lengths: how many tokens of a row enter the memory, or None for all.
      memory: of earlier tokens, as returned: sums of features(k_j) [v_j, 1], H1 = H + 1; None for nothing.
      chunk_size: changes rounding only.

    Returns:
      The outputs and the memory after the last token, of that token's document.
    """
    q, k, v = (x.astype(jnp.result_type(jnp.float32, x)) for x in (q, k, v))
    (batch, _, num_heads, feature_dim), (num_kv_heads, head_dim) = q.shape, v.shape[2:]
    q = q.reshape(*q.shape[:2], num_kv_heads, num_heads // num_kv_heads, feature_dim)
    v = jnp.concatenate([v, jnp.ones_like(v[..., :1])], axis=-1)  # the last column sums the weights
    if memory is None:
        memory = jnp.zeros((batch, num_kv_heads, taylor_size(feature_dim), head_dim + 1), v.dtype)

    def step(memory, chunk, q, k, v):
        product = lambda equation, *arrays: jnp.einsum(equation, *arrays, precision="highest")
        s = product("btkgr,bskr->bkgts", q, k) / math.sqrt(feature_dim)
        weights = jnp.where(chunk.visible[:, None, None], 1 + s + s * s / 2, 0)
        out = product("bkgts,bskh->btkgh", weights, v)
        masked = lambda mask, x: jnp.where(mask.reshape(*mask.shape, *[1] * (x.ndim - mask.ndim)), x, 0)
        out += product("btkgp,bkph->btkgh", masked(chunk.reads, taylor_features(q)), memory)
        new = product("bskp,bskh->bkph", masked(chunk.writes, taylor_features(k)), v)
        return masked(chunk.keeps, memory) + new, out[..., :-1] / (out[..., -1:] + eps)

    memory, out = scan_chunks(step, memory, (q, k, v), segment_ids=segment_ids, lengths=lengths, chunk_size=chunk_size)
    return out.reshape(*out.shape[:2], num_heads, head_dim), memory


class Based(nn.Module):
    """The linear attention of Based: y = o_proj(linear_attention(q, k, v)).

    The published models alternate layers of it with gated short convolutions (the mixer "base_conv") and, in the larger
    ones, with sliding-window attention (the mixer "nope" with a `window`); those are layers of their own, not parts of
    this mixer. No rotary embedding.

    Args:
      num_heads: query heads N; num_kv_heads: K, N by default; head_dim: H of the values, D // N by default.
      feature_dim: R of queries and keys; the state has 1 + R + R (R + 1) / 2 rows per head.
      conv_size: tokens of a depthwise convolution in front of the projections, or 0 for none.
      eps: added to the sum of the weights, which is at least 1/2.
      chunk_size: see `linear_attention`.
      dtype: compute dtype, the input's by default; the attention is computed in float32.

    Source: Arora et al., "Simple linear attention language models balance the recall-throughput tradeoff", section 4.1.
    """

    num_heads: int
    num_kv_heads: int | None = None
    head_dim: int | None = None
    feature_dim: int = 16
    conv_size: int = 0
    eps: float = 1e-12
    chunk_size: int = 64
    dtype: jnp.dtype | None = None

    def init_state(self, batch: int, max_length: int, embed_dim: int, **cache_options) -> RecurrentState:
        """State of a fixed size; `cache_options` go to `init_recurrent_state`."""
        del max_length
        head_dim = self.head_dim or embed_dim // self.num_heads
        num_kv_heads = self.num_kv_heads or self.num_heads
        return init_recurrent_state(
            batch,
            histories={"x": (self.conv_size - 1, embed_dim)} if self.conv_size else {},
            memories={"kv": (num_kv_heads, taylor_size(self.feature_dim), head_dim + 1)},
            **{"dtype": self.dtype} | cache_options,
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
        del positions  # nothing here depends on them
        lengths = lengths_of(x, cache, segment_ids, lengths)
        dtype = x.dtype if self.dtype is None else self.dtype
        (_, length, embed_dim), num_kv_heads = x.shape, self.num_kv_heads or self.num_heads
        head_dim = self.head_dim or embed_dim // self.num_heads
        history = {}
        if self.conv_size:
            x = x.astype(dtype)
            if cache is not None:
                x, history["x"] = append(cache.history["x"], x, lengths)
            conv = ShortConv(self.conv_size, use_bias=True, use_silu=False, name="conv")
            x = Tap(name="conv_out")(conv(x, segment_ids)[:, -length:])

        heads = lambda y, size: y.reshape(*y.shape[:2], -1, size)
        q = heads(linear(self.num_heads * self.feature_dim, "q_proj", dtype=dtype)(x), self.feature_dim)
        k = heads(linear(num_kv_heads * self.feature_dim, "k_proj", dtype=dtype)(x), self.feature_dim)
        v = heads(linear(num_kv_heads * head_dim, "v_proj", dtype=dtype)(x), head_dim)
        q, k, v = Tap(name="q")(q), Tap(name="k")(k), Tap(name="v")(v)
        memory = None if cache is None else cache.memory["kv"]
        out, memory = linear_attention(
            q, k, v, eps=self.eps, segment_ids=segment_ids, lengths=lengths, memory=memory, chunk_size=self.chunk_size
        )
        out = Tap(name="recurrence")(out.astype(dtype))
        if cache is not None:
            cache = RecurrentState(cache.length + lengths, history, {"kv": memory})
        return linear(embed_dim, "o_proj", dtype=dtype)(out.reshape(*out.shape[:2], -1)), cache
