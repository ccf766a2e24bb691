"""Motifs of DNA, written at loci and then moved, copied and inverted: a question asks what stands at a locus now.

    L0=ACG L1=TTA L2=GAC L0~ L1/ L2CCAT L2< L0 L1?GAC L2?CGT

`L0=ACG` writes a motif, `L0~` inverts a locus (its motif becomes the reverse complement, which is what the other
strand reads), `L1/ L2` exchanges the motifs of two loci, `L2< L0` copies that of L0 to L2, and `L1?GAC` asks: the
letters after the question mark are scored. Letters outside of these are spacers and mean nothing. Every row begins by
writing all loci in random order; it is cut after `length` tokens, be it within an event. To answer, a model follows the
motif from locus to locus and tells whether it was inverted an odd number of times; a motif of odd length is never its
own reverse complement.

Rows are tokens, and text through `as_text(task.words, tokens)`. Mutations, overlapping motifs and nested inversions of
several loci are not part of it. The task is ours; it has the operations of genome rearrangement (inversion,
translocation, duplication) on separate loci.
"""

import dataclasses

import numpy as np

from path_jax.data.draws import Draws
from path_jax.data.examples import Examples, cut_examples

BASES = "ACGT"  # the complement of base i is base 3 - i
WRITE, INVERT, EXCHANGE, COPY, QUESTION, SPACER = range(6)
_SIGNS = "=~/<?"
_FIRST_SIGN = len(BASES)
_FIRST_LOCUS = _FIRST_SIGN + len(_SIGNS)
MOST_CHANGES = 3


@dataclasses.dataclass(frozen=True)
class Motif:
    """Events after the first writings are independent draws; all loci and motifs are equally likely.

    The level of a question is the number of inversions, exchanges and copies that the motif went through since it was
    written, at most 3.

    Args:
      length: T; at least the first writings and a question.
      num_loci: 2 or more.
      motif_length: letters of a motif.
      inversions, exchanges, copies, questions, spacers: shares of the events; the rest are writings.
      spacer_length: letters of a spacer.
    """

    length: int = 256
    num_loci: int = 5
    motif_length: int = 3
    inversions: float = 0.2
    exchanges: float = 0.15
    copies: float = 0.1
    questions: float = 0.3
    spacers: float = 0.1
    spacer_length: int = 4

    def __post_init__(self):
        for name, least in (("num_loci", 2), ("motif_length", 1), ("spacer_length", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}")
        shares = self._shares
        if min(shares) < 0 or sum(shares) > 1 + 1e-9:
            raise ValueError(
                f"inversions={self.inversions}, exchanges={self.exchanges}, copies={self.copies}, "
                f"questions={self.questions} and spacers={self.spacers} must be at least 0 and together at most 1"
            )
        needed = (2 + self.motif_length) * (self.num_loci + 1)
        if self.length < needed:
            raise ValueError(f"length={self.length} must be at least {needed} for num_loci={self.num_loci}")

    @property
    def _shares(self) -> tuple[float, ...]:
        """Of INVERT ... SPACER."""
        return self.inversions, self.exchanges, self.copies, self.questions, self.spacers

    @property
    def words(self) -> tuple[str, ...]:
        """Bases, signs, loci."""
        return (*BASES, *_SIGNS, *(f" L{number}" for number in range(self.num_loci)))

    @property
    def vocab_size(self) -> int:
        """Number of words."""
        return len(self.words)

    @property
    def levels(self) -> tuple[str, ...]:
        """Numbers of changes."""
        return "0 changes", "1 change", "2 changes", "3+ changes"

    def examples(self, seed: int, index: np.ndarray) -> Examples:
        """See `Task`."""
        count = -(-self.length // min(2, self.spacer_length))
        draws, size = Draws(seed, index), self.motif_length
        # Events come first, so that a step reads contiguous rows.
        chance = np.ascontiguousarray(draws.uniform(count).T)
        bounds = np.cumsum(self._shares)
        kind = np.select([chance < bound for bound in bounds], [INVERT, EXCHANGE, COPY, QUESTION, SPACER], WRITE)
        locus = draws.integers(self.num_loci, count).T
        letters = np.ascontiguousarray(draws.integers(len(BASES), count, max(size, self.spacer_length)).swapaxes(0, 1))
        kind[: self.num_loci] = WRITE
        locus[: self.num_loci] = draws.permutations(self.num_loci).T
        other = (locus + 1 + draws.integers(self.num_loci - 1, count).T) % self.num_loci
        changes = self._run(kind, locus, other, letters)

        num_rows = kind.shape[1]
        longest = max(2 + size, 3, self.spacer_length)
        tokens = np.full((count, num_rows, longest), -1, np.int32)
        is_scored = np.zeros(tokens.shape, bool)
        has_locus, has_motif = kind != SPACER, (kind == WRITE) | (kind == QUESTION)
        tokens[..., 0] = _FIRST_LOCUS + locus
        tokens[..., 1] = _FIRST_SIGN + kind
        has_other = (kind == EXCHANGE) | (kind == COPY)
        tokens[has_other, 2] = _FIRST_LOCUS + other[has_other]
        tokens[has_motif, 2 : 2 + size] = letters[has_motif, :size]
        tokens[~has_locus, 0:2] = -1
        tokens[~has_locus, : self.spacer_length] = letters[~has_locus, : self.spacer_length]
        is_scored[kind == QUESTION, 1 : 1 + size] = True  # the next token is a letter of the answer
        level = np.broadcast_to(changes[..., None], tokens.shape)
        flat = lambda x: np.ascontiguousarray(x.swapaxes(0, 1)).reshape(num_rows, count * longest)
        return cut_examples(flat(tokens), flat(is_scored), flat(level), self.length)

    def _run(self, kind, locus, other, letters) -> np.ndarray:
        """Carries the events out; writes the answers into `letters` and returns the level of each event [count, n]."""
        count, num_rows = kind.shape
        rows, size = np.arange(num_rows), self.motif_length
        motif = np.zeros((num_rows, self.num_loci, size), np.int64)
        changed = np.zeros((num_rows, self.num_loci), np.int64)
        levels = np.zeros((count, num_rows), np.int64)
        for i in range(count):
            here, there = motif[rows, locus[i]], motif[rows, other[i]]
            here_changed, there_changed = changed[rows, locus[i]], changed[rows, other[i]]
            levels[i] = np.minimum(here_changed, MOST_CHANGES)
            is_question = kind[i] == QUESTION
            letters[i, is_question, :size] = here[is_question]
            comes_from_there = (kind[i] == EXCHANGE) | (kind[i] == COPY)
            cases = [kind[i] == WRITE, kind[i] == INVERT, comes_from_there]
            inverted = len(BASES) - 1 - here[:, ::-1]
            motif[rows, locus[i]] = np.select(
                [case[:, None] for case in cases], [letters[i, :, :size], inverted, there], here
            )
            changed[rows, locus[i]] = np.select(cases, [0, here_changed + 1, there_changed + 1], here_changed)
            is_exchange = kind[i] == EXCHANGE
            motif[rows, other[i]] = np.where(is_exchange[:, None], here, there)
            changed[rows, other[i]] = np.where(is_exchange, here_changed + 1, there_changed)
        return levels

    def variants(self) -> dict[str, "Motif"]:
        """The settings themselves, and two and four times the length."""
        return {
            name: dataclasses.replace(self, length=factor * self.length)
            for name, factor in (("in_distribution", 1), ("length_x2", 2), ("length_x4", 4))
        }
