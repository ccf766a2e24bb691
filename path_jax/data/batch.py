"""The one batch type that training and evaluation consume.

A batch is decoder-only and dense. Encoder-decoder pairs and images are not covered.
"""

from typing import Any, NamedTuple

from jaxtyping import Float32, Int32


class Batch(NamedTuple):
    """Packed next-token rows; a pytree of NumPy or JAX arrays.

    The loss of a batch is `sum(weights * nll(targets | tokens)) / sum(weights)`, where a
    position sees only earlier positions of its own segment.

    Attributes:
      tokens: Input ids in [0, vocab); int32 [B, T]. Padding holds 0.
      targets: The id that follows each input; int32 [B, T]. Padding holds 0.
      weights: 1 where the target counts, 0 for padding and where the next token belongs
        to another document; float32 [B, T].
      segment_ids: 1, 2, ... for each document piece of a row, 0 for padding; int32 [B, T].
      positions: Position inside the segment, from 0; int32 [B, T]. Padding holds 0.
    """

    tokens: Int32[Any, "B T"]
    targets: Int32[Any, "B T"]
    weights: Float32[Any, "B T"]
    segment_ids: Int32[Any, "B T"]
    positions: Int32[Any, "B T"]
