"""Word problems of finite groups: multiply group elements one after the other, and say the product after each.

Composing permutations is what tracking a state means: of chess pieces, of cups, of variables. The word problem of A5,
the smallest group that is not solvable, is complete for NC1; a transformer with a fixed number of layers cannot solve
it for all lengths if TC0 and NC1 differ. Z_m is counting modulo m; Z_2 is parity.

Source: Merrill et al., "The illusion of state in state-space models", 2024; Yang et al., "PaTH Attention", section 4.
"""

import dataclasses
import functools
import itertools
import re

import numpy as np

from path_jax.data.draws import Draws
from path_jax.data.examples import Examples


@functools.cache
def multiplication_table(group: str) -> np.ndarray:
    """Products a b of all elements; element 0 is the unit.

    Args:
      group: "s3", "a5", "s5" ...: all or the even permutations of so many things, (a b)(i) = a(b(i)); "z7": addition
        modulo 7.

    Returns:
      int32 [order, order].

    Raises:
      ValueError: for another name, or a group of more than 1000 elements.
    """
    match = re.fullmatch(r"([asz])([1-9]\d*)", group)
    size = int(match[2]) if match else 0
    if not match or (match[1] != "z" and size > 6) or size > 1000:
        raise ValueError(f"group={group!r} is not one of s1 ... s6, a1 ... a6, z1 ... z1000")
    if match[1] == "z":
        number = np.arange(size, dtype=np.int32)
        return (number[:, None] + number) % size
    elements = list(itertools.permutations(range(size)))
    if match[1] == "a":
        is_even = lambda p: sum(a > b for a, b in itertools.combinations(p, 2)) % 2 == 0
        elements = [p for p in elements if is_even(p)]
    number = {p: i for i, p in enumerate(elements)}
    return np.array([[number[tuple(a[i] for i in b)] for b in elements] for a in elements], np.int32)


@dataclasses.dataclass(frozen=True)
class GroupWords:
    """Tokens are elements x_1, x_2, ..., the answer after x_t is x_1 x_2 ... x_t.

    Args:
      length: T, elements per row.
      group: see `multiplication_table`.
      generators: where it is not 0, draws only elements 0 (the unit) ... generators - 1; the answers are all elements.
        Z_7 with two of them counts ones modulo 7.
    """

    length: int = 32
    group: str = "a5"
    generators: int = 0

    def __post_init__(self):
        order = len(multiplication_table(self.group))
        if self.length < 1 or self.generators == 1 or not 0 <= self.generators <= order:
            raise ValueError(
                f"length={self.length} must be positive and generators={self.generators} 0 or in [2, {order}]"
            )

    @property
    def vocab_size(self) -> int:
        """Order of the group."""
        return len(multiplication_table(self.group))

    @property
    def levels(self) -> tuple[str, ...]:
        """Numbers of factors."""
        return tuple(f"{2**i}-{2 ** (i + 1) - 1} factors" for i in range(self.length.bit_length()))

    def examples(self, seed: int, index: np.ndarray) -> Examples:
        """See `Task`."""
        table, draws = multiplication_table(self.group), Draws(seed, index)
        tokens = draws.integers(self.generators or len(table), self.length)
        targets, product = np.empty_like(tokens), np.zeros(len(tokens), np.int64)
        for t in range(self.length):
            product = table[product, tokens[:, t]]
            targets[:, t] = product
        level = np.broadcast_to(np.log2(np.arange(1, self.length + 1)).astype(np.int32), tokens.shape)
        tokens, targets = tokens.astype(np.int32), targets.astype(np.int32)
        return Examples(tokens, targets, np.ones(tokens.shape, np.float32), level)

    def variants(self) -> dict[str, "GroupWords"]:
        """The settings themselves, and two and four times the length."""
        return {
            name: dataclasses.replace(self, length=factor * self.length)
            for name, factor in (("in_distribution", 1), ("length_x2", 2), ("length_x4", 4))
        }
