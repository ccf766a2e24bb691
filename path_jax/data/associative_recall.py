"""Associative recall (AR): pairs of a key and a value, then one of the keys, and its value.

`MultiQueryRecall` in path_jax.data.recall asks for all keys of a row.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from path_jax.data.draws import Draws
from path_jax.data.query_document import FIRST_ITEM, MAX_TRIES, Documents, QueryTask, one_of

QUERY_TYPES = "key", "value"


@dataclasses.dataclass(frozen=True)
class AssociativeRecall(QueryTask):
    """AR: a row is `BOS k1 v1 ... kn vn EOS query answer`; n is uniform, keys are different, and so are values.

    The level of a question is the number of pairs from the one asked for to the end, 1 for the last, halved until it
    is 1: 0 for one, 1 for two or three ... Documents without a pair that the split may ask for are drawn again with
    the same n: n stays uniform, and all texts of n pairs that have such a pair are equally likely.

    Args:
      num_kv: key and value tokens together, even, half of them each.
      min_length, max_length: least and greatest number of tokens of the pairs; n is in [min_length // 2,
        max_length // 2]. The published `ar_32` has 32 tokens, that is 16 pairs, where the paper says 32 pairs.
      query_type: "key" asks for the value of a key, "value" for the key of a value.
      as_published: the published code's split: no split asks for withheld pairs, "test" neither, and a document with
        withheld pairs only is an error (here a ValueError that `examples` raises) and is not drawn again.
      length, mask_nonquery, train_test_split, split, split_seed, train_set_size: see `QueryTask`.

    Source: Arora et al., "Mechanistic evaluation of Transformers and state space models", 2025, and class AR of its
    code. The withheld pairs are not those of the code, which draws a table of all pairs.
    """

    num_kv: int = 8192
    min_length: int = 32
    max_length: int = 32
    query_type: str = "key"
    as_published: bool = False

    def __post_init__(self):
        super().__post_init__()
        if self.num_kv < 2 or self.num_kv % 2:
            raise ValueError(f"num_kv={self.num_kv} must be even and positive")
        if self.query_type not in QUERY_TYPES:
            raise ValueError(f"query_type={self.query_type!r} is not one of {', '.join(QUERY_TYPES)}")
        check_pairs(self, ("min_length", "max_length"), 2, self.num_kv // 2)

    @property
    def vocab_size(self) -> int:
        """PAD, BOS, EOS, keys, values, and one id that is never used, which the published code counts too."""
        return FIRST_ITEM + self.num_kv + 1

    @property
    def item_kinds(self) -> tuple[tuple[int, int], ...]:
        """Keys, values."""
        half = self.num_kv // 2
        return (FIRST_ITEM, half), (FIRST_ITEM + half, half)

    @property
    def levels(self) -> tuple[str, ...]:
        """Distances of a pair from the end of the text, in pairs."""
        return pair_levels(self.max_length // 2)

    @property
    def asks_for_withheld(self) -> bool:
        """See `QueryTask`."""
        return super().asks_for_withheld and not self.as_published

    def documents(self, seed: int, index: np.ndarray) -> Documents:
        """See `QueryTask`."""
        half = self.num_kv // 2

        def pairs(draws, count):
            keys, values = (draws.distinct(half, count) for _ in range(2))
            return FIRST_ITEM + keys, FIRST_ITEM + half + values

        bounds = self.min_length // 2, self.max_length // 2
        num_tries = 1 if self.as_published else MAX_TRIES
        documents = pair_documents(self, pairs, bounds, seed, index, num_tries)
        if self.query_type == "value":
            documents = documents._replace(key=documents.value, value=documents.key)
        return documents

    def longer(self) -> dict[str, "AssociativeRecall"]:
        """Twice the pairs, where there are as many keys."""
        if 2 * self.max_length > self.num_kv:
            return {}
        bounds = {"min_length": 2 * self.min_length, "max_length": 2 * self.max_length}
        return {"pairs_x2": dataclasses.replace(self, length=self.length + self.max_length, **bounds)}


def check_pairs(task: QueryTask, names: tuple[str, str], unit: int, most: int) -> None:
    """Checks the settings with these names, least and greatest number of pairs times `unit`.

    Raises:
      ValueError: where they are no range in [1, most], or T is too short for them.
    """
    least, greatest = (getattr(task, name) for name in names)
    stated = f"{names[0]}={least} and {names[1]}={greatest}"
    if not unit <= least <= greatest:
        raise ValueError(f"{stated} must be at least {unit} and in order")
    if greatest // unit > most:
        raise ValueError(f"{stated} must be at most {unit * most}, for {most} different keys")
    if task.length < (needed := 2 * (greatest // unit) + 4):
        raise ValueError(f"length={task.length} must be at least {needed} for {names[1]}={greatest}")


def pair_levels(most: int) -> tuple[str, ...]:
    """Levels of questions for one of up to `most` pairs."""
    return tuple(f"{2**i}-{2 ** (i + 1) - 1} back" for i in range(most.bit_length()))


def pair_documents(
    task: QueryTask,
    pairs: Callable[[Draws, int], tuple[np.ndarray, np.ndarray]],
    bounds: tuple[int, int],
    seed: int,
    index: np.ndarray,
    num_tries: int = MAX_TRIES,
) -> Documents:
    """Texts of pairs, one of which the task may ask for.

    Args:
      task: whose split it is.
      pairs: given draws for m examples and a number c, returns ids of different keys and of their values, [m, c] each,
        in random order.
      bounds: least and greatest number of pairs.
      seed, index: as in `QueryTask.documents`; num_tries: as in `QueryTask.first_accepted`.
    """
    least, most = bounds
    size = least + Draws(MAX_TRIES, task.series(seed, index)).integers(most - least + 1)

    def sample(draws, rows):
        keys, values = pairs(draws, most)
        may_ask = (np.arange(most) < size[rows, None]) & task.may_ask(keys, values)
        return may_ask.any(axis=1), keys, values, one_of(may_ask, draws.uniform())

    keys, values, asked = task.first_accepted(sample, seed, index, num_tries)
    text = np.stack([keys, values], axis=2).reshape(len(keys), 2 * most)
    text = np.where(np.arange(2 * most) < 2 * size[:, None], text, -1).astype(np.int32)
    return Documents(text, 2 * size, 2 * asked, 2 * asked + 1, size - asked)
