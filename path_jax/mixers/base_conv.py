"""BaseConv: a gated convolution, the smallest model of the family of H3 and Hyena."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from path_jax.mixers.state import RecurrentState, init_recurrent_state, lengths_of
from path_jax.nn.layers import ShortConv, append, linear
from path_jax.nn.long_conv import ImplicitFilter, check_filter_length, long_conv
from path_jax.nn.taps import Tap

FILTERS = ("short", "implicit", "explicit")


class BaseConv(nn.Module):
    """One gated convolution: y = gate_proj(x) * (conv(x) + bias) + skip * x.

    Args:
      filter: "short" (kernel_size taps), or one of two long ones of `filter_length` taps: "implicit" (a small network
        of the lag) and "explicit" (every tap is a parameter). A long convolution adds its input to its output; its
        state holds all inputs, and rows that outgrow it give NaN.
      kernel_size: taps of the short filter.
      filter_length: of the long filters, the longest sequence.
      filter_width: of the network that generates the implicit filter.
      skip: adds x to the output, as the published code does; the paper's layer has no such term.
      dtype: compute dtype, the input's by default; long convolutions are computed in float32.

    Source: Arora et al., "Zoology", section 4. The implicit filter is that of the published code since 2024, a ReLU
    network of the time features without decay; the bias of the long convolutions, 0 at first, is the paper's; explicit
    taps start 1 / sqrt(filter_length) as large as published, so that sums over long sequences do too.
    """

    filter: str = "short"
    kernel_size: int = 3
    filter_length: int = 2048
    filter_width: int = 16
    skip: bool = True
    dtype: jnp.dtype | None = None

    def __post_init__(self):
        if self.filter not in FILTERS:
            raise ValueError(f"filter={self.filter!r} is unknown; choose from {FILTERS}")
        if self.kernel_size < 1:
            raise ValueError(f"kernel_size={self.kernel_size} must be at least 1")
        super().__post_init__()

    def init_state(self, batch: int, max_length: int, embed_dim: int, **cache_options) -> RecurrentState:
        """State for rows of up to `max_length` tokens; `cache_options` go to `init_recurrent_state`.

        Raises:
          ValueError: for rows longer than a long filter.
        """
        if self.filter != "short":
            check_filter_length(max_length, self.filter_length)
        size = self.kernel_size - 1 if self.filter == "short" else max_length
        return init_recurrent_state(
            batch, histories={"x": (size, embed_dim)}, memories={}, **{"dtype": self.dtype} | cache_options
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
        del positions  # the filter knows distances
        lengths = lengths_of(x, cache, segment_ids, lengths)
        dtype = x.dtype if self.dtype is None else self.dtype
        x = x.astype(dtype)
        (_, length, embed_dim), history = x.shape, None if cache is None else cache.history["x"]
        if self.filter == "short":
            inputs = x
            if cache is not None:
                inputs, history = append(history, x, lengths)
            conv = ShortConv(self.kernel_size, use_bias=True, use_silu=False, name="conv")
            y = conv(inputs, segment_ids)[:, -length:]
        else:
            seen = None if cache is None else cache.length
            y, history = long_conv(
                x, self._make_taps(embed_dim), self.filter_length,
                segment_ids=segment_ids, history=history, seen=seen, lengths=lengths,
            )  # fmt: skip
            y += x + self.param("conv_bias", nn.initializers.zeros, (embed_dim,))
        y = Tap(name="conv_out")(y).astype(dtype)
        y *= Tap(name="gate")(linear(embed_dim, "gate_proj", dtype=dtype, use_bias=True)(x))
        if cache is not None:
            cache = RecurrentState(cache.length + lengths, {"x": history}, {})
        return y + x if self.skip else y, cache

    def _make_taps(self, embed_dim):
        if self.filter == "implicit":
            return ImplicitFilter(
                embed_dim, self.filter_length, width=self.filter_width, num_hidden=1,
                activation="relu", use_decay=False, use_bias=True, name="filter",
            )  # fmt: skip
        init = nn.initializers.normal(self.filter_length**-0.5)
        taps = self.param("filter_taps", init, (self.filter_length, embed_dim))
        return lambda num_taps: taps[:num_taps]
