"""Bits per byte of two models without a neural network: gzip and an order-3 byte model.

They say what a language model's bits per byte are worth on the same text. The byte model
does not adapt to the text it predicts. gzip learns from its input alone, so it is given no
training text.
"""

import dataclasses
import gzip

import numpy as np
from jaxtyping import Float64, Int64, UInt32

_MAX_ORDER = 3


def gzip_bits_per_byte(data: bytes) -> float:
    """Returns 8 * (size of gzip level 9) / (size of `data`).

    Args:
      data: At least one byte.

    Returns:
      Compressed bits per byte, including the header of 18 bytes.

    Raises:
      ValueError: `data` is empty.
    """
    if not data:
        raise ValueError("data has 0 bytes; bits per byte need at least 1")
    # A fixed time stamp keeps the result the same on every call.
    return 8 * len(gzip.compress(data, compresslevel=9, mtime=0)) / len(data)


def order3_bits_per_byte(train: bytes, heldout: bytes) -> float:
    """Returns the mean of -log2 p of the held-out bytes under `Order3Model.fit(train)`.

    Args:
      train: Bytes that are counted, at least one.
      heldout: Bytes that are predicted, at least one; they are not counted.

    Returns:
      Bits per byte.

    Raises:
      ValueError: An argument is empty.
    """
    if not heldout:
        raise ValueError("heldout has 0 bytes; bits per byte need at least 1")
    return float(-Order3Model.fit(train).log2_prob(heldout).mean())


@dataclasses.dataclass(frozen=True, eq=False)
class _Counts:
    """How often each (context, byte) and each context occurred, as sorted tables.

    A context of k bytes is the integer of these bytes, first byte most significant; a pair
    is `context << 8 | byte`, which fits 32 bits for k <= 3.
    """

    pairs: UInt32[np.ndarray, "p"]
    pair_counts: Int64[np.ndarray, "p"]
    contexts: UInt32[np.ndarray, "c"]
    context_counts: Int64[np.ndarray, "c"]
    num_successors: Int64[np.ndarray, "c"]


class Order3Model:
    """Interpolated byte counts of orders 3, 2, 1, 0 and the uniform distribution.

    With n(h, b) the count of byte b after context h, n(h) its sum over b, t(h) the number
    of distinct bytes seen after h, and h' the context h without its first byte,

      p(b | h) = (n(h, b) + t(h) p(b | h')) / (n(h) + t(h)),

    and p(b | h) = p(b | h') for a context that was never seen. The recursion ends below
    order 0 with p = 1/256.

    Source: Witten and Bell 1991, method C, in the interpolated form.
    """

    def __init__(self, counts: tuple[_Counts, ...]):
        """Takes the tables of orders 0, 1, 2, 3; use `fit` to make them."""
        self._counts = counts

    @classmethod
    def fit(cls, train: bytes) -> "Order3Model":
        """Counts `train`; about 2 s and 0.2 GB for 11 MB.

        Args:
          train: At least one byte.

        Returns:
          The model.

        Raises:
          ValueError: `train` is empty.
        """
        if not train:
            raise ValueError("train has 0 bytes; give at least 1")
        packed = _pack(np.frombuffer(train, np.uint8))
        # The first k bytes have no context of k bytes, so order k starts at byte k.
        return cls(tuple(_count(packed[order:], order) for order in range(_MAX_ORDER + 1)))

    def log2_prob(self, data: bytes, context: bytes = b"") -> Float64[np.ndarray, "n"]:
        """Returns log2 p of each byte of `data` given the three before it.

        Args:
          data: Bytes to predict, n of them.
          context: Bytes before `data`. Where fewer than three bytes come before a byte,
            the model starts at the longest order available.

        Returns:
          Values <= 0 in bits, float64 [n].
        """
        context = context[-_MAX_ORDER:]
        packed = _pack(np.frombuffer(context + data, np.uint8))[len(context) :]
        probability = np.full(len(data), 1 / 256)
        for order, counts in enumerate(self._counts):
            start = max(order - len(context), 0)
            keys = _low_bytes(packed[start:], order + 1)
            probability[start:] = _interpolate(counts, keys, probability[start:])
        return np.log2(probability)


def _pack(data: np.ndarray) -> UInt32[np.ndarray, "n"]:
    """Returns each byte with the three before it in one integer, zeros before the start."""
    wide = data.astype(np.uint32)
    packed = wide.copy()
    for distance in range(1, _MAX_ORDER + 1):
        packed[distance:] |= wide[: len(wide) - distance] << np.uint32(8 * distance)
    return packed


def _low_bytes(packed: UInt32[np.ndarray, "n"], num_bytes: int) -> UInt32[np.ndarray, "n"]:
    return packed & np.uint32(2 ** (8 * num_bytes) - 1)


def _count(packed: UInt32[np.ndarray, "n"], order: int) -> _Counts:
    pairs, pair_counts = np.unique(_low_bytes(packed, order + 1), return_counts=True)
    # Pairs are sorted, so those of one context are neighbours.
    contexts, starts, num_successors = np.unique(pairs >> np.uint32(8), return_index=True, return_counts=True)
    # `reduceat` refuses an empty table, which a text shorter than the order gives.
    sums = np.add.reduceat(pair_counts, starts) if len(pairs) else pair_counts
    return _Counts(pairs, pair_counts.astype(np.int64), contexts, sums.astype(np.int64), num_successors)


def _interpolate(
    counts: _Counts, keys: UInt32[np.ndarray, "n"], lower: Float64[np.ndarray, "n"]
) -> Float64[np.ndarray, "n"]:
    """Returns p at one order from `lower`, p at the order below."""
    pair_count = _lookup(counts.pairs, counts.pair_counts, keys)
    contexts = keys >> np.uint32(8)
    total = _lookup(counts.contexts, counts.context_counts, contexts)
    successors = _lookup(counts.contexts, counts.num_successors, contexts)
    # An unseen context has 0 / 0 here; dividing by 1 instead is masked below.
    denominator = np.maximum(total + successors, 1)
    return np.where(total > 0, (pair_count + successors * lower) / denominator, lower)


def _lookup(
    table: UInt32[np.ndarray, "p"], values: Int64[np.ndarray, "p"], keys: UInt32[np.ndarray, "n"]
) -> Int64[np.ndarray, "n"]:
    """Returns the value at each key of a sorted table, 0 where the key is absent."""
    if len(table) == 0:
        return np.zeros(len(keys), np.int64)
    place = np.minimum(np.searchsorted(table, keys), len(table) - 1)
    return np.where(table[place] == keys, values[place], 0)
