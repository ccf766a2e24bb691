"""Watches early exits while they run, by taking some tokens that leave to full depth too."""

import numpy as np
from jaxtyping import Bool


class ExitMonitor:
    """Estimates how often a token that leaves differs from full depth, and trips when that is surely too often.

    For `path_jax.models.early_exit.generate_with_exits`, which asks `choose` for the tokens to compare and tells
    `observe` what came of it. The bounds hold at all times at once, so that looking after every token costs no
    confidence: with s differences in n comparisons, the shares p with

        B(s + 1/2, n - s + 1/2) / B(1/2, 1/2) < p^s (1 - p)^(n - s) / (1 - confidence),   B the beta function,

    are those that are not refuted (the mixture of likelihood ratios is a martingale, Ville's inequality). Tokens are
    taken to be alike; after a change of text, a new monitor learns faster.

    Args:
      limit: share of differences that must not be passed, in (0, 1).
      check_rate: share of the tokens that leave which are compared, in (0, 1].
      confidence: in (0, 1): the probability that exits that keep to the limit are never ended.
      seed: of the choice of tokens.

    Raises:
      ValueError: for a number out of range.
    """

    def __init__(self, limit: float, *, check_rate: float = 0.1, confidence: float = 0.95, seed: int = 0):
        for name, value in (("limit", limit), ("confidence", confidence)):
            if not 0 < value < 1:
                raise ValueError(f"{name}={value} must be in (0, 1)")
        if not 0 < check_rate <= 1:
            raise ValueError(f"{check_rate=} must be in (0, 1]")
        self.limit, self.check_rate, self.confidence = limit, check_rate, confidence
        self.num_exits = self.num_checked = self.num_different = 0
        self._is_tripped, self._rng, self._drawn = False, np.random.default_rng(seed), np.zeros(0, bool)

    @property
    def is_tripped(self) -> bool:
        """Whether the share is above the limit; stays so."""
        return self._is_tripped

    @property
    def share(self) -> float:
        """Of differences so far; NaN before the first comparison."""
        return self.num_different / self.num_checked if self.num_checked else float("nan")

    @property
    def bounds(self) -> tuple[float, float]:
        """Of the share, with the confidence, at all times at once."""
        return self._bound(0.0), self._bound(1.0)

    def choose(self, num: int) -> Bool[np.ndarray, "num"]:
        """Which of the next `num` tokens that leave to compare."""
        chosen = self.foresee(num)
        self._drawn = self._drawn[num:]
        self.num_exits += num
        return chosen

    def foresee(self, num: int) -> Bool[np.ndarray, "num"]:
        """What `choose` will say of the next `num` tokens that leave."""
        missing = max(0, num - len(self._drawn))
        self._drawn = np.append(self._drawn, self._rng.random(missing) < self.check_rate)
        return self._drawn[:num]

    def observe(self, agreed: Bool[np.ndarray, "n"]) -> None:
        """Takes what comparisons gave."""
        self.num_checked += len(agreed)
        self.num_different += int(len(agreed) - np.sum(agreed))
        self._is_tripped |= bool(self._refutes(self.limit)) and self.share > self.limit

    def reset(self) -> None:
        """Forgets what it has seen, and lets tokens leave again."""
        self.num_exits = self.num_checked = self.num_different = 0
        self._is_tripped = False

    def _refutes(self, p: float) -> bool:
        from scipy.special import betaln, xlog1py, xlogy  # slow to import

        s, n = self.num_different, self.num_checked
        log_ratio = betaln(s + 0.5, n - s + 0.5) - betaln(0.5, 0.5) - xlogy(s, p) - xlog1py(n - s, -p)
        return log_ratio >= -np.log1p(-self.confidence)

    def _bound(self, end: float) -> float:
        """By bisection between an end of 0 ... 1 and the share, at which the ratio is least."""
        if not self.num_checked or not self._refutes(end):
            return end
        inside, outside = self.share, end
        for _ in range(60):
            middle = (inside + outside) / 2
            inside, outside = (inside, middle) if self._refutes(middle) else (middle, outside)
        return outside
