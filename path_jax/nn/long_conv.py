"""Causal convolutions whose filters are as long as the sequence, and filters that a small network generates.

The sequence is cut at multiples of 1, 2, 4, ...: what lies before a cut reaches what lies after it by a convolution of
its own. So no output depends on later inputs, not even by rounding as it would in one Fourier transform over the whole
sequence; and since at most one document crosses a cut, documents are separated exactly by one mask on either side.
O(T log^2 W) time for W taps, O(T) memory.
"""

import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from path_jax.nn.layers import append, document_index

DENSE_SIZE = 32  # tokens on either side of a cut up to which a product is cheaper than Fourier transforms
ACTIVATIONS = ("sine", "relu")


def causal_long_conv(
    x: Float[Array, "B T D"], taps: Float[Array, "W D"], segment_ids: Int[Array, "B T"] | None = None
) -> Float[Array, "B T D"]:
    """Depthwise causal convolution, taps from newest to oldest: y_t = sum_i taps[i] x_{t - i}, in float32 at least.

    Documents of a packed sequence do not see each other.
    """
    length, num_taps = x.shape[1], min(taps.shape[0], x.shape[1])
    x, taps = _wide(x, taps)
    taps = taps[:num_taps]
    documents = None if segment_ids is None else document_index(segment_ids)
    y, half, is_last = taps[0] * x, 1, num_taps == 1
    while half < length and not is_last:
        # Cuts at the odd multiples of `half`; the last round takes all multiples that are left.
        is_last = half >= num_taps - 1
        sources, targets = (slice(None, -1), slice(1, None)) if is_last else (slice(0, None, 2), slice(1, None, 2))
        unit = half if is_last else 2 * half
        padding = -length % unit
        blocks = lambda x: jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2)).reshape(
            x.shape[0], -1, half, *x.shape[2:]
        )
        before = blocks(x)[:, sources]
        if documents is not None:
            ids = blocks(documents)
            crossing = ids[:, targets, :1]
            before = jnp.where((ids[:, sources] == crossing)[..., None], before, 0)
        after = _across(before, taps)
        if documents is not None:
            after = jnp.where((ids[:, targets] == crossing)[..., None], after, 0)
        nothing = jnp.zeros_like(after)
        if is_last:
            after = jnp.concatenate([nothing[:, :1], after], axis=1)
        else:
            after = jnp.stack([nothing, after], axis=2)
        y, half = y + after.reshape(x.shape[0], -1, x.shape[2])[:, :length], 2 * half
    return y


def _wide(*arrays):
    """In the widest of their types and float32."""
    dtype = jnp.result_type(jnp.float32, *arrays)
    return tuple(x.astype(dtype) for x in arrays)


def _across(x: Float[Array, "B G C D"], taps: Float[Array, "W D"]) -> Float[Array, "B G C D"]:
    """What C tokens contribute to the C tokens that follow them."""
    size = x.shape[2]
    taps = jnp.pad(taps[: 2 * size], [(0, max(0, 2 * size - taps.shape[0])), (0, 0)])
    if size <= DENSE_SIZE:
        lags = size + np.arange(size)[:, None] - np.arange(size)
        return jnp.einsum("bgsd,tsd->bgtd", x, taps[lags], precision="highest")
    # What wraps around in transforms of 2 C tokens falls on the first C, which are not wanted.
    spectrum = jnp.fft.rfft(x, 2 * size, axis=2) * jnp.fft.rfft(taps, axis=0)
    return jnp.fft.irfft(spectrum, 2 * size, axis=2)[:, :, size:]


def extend_long_conv(
    history: Float[Array, "B S D"], x: Float[Array, "B T D"], lengths: Int[Array, "B"], taps: Float[Array, "W D"]
) -> tuple[Float[Array, "B T D"], Float[Array, "B S D"]]:
    """`causal_long_conv` of T further tokens, of which row b has the first `lengths[b]`, and the last S of each row."""
    y = causal_long_conv(x, taps) + _from_past(history, taps, x.shape[1])
    return y, append(history, x, lengths)[1]


def _from_past(past: Float[Array, "B S D"], taps: Float[Array, "W D"], length: int) -> Float[Array, "B T D"]:
    """What S tokens contribute to the T = `length` tokens that follow them."""
    size = past.shape[1]
    past, taps = _wide(past, taps)
    taps = jnp.pad(taps[: size + length], [(0, max(0, size + length - taps.shape[0])), (0, 0)])
    if length == 1:
        return jnp.einsum("bsd,sd->bd", past, taps[:0:-1], precision="highest")[:, None]
    transform = 2 ** math.ceil(math.log2(size + length))  # what wraps around falls on the past
    spectrum = jnp.fft.rfft(past, transform, axis=1) * jnp.fft.rfft(taps, transform, axis=0)
    return jnp.fft.irfft(spectrum, transform, axis=1)[:, size : size + length]


def check_filter_length(length: int, filter_length: int) -> None:
    """Raises ValueError for more tokens than the filter has taps."""
    if length > filter_length:
        raise ValueError(f"{length} tokens are more than the filter's {filter_length} taps; raise filter_length")


def long_conv(
    x: Float[Array, "B T D"],
    make_taps: Callable[[int], Float[Array, "W D"]],
    filter_length: int,
    *,
    segment_ids: Int[Array, "B T"] | None = None,
    history: Float[Array, "B S D"] | None = None,
    seen: Int[Array, "B"] | None = None,
    lengths: Int[Array, "B"] | None = None,
) -> tuple[Float[Array, "B T D"], Float[Array, "B S D"] | None]:
    """Convolution with all earlier inputs: of whole sequences, or of T tokens that follow what `history` remembers.

    Args:
      make_taps: the first taps of the filter, given their number.
      filter_length: taps it has, the longest sequence.
      history: the last S inputs of every row, 0 before its first, or None.
      seen: tokens before these, with a history; lengths: how many of the T tokens are there.

    Returns:
      y, NaN in rows of more than S tokens, and the new history.

    Raises:
      ValueError: for more tokens than taps.
    """
    length = x.shape[1]
    check_filter_length(length, filter_length)
    if history is None:
        return causal_long_conv(x, make_taps(length), segment_ids), None
    size = history.shape[1]
    y, history = extend_long_conv(history, x, lengths, make_taps(min(filter_length, size + length)))
    has_outgrown = seen + lengths > size
    return jnp.where(has_outgrown[:, None, None], jnp.nan, y), history


def time_features(num_taps: int, filter_length: int, num_features: int) -> np.ndarray:
    """Of the first `num_taps` of L = `filter_length` taps: time i / (L - 1), then cosines and minus sines.

    The F = (num_features - 1) / 2 frequencies are evenly spaced from 1e-4 to F - 1 turns per filter.
    """
    bands = (num_features - 1) // 2
    index = np.arange(num_taps)[:, None]
    angles = 2 * np.pi * index / filter_length * np.linspace(1e-4, bands - 1, bands)
    return np.concatenate([index / max(1, filter_length - 1), np.cos(angles), -np.sin(angles)], axis=1)


def decay_rates(features: int, fast: float = 0.3, slow: float = 1.5, target: float = 1e-2) -> np.ndarray:
    """Rates of exp(-rate * time) that reach `target` between `slow` (first channel) and `fast` filter lengths."""
    return np.linspace(-math.log(target) / slow, -math.log(target) / fast, features)


class ImplicitFilter(nn.Module):
    """Taps [num_taps, D] = MLP(time_features) of a filter of `filter_length` taps, newest first, times a decay.

    The first taps are the same however many are asked for.

    Args:
      features: channels D.
      filter_length: taps of the whole filter; time is measured in it.
      width: of the hidden layers; num_hidden: their number.
      activation: "sine" (of the values times a learned frequency per unit, which all layers share, 1 at first), "relu".
      use_decay: multiplies channel d by exp(-decay_rates[d] * time), which is not learned.
      use_bias: of the last layer.
      num_features: of the time features, odd.

    Source: Poli et al., "Hyena Hierarchy", section 3.3. The time features are constants here; the published code trains
    them at a small rate.
    """

    features: int
    filter_length: int
    width: int = 64
    num_hidden: int = 3
    activation: str = "sine"
    use_decay: bool = True
    use_bias: bool = False
    num_features: int = 3

    def __post_init__(self):
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation={self.activation!r} is unknown; choose from {ACTIVATIONS}")
        if self.num_features < 3 or self.num_features % 2 == 0:
            raise ValueError(f"num_features={self.num_features} must be odd and at least 3: time, cosines, sines")
        super().__post_init__()

    @nn.compact
    def __call__(self, num_taps: int) -> Float[Array, "W D"]:
        # Not the 0.02 of the other projections: the taps would start as products of `num_hidden` small numbers.
        init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
        dense = lambda features, name, use_bias: nn.Dense(
            features, use_bias=use_bias, kernel_init=init, precision="highest", name=name
        )
        time = jnp.asarray(time_features(num_taps, self.filter_length, self.num_features))
        x = time
        if self.activation == "sine":
            frequency = self.param("frequency", nn.initializers.ones, (self.width,))
        for i in range(self.num_hidden):
            x = dense(self.width, f"hidden_{i}", True)(x)
            x = jnp.sin(frequency * x) if self.activation == "sine" else jax.nn.relu(x)
        taps = dense(self.features, "out", self.use_bias)(x)
        if self.use_decay:
            taps *= jnp.exp(-time[:, :1] * decay_rates(self.features).astype(time.dtype))
        return taps
