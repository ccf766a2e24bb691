"""PaTH and PaTH-FoX attention as a module: projections, reflection directions and strengths, optional forget gate."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import attention_weights, weighted_values
from path_jax.mixers.state import State, init_state, lengths_of
from path_jax.nn.layers import HeadRMSNorm, ShortConv, append, linear
from path_jax.nn.taps import Tap
from path_jax.parallel.attention import extend, path_attention


def unit_directions(w: Float[Array, "B T K H"]) -> Float[Array, "B T K H"]:
    """`w / sqrt(sum(w^2) + 1e-6)` in float32: a rounded direction would move every logit whose path crosses it."""
    w = w.astype(jnp.float32)
    return w * jax.lax.rsqrt(jnp.sum(jnp.square(w), axis=-1, keepdims=True) + 1e-6)


def rounded_directions(
    w: Float[Array, "B T K H"], beta: Float[Array, "B T K"], dtype
) -> tuple[Float[Array, "B T K H"], Float[Array, "B T K"]]:
    """Directions rounded to `dtype`, and strengths that keep `beta |w|^2` as it is.

    `I - beta w^T w` then moves the rounded direction as far as it moved the exact one: rounding changes the model a
    little, the same way wherever it runs, and no product of reflections grows.
    """
    rounded = w.astype(dtype)
    exact, squared = (jnp.sum(jnp.square(x.astype(jnp.float32)), axis=-1) for x in (w, rounded))
    return rounded, beta * jnp.where(squared > 0, exact / jnp.where(squared > 0, squared, 1), 1)


class PathAttention(nn.Module):
    """Multi-head attention with accumulated Householder position encoding.

        w = unit(silu(conv(w_proj x))),  beta = min(2 sigmoid(beta_proj x), beta_max),
        log_forget = log_sigmoid(forget_proj x),  y = o_proj(path_attention(q, k, v, w, beta, log_forget))

    Args:
      num_heads: query heads N; num_kv_heads: heads of k, v, w, beta (N by default); head_dim: D // N by default.
      forget_gate: adds the per-head forget gate (PaTH-FoX).
      w_rank: rank of the projection to w (two linear maps), or None for a full one, which suits few key heads.
      conv_size: tokens of the short convolution on w, or 0 for none.
      qk_norm: RMS norm of each query and key head, scale shared by the heads.
      gate_scale: factor of the forget gate in the logits; None means the logit scale, as in flash-linear-attention.
      beta_max: clips beta below 2, for runs in which rounding lets products of reflections grow.
      round_directions: rounds w to the compute dtype, keeping reflections exact. TPU kernels compute their linear stage
        in the dtype of w, in bfloat16 several times as fast; False gives float32 accuracy there.
      prune: see pallas_kernels.path_attention.
      expose_weights: computes the weights densely, from the definition, in the tap `attn_probs` [B, N, T, S] (prune and
        implementation are of no meaning then): for analysis, the parameters are the same.
      dtype: compute dtype, the input's by default. beta, the gate and, unless rounded, w are float32 always.
      implementation: see pallas_kernels.path_attention.

    Source: Yang et al., "PaTH Attention", sections 3 and 4.
    """

    num_heads: int
    num_kv_heads: int | None = None
    head_dim: int | None = None
    forget_gate: bool = False
    w_rank: int | None = 32
    conv_size: int = 3
    qk_norm: bool = False
    gate_scale: float | None = 1.0
    beta_max: float = 2.0
    round_directions: bool = True
    prune: float | str | None = None
    expose_weights: bool = False
    dtype: jnp.dtype | None = None
    implementation: str | None = None

    def __post_init__(self):
        if not 0 < self.beta_max <= 2:
            raise ValueError(f"beta_max={self.beta_max} must be in (0, 2]")
        if self.conv_size < 0 or (self.w_rank is not None and self.w_rank < 1):
            raise ValueError(f"conv_size={self.conv_size} must be >= 0 and w_rank={self.w_rank} None or >= 1")
        super().__post_init__()

    def init_state(self, batch: int, max_length: int, embed_dim: int, **cache_options) -> State:
        """State for rows of up to `max_length` tokens; `cache_options` go to pallas_kernels.init_cache."""
        head_dim = self.head_dim or embed_dim // self.num_heads
        num_kv_heads = self.num_kv_heads or self.num_heads
        return init_state(
            batch, max_length, num_heads=self.num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim,
            path=True, forget=self.forget_gate, **{"dtype": self.dtype} | cache_options,
            histories={"w": (self.conv_size - 1, num_kv_heads * head_dim)} if self.conv_size else {},
        )  # fmt: skip

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        cache: State | None = None,
        lengths: Int[Array, "B"] | None = None,
    ):
        """Raises NotImplementedError for a cache where weights are exposed."""
        del positions  # position is what the reflections encode
        if self.expose_weights and cache is not None:
            raise NotImplementedError("expose_weights has no decode cache: decode with expose_weights=False")
        lengths = lengths_of(x, cache, segment_ids, lengths)
        dtype = x.dtype if self.dtype is None else self.dtype
        num_kv_heads = self.num_kv_heads or self.num_heads
        head_dim = self.head_dim or x.shape[-1] // self.num_heads
        heads = lambda y: y.reshape(*y.shape[:2], -1, head_dim)

        q = heads(linear(self.num_heads * head_dim, "q_proj", dtype=dtype)(x))
        k = heads(linear(num_kv_heads * head_dim, "k_proj", dtype=dtype)(x))
        v = Tap(name="v")(heads(linear(num_kv_heads * head_dim, "v_proj", dtype=dtype)(x)))
        if self.qk_norm:
            q, k = HeadRMSNorm(is_shared=True, name="q_norm")(q), HeadRMSNorm(is_shared=True, name="k_norm")(k)
        q, k = Tap(name="q")(q), Tap(name="k")(k)

        if self.w_rank is None:
            w = linear(num_kv_heads * head_dim, "w_proj", dtype=dtype)(x)
        else:
            w = linear(self.w_rank, "w_proj_down", dtype=dtype)(x)
            w = linear(num_kv_heads * head_dim, "w_proj_up", dtype=dtype)(w)
        history = {}
        if self.conv_size:
            conv = ShortConv(self.conv_size, name="w_conv")
            if cache is not None:
                w, history["w"] = append(cache.history["w"], w, lengths)
            w = Tap(name="conv_out")(conv(w, segment_ids)[:, -x.shape[1] :])
        w = Tap(name="w")(unit_directions(heads(w)))
        beta = linear(num_kv_heads, "beta_proj", dtype=dtype, use_bias=True)(x)
        beta = Tap(name="beta")(jnp.minimum(2 * nn.sigmoid(beta.astype(jnp.float32)), self.beta_max))
        if self.round_directions:
            w, beta = rounded_directions(w, beta, dtype)
        log_forget = None
        if self.forget_gate:
            gate = linear(self.num_heads, "forget_proj", dtype=dtype, use_bias=True)(x)
            log_forget = Tap(name="log_forget")(nn.log_sigmoid(gate.astype(jnp.float32)))

        options = dict(gate_scale=head_dim**-0.5 if self.gate_scale is None else self.gate_scale)
        if self.expose_weights:
            weights = attention_weights(q, k, w, beta, log_forget, segment_ids=segment_ids, **options)
            out = weighted_values(Tap(name="attn_probs")(weights), v).astype(q.dtype)
        elif cache is None:
            options |= dict(segment_ids=segment_ids, prune=self.prune, implementation=self.implementation)
            out = path_attention(q, k, v, w, beta, log_forget, **options)
        else:
            options |= dict(lengths=lengths, prune=self.prune)
            out, attention = extend(cache.attention, q, k, v, w, beta, log_forget, **options)
            cache = State(attention, history)
        out = Tap(name="head_out")(out)
        return linear(x.shape[-1], "o_proj", dtype=dtype)(out.reshape(*x.shape[:2], -1)), cache
