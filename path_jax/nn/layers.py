"""Layers shared by mixers and models: norms, projections, MLPs, causal shifts and convolutions, rotary embedding.

Parameters are float32; `dtype` is the compute dtype. Norm statistics are always float32.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

INIT_STD = 0.02  # of every projection and embedding, in the PaTH and in the FoX paper


def linear(features: int, name: str, *, dtype=None, use_bias: bool = False) -> nn.Dense:
    """Dense layer initialised N(0, 0.02), bias 0."""
    return nn.Dense(features, use_bias=use_bias, name=name, dtype=dtype, kernel_init=nn.initializers.normal(INIT_STD))


def rms_norm(x: Float[Array, "*batch H"], scale: Float[Array, "*heads H"], eps: float) -> Float[Array, "*batch H"]:
    """`x / sqrt(mean(x^2) + eps) * scale` over the last axis, in float32, returned in x's dtype."""
    x32 = x.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return (normed * scale).astype(x.dtype)


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis, with a learned scale (init 1)."""

    eps: float = 1e-6

    @nn.compact
    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        return rms_norm(x, self.param("scale", nn.initializers.ones, x.shape[-1:]), self.eps)


class HeadRMSNorm(nn.Module):
    """Root-mean-square norm of each head; `scale` is shared by the heads [H] or has its own entry for each [N * H]."""

    is_shared: bool
    eps: float = 1e-5

    @nn.compact
    def __call__(self, x: Float[Array, "B T N H"]) -> Float[Array, "B T N H"]:
        num_heads, head_dim = x.shape[-2:]
        scale = self.param("scale", nn.initializers.ones, (head_dim if self.is_shared else num_heads * head_dim,))
        return rms_norm(x, scale.reshape(-1, head_dim), self.eps)


class SwiGLU(nn.Module):
    """`down(silu(gate(x)) * up(x))`, no biases."""

    mlp_dim: int
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        gate = linear(self.mlp_dim, "gate_proj", dtype=self.dtype)(x)
        up = linear(self.mlp_dim, "up_proj", dtype=self.dtype)(x)
        return linear(x.shape[-1], "down_proj", dtype=self.dtype)(nn.silu(gate) * up)


class GeluMLP(nn.Module):
    """`down(gelu(up(x)))` with biases and the tanh approximation of gelu, as in GPT-2."""

    mlp_dim: int
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        up = linear(self.mlp_dim, "up_proj", dtype=self.dtype, use_bias=True)(x)
        return linear(x.shape[-1], "down_proj", dtype=self.dtype, use_bias=True)(nn.gelu(up, approximate=True))


def shift(x: Float[Array, "B T *D"], distance: int, segment_ids: Int[Array, "B T"] | None = None):
    """`x` moved `distance` tokens later: y_t = x_{t - distance}, 0 before the start of the sequence or document."""
    if distance == 0:
        return x
    moved = jnp.pad(x, [(0, 0), (distance, 0)] + [(0, 0)] * (x.ndim - 2))[:, : x.shape[1]]
    if segment_ids is None:
        return moved
    origin = jnp.pad(segment_ids, [(0, 0), (distance, 0)])[:, : x.shape[1]]
    same = (origin == segment_ids).reshape(*segment_ids.shape, *[1] * (x.ndim - 2))
    return jnp.where(same, moved, 0)


def causal_conv(x: Float[Array, "B T D"], kernel: Float[Array, "W D"], segment_ids: Int[Array, "B T"] | None = None):
    """Depthwise causal convolution, taps from oldest to newest: y_t = sum_i kernel[W - 1 - i] * x_{t - i}.

    Documents of a packed sequence do not see each other.
    """
    width = kernel.shape[0]
    kernel = kernel.astype(x.dtype)
    return sum(kernel[width - 1 - i] * shift(x, i, segment_ids) for i in range(width))


def append(history: Float[Array, "B W *D"], x: Float[Array, "B T *D"], lengths: Int[Array, "B"]):
    """Puts the last W tokens before new ones, of which row b has the first `lengths[b]`.

    Returns:
      The tokens [B, W + T, *D], and the last W of each row's.
    """
    joined = jnp.concatenate([history, x.astype(history.dtype)], axis=1)
    index = lengths[:, None] + jnp.arange(history.shape[1])
    index = index.reshape(*index.shape, *[1] * (x.ndim - 2))
    return joined, jnp.take_along_axis(joined, index, axis=1)


class ShortConv(nn.Module):
    """Depthwise causal convolution of `size` tokens, followed by SiLU."""

    size: int
    use_bias: bool = False
    use_silu: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], segment_ids: Int[Array, "B T"] | None = None):
        # Uniform in +-1/sqrt(size), the usual initialisation of a depthwise convolution and of its bias.
        init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform", in_axis=0, out_axis=())
        y = causal_conv(x, self.param("kernel", init, (self.size, x.shape[-1])), segment_ids)
        if self.use_bias:
            bound = self.size**-0.5
            init = lambda rng, shape: jax.random.uniform(rng, shape, minval=-bound, maxval=bound)
            y += self.param("bias", init, x.shape[-1:]).astype(y.dtype)
        return nn.silu(y) if self.use_silu else y


def rotary(x: Float[Array, "B T N H"], positions: Int[Array, "B T"], theta: float) -> Float[Array, "B T N H"]:
    """Rotary position embedding on halves: pairs (x_i, x_{i + H/2}) turn by `position * theta**(-2 i / H)` radians.

    Raises:
      ValueError: if H is odd.
    """
    head_dim = x.shape[-1]
    if head_dim % 2:
        raise ValueError(f"rotary embedding needs an even head dim, got {head_dim}")
    frequencies = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angles = positions[:, :, None, None].astype(jnp.float32) * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def default_positions(tokens: Int[Array, "B T"], segment_ids: Int[Array, "B T"] | None) -> Int[Array, "B T"]:
    """Positions 0, 1, ... counted from the start of each document."""
    index = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    if segment_ids is None:
        return index
    return index - jax.lax.cummax(jnp.where(_is_start(segment_ids), index, 0), axis=1)


def document_index(segment_ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Documents and stretches of padding of a row, counted from 1: segment id 0 may come up more than once."""
    return jnp.cumsum(_is_start(segment_ids), axis=1, dtype=jnp.int32)


def _is_start(segment_ids):
    return jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], [(0, 0), (1, 0)], constant_values=True)
