"""Documents packed into fixed-length rows, as random-access sources.

A row is a function of its index alone, so a run can resume anywhere and every process
sees the same rows. Lengths must be known, hence this is not for lazy sources; the loader
streams those.
"""

import operator
from collections.abc import Iterator, Sequence
from typing import SupportsIndex

import numpy as np
from jaxtyping import Bool, Int

from path_jax.data.text import Document

Row = dict[str, np.ndarray]


class PackedRows:
    """Cuts the concatenated documents into rows of T + 1 tokens with stride T.

    Row i holds the stream's tokens [i T, i T + T] as T inputs and T targets, so every
    token but the first is a target of exactly one row. Targets that open a document have
    weight 0; all others have weight 1. A document cut by a row boundary continues as a
    new segment with positions from 0.

    Attributes:
      sequence_length: T.
    """

    def __init__(self, documents: Sequence[Document], sequence_length: int):
        """Measures the documents; their tokens are not copied.

        Args:
          documents: Documents in stream order.
          sequence_length: T, at least 1.

        Raises:
          ValueError: T < 1, or fewer than T + 1 tokens.
        """
        self._tokens, num_tokens = _checked_tokens(documents, sequence_length)
        self._ends = np.cumsum([len(tokens) for tokens in self._tokens])
        self._num_rows = num_concat_rows(num_tokens, sequence_length)
        self.sequence_length = sequence_length

    def __len__(self) -> int:
        return self._num_rows

    def __getitem__(self, index: SupportsIndex) -> Row:
        """Returns row `index` in [0, len): the fields of `Batch`, each [T].

        Raises:
          IndexError: `index` is out of range.
        """
        start = checked_index(index, self._num_rows) * self.sequence_length
        return concat_row(list(self._pieces(start, start + self.sequence_length + 1)), self.sequence_length)

    def _pieces(self, start: int, stop: int) -> Iterator[np.ndarray]:
        """Yields the non-empty parts of documents inside the stream's [start, stop)."""
        first = int(np.searchsorted(self._ends, start, side="right"))
        for number in range(first, len(self._tokens)):
            tokens = self._tokens[number]
            offset = int(self._ends[number]) - len(tokens)
            if offset >= stop:
                return
            piece = tokens[max(start - offset, 0) : stop - offset]
            if len(piece):
                yield piece


def num_concat_rows(num_tokens: int, sequence_length: int) -> int:
    """Number of rows of T + 1 tokens with stride T, the last of which may be shorter."""
    return -(-(num_tokens - 1) // sequence_length)


def concat_row(pieces: Sequence[np.ndarray], sequence_length: int) -> Row:
    """A row of the concat packing.

    Args:
      pieces: The parts of documents that its T + 1 tokens are made of, none empty; fewer tokens at the end of a stream.
      sequence_length: T.
    """
    stream = np.concatenate(pieces)
    segment_ids = np.repeat(np.arange(1, len(pieces) + 1), [len(p) for p in pieces])
    return _padded_row(stream[:-1], stream[1:], segment_ids[:-1], segment_ids[1:] == segment_ids[:-1], sequence_length)


def first_fit_rows(documents: Sequence[Document], sequence_length: int) -> "_FirstFitRows":
    """Packs whole documents into rows; only documents longer than a row are cut.

    A document of n tokens takes n - 1 places, one per predicted token. One of more than
    T + 1 tokens becomes pieces of T + 1 that share one token, so no target is lost. Each
    piece goes to the first row with room for it, in document order.

    Args:
      documents: Documents in packing order.
      sequence_length: T, at least 1.

    Returns:
      A source like `PackedRows`: `len`, and rows of arrays [T] by index.

    Raises:
      ValueError: T < 1, fewer than T + 1 tokens, or no document of two tokens.
    """
    return _FirstFitRows(documents, sequence_length)


class _FirstFitRows:
    """Rows as lists of `(document, start, stop)`, assigned once."""

    def __init__(self, documents: Sequence[Document], sequence_length: int):
        self._tokens, _ = _checked_tokens(documents, sequence_length)
        self.sequence_length = sequence_length
        pieces = [
            (number, start, min(start + sequence_length + 1, len(tokens)))
            for number, tokens in enumerate(self._tokens)
            for start in range(0, len(tokens) - 1, sequence_length)
        ]
        if not pieces:
            raise ValueError("no document has two tokens, so there is nothing to predict")
        sizes = [stop - start - 1 for _, start, stop in pieces]
        bins = _first_fit(sizes, sequence_length)
        self._rows: list[list[tuple[int, int, int]]] = [[] for _ in range(max(bins) + 1)]
        for piece, number in zip(pieces, bins, strict=True):
            self._rows[number].append(piece)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: SupportsIndex) -> Row:
        row = self._rows[checked_index(index, len(self._rows))]
        pieces = [self._tokens[number][start:stop] for number, start, stop in row]
        sizes = [len(piece) - 1 for piece in pieces]
        return _padded_row(
            np.concatenate([piece[:-1] for piece in pieces]),
            np.concatenate([piece[1:] for piece in pieces]),
            np.repeat(np.arange(1, len(pieces) + 1), sizes),
            np.ones(sum(sizes), bool),
            self.sequence_length,
        )


def _first_fit(sizes: Sequence[int], capacity: int) -> list[int]:
    """Returns for each size the lowest-numbered bin that still has room for it.

    A tree over the bins stores the largest room below each node, which makes a choice
    O(log n); scanning the bins would be quadratic in the number of documents.

    Args:
      sizes: Values in [1, capacity].
      capacity: Room of an empty bin.

    Returns:
      Bin numbers without gaps, from 0.
    """
    num_leaves = 1 << (len(sizes) - 1).bit_length()
    room = [capacity] * (2 * num_leaves)
    bins = []
    for size in sizes:
        node = 1
        while node < num_leaves:
            node = 2 * node if room[2 * node] >= size else 2 * node + 1
        bins.append(node - num_leaves)
        room[node] -= size
        while node > 1:
            node //= 2
            room[node] = max(room[2 * node], room[2 * node + 1])
    return bins


def _padded_row(
    tokens: Int[np.ndarray, "n"],
    targets: Int[np.ndarray, "n"],
    segment_ids: Int[np.ndarray, "n"],
    is_counted: Bool[np.ndarray, "n"],
    sequence_length: int,
) -> Row:
    """Returns the arrays padded with zeros to [T], and positions counted per segment."""
    arange = np.arange(len(tokens))
    is_start = np.diff(segment_ids, prepend=0) != 0
    starts = np.maximum.accumulate(np.where(is_start, arange, 0))

    def pad(values: np.ndarray, dtype: type) -> np.ndarray:
        padded = np.zeros(sequence_length, dtype)
        padded[: len(values)] = values
        return padded

    return {
        "tokens": pad(tokens, np.int32),
        "targets": pad(targets, np.int32),
        "weights": pad(is_counted, np.float32),
        "segment_ids": pad(segment_ids, np.int32),
        "positions": pad(arange - starts, np.int32),
    }


def _checked_tokens(documents: Sequence[Document], sequence_length: int) -> tuple[list[np.ndarray], int]:
    tokens = [document.tokens for document in documents]
    num_tokens = sum(map(len, tokens))
    check_size(num_tokens, sequence_length)
    return tokens, num_tokens


def check_size(num_tokens: int, sequence_length: int) -> None:
    """Raises ValueError for T < 1, or where there are fewer than T + 1 tokens."""
    if sequence_length < 1:
        raise ValueError(f"sequence_length is {sequence_length}; it must be at least 1")
    if num_tokens < sequence_length + 1:
        raise ValueError(
            f"corpus has {num_tokens} tokens, fewer than one sequence of {sequence_length + 1}; "
            "lower data.sequence_length or give more text"
        )


def checked_index(index: SupportsIndex, num_rows: int) -> int:
    """The index as an integer; raises IndexError outside of [0, num_rows)."""
    index = operator.index(index)
    if not 0 <= index < num_rows:
        raise IndexError(f"row {index} is outside [0, {num_rows})")
    return index
