"""Whether a model's second-best token is the right one more often where it is decided late.

Source: Lioubashevski et al., "Looking beyond the top-1: Transformers determine top tokens in order", 2024 (arXiv
2410.20210), section on better language modelling.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Int


class SecondRank(NamedTuple):
    """Of tokens whose best one is wrong: how often the second best is right."""

    num_late: int  # whose second rank saturates at the last layer
    late_accuracy: float
    num_early: int  # whose second rank saturates `gap` layers before that, or earlier
    early_accuracy: float
    z: float  # of the difference late - early, with the pooled variance of two proportions
    p_value: float  # two-sided; NaN where the test is undefined


def second_rank(
    layers: Int[np.ndarray, "k n"],
    ids: Int[np.ndarray, "n k"],
    targets: Int[np.ndarray, "n"],
    num_layers: int,
    *,
    gap: int | None = None,
) -> SecondRank:
    """Compares late with early second ranks.

    Args:
      layers: of `saturation_layers`; ids: the model's best tokens; targets: the text's, -1 where it ends.
      gap: published 6 for GPT2-XL, of 48 layers; by default max(1, L // 8).

    Raises:
      ValueError: if shapes do not fit, or there is no second rank.
    """
    from scipy import stats  # slow to import

    layers, ids, targets = np.asarray(layers), np.asarray(ids), np.asarray(targets)
    if len(layers) < 2 or ids.shape != layers.T.shape or targets.shape != layers.shape[1:]:
        raise ValueError(f"layers {layers.shape}, ids {ids.shape}, targets {targets.shape}: not [k, n], [n, k], [n]")
    gap = max(1, num_layers // 8) if gap is None else gap
    is_wrong, is_right = (targets >= 0) & (ids[:, 0] != targets), ids[:, 1] == targets
    second = layers[1] % num_layers
    groups = [is_right[is_wrong & mask] for mask in (second == num_layers - 1, second <= num_layers - 1 - gap)]
    (num_late, late), (num_early, early) = ((len(x), float(x.mean()) if len(x) else np.nan) for x in groups)
    z = p_value = np.nan
    if num_late and num_early:
        pooled = np.concatenate(groups).mean()
        if 0 < pooled < 1:
            z = float((late - early) / np.sqrt(pooled * (1 - pooled) * (1 / num_late + 1 / num_early)))
            p_value = float(2 * stats.norm.sf(abs(z)))
    return SecondRank(num_late, late, num_early, early, z, p_value)
