"""Random numbers that belong to an example, not to the order in which examples are made."""

import numpy as np
from jaxtyping import Float, Int

_STEP = np.uint64(0x9E3779B97F4A7C15)  # of splitmix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number
# generators", 2014), whose streams these are: one for each pair (seed, index), its numbers taken in order.


def _mixed(x):
    """A permutation of 64-bit integers after which neighbours have nothing in common."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class Draws:
    """Draws for the examples with the given numbers; what example i draws depends on the seed and i alone."""

    def __init__(self, seed: int, index: Int[np.ndarray, "n"]):
        if seed < 0:
            raise ValueError(f"{seed=} must not be negative")
        index = np.asarray(index).astype(np.uint64)
        with np.errstate(over="ignore"):  # arithmetic is modulo 2^64
            self._key = _mixed(_mixed(np.array([seed], np.uint64) + _STEP) + _STEP * (index + np.uint64(1)))
        self._taken = 0

    def uniform(self, *shape: int) -> Float[np.ndarray, "n *shape"]:
        """Float64 numbers in [0, 1), `shape` of them for each example."""
        count = int(np.prod(shape))
        steps = np.arange(self._taken + 1, self._taken + count + 1, dtype=np.uint64)
        self._taken += count
        with np.errstate(over="ignore"):
            bits = _mixed(self._key[:, None] + _STEP * steps)
        return ((bits >> np.uint64(11)) * 2.0**-53).reshape(len(self._key), *shape)

    def integers(self, high, *shape: int) -> Int[np.ndarray, "n *shape"]:
        """Int64 numbers in [0, high); `high` is a number or an array [n, *shape]."""
        return (self.uniform(*shape) * high).astype(np.int64)

    def permutations(self, size: int, *shape: int) -> Int[np.ndarray, "n *shape size"]:
        """Permutations of 0 ... size - 1; the first k entries are a sample without replacement."""
        return np.argsort(self.uniform(*shape, size), axis=-1)

    def distinct(self, size: int, count: int) -> Int[np.ndarray, "n count"]:
        """Different int64 numbers in [0, size), `count` of them for each example, in random order.

        The work does not grow with `size` (Bentley and Floyd, "A sample of brilliance", 1987): the i-th draw is from
        the first size - count + i + 1 numbers, and the last of these replaces a number that is already there.
        """
        last = size - count + np.arange(count)
        numbers = self.integers(last + 1, count)
        for i in range(1, count):
            is_taken = (numbers[:, :i] == numbers[:, i : i + 1]).any(axis=1)
            numbers[is_taken, i] = last[i]
        return np.take_along_axis(numbers, self.permutations(count), axis=1)
