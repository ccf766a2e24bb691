"""Flip-flop language modelling: one bit is written, ignored and read.

A row is a series of instructions with a bit each, `w 1 i 0 i 1 r 1 ...`. A read repeats the bit of the last write; all
other bits are random. The first instruction is a write, the last a read. The level of a read is the number of
instructions since that write, halved until it is 1: 0 for one, 1 for two or three, 2 for four to seven ...

Source: Liu et al., "Exposing attention glitches with flip-flop language modeling", 2023, definition 1 and section 4.
"""

import dataclasses

import numpy as np

from path_jax.data.draws import Draws
from path_jax.data.examples import Examples

WRITE, READ, IGNORE, ZERO, ONE = range(5)


@dataclasses.dataclass(frozen=True)
class FlipFlop:
    """FFL(T, p).

    Args:
      length: T, even.
      ignore: p, share of the instructions between the first and the last that are ignored; the others are writes and
        reads in equal parts. The task trains on 0.8; 0.98 (sparse) and 0.1 (dense) are its tests.
      every_token: also scores the tokens that cannot be known, as a language model's loss does.
    """

    length: int = 256
    ignore: float = 0.8
    every_token: bool = False

    def __post_init__(self):
        if self.length < 4 or self.length % 2:
            raise ValueError(f"length={self.length} must be even and at least 4")
        if not 0 <= self.ignore <= 1:
            raise ValueError(f"ignore={self.ignore} must be in [0, 1]")

    @property
    def vocab_size(self) -> int:
        """w, r, i, 0, 1."""
        return 5

    @property
    def levels(self) -> tuple[str, ...]:
        """Distances of a read from its write, in instructions."""
        return tuple(f"{2**i}-{2 ** (i + 1) - 1} back" for i in range((self.length // 2 - 1).bit_length()))

    def examples(self, seed: int, index: np.ndarray) -> Examples:
        """See `Task`."""
        draws, count = Draws(seed, index), self.length // 2
        chance, bit = draws.uniform(count), draws.integers(2, count)
        instruction = np.where(chance < self.ignore, IGNORE, np.where(chance < (1 + self.ignore) / 2, WRITE, READ))
        instruction[:, 0], instruction[:, -1] = WRITE, READ
        place = np.arange(count)
        written = np.maximum.accumulate(np.where(instruction == WRITE, place, 0), axis=1)
        bit = np.where(instruction == READ, np.take_along_axis(bit, written, axis=1), bit)
        tokens = np.stack([instruction, ZERO + bit], axis=2).reshape(len(bit), self.length).astype(np.int32)
        targets = np.concatenate([tokens[:, 1:], tokens[:, -1:]], axis=1)
        is_read = tokens == READ
        distance = np.maximum(np.repeat(place - written, 2, axis=1), 1)
        level = np.where(is_read, np.log2(distance).astype(np.int32), 0).astype(np.int32)
        is_scored = np.arange(self.length) < self.length - 1 if self.every_token else is_read
        weights = np.broadcast_to(is_scored, tokens.shape).astype(np.float32)
        return Examples(tokens, targets, weights, level)

    def variants(self) -> dict[str, "FlipFlop"]:
        """The settings themselves, sparse and dense; only reads are scored."""
        at = lambda ignore: dataclasses.replace(self, ignore=ignore, every_token=False)
        return {"in_distribution": at(self.ignore), "sparse": at(0.98), "dense": at(0.1)}
