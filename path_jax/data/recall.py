"""Associative recall: pairs of a key and a value, and questions for the values of keys.

`RepeatedRecall` writes the same keys again and again and asks for the N-th last value at every one; `MultiQueryRecall`
writes each key once and asks later, if wanted after some keys are deleted or through several links.
"""

import dataclasses

import numpy as np

from path_jax.data.draws import Draws
from path_jax.data.examples import Examples, next_tokens


@dataclasses.dataclass(frozen=True)
class RepeatedRecall:
    """MQRAR-N-back: a row is `key value key value ...`; a key asks for the N-th last of the values it had before.

    With N = 2, `A 1 B 2 A 5 A 7 B 6 A 9` asks for 1 at the third A and for 5 at the fourth. Keys that were written less
    than N times are not scored. Keys and values are uniform draws. The level of a question is the number of pairs since
    the value was written, halved until it is 1: 0 for one, 1 for two or three, 2 for four to seven ...

    Args:
      length: T, even; the paper's is 768.
      num_keys: different keys per row, drawn from all key tokens; the paper's 32.
      num_key_tokens: key tokens; num_values: value tokens; half each of the 8192 in Tan et al.'s code.
      back: N, 1 to 4 in the paper, one model for each.

    Source: Yang et al., "PaTH Attention", 2025, section 4.1, after Tan et al., "Scaling stick-breaking attention",
    2024 (N = 1). Tan et al.'s code writes `num_keys` pairs and asks `num_keys` times, at the places of
    `MultiQueryRecall`, with random values between the questions; here all of a row is pairs, as in the paper's example.
    """

    length: int = 768
    num_keys: int = 32
    num_key_tokens: int = 4096
    num_values: int = 4096
    back: int = 1

    def __post_init__(self):
        if self.back < 1 or self.length % 2 or self.length < 2 * (self.back + 1):
            raise ValueError(f"length={self.length} must be even and at least 2 (N + 1), back={self.back} (N) positive")
        if not 1 <= self.num_keys <= self.num_key_tokens:
            raise ValueError(f"num_keys={self.num_keys} must be in [1, num_key_tokens={self.num_key_tokens}]")
        if self.num_values < 1:
            raise ValueError(f"num_values={self.num_values} must be positive")

    @property
    def vocab_size(self) -> int:
        """Keys, then values."""
        return self.num_key_tokens + self.num_values

    @property
    def levels(self) -> tuple[str, ...]:
        """Distances of a question from the value's writing, in pairs."""
        return tuple(f"{2**i}-{2 ** (i + 1) - 1} back" for i in range((self.length // 2 - 1).bit_length()))

    def examples(self, seed: int, index: np.ndarray) -> Examples:
        """See `Task`."""
        draws, count = Draws(seed, index), self.length // 2
        used = draws.distinct(self.num_key_tokens, self.num_keys)
        key = np.take_along_axis(used, draws.integers(self.num_keys, count), axis=1)
        value = self.num_key_tokens + draws.integers(self.num_values, count)
        # Sorted by key, and in the order of the row among equal keys, the N-th last writing is N places before.
        order = np.argsort(key, axis=1, kind="stable")
        by_key, written = np.take_along_axis(key, order, axis=1), np.full_like(order, -1)
        earlier = np.where(by_key[:, self.back :] == by_key[:, : -self.back], order[:, : -self.back], -1)
        np.put_along_axis(written, order[:, self.back :], earlier, axis=1)
        is_asked = written >= 0
        tokens = np.stack([key, value], axis=2).reshape(len(key), self.length).astype(np.int32)
        targets, level, weights = next_tokens(tokens), np.zeros_like(tokens), np.zeros(tokens.shape, np.float32)
        recalled = np.take_along_axis(value, np.maximum(written, 0), axis=1)
        targets[:, ::2] = np.where(is_asked, recalled, value)
        level[:, ::2] = np.where(is_asked, np.log2(np.arange(count) - written), 0)
        weights[:, ::2] = is_asked
        return Examples(tokens, targets, weights, level)

    def variants(self) -> dict[str, "RepeatedRecall"]:
        """The settings themselves, twice the length, and twice the keys where there are so many tokens."""
        variants = {"in_distribution": self, "length_x2": dataclasses.replace(self, length=2 * self.length)}
        if 2 * self.num_keys <= self.num_key_tokens:
            variants["keys_x2"] = dataclasses.replace(self, num_keys=2 * self.num_keys)
        return variants


NONE, FORGET, FILLER = range(3)


@dataclasses.dataclass(frozen=True)
class MultiQueryRecall:
    """MQAR: `num_pairs` pairs of a key and a value, then every key once, each followed by its question's filler.

    A row is `key value` for each pair, `key FORGET` for each deleted key, and then places for `key filler`; those
    without a question are filler. The places of the questions are drawn without replacement, the i-th with probability
    proportional to i^(power - 1); the first pair draws first. With `hops` = H > 1 pairs form chains of H keys, written
    in random order, in which the value of a key is the next key; the answer is the value at the end, and is 1 ... H
    links away. A deleted key, asked for or met on the way, makes the answer NONE. The level is the number of links
    less 1; answers NONE have a level of their own, the last.

    Args:
      length: T, even.
      num_pairs: pairs per row; keys and values are all different in a row.
      num_key_tokens: key tokens; num_values: value tokens, about half of the vocabulary of 8192 each in the paper.
      num_fillers: filler tokens. The paper's experiments have one.
      power: 1 spreads questions evenly, the published 0.01 puts most of them soon after the pairs.
      forget: share of the keys that are deleted.
      hops: H, greatest number of links.

    Source: Arora et al., "Zoology: measuring and improving recall in efficient language models", 2023, section 4 and
    `multiquery_ar`. There filler may also be random tokens, keys and values among them; deletion and chains are ours.
    """

    length: int = 256
    num_pairs: int = 16
    num_key_tokens: int = 4096
    num_values: int = 4096
    num_fillers: int = 1
    power: float = 0.01
    forget: float = 0.0
    hops: int = 1

    def __post_init__(self):
        if not 0 <= self.forget <= 1:
            raise ValueError(f"forget={self.forget} must be in [0, 1]")
        if self.power <= 0 or self.num_fillers < 1:
            raise ValueError(f"power={self.power} and num_fillers={self.num_fillers} must be positive")
        if not 1 <= self.hops <= self.num_pairs:
            raise ValueError(f"hops={self.hops} must be in [1, num_pairs={self.num_pairs}]")
        if self.num_pairs > self.num_key_tokens or self._num_chains > self.num_values:
            raise ValueError(
                f"num_pairs={self.num_pairs} must be at most num_key_tokens={self.num_key_tokens}, and its "
                f"{self._num_chains} different values at most num_values={self.num_values}"
            )
        if self.length % 2 or self.length < (needed := 4 * self.num_pairs + 2 * self._num_deleted):
            raise ValueError(f"length={self.length} must be even and at least {needed} for num_pairs={self.num_pairs}")

    @property
    def _num_chains(self) -> int:
        return -(-self.num_pairs // self.hops)

    @property
    def _num_deleted(self) -> int:
        return round(self.forget * self.num_pairs)

    @property
    def num_written(self) -> int:
        """Tokens before the first place of a question."""
        return 2 * (self.num_pairs + self._num_deleted)

    @property
    def vocab_size(self) -> int:
        """NONE, FORGET, fillers, keys, values."""
        return FILLER + self.num_fillers + self.num_key_tokens + self.num_values

    @property
    def levels(self) -> tuple[str, ...]:
        """Numbers of links, and keys without a value."""
        hops = tuple("1 hop" if i == 1 else f"{i} hops" for i in range(1, self.hops + 1))
        return hops + (("forgotten",) if self.forget else ())

    def examples(self, seed: int, index: np.ndarray) -> Examples:
        """See `Task`."""
        draws, count, written = Draws(seed, index), self.num_pairs, self.num_written
        first_key = FILLER + self.num_fillers
        key = first_key + draws.distinct(self.num_key_tokens, count)
        ends = first_key + self.num_key_tokens + draws.distinct(self.num_values, self._num_chains)
        # Pair i is in chain i // H and i % H + 1 links from its end; its value is the key of pair i - 1, or the end.
        links = np.arange(count) % self.hops
        value = np.where(links == 0, ends[:, np.arange(count) // self.hops], np.roll(key, 1, axis=1))
        order = draws.permutations(count)
        deleted = draws.permutations(count)[:, : self._num_deleted]
        answer = value.copy()
        np.put_along_axis(answer, deleted, NONE, axis=1)
        for i in np.flatnonzero(links):
            answer[:, i] = np.where(answer[:, i] == NONE, NONE, answer[:, i - 1])
        level = np.where(answer == NONE, self.hops, links)

        num_places = (self.length - written) // 2
        weight = np.arange(1, num_places + 1) ** (self.power - 1.0)
        # The first of exponential clocks with these rates is a draw with these weights, the next one from the rest.
        clock = -np.log1p(-draws.uniform(num_places)) / weight
        asked_at = written + 2 * np.argsort(clock, axis=1)[:, :count]

        tokens = (FILLER + draws.integers(self.num_fillers, self.length)).astype(np.int32)
        in_order = lambda x: np.take_along_axis(x, order, axis=1)
        tokens[:, : 2 * count : 2], tokens[:, 1 : 2 * count : 2] = in_order(key), in_order(value)
        tokens[:, 2 * count : written : 2] = np.take_along_axis(key, deleted, axis=1)
        tokens[:, 2 * count + 1 : written : 2] = FORGET
        np.put_along_axis(tokens, asked_at, in_order(key), axis=1)
        targets, levels, weights = next_tokens(tokens), np.zeros_like(tokens), np.zeros(tokens.shape, np.float32)
        np.put_along_axis(targets, asked_at, in_order(answer), axis=1)
        np.put_along_axis(levels, asked_at, in_order(level), axis=1)
        np.put_along_axis(weights, asked_at, 1.0, axis=1)
        return Examples(tokens, targets, weights, levels)

    def variants(self) -> dict[str, "MultiQueryRecall"]:
        """The settings themselves, twice the length, and twice the pairs in it where they fit."""
        longer, pairs = dataclasses.replace(self, length=2 * self.length), 2 * self.num_pairs
        variants = {"in_distribution": self, "length_x2": longer}
        # Shares are rounded, so that twice the pairs may delete more than twice as many.
        has_room = 4 * pairs + 2 * round(self.forget * pairs) <= longer.length
        if has_room and pairs <= min(self.num_key_tokens, self.num_values):
            variants["pairs_x2"] = dataclasses.replace(longer, num_pairs=pairs)
        return variants
