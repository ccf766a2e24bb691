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
    elements = _permutations(size, is_even=match[1] == "a")
    number = {p: i for i, p in enumerate(elements)}
    return np.array([[number[tuple(a[i] for i in b)] for b in elements] for a in elements], np.int32)


def _permutations(size: int, is_even: bool) -> list[tuple[int, ...]]:
    """In the order of their numbers; only the even ones if so asked."""
    elements = itertools.permutations(range(size))
    parity = lambda p: sum(a > b for a, b in itertools.combinations(p, 2)) % 2
    return [p for p in elements if not (is_even and parity(p))]


@dataclasses.dataclass(frozen=True)
class GroupWords:
    """Tokens are elements x_1, x_2, ..., the answer after x_t is x_1 x_2 ... x_t.

    Args:
      length: T, tokens per row.
      group: see `multiplication_table`.
      generators: "all" elements, or fewer that the factors are drawn from; the answers are all elements. A number n
        means the elements 0 (the unit) ... n - 1: Z_7 with two of them counts ones modulo 7. "swaps" are the
        permutations that exchange two things, each of which is one reflection of the space in which every thing has an
        axis; "involutions" are the elements of order 2. Those of A5 are half turns of an icosahedron: reflections, but
        for the sign of all axes.
      start: each row begins with a token of its own, which is no factor and not scored. Nothing else tells a mixer
        without positions which factor is the first.
    """

    length: int = 32
    group: str = "a5"
    generators: int | str = "all"
    start: bool = False

    def __post_init__(self):
        if self.length < 1 + self.start:
            raise ValueError(f"length={self.length} must be at least {1 + self.start}")
        order = len(multiplication_table(self.group))
        if self.generators in ("swaps", "involutions"):
            if (self.generators == "swaps" and self.group[0] != "s") or not len(self._factors):
                raise ValueError(f"group={self.group!r} has no {self.generators}")
        elif self.generators != "all" and not (isinstance(self.generators, int) and 2 <= self.generators <= order):
            raise ValueError(
                f"generators={self.generators!r} must be all, swaps, involutions or a number in [2, {order}]"
            )

    @property
    def vocab_size(self) -> int:
        """Order of the group, and one for the token at the start."""
        return len(multiplication_table(self.group)) + self.start

    @property
    def _factors(self) -> np.ndarray:
        """Elements that are drawn."""
        table = multiplication_table(self.group)
        if self.generators == "swaps":
            elements = _permutations(int(self.group[1:]), is_even=False)
            return np.array([i for i, p in enumerate(elements) if sum(j != x for j, x in enumerate(p)) == 2])
        if self.generators == "involutions":
            return 1 + np.flatnonzero(np.diagonal(table)[1:] == 0)
        return np.arange(len(table) if self.generators == "all" else self.generators)

    @property
    def levels(self) -> tuple[str, ...]:
        """Numbers of factors."""
        return tuple(f"{2**i}-{2 ** (i + 1) - 1} factors" for i in range((self.length - self.start).bit_length()))

    def examples(self, seed: int, index: np.ndarray) -> Examples:
        """See `Task`."""
        table, draws, factors = multiplication_table(self.group), Draws(seed, index), self._factors
        first = int(self.start)
        tokens = np.full((len(index), self.length), len(table), np.int32)
        tokens[:, first:] = factors[draws.integers(len(factors), self.length - first)]
        targets, product = np.zeros_like(tokens), np.zeros(len(tokens), np.int32)
        weights, level = np.zeros(tokens.shape, np.float32), np.zeros_like(tokens)
        for t in range(first, self.length):
            product = table[product, tokens[:, t]]
            targets[:, t] = product
        targets[:, :first] = tokens[:, first : 2 * first]
        weights[:, first:] = 1
        level[:, first:] = np.log2(np.arange(1, self.length - first + 1))
        return Examples(tokens, targets, weights, level)

    def variants(self) -> dict[str, "GroupWords"]:
        """The settings themselves, and two and four times the length."""
        return {
            name: dataclasses.replace(self, length=factor * self.length)
            for name, factor in (("in_distribution", 1), ("length_x2", 2), ("length_x4", 4))
        }
