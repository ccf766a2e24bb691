"""Text to the ids that a model reads, and back."""

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int32

from path_jax.data import Alphabet, ByteTokenizer, LearnedTokenizer

Tokenizer = ByteTokenizer | Alphabet | LearnedTokenizer


def opening_of(tokenizer: LearnedTokenizer) -> tuple[int, ...]:
    """What a vocabulary's own rules put before every text."""
    pairs = zip(tokenizer.encode("").tolist(), tokenizer.encode("a").tolist())
    return tuple(x for x, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


@dataclasses.dataclass(frozen=True)
class TextCodec:
    """A tokenizer, and what a model's texts open with.

    Attributes:
      tokenizer: Text to ids and back.
      opening: Ids before those of a text.
      num_own: How many ids the tokenizer's own rules put there, which `opening` replaces.
    """

    tokenizer: Tokenizer
    opening: tuple[int, ...] = ()
    num_own: int = 0

    @classmethod
    def of(cls, tokenizer: Tokenizer, vocab_size: int, bos_id: int | None = None) -> "TextCodec":
        """For a model with `vocab_size` ids; texts open with `bos_id`, or as the tokenizer has it."""
        if isinstance(tokenizer, ByteTokenizer):
            return cls(tokenizer, (tokenizer.bos_id,) if vocab_size > tokenizer.bos_id else ())
        if isinstance(tokenizer, Alphabet):
            return cls(tokenizer, (tokenizer.bos_id,))
        own = opening_of(tokenizer)
        return cls(tokenizer, own if bos_id is None else (bos_id,), len(own))

    def encode(self, text: str) -> Int32[np.ndarray, "n"]:
        """Returns the ids of a whole text."""
        return np.concatenate([np.array(self.opening, np.int32), self.tokenizer.encode(text)[self.num_own :]])

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of ids, without what opens one."""
        ids, size = np.asarray(ids), len(self.opening)
        return self.tokenizer.decode(ids[size:] if tuple(ids[:size].tolist()) == self.opening else ids)
