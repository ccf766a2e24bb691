"""Trials of implants: which are made, what the controls implant, and how they are summed up.

Tokens are numbered; what runs the model is a function of those numbers, so text, images and speech share this. See
`path_jax.interpretability.implants` for what an implant is.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from path_jax.interpretability.saturation import saturation_layers

CONTROLS = ("same", "late", "random")


class Pairs(NamedTuple):
    """Tokens with the same best token in the end, which saturates earlier in one of them."""

    early_row: Int[np.ndarray, "p"]
    early_position: Int[np.ndarray, "p"]
    early_layer: Int[np.ndarray, "p"]  # e
    late_row: Int[np.ndarray, "p"]
    late_position: Int[np.ndarray, "p"]
    late_layer: Int[np.ndarray, "p"]  # l
    final_id: Int[np.ndarray, "p"]


class Trials(NamedTuple):
    """Implants that were made, one of each pair after each layer."""

    pair: Int[np.ndarray, "n"]
    layer: Int[np.ndarray, "n"]  # m
    source_row: Int[np.ndarray, "n"]
    source_position: Int[np.ndarray, "n"]
    new_layer: Int[np.ndarray, "n"]  # at which late's best token saturates now
    new_id: Int[np.ndarray, "n"]  # which it is in the end


class ImplantReport(NamedTuple):
    """What implants did at each distance d of their layer from the source's saturation; NaN without trials.

    Attributes:
      distances: d = m - e.
      num_trials, num_successes: a success saturates at the implant's layer, with the final best token unchanged.
      rates: num_successes / num_trials; lows, highs: its 95 % interval (Wilson), of independent trials.
      mean_moved: number of layers by which late's best token saturates earlier than without the implant.
      unchanged_shares: of trials with the final best token unchanged.
      trials: all of them, one by one.
    """

    distances: Int[np.ndarray, "d"]
    num_trials: Int[np.ndarray, "d"]
    num_successes: Int[np.ndarray, "d"]
    rates: Float[np.ndarray, "d"]
    lows: Float[np.ndarray, "d"]
    highs: Float[np.ndarray, "d"]
    mean_moved: Float[np.ndarray, "d"]
    unchanged_shares: Float[np.ndarray, "d"]
    trials: Trials


def check_trials(pairs: Pairs, reach: int, batch_size: int, control: str | None) -> Pairs:
    """The pairs as arrays.

    Raises:
      ValueError: if there are none, for an unknown control or a number out of range.
    """
    if control not in (None, *CONTROLS):
        raise ValueError(f"{control=} is unknown; choose from {', '.join(CONTROLS)}")
    if reach < 0 or batch_size < 1:
        raise ValueError(f"{reach=} must be at least 0 and {batch_size=} at least 1")
    pairs = Pairs(*map(np.asarray, pairs))
    if not len(pairs.early_row):
        raise ValueError("there are no pairs")
    return pairs


def make_trials(
    pairs: Pairs,
    early: Int[np.ndarray, "p"],
    late: Int[np.ndarray, "p"],
    places: Int[np.ndarray, "2 tokens"],
    best_tokens: Callable[[], tuple[Int[np.ndarray, "tokens"], Int[np.ndarray, "tokens"], Bool[np.ndarray, "tokens"]]],
    implanted: Callable[..., Int[np.ndarray, "L n"]],
    *,
    reach: int,
    control: str | None,
    seed: int,
    as_published: bool,
) -> ImplantReport:
    """Implants into the late token of each pair after each layer e - reach ... e + reach that there is before l.

    Args:
      pairs: see `check_trials`; early, late: the numbers of their tokens.
      places: row and position of every token.
      best_tokens: () -> for every token the layer at which its best one saturates, which it is in the end, and whether
        a control may take its stream; called where a control needs it.
      implanted: (late [n], layer [n], source [n]) -> best tokens of every layer at the late ones, with the streams of
        the sources after these layers in place of their own.
      reach, control, seed, as_published: see `implant`.
    """
    distances = np.arange(-reach, reach + 1)
    layer = pairs.early_layer[:, None] + distances
    pair, at = np.nonzero((layer >= 0) & (layer < pairs.late_layer[:, None]))
    layer, late = layer[pair, at], late[pair]
    if control in (None, "same"):
        source, is_made = late if control else early[pair], np.ones(len(pair), bool)
    else:
        source, is_made = _control_sources(control, *best_tokens(), late, pairs.final_id[pair], layer, seed)
    pair, at, layer, late, source = (x[is_made] for x in (pair, at, layer, late, source))
    ids = implanted(late, layer, source)
    trials = Trials(pair, layer, *places[:, source], saturation_layers(ids[..., None])[0].astype(int), ids[-1])

    is_unchanged = trials.new_id == pairs.final_id[pair]
    is_success = is_unchanged & (trials.new_layer == layer + as_published)
    count = lambda weights=None: np.bincount(at, weights, minlength=len(distances))
    num_trials, num_successes = count(), count(is_success).astype(int)
    with np.errstate(invalid="ignore"):
        means = [count(x) / num_trials for x in (pairs.late_layer[pair] - trials.new_layer, is_unchanged)]
        rates = num_successes / num_trials
    lows, highs = np.array([_wilson(*x) for x in zip(num_successes.tolist(), num_trials.tolist())]).T
    return ImplantReport(distances, num_trials, num_successes, rates, lows, highs, *means, trials)


def batches(num_rows: int, size: int) -> Iterator[tuple[Int[np.ndarray, "size"], int]]:
    """Indices of rows, in batches of one size, and how many of them are new: the last one has some twice."""
    for start in range(0, num_rows, size):
        rows = np.arange(start, min(start + size, num_rows))
        yield np.resize(rows, size), len(rows)


def _control_sources(control, layers, ids, may_be, late, final_id, after, seed):
    """A random token for each trial, and whether there is one."""
    rng, source, has_source = np.random.default_rng(seed), late.copy(), np.zeros(len(late), bool)
    for i in range(len(late)):
        is_same = ids == final_id[i]
        fits = may_be & (is_same & (layers > after[i] + 1) if control == "late" else ~is_same)
        fits[late[i]] = False
        if len(candidates := np.flatnonzero(fits)):
            source[i], has_source[i] = rng.choice(candidates), True
    return source, has_source


def _wilson(successes, trials) -> tuple[float, float]:
    from scipy import stats  # slow to import

    return tuple(stats.binomtest(successes, trials).proportion_ci(method="wilson")) if trials else (np.nan, np.nan)
