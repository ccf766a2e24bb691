"""Softmax attention with an optional forget gate and optional rotary embedding: FoX, RoPE and NoPE transformers."""

import math

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pallas_kernels import attention_weights, weighted_values
from path_jax.mixers.state import State, init_state, lengths_of
from path_jax.nn.layers import HeadRMSNorm, append, default_positions, linear, rotary, shift
from path_jax.nn.taps import Tap
from path_jax.parallel.attention import extend, forgetting_attention

GATES = ("full", "bias_only", "fixed", "none")
QK_NORMS = ("none", "head", "shared")


def timescale_biases(num_heads: int, shortest: float, longest: float) -> np.ndarray:
    """Gate biases b with log_sigmoid(b) = -1/T, T log-spaced over the heads from `shortest` to `longest` tokens."""
    timescales = np.exp(np.linspace(math.log(shortest), math.log(longest), num_heads))
    return -np.log(np.expm1(1 / timescales)).astype(np.float32)


class ForgettingAttention(nn.Module):
    """Multi-head attention whose logits decay by data-dependent forget gates (FoX), or plain without a gate.

    The "LLaMA" FoX block is the default; the "Pro" block is `kv_shift=True, qk_norm="head" (or "shared"),
    output_norm=True, output_gate=True`.

    Args:
      num_heads: query heads N; num_kv_heads: N by default; head_dim: D // N by default.
      gate: "full" (log_sigmoid of a projection of x), "bias_only" (a learned constant per head), "fixed" (a constant
        per head), "none".
      gate_timescales: shortest and longest decay time in tokens, over the heads, that "bias_only" starts from and
        "fixed" keeps. The paper's range is not stated; this one is ours.
      kv_shift: mixes each key and value head with the previous token's by a data-dependent amount.
      qk_norm: RMS norm of query and key heads (eps 1e-5): "none", "head" (a scale per head) or "shared" (one for all).
      output_norm: RMS norm of each output head; output_gate: multiplies the output by sigmoid(output_gate_proj x).
      rope_theta: base of the rotary embedding, applied after the norm; None for none.
      norm_eps: of the output norm.
      qkv_bias, o_bias: biases of the query, key and value projections, and of the output projection.
      window, prune, gate_scale, implementation: see pallas_kernels.forgetting_attention.
      expose_weights: computes the weights densely, from the definition, in the tap `attn_probs` [B, N, T, S] (prune and
        implementation are of no meaning then): for analysis, the parameters are the same.
      dtype: compute dtype, the input's by default; the gate is float32 always.

    Source: Lin et al., "Forgetting Transformer", sections 3 and 4.
    """

    num_heads: int
    num_kv_heads: int | None = None
    head_dim: int | None = None
    gate: str = "full"
    gate_timescales: tuple[float, float] = (16.0, 4096.0)
    kv_shift: bool = False
    qk_norm: str = "none"
    output_norm: bool = False
    output_gate: bool = False
    rope_theta: float | None = None
    norm_eps: float = 1e-6
    qkv_bias: bool = False
    o_bias: bool = False
    window: int | None = None
    prune: float | str | None = None
    gate_scale: float = 1.0
    expose_weights: bool = False
    dtype: jnp.dtype | None = None
    implementation: str | None = None

    def __post_init__(self):
        if self.gate not in GATES:
            raise ValueError(f"gate={self.gate!r} is unknown; choose from {GATES}")
        if self.qk_norm not in QK_NORMS:
            raise ValueError(f"qk_norm={self.qk_norm!r} is unknown; choose from {QK_NORMS}")
        super().__post_init__()

    def init_state(self, batch: int, max_length: int, embed_dim: int, **cache_options) -> State:
        """State for rows of up to `max_length` tokens; `cache_options` go to pallas_kernels.init_cache."""
        head_dim = self.head_dim or embed_dim // self.num_heads
        num_kv_heads = self.num_kv_heads or self.num_heads
        return init_state(
            batch, max_length, num_heads=self.num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim,
            path=False, forget=self.gate != "none", **{"dtype": self.dtype} | cache_options,
            histories={name: (1, num_kv_heads, head_dim) for name in "kv"} if self.kv_shift else {},
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
        if self.expose_weights and cache is not None:
            raise NotImplementedError("expose_weights has no decode cache: decode with expose_weights=False")
        lengths = lengths_of(x, cache, segment_ids, lengths)
        dtype = x.dtype if self.dtype is None else self.dtype
        num_kv_heads = self.num_kv_heads or self.num_heads
        head_dim = self.head_dim or x.shape[-1] // self.num_heads
        heads = lambda y: y.reshape(*y.shape[:2], -1, head_dim)

        q = heads(linear(self.num_heads * head_dim, "q_proj", dtype=dtype, use_bias=self.qkv_bias)(x))
        k = heads(linear(num_kv_heads * head_dim, "k_proj", dtype=dtype, use_bias=self.qkv_bias)(x))
        v = heads(linear(num_kv_heads * head_dim, "v_proj", dtype=dtype, use_bias=self.qkv_bias)(x))
        history = {}
        if self.kv_shift:
            k, history["k"] = self._shifted("k", k, x, segment_ids, cache, lengths)
            v, history["v"] = self._shifted("v", v, x, segment_ids, cache, lengths)
        if self.qk_norm != "none":
            is_shared = self.qk_norm == "shared"
            q, k = HeadRMSNorm(is_shared, name="q_norm")(q), HeadRMSNorm(is_shared, name="k_norm")(k)
        if self.rope_theta is not None:
            if positions is None:
                positions = default_positions(x[..., 0], segment_ids)
                positions += 0 if cache is None else cache.length[:, None]
            q, k = rotary(q, positions, self.rope_theta), rotary(k, positions, self.rope_theta)
        q, k, v = Tap(name="q")(q), Tap(name="k")(k), Tap(name="v")(v)

        log_forget, options = self._log_forget(x, dtype), dict(gate_scale=self.gate_scale, window=self.window)
        if self.expose_weights:
            weights = attention_weights(q, k, log_forget=log_forget, segment_ids=segment_ids, **options)
            out = weighted_values(Tap(name="attn_probs")(weights), v).astype(q.dtype)
        elif cache is None:
            options |= dict(segment_ids=segment_ids, prune=self.prune, implementation=self.implementation)
            out = forgetting_attention(q, k, v, log_forget, **options)
        else:
            options |= dict(lengths=lengths, prune=self.prune)
            out, attention = extend(cache.attention, q, k, v, log_forget=log_forget, **options)
            cache = State(attention, history)
        out = Tap(name="head_out")(out)
        if self.output_norm:
            out = HeadRMSNorm(is_shared=False, eps=self.norm_eps, name="output_norm")(out)
        out = out.reshape(*x.shape[:2], -1)
        if self.output_gate:
            out *= Tap(name="gate")(nn.sigmoid(linear(out.shape[-1], "output_gate_proj", dtype=dtype)(x)))
        return linear(x.shape[-1], "o_proj", dtype=dtype, use_bias=self.o_bias)(out), cache

    def _shifted(self, name, y, x, segment_ids, cache, lengths):
        """`a_t y_{t-1} + (1 - a_t) y_t` per head, a = sigmoid(shift_proj x), y = 0 before each document; in float32."""
        amount = nn.sigmoid(linear(y.shape[2], f"{name}_shift_proj", dtype=y.dtype)(x).astype(jnp.float32))[..., None]
        history = None
        if cache is None:
            before = shift(y, 1, segment_ids)
        else:
            joined, history = append(cache.history[name], y, lengths)
            before = joined[:, :-1]
        return (amount * before + (1 - amount) * y).astype(y.dtype), history

    def _log_forget(self, x, dtype):
        if self.gate == "none":
            return None
        if self.gate == "full":
            gate = linear(self.num_heads, "forget_proj", dtype=dtype, use_bias=True)(x)
        else:
            biases = timescale_biases(self.num_heads, *self.gate_timescales)
            if self.gate == "bias_only":
                biases = self.param("forget_bias", lambda _: jnp.asarray(biases))
            gate = jnp.broadcast_to(biases, (*x.shape[:2], self.num_heads))
        return Tap(name="log_forget")(nn.log_sigmoid(gate.astype(jnp.float32)))
