"""H3: two state space models and two products, the predecessor of linear attention with decay."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Complex, Float, Int

from path_jax.mixers.state import RecurrentState, init_recurrent_state, lengths_of
from path_jax.nn.chunks import scan_chunks
from path_jax.nn.layers import linear
from path_jax.nn.long_conv import causal_long_conv, extend_long_conv
from path_jax.nn.taps import Tap


def discretise(
    log_dt: Float[Array, "N"], log_decay: Float[Array, "N P"], frequency: Float[Array, "N P"]
) -> tuple[Complex[Array, "N P"], Complex[Array, "N P"]]:
    """Bilinear discretisation of dx/dt = a x + u, a = -exp(log_decay) + i frequency, with steps dt.

    Returns:
      log of the factor (1 + dt a / 2) / (1 - dt a / 2) of a step, and the input's factor dt / (1 - dt a / 2).
    """
    dt = jnp.exp(log_dt)[:, None]
    half = jax.lax.complex(-jnp.exp(log_decay), frequency) * dt / 2
    return jnp.log((1 + half) / (1 - half)), dt / (1 - half)


def decayed_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T N H"],
    v: Float[Array, "B T N H"],
    log_factor: Complex[Array, "N P"],
    readout: Complex[Array, "N P"],
    skip: Float[Array, "N"],
    *,
    segment_ids: Int[Array, "B T"] | None = None,
    lengths: Int[Array, "B"] | None = None,
    memory: Float[Array, "B N 2 P H H"] | None = None,
    chunk_size: int = 64,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N 2 P H H"]]:
    """The diagonal state space model of every entry of k v^T, and the product of its output with q.

        S_t = exp(log_factor) S_{t-1} + k_t v_t^T  (P states of H x H numbers),
        o_t = q_t^T (2 Re sum_p readout_p S_tp + skip k_t v_t^T)

    Within a chunk that is attention with the logits' place taken by the model's impulse response at t - j, times
    q_t . k_j; what precedes it is the state. Only the powers 0 ... C of the factors are needed, resets between packed
    documents are exact, and there is one form for training, prefill and steps. In float32 at least.

    Args:
      segment_ids: packed documents do not see each other.
      lengths: how many tokens of a row enter the state, or None for all.
      memory: real and imaginary part of S before the first token, None for 0.
      chunk_size: C; changes rounding only.

    Returns:
      The outputs and the memory after the last token, of that token's document.
    """
    q, k, v = (x.astype(jnp.result_type(jnp.float32, x, skip)) for x in (q, k, v))
    (batch, length, num_heads, head_dim), num_states = q.shape, log_factor.shape[1]
    size = min(chunk_size, length)
    powers = jnp.exp(jnp.arange(size + 1)[:, None, None] * log_factor)  # [C + 1, N, P]
    parts = lambda x: jnp.stack([x.real, x.imag], axis=2)
    response = 2 * jnp.sum(readout * powers[:-1], axis=-1).real.at[0].add(skip / 2)
    lag = np.arange(size)[:, None] - np.arange(size)
    response = jnp.moveaxis(response[np.maximum(lag, 0)], 2, 0)  # [N, C, C]
    reading = parts(2 * jnp.conj(readout * powers[1:]))  # [C, N, 2, P]: its product with (Re S, Im S) is 2 Re(c S)
    writing, powers = parts(powers[size - 1 :: -1]), parts(powers)
    if memory is None:
        memory = jnp.zeros((batch, num_heads, 2, num_states, head_dim, head_dim), q.dtype)

    def step(memory, chunk, q, k, v):
        product = lambda equation, *arrays: jnp.einsum(equation, *arrays, precision="highest")
        weights = jnp.where(chunk.visible[:, None], response * product("btnd,bsnd->bnts", q, k), 0)
        out = product("bnts,bsne->btne", weights, v)
        read = product("tncp,bncpde->btnde", reading, memory)
        out += jnp.where(chunk.reads[..., None, None], product("btnd,btnde->btne", q, read), 0)

        # The chunk's last token must come last, for its input has decayed by nothing: tokens move up.
        source = jnp.arange(size) - (size - chunk.count[:, None])
        at = jnp.maximum(source, 0)
        is_written = (source >= 0) & jnp.take_along_axis(chunk.writes, at, axis=1)
        moved = lambda x: jnp.take_along_axis(x, at[..., None, None], axis=1)
        kv = jnp.where(is_written[..., None, None, None], moved(k)[..., :, None] * moved(v)[..., None, :], 0)
        factor = powers[chunk.count][..., None, None]  # [B, N, 2, P, 1, 1]
        (a, b), (real, imag) = (jnp.moveaxis(x, 2, 0) for x in (factor, memory))
        decayed = jnp.stack([a * real - b * imag, a * imag + b * real], axis=2)
        kept = jnp.where(chunk.keeps[:, None, None, None, None, None], decayed, 0)
        return kept + product("sncp,bsnde->bncpde", writing, kv), out

    memory, out = scan_chunks(step, memory, (q, k, v), segment_ids=segment_ids, lengths=lengths, chunk_size=chunk_size)
    return out, memory


class H3(nn.Module):
    """Hungry Hungry Hippos: y = o_proj(q * diagonal(shift(k) * v)), heads of H channels multiplying as outer products.

    `shift` is a state space model that remembers the last `state_size` tokens, that is a causal convolution;
    `diagonal` is one with `state_size / 2` pairs of complex states per head.

    Args:
      head_dim: H, channels per head; a head's state has state_size * H^2 numbers.
      state_size: of both models, even.
      dt_range: smallest and largest initial step of the diagonal model, log-uniform over the heads.
      chunk_size: see `decayed_attention`.
      dtype: compute dtype of the projections, the input's by default; both models compute in float32.

    Source: Fu et al., "Hungry Hungry Hippos", section 3; parameters as in the authors' code with their S4D-Lin start,
    but for input vectors of the two models, which are fixed at their initial values: they multiply other parameters.
    """

    head_dim: int = 1
    state_size: int = 64
    dt_range: tuple[float, float] = (0.001, 0.1)
    chunk_size: int = 64
    dtype: jnp.dtype | None = None

    def __post_init__(self):
        if self.state_size < 2 or self.state_size % 2:
            raise ValueError(f"state_size={self.state_size} must be even: states come in complex pairs")
        super().__post_init__()

    def _num_heads(self, embed_dim: int) -> int:
        if embed_dim % self.head_dim:
            raise ValueError(f"head_dim={self.head_dim} does not divide the width {embed_dim}")
        return embed_dim // self.head_dim

    def init_state(self, batch: int, max_length: int, embed_dim: int, **cache_options) -> RecurrentState:
        """State of a fixed size; `cache_options` go to `init_recurrent_state`."""
        del max_length
        states = (self._num_heads(embed_dim), 2, self.state_size // 2, self.head_dim, self.head_dim)
        return init_recurrent_state(
            batch,
            histories={"k": (self.state_size - 1, embed_dim)},
            memories={"kv": states},
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
        embed_dim = x.shape[-1]
        num_heads, num_states = self._num_heads(embed_dim), self.state_size // 2
        q, k, v = (linear(embed_dim, f"{name}_proj", dtype=dtype, use_bias=True)(x) for name in "qkv")
        q, k, v = Tap(name="q")(q), Tap(name="k")(k), Tap(name="v")(v)

        normal, bound = nn.initializers.normal, self.state_size**-0.5
        uniform = lambda rng, shape: jax.random.uniform(rng, shape, minval=-bound, maxval=bound)
        shift_taps = self.param("shift_taps", uniform, (self.state_size, embed_dim))
        shift_skip = self.param("shift_skip", normal(1), (embed_dim,))
        history, memory = {}, None
        if cache is None:
            shifted = causal_long_conv(k, shift_taps, segment_ids)
        else:
            shifted, history["k"] = extend_long_conv(cache.history["k"], k, lengths, shift_taps)
            memory = cache.memory["kv"]
        k = Tap(name="conv_out")(shifted + shift_skip * k)

        first, last = np.log(self.dt_range)
        log_uniform = lambda rng, shape: jax.random.uniform(rng, shape, minval=first, maxval=last)
        log_half = nn.initializers.constant(math.log(0.5))
        multiples_of_pi = lambda _, shape: jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.float32) * np.pi, shape)
        log_factor, input_factor = discretise(
            self.param("log_dt", log_uniform, (num_heads,)),
            self.param("log_decay", log_half, (num_heads, num_states)),
            self.param("frequency", multiples_of_pi, (num_heads, num_states)),
        )
        readout = self.param("readout", normal(math.sqrt(0.5)), (2, num_heads, num_states))
        readout = jax.lax.complex(readout[0], readout[1]) * input_factor
        skip = self.param("skip", normal(1), (num_heads,))
        heads = lambda y: y.reshape(*y.shape[:2], num_heads, self.head_dim)
        out, memory = decayed_attention(
            heads(q), heads(k), heads(v), log_factor, readout, skip,
            segment_ids=segment_ids, lengths=lengths, memory=memory, chunk_size=self.chunk_size,
        )  # fmt: skip
        out = Tap(name="recurrence")(out.astype(dtype))
        if cache is not None:
            cache = RecurrentState(cache.length + lengths, history, {"kv": memory})
        return linear(embed_dim, "o_proj", dtype=dtype, use_bias=True)(out.reshape(*out.shape[:2], -1)), cache
