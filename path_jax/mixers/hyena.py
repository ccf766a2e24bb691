"""Hyena of order 2: a convolution over the whole sequence, with a generated filter, between two gates."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from path_jax.mixers.state import RecurrentState, init_recurrent_state, lengths_of
from path_jax.nn.layers import ShortConv, append, linear
from path_jax.nn.long_conv import ImplicitFilter, check_filter_length, long_conv
from path_jax.nn.taps import Tap


class Hyena(nn.Module):
    """A long convolution between two gates.

        k, v, q = short_conv(in_proj x),  y = o_proj(q * (filter conv (k v) + skip * k v))

    The filter is a function of the lag alone. A step reads all earlier inputs k v, so the state holds them; rows that
    outgrow it give NaN. Every call with a state generates the filter anew.

    Args:
      filter_length: taps of the filter, the longest sequence; its shape is stretched over them.
      filter_width: of the network that generates it.
      conv_size: tokens of the short convolution on k, v and q.
      dtype: compute dtype, the input's by default; filter and long convolution are computed in float32.

    Source: Poli et al., "Hyena Hierarchy", section 3. One filter per channel; no bidirectional form.
    """

    filter_length: int = 2048
    filter_width: int = 64
    conv_size: int = 3
    dtype: jnp.dtype | None = None

    def __post_init__(self):
        if self.conv_size < 1:
            raise ValueError(f"conv_size={self.conv_size} must be at least 1")
        super().__post_init__()

    def init_state(self, batch: int, max_length: int, embed_dim: int, **cache_options) -> RecurrentState:
        """State for rows of up to `max_length` tokens; `cache_options` go to `init_recurrent_state`.

        Raises:
          ValueError: for rows longer than the filter.
        """
        check_filter_length(max_length, self.filter_length)
        return init_recurrent_state(
            batch,
            histories={"in": (self.conv_size - 1, 3 * embed_dim), "kv": (max_length, embed_dim)},
            memories={},
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
        del positions  # the filter knows distances
        lengths = lengths_of(x, cache, segment_ids, lengths)
        dtype = x.dtype if self.dtype is None else self.dtype
        (_, length, embed_dim), history = x.shape, {}
        inputs = linear(3 * embed_dim, "in_proj", dtype=dtype, use_bias=True)(x)
        if cache is not None:
            inputs, history["in"] = append(cache.history["in"], inputs, lengths)
        conv = ShortConv(self.conv_size, use_bias=True, use_silu=False, name="short_conv")
        k, q, v = jnp.split(conv(inputs, segment_ids)[:, -length:].astype(dtype), 3, axis=-1)
        q, k, v = Tap(name="q")(q), Tap(name="k")(k), Tap(name="v")(v)

        kv = k * v
        make_taps = ImplicitFilter(embed_dim, self.filter_length, width=self.filter_width, name="filter")
        past = {} if cache is None else dict(history=cache.history["kv"], seen=cache.length, lengths=lengths)
        y, past = long_conv(kv, make_taps, self.filter_length, segment_ids=segment_ids, **past)
        y += self.param("skip", nn.initializers.normal(1), (embed_dim,)) * kv
        y = q * Tap(name="conv_out")(y).astype(dtype)
        if cache is not None:
            cache = RecurrentState(cache.length + lengths, history | {"kv": past}, {})
        return linear(embed_dim, "o_proj", dtype=dtype, use_bias=True)(y), cache
