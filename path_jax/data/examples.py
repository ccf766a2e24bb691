"""What a synthetic task is: numbers in, examples with exact answers out."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

import numpy as np
from jaxtyping import Bool, Float32, Int, Int32


class Examples(NamedTuple):
    """Rows of a task. A scored position is one whose answer is determined by the tokens up to it.

    Attributes:
      tokens: input ids in [0, vocab_size); int32 [n, T]. Padding, at the end of a row, holds -1.
      targets: the answer at scored positions, elsewhere the next token where there is one; int32 [n, T].
      weights: 1 at scored positions, else 0; float32 [n, T].
      level: how hard a scored position is, as the task defines it, from 0; int32 [n, T]. 0 elsewhere.
    """

    tokens: Int32[np.ndarray, "n T"]
    targets: Int32[np.ndarray, "n T"]
    weights: Float32[np.ndarray, "n T"]
    level: Int32[np.ndarray, "n T"]


class Task(Protocol):
    """A frozen dataclass of settings; all of them have defaults but `length`, the number T of input tokens."""

    length: int

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""

    @property
    def levels(self) -> tuple[str, ...]:
        """What the levels mean, in words that can name a column."""

    def examples(self, seed: int, index: np.ndarray) -> Examples:
        """The examples with the numbers `index` [n] of the series `seed`, whoever asks and in whatever order."""

    def variants(self) -> dict[str, "Task"]:
        """Settings to evaluate on, among them these settings themselves; all share one vocabulary."""


def next_tokens(tokens: Int[np.ndarray, "n T"]) -> Int[np.ndarray, "n T"]:
    """The token after each; the last, which has none, stands for itself."""
    return np.concatenate([tokens[:, 1:], tokens[:, -1:]], axis=1)


def cut_examples(
    tokens: Int[np.ndarray, "n M"], is_scored: Bool[np.ndarray, "n M"], level: Int[np.ndarray, "n M"], length: int
) -> Examples:
    """The first `length` tokens of every row, where the text itself holds the answers: each follows its question.

    Args:
      tokens: ids, or -1 for a gap, which is closed; at least `length` ids in each row.
      is_scored: where the next token is an answer. A question is dropped where the cut leaves it without one.
      level: of the scored positions, else ignored.
      length: T.
    """
    keep = tokens >= 0
    keep &= np.cumsum(keep, axis=1, dtype=np.int32) <= length
    tokens, is_scored, level = (x[keep].reshape(len(x), length) for x in (tokens, is_scored, level))
    is_scored[:, -1] = False
    tokens, level = tokens.astype(np.int32), np.where(is_scored, level, 0).astype(np.int32)
    return Examples(tokens, next_tokens(tokens), is_scored.astype(np.float32), level)


def as_text(words: Sequence[str], tokens: Iterable[int]) -> str:
    """One row as text, for any tokenizer.

    Args:
      words: spelling of each id, with its spaces: the attribute `words` of a task that has one.
      tokens: ids [T]; padding is left out.
    """
    return "".join(words[token] for token in tokens if token >= 0)
