"""Documents that end with a question about them: `BOS text EOS query [type] answer EOS`.

A row is a document without its last token, so that the answer is in the input too, after the place that predicts it.
Ids are 0 PAD (never written: rows are padded with -1), 1 BOS, 2 EOS, then the items.

Source: Arora et al., "Mechanistic evaluation of Transformers and state space models", 2025, and its code.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, Int32

from path_jax.data.draws import Draws
from path_jax.data.examples import Examples

PAD, BOS, EOS, FIRST_ITEM = range(4)
SPLITS = "train", "dev", "test"
REPLACEABLE = "key", "value", "query", "answer"
# An example owns the series Draws(purpose, number), its number a draw of Draws(seed, index). Purposes 0 ... MAX_TRIES
# - 1 are tries, MAX_TRIES what does not change from try to try, those after it replacements.
MAX_TRIES = 10_000


class Documents(NamedTuple):
    """Documents by their parts.

    Attributes:
      text: ids between BOS and EOS, -1 after their end; int32 [n, S].
      size: number of these ids; int64 [n].
      key: place in the text of the item that the query repeats; value: of the answer; int64 [n].
      distance: at least 1, whatever the task counts; int64 [n]. Its binary logarithm, rounded down, is the level.
      kind: id that says what is asked about the query; int64 [n], or None where there is one kind of question.
    """

    text: Int32[np.ndarray, "n S"]
    size: Int[np.ndarray, "n"]
    key: Int[np.ndarray, "n"]
    value: Int[np.ndarray, "n"]
    distance: Int[np.ndarray, "n"]
    kind: Int[np.ndarray, "n"] | None = None

    def sites(self) -> dict[str, Int32[np.ndarray, "n"]]:
        """See `QueryTask.sites`."""
        places = {"key": 1 + self.key, "value": 1 + self.value, "divider": 1 + self.size, "query": 2 + self.size}
        if self.kind is not None:
            places["type"] = 3 + self.size
        places["answer"] = 3 + (self.kind is not None) + self.size
        return {name: place.astype(np.int32) for name, place in places.items()}


@dataclasses.dataclass(frozen=True)
class QueryTask:
    """One question per row. A subclass has `documents`, `item_kinds`, `vocab_size`, `levels` and `longer`.

    Questions are for pairs of a key and a value. Pairs can be withheld from training: questions of the splits "train"
    and "dev" are for other pairs, those of "test" for these only; texts may hold both.

    Args:
      length: T.
      mask_nonquery: scores the answers only; else every token but BOS, most of which cannot be known.
      train_test_split: chance of a pair to be withheld, in [0, 1); 0 makes the splits alike. Every pair has a draw of
        its own, made of `split_seed` and the pair, so that no table of pairs is needed.
      split: "train", "dev" or "test"; `TaskStream` makes "train" and "dev" from different seeds.
      split_seed: chooses the withheld pairs.
      train_set_size: number of examples after which a series repeats, 0: it does not. The paper trains on 100,032
        documents again and again (`prepare_train_set` in the code).
    """

    length: int = 256
    mask_nonquery: bool = True
    train_test_split: float = 0.0
    split: str = "train"
    split_seed: int = 0
    train_set_size: int = 0

    def __post_init__(self):
        if not 0 <= self.train_test_split < 1:
            raise ValueError(f"train_test_split={self.train_test_split} must be in [0, 1)")
        if self.split not in SPLITS:
            raise ValueError(f"split={self.split!r} is not one of {', '.join(SPLITS)}")
        if self.split_seed < 0 or self.train_set_size < 0:
            raise ValueError(
                f"split_seed={self.split_seed} and train_set_size={self.train_set_size} must not be negative"
            )

    @property
    def item_kinds(self) -> tuple[tuple[int, int], ...]:
        """First id and number of items of each kind; kinds follow each other."""
        raise NotImplementedError

    @property
    def asks_for_withheld(self) -> bool:
        """Whether questions are for withheld pairs only, else for none of them."""
        return self.split == "test"

    def documents(self, seed: int, index: np.ndarray) -> Documents:
        """The documents with the numbers `index` [n] of the series `seed`; texts leave room for the question in T."""
        raise NotImplementedError

    def longer(self) -> dict[str, "QueryTask"]:
        """Variants with longer texts, by name."""
        raise NotImplementedError

    def series(self, seed: int, index: np.ndarray) -> Int[np.ndarray, "n"]:
        """The number of each example's own series of draws."""
        index = np.asarray(index)
        return Draws(seed, index % self.train_set_size if self.train_set_size else index).integers(2**53)

    def examples(self, seed: int, index: np.ndarray) -> Examples:
        """See `Task`. The token that follows the row, EOS, is a target too."""
        documents = self.documents(seed, index)
        places = documents.sites()
        rows, text = np.arange(len(documents.text)), documents.text
        tokens = np.full((len(rows), self.length + 1), -1, np.int32)
        tokens[:, 0] = BOS
        tokens[:, 1 : 1 + text.shape[1]] = text
        tokens[rows, places["divider"]] = EOS
        tokens[rows, places["query"]] = text[rows, documents.key]
        if documents.kind is not None:
            tokens[rows, places["type"]] = documents.kind
        tokens[rows, places["answer"]] = text[rows, documents.value]
        tokens[rows, places["answer"] + 1] = EOS
        targets = np.maximum(tokens[:, 1:], PAD)
        tokens[rows, places["answer"] + 1] = -1
        tokens = np.ascontiguousarray(tokens[:, :-1])
        is_asked = np.arange(self.length, dtype=np.int32) == places["answer"][:, None] - 1
        is_scored = is_asked if self.mask_nonquery else tokens >= 0
        level = np.zeros_like(tokens)
        level[rows, places["answer"] - 1] = np.log2(documents.distance)
        return Examples(tokens, targets, is_scored.astype(np.float32), level)

    def sites(self, seed: int, index: np.ndarray) -> dict[str, Int32[np.ndarray, "n"]]:
        """Places in the rows of `examples`, with the names of the published code in brackets.

        Returns:
          "key": what the query repeats, in the text (query_item_orig); "value": the answer, in the text
          (target_item_orig); "divider": the EOS after the text; "query" (query_item); "type" (query_type), where there
          are several kinds of questions; "answer" (target_item), which is predicted one place before, at "query" or
          "type". With questions for keys, "key" is the place of a value.
        """
        return self.documents(seed, index).sites()

    def replacements(
        self, tokens: Int[np.ndarray, "n T"], site: str, seed: int, index: np.ndarray, *, as_published: bool = False
    ) -> Int[np.ndarray, "n T"]:
        """Rows whose item at a site is another one of the same kind, at random.

        It is one that the row does not hold, or, where the row holds the whole kind, any other one.

        Args:
          tokens: of the examples with these numbers.
          site: "key", "value", "query" or "answer"; seed, index: as in `examples`. Sites have draws of their own.
          as_published: draws from the query's kind whatever the site's is, as the published code does, and does not
            look at the rest of the row. So values become keys, but never the last key, and with questions for keys,
            keys become values, but never the first.

        Raises:
          ValueError: for another site, or a kind with a single item.
        """
        if site not in REPLACEABLE:
            raise ValueError(f"{site=} is not one of {', '.join(REPLACEABLE)}")
        if min(count for _, count in self.item_kinds) < 2:
            raise ValueError("a kind with a single item has no other to replace it")
        places, rows = self.sites(seed, index), np.arange(len(tokens))
        firsts, counts = np.array(self.item_kinds).T
        old, tokens = tokens[rows, places[site]], tokens.copy()
        kind = np.searchsorted(firsts, tokens[rows, places["query"]] if as_published else old, side="right") - 1
        first, count = firsts[kind], counts[kind]
        chance = Draws(MAX_TRIES + 1 + REPLACEABLE.index(site), self.series(seed, index)).uniform()
        other = first + (chance * (count - 1)).astype(np.int64)
        other += other >= old
        if not as_published:
            # The r-th missing item is r + the held items at or before it, and the i-th held item is before it if it is
            # at most r + i.
            item = tokens - first[:, None]
            item = np.sort(np.where((item >= 0) & (item < count[:, None]), item, -1), axis=1)
            is_held = (item >= 0) & (np.diff(item, axis=1, prepend=-1) > 0)
            free = count - is_held.sum(axis=1)
            missing = (chance * free).astype(np.int64)
            rank = np.cumsum(is_held, axis=1) - 1
            missing += (is_held & (item - rank <= missing[:, None])).sum(axis=1)
            other = np.where(free > 0, first + missing, other)
        tokens[rows, places[site]] = other
        return tokens

    def variants(self) -> dict[str, "QueryTask"]:
        """The settings themselves, longer texts and, where pairs are withheld, questions for these; answers only."""
        task = dataclasses.replace(self, mask_nonquery=True)
        variants = {"in_distribution": task, **task.longer()}
        if self.train_test_split:
            variants["withheld_pairs"] = dataclasses.replace(task, split="test")
        return variants

    def may_ask(self, first: Int[np.ndarray, "*m"], second: Int[np.ndarray, "*m"]) -> Bool[np.ndarray, "*m"]:
        """Whether the split has questions for these pairs of ids."""
        if not self.train_test_split:
            return np.ones(first.shape, bool)
        number = (first.astype(np.int64) + 1 << 32) + second
        is_withheld = Draws(self.split_seed, number.ravel()).uniform().reshape(first.shape) < self.train_test_split
        return is_withheld == self.asks_for_withheld

    def first_accepted(
        self,
        sample: Callable[[Draws, np.ndarray], tuple[np.ndarray, ...]],
        seed: int,
        index: np.ndarray,
        num_tries: int = MAX_TRIES,
    ) -> list[np.ndarray]:
        """Draws documents, and those that are not accepted again.

        Args:
          sample: given draws for m examples and which of the n they are, returns whether each is accepted, bool [m],
            and arrays [m] and [m, S], where S may be another one each time.

        Returns:
          The arrays of all examples, [n] and [n, greatest S]; -1 behind shorter ones.

        Raises:
          ValueError: when an example is not accepted in so many tries.
        """
        series = self.series(seed, index)
        pending, wholes = np.arange(len(series)), None
        for attempt in range(num_tries):
            is_accepted, *parts = sample(Draws(attempt, series[pending]), pending)
            accepted, parts = pending[is_accepted], [part[is_accepted] for part in parts]
            wholes = [_with_rows(*pair, accepted, len(series)) for pair in zip(wholes or [None] * len(parts), parts)]
            pending = pending[~is_accepted]
            if not len(pending):
                return wholes
        raise ValueError(
            f"example {np.asarray(index)[pending[0]]} has no pair to ask for in {num_tries} tries: "
            f"split={self.split!r}, train_test_split={self.train_test_split}"
        )


def _with_rows(whole, part, rows, num_rows):
    """`whole` with these rows, made or widened where needed."""
    if whole is None:
        whole = np.full((num_rows, *part.shape[1:]), -1, part.dtype)
    if part.ndim == 1:
        whole[rows] = part
        return whole
    if (missing := part.shape[1] - whole.shape[1]) > 0:
        whole = np.pad(whole, ((0, 0), (0, missing)), constant_values=-1)
    whole[rows, : part.shape[1]] = part
    return whole


def one_of(mask: Bool[np.ndarray, "n S"], chance: Float[np.ndarray, "n"]) -> Int[np.ndarray, "n"]:
    """A true place of each row, all equally likely if `chance` is uniform in [0, 1); 0 where there is none."""
    number = (chance * mask.sum(axis=1)).astype(np.int32)
    return (np.cumsum(mask, axis=1, dtype=np.int32) > number[:, None]).argmax(axis=1)
