"""Mamba (version 1): a selective state-space model between a short convolution and a gate.

The pure functions come first: the recurrence for one token, and chunk by chunk for whole sequences. Both are ordinary
differentiable array code in at least float32. The layer of the paper has no MLP beside it; our decoder gives every
mixer one.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from path_jax.mixers.state import RecurrentState, init_recurrent_state, lengths_of
from path_jax.nn.layers import ShortConv, append, linear
from path_jax.nn.taps import Tap

CHUNK_SIZE = 64
STEP_RANGE = (1e-3, 0.1)  # log-uniform step sizes dt at initialisation


def selective_step(
    state: Float[Array, "B E P"],
    x: Float[Array, "B E"],
    dt: Float[Array, "B E"],
    a: Float[Array, "E P"],
    b: Float[Array, "B P"],
    c: Float[Array, "B P"],
) -> tuple[Float[Array, "B E"], Float[Array, "B E P"]]:
    """One token of `selective_scan`, in the state's precision: its output and the next state."""
    x, dt, a, b, c = (y.astype(state.dtype) for y in (x, dt, a, b, c))
    state = jnp.exp(dt[..., None] * a) * state + (dt * x)[..., None] * b[:, None]
    return jnp.sum(state * c[:, None], axis=-1), state


def selective_scan(
    x: Float[Array, "B T E"],
    dt: Float[Array, "B T E"],
    a: Float[Array, "E P"],
    b: Float[Array, "B T P"],
    c: Float[Array, "B T P"],
    state: Float[Array, "B E P"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    *,
    chunk_size: int = CHUNK_SIZE,
) -> tuple[Float[Array, "B T E"], Float[Array, "B E P"]]:
    """Diagonal state-space model whose step size, input and output maps depend on the token.

        s_t = exp(dt_t a) s_{t-1} + dt_t x_t b_t,    y_t = sum_p c_tp s_tp        (per channel e; p = 1 ... P)

    An associative scan inside each chunk (on a CPU a plain one, which takes a tenth of the time), a plain one over the
    chunks. Memory is O(chunk_size E P + T E P / chunk_size) besides the inputs, backward pass (which computes every
    chunk again) included.

    Args:
      x: input of E channels; dt: step sizes >= 0, of which 0 leaves the state as it is.
      a: rates, < 0; b, c: input and output maps.
      state: before the first token, 0 by default; of the document that the first token belongs to.
      segment_ids: contiguous packed documents, each of which starts from 0; 0 is padding.
      chunk_size: tokens per chunk.

    Returns:
      y, 0 in padding, and the state after the last token, of its document; float32, or float64 for float64 inputs.

    Raises:
      ValueError: if chunk_size is not positive.

    Source: Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", section 3; b is discretised
    by dt b, as in the published code.
    """
    if chunk_size < 1:
        raise ValueError(f"{chunk_size=} must be positive")
    batch, length, channels = x.shape
    dtype = jnp.promote_types(jnp.float32, x.dtype)
    a = a.astype(dtype)
    chunk_size = min(chunk_size, length)
    state = jnp.zeros((batch, channels, a.shape[-1]), dtype) if state is None else state.astype(dtype)
    is_reset = jnp.zeros((batch, length), bool)
    if segment_ids is not None:
        is_reset = is_reset.at[:, 1:].set(segment_ids[:, 1:] != segment_ids[:, :-1])
        x = jnp.where((segment_ids > 0)[..., None], x, 0)

    def to_chunks(y):  # [B, T, ...] -> [chunks, C, B, ...]; added tokens have dt = 0
        y = jnp.pad(y, [(0, 0), (0, -length % chunk_size)] + [(0, 0)] * (y.ndim - 2))
        return jnp.moveaxis(y.reshape(batch, -1, chunk_size, *y.shape[2:]), 0, 2)

    def compose(first, second):
        return first[0] * second[0], second[0] * first[1] + second[1]

    def terms(chunk):
        is_reset, *rest = chunk
        x, dt, b, c = (y.astype(dtype) for y in rest)
        decay = jnp.where(is_reset[..., None, None], 0, jnp.exp(dt[..., None] * a))
        return decay, (dt * x)[..., None] * b[..., None, :], c[..., None, :]

    def take_tokens(state, chunk):
        def take_token(state, token):
            decay, update, c = terms(token)
            state = decay * state + update
            return state, jnp.sum(state * c, axis=-1)

        return jax.lax.scan(take_token, state, chunk)

    def take_together(state, chunk):
        decay, update, c = terms(chunk)
        decay, local = jax.lax.associative_scan(compose, (decay, update))
        states = decay * state + local
        return states[-1], jnp.sum(states * c, axis=-1)

    @jax.checkpoint
    def take_chunk(state, chunk):
        return jax.lax.platform_dependent(state, chunk, cpu=take_tokens, default=take_together)

    state, y = jax.lax.scan(take_chunk, state, tuple(to_chunks(y) for y in (is_reset, x, dt, b, c)))
    return jnp.moveaxis(y, 2, 0).reshape(batch, -1, channels)[:, :length], state


def _step_bias(rng, shape, dtype=jnp.float32):
    """Biases whose softplus is log-uniform in STEP_RANGE."""
    dt = jnp.exp(jax.random.uniform(rng, shape, dtype, *(math.log(bound) for bound in STEP_RANGE)))
    return dt + jnp.log(-jnp.expm1(-dt))


class Mamba(nn.Module):
    """Selective state-space mixer.

        u, z = in_proj x;   u = silu(conv(u));   r, b, c = x_proj u;   dt = softplus(dt_proj r)
        y = out_proj((selective_scan(u, dt, -exp(log_a), b, c) + skip * u) * silu(z))

    Args:
      expand: channels E per width D; state_size: P; dt_rank: width of r, D / 16 rounded up by default.
      conv_size: tokens of the short convolution (with a bias), or 0 for none (SiLU stays).
      dtype: compute dtype, the input's by default; dt and the recurrence are float32 always.

    Source: Gu and Dao, "Mamba", section 3.4 and published code, with its initialisation of everything but in_proj and
    out_proj, which have that of all our mixers.
    """

    expand: int = 2
    state_size: int = 16
    dt_rank: int | None = None
    conv_size: int = 4
    dtype: jnp.dtype | None = None

    def __post_init__(self):
        sizes = (self.expand, self.state_size, 1 if self.dt_rank is None else self.dt_rank)
        if self.conv_size < 0 or min(sizes) < 1:
            raise ValueError(
                f"conv_size={self.conv_size} must be >= 0, expand={self.expand} and state_size={self.state_size} >= 1, "
                f"dt_rank={self.dt_rank} None or >= 1"
            )
        super().__post_init__()

    def init_state(self, batch: int, max_length: int, embed_dim: int, **cache_options) -> RecurrentState:
        """State before the first token, of a size that does not depend on `max_length`."""
        del max_length
        channels = self.expand * embed_dim
        return init_recurrent_state(
            batch,
            histories={"conv": (self.conv_size - 1, channels)} if self.conv_size else {},
            memories={"state": (channels, self.state_size)},
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
        del positions  # the recurrence knows the order
        lengths = lengths_of(x, cache, segment_ids, lengths)
        dtype = x.dtype if self.dtype is None else self.dtype
        length, channels = x.shape[1], self.expand * x.shape[-1]
        dt_rank = self.dt_rank or -(-x.shape[-1] // 16)

        u, z = jnp.split(linear(2 * channels, "in_proj", dtype=dtype)(x), 2, axis=-1)
        history = {}
        if self.conv_size:
            if cache is not None:
                u, history["conv"] = append(cache.history["conv"], u, lengths)
            conv = ShortConv(self.conv_size, use_bias=True, name="conv")
            u = Tap(name="conv_out")(conv(u, segment_ids)[:, -length:])
        else:
            u = nn.silu(u)
        uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # in +-1/sqrt(fan-in)
        mixed = nn.Dense(dt_rank + 2 * self.state_size, False, dtype, kernel_init=uniform, name="x_proj")(u)
        r, b, c = jnp.split(mixed, (dt_rank, dt_rank + self.state_size), axis=-1)
        dt_proj = nn.Dense(channels, dtype=jnp.float32, kernel_init=uniform, bias_init=_step_bias, name="dt_proj")
        dt = nn.softplus(dt_proj(r))
        rates = jnp.log(jnp.arange(1, self.state_size + 1, dtype=jnp.float32))
        log_a = self.param("log_a", lambda _: jnp.tile(rates, (channels, 1)))
        skip = self.param("skip", nn.initializers.ones, (channels,))

        if cache is None:
            y, _ = selective_scan(u, dt, -jnp.exp(log_a), b, c, segment_ids=segment_ids)
        else:
            state = cache.memory["state"]
            dt = jnp.where(jnp.arange(length)[:, None] < lengths[:, None, None], dt, 0)
            if length == 1:
                y, state = selective_step(state, u[:, 0], dt[:, 0], -jnp.exp(log_a), b[:, 0], c[:, 0])
                y = y[:, None]
            else:
                y, state = selective_scan(u, dt, -jnp.exp(log_a), b, c, state)
            cache = RecurrentState(cache.length + lengths, history, {"state": state})
        y = (Tap(name="recurrence")(y) + skip * u).astype(dtype) * Tap(name="gate")(nn.silu(z))
        return linear(x.shape[-1], "out_proj", dtype=dtype)(y), cache
