"""Several corpora as one: rows of each in exact proportions, in one order for every number of processes."""

import fractions
import math
from collections.abc import Mapping, Sequence
from typing import SupportsIndex

import grain
import numpy as np

from path_jax.data.packing import Row, checked_index
from path_jax.data.prepared import PreparedRange
from path_jax.data.text import Document

Side = Sequence[Document] | PreparedRange
_NUM_ROWS = 2**40  # more than anyone trains on


def checked_weights(weights: Mapping[str, float]) -> tuple[int, ...]:
    """Whole numbers in the exact ratio of the weights, in the order given.

    Raises:
      ValueError: A weight is not a positive number.
    """
    for name, weight in weights.items():
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight < math.inf:
            raise ValueError(f"data.parts.{name}.weight is {weight!r}; it must be a positive number")
    exact = [fractions.Fraction(str(weight)) for weight in weights.values()]
    common = math.lcm(*(weight.denominator for weight in exact))
    counts = [int(weight * common) for weight in exact]
    return tuple(count // math.gcd(*counts) for count in counts)


def chosen_part(weights: Sequence[int], number: int) -> tuple[int, int]:
    """Which part row `number` of a mixture is of, and its number among the rows of that part.

    Of the first n rows, the first part has n less floor(n (W - w) / W), where w is its weight and W the sum; the rows
    that are left are divided among the other parts in the same way. So the rows of a part are spread evenly, and no
    table is needed to find one.
    """
    total = sum(weights)
    for part, weight in enumerate(weights):
        before, after = (n * (total - weight) // total for n in (number, number + 1))
        if before == after:
            return part, number - before
        number, total = before, total - weight
    raise ValueError(f"weights {weights} are not positive")


class MixedRows:
    """Rows of several sources, endless. Each part visits all its rows, in a new order each time, before any again."""

    def __init__(self, sources: Sequence[Sequence[Row]], weights: Sequence[int], seed: int):
        """Mixes sources of rows.

        Args:
          sources: Rows of each part, by index.
          weights: Their shares, positive integers.
          seed: Of the orders, in [0, 2**32); each part has an order of its own.
        """
        self._weights = tuple(weights)
        self._orders = [
            grain.MapDataset.source(rows).seed((seed + number) % 2**32).shuffle().repeat()
            for number, rows in enumerate(sources)
        ]

    def __len__(self) -> int:
        return _NUM_ROWS

    def __getitem__(self, index: SupportsIndex) -> Row:
        """Row `index` in [0, len)."""
        part, number = chosen_part(self._weights, checked_index(index, _NUM_ROWS))
        return self._orders[part][number]


class Mixture(Sequence[Document]):
    """The documents of several parts, one part after the other; their names begin with that of the part.

    Attributes:
      parts: {name: documents}; weights: shares of the rows of training, integers in the same order.
    """

    def __init__(self, parts: Mapping[str, Side], weights: Sequence[int]):
        self.parts, self.weights = dict(parts), tuple(weights)

    def __len__(self) -> int:
        return sum(map(len, self.parts.values()))

    def __getitem__(self, index: SupportsIndex) -> Document:
        number = checked_index(index, len(self))
        for name, documents in self.parts.items():
            if number < len(documents):
                document = documents[number]
                return Document(f"{name}/{document.name}", document.tokens)
            number -= len(documents)
        raise IndexError(index)

    def in_proportion(self) -> "Mixture":
        """The beginnings of the parts, as long as they can be with their tokens in the ratio of the weights."""
        sizes = [_num_tokens(documents) for documents in self.parts.values()]
        unit = min(size / weight for size, weight in zip(sizes, self.weights))
        lengths = [max(2, int(unit * weight)) for weight in self.weights]
        return Mixture(
            {name: _beginning(part, length) for (name, part), length in zip(self.parts.items(), lengths)}, self.weights
        )


def _num_tokens(documents: Side) -> int:
    if isinstance(documents, PreparedRange):
        return documents.stop - documents.start
    return sum(len(document.tokens) for document in documents)


def _beginning(documents: Side, num_tokens: int) -> Side:
    """The first so many tokens; the last document may be cut."""
    if isinstance(documents, PreparedRange):
        stop = min(documents.start + num_tokens, documents.stop)
        return PreparedRange(documents.stream, documents.start, stop)
    ends = np.cumsum([len(document.tokens) for document in documents])
    last = int(np.searchsorted(ends, num_tokens))
    if last >= len(documents):
        return documents
    whole = documents[last]
    tokens = whole.tokens[: len(whole.tokens) - int(ends[last]) + num_tokens]
    return (*documents[:last], Document(whole.name, tokens))
