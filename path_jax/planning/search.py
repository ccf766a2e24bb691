"""The largest global batch that fits, from few compilations: memory grows about linearly with the batch."""

import dataclasses
from collections.abc import Callable

_MOST_COMPILATIONS = 4
_MOST_TIMES = 64  # the configuration's batch: no larger one is looked for


@dataclasses.dataclass(frozen=True)
class LargestBatch:
    """What was found.

    Attributes:
      batch_size: the largest that was compiled and fits, 0 for none; peak_bytes: of one device with it.
      num_compiled: compilations, the one that came first included.
    """

    batch_size: int
    peak_bytes: int
    num_compiled: int


def largest_batch(peak: Callable[[int], int], unit: int, batch_size: int, first_peak: int, memory: int) -> LargestBatch:
    """Searches multiples of `unit` rows.

    Args:
      peak: batch size -> bytes of one device, also where that is more than it has.
      unit: rows that every device needs one of; batch_size: compiled already, with `first_peak` bytes.
      memory: bytes of one device.
    """
    known = {batch_size: first_peak}

    def measure(size):
        if size not in known:
            known[size] = peak(size)
        return known[size]

    measure(unit if batch_size > unit else 2 * unit)
    limit = _MOST_TIMES * batch_size // unit * unit
    while True:
        fitting = max((size for size, used in known.items() if used <= memory), default=0)
        too_large = min((size for size, used in known.items() if used > memory), default=limit + unit)
        guess = min(max(_crossing(known, memory) // unit * unit, fitting + unit), too_large - unit)
        if guess <= fitting or guess < unit or len(known) >= _MOST_COMPILATIONS:
            return LargestBatch(fitting, known.get(fitting, 0), len(known))
        measure(guess)


def _crossing(known, memory) -> int:
    """Batch at which the line through the two sizes nearest to the memory reaches it."""
    (low, low_bytes), (high, high_bytes) = sorted(sorted(known.items(), key=lambda item: abs(item[1] - memory))[:2])
    slope = (high_bytes - low_bytes) / (high - low)
    return int(low + (memory - low_bytes) / slope) if slope > 0 else 2**62
