"""What early exits would do to a text, and thresholds that keep what they change below a limit.

All of it reads the residual streams of full-depth passes, so it says what generate_with_exits does where layers left
out are recomputed (missing="recompute"): there every token finds exact caches.

Axes: E exits, n tokens, L layers. Exit E stands for full depth.
"""

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from path_jax.data import Batch
from path_jax.interpretability.exit_rules import Rule
from path_jax.interpretability.hooks import Site, run
from path_jax.interpretability.logit_lens import unpacked
from path_jax.models import DecoderLM

_MAX_LIMITS = 1000  # that are tried


class ExitTrace(NamedTuple):
    """What a text's tokens look like at each exit."""

    best: Int[np.ndarray, "E+1 n"]  # likeliest next tokens by the logit lens, the last ones those of full depth
    targets: Int[np.ndarray, "n"]  # the next tokens of the text, -1 where it ends
    scores: Mapping[str, Float[np.ndarray, "E n"]]  # of rules
    streams: Float[np.ndarray, "E m D"]  # float32, of the first m tokens

    @property
    def agrees(self) -> Bool[np.ndarray, "E n"]:
        """Whether the likeliest token is that of full depth."""
        return self.best[:-1] == self.best[-1]


class ExitSummary(NamedTuple):
    """Of one rule on one text; shares of tokens, with ends of exact 95 % intervals where said."""

    num_tokens: int
    disagreement: float  # tokens whose likeliest next token is not that of full depth
    disagreement_low: float
    disagreement_high: float
    accuracy: float  # tokens whose likeliest next token is the text's
    full_accuracy: float
    exit_shares: Float[np.ndarray, "E+1"]
    mean_depth: float  # layers
    layer_speedup: float  # L / mean_depth
    published_speedup: float  # L / mean of the exits' layers, numbered from 0


def trace_exits(
    model: DecoderLM,
    params,
    batches: Iterable[Int[Array, "B T"] | Batch],
    exit_layers: Sequence[int],
    rules: Mapping[str, Rule],
    *,
    num_streams: int = 0,
) -> ExitTrace:
    """Runs a text through the model at full depth and keeps what exits would have seen.

    Args:
      model: scanned or unrolled; params: of either shape.
      batches: tokens, or `Batch`, whose padding is left out; each further shape is compiled anew.
      exit_layers: ascending, of 0 ... L - 2.
      rules: {name: rule}, whose scores are kept.
      num_streams: of how many tokens, the first ones, to keep the residual streams too.

    Raises:
      ValueError: for layers out of range, or without tokens.
    """
    exits = tuple(int(layer) for layer in exit_layers)
    last = model.config.num_layers - 1
    if exits != tuple(sorted(set(exits))) or not exits or not 0 <= exits[0] <= exits[-1] < last:
        raise ValueError(f"exit_layers={list(exits)} must be layers of 0 ... {last - 1}, ascending")
    parts, num_kept = [], 0
    for batch in batches:
        tokens, is_token, inputs = unpacked(batch)
        if isinstance(batch, Batch):
            targets = np.where(np.asarray(batch.weights) > 0, batch.targets, -1)
        else:
            targets = np.pad(np.asarray(tokens)[:, 1:], ((0, 0), (0, 1)), constant_values=-1)
        best, scores, streams = jax.device_get(_trace(model, params, jnp.asarray(tokens), inputs, dict(rules), exits))
        num_new = max(0, min(num_streams - num_kept, int(is_token.sum())))
        num_kept += num_new
        scores = {name: x[:, is_token] for name, x in scores.items()}
        parts.append((best[:, is_token], targets[is_token], scores, streams[:, is_token][:, :num_new]))
    if not parts:
        raise ValueError("the text has no tokens")
    best, targets, scores, streams = zip(*parts)
    scores = {name: np.concatenate([part[name] for part in scores], axis=1) for name in rules}
    return ExitTrace(np.concatenate(best, 1), np.concatenate(targets), scores, np.concatenate(streams, 1))


@functools.partial(jax.jit, static_argnames=("model", "exits"))
def _trace(model, params, tokens, inputs, rules, exits):
    sites = [(Site(layer, "resid_pre"), Site(layer, "resid_post")) for layer in exits]
    last = Site(model.config.num_layers - 1, "resid_post")
    _, values = run(model, params, tokens, capture=[last, *(site for pair in sites for site in pair)], **inputs)
    flat = lambda x: x.reshape(tokens.size, -1)
    lens = lambda x: model.apply({"params": params}, x, method="lens")
    unflat = lambda x: x.reshape(*tokens.shape, *x.shape[1:])
    best, scores = [], {name: [] for name in rules}
    for i, (before, after) in enumerate(sites):
        best.append(jnp.argmax(lens(values[after]), axis=-1))
        for name, rule in rules.items():
            scores[name].append(unflat(rule.scores(i, flat(values[after]), flat(values[before]), lens)))
    best.append(jnp.argmax(lens(values[last]), axis=-1))
    streams = jnp.stack([values[after] for _, after in sites]).astype(jnp.float32)
    return jnp.stack(best), {name: jnp.stack(x) for name, x in scores.items()}, streams


def first_exits(scores: Float[Array, "E n"], thresholds: Float[Array, "E"]) -> Int[np.ndarray, "n"]:
    """The first exit at which each token's score is above the threshold, or E."""
    is_above = np.asarray(scores) > np.asarray(thresholds)[:, None]
    return np.where(is_above.any(axis=0), is_above.argmax(axis=0), len(is_above))


def oracle_exits(agrees: Bool[Array, "E n"]) -> Int[np.ndarray, "n"]:
    """The first exit from which on every exit has the best token of full depth, or E: what no rule can know."""
    return len(agrees) - np.logical_and.accumulate(np.asarray(agrees)[::-1], axis=0).sum(axis=0)


def calibrate(
    scores: Float[Array, "E n"],
    agrees: Bool[Array, "E n"],
    depths: Int[Array, "E+1"],
    *,
    target: float = 0.01,
    confidence: float = 0.95,
    score_cost: float = 0.0,
    seed: int = 0,
) -> Float[np.ndarray, "E"]:
    """Thresholds that save the most layers while at most a share `target` of the tokens changes.

    With one half of the tokens a monotone function from each exit's score to the probability of agreement is fitted
    (isotonic regression), so that exits can be compared; one limit on that probability, the same for all exits, is then
    chosen with the other half: the lowest of its kind whose disagreement is at most `target` with the confidence.
    The limits are tried from the strictest on, up to the first that fails, so the confidence needs no correction for
    how many were tried (fixed sequence testing, as in Schuster et al., 2022). It holds for tokens drawn independently
    from the same source; tokens of a text are not quite.

    Where a score itself costs time, exits that would cost more of it than they save, by the first half, are given up
    before, one after the other, the worst first.

    Args:
      scores: of tokens at exits; agrees: whether their best tokens there are those of full depth.
      depths: layers of each exit, and L.
      target, confidence: see above; seed: of the halves.
      score_cost: of one score at one exit, in layers; see `score_cost` of exit_rules.

    Returns:
      Thresholds; inf for exits that are never taken.

    Raises:
      ImportError: scikit-learn is missing.
      ValueError: for shapes or shares that do not fit.
    """
    try:
        from sklearn.isotonic import IsotonicRegression
    except ImportError as error:
        raise ImportError("calibration needs scikit-learn; run: pip install path-jax[interp]") from error
    scores, agrees, depths = np.asarray(scores, np.float64), np.asarray(agrees, bool), np.asarray(depths)
    if scores.shape != agrees.shape or scores.ndim != 2 or len(depths) != len(scores) + 1:
        raise ValueError(
            f"scores {scores.shape}, agrees {agrees.shape}, depths {depths.shape}: not [E, n], and [E + 1]"
        )
    if not 0 < target < 1 or not 0 < confidence < 1:
        raise ValueError(f"{target=} and {confidence=} must be in (0, 1)")
    if not score_cost >= 0:
        raise ValueError(f"{score_cost=} must be at least 0")
    order = np.random.default_rng(seed).permutation(scores.shape[1])
    fitting, choosing = order[: len(order) // 2], order[len(order) // 2 :]
    if len(fitting) < 20:
        raise ValueError(f"{scores.shape[1]} tokens are too few to choose thresholds by")
    fits = [
        IsotonicRegression(out_of_bounds="clip").fit(score[fitting], agree[fitting])
        for score, agree in zip(scores, agrees)
    ]
    probabilities = np.stack([fit.predict(score) for fit, score in zip(fits, scores)])
    # Where the fit is flat, the higher score is the more probable one.
    probabilities += 1e-6 * np.argsort(np.argsort(scores, axis=1, kind="stable"), axis=1) / scores.shape[1]
    half = lambda some: (scores[:, some], probabilities[:, some], agrees[:, some])
    is_used = np.ones(len(fits), bool)
    if score_cost:
        thresholds = _lowest_thresholds(*half(fitting), is_used, target, confidence)
        is_used = _is_worthwhile(scores[:, fitting], thresholds, depths, score_cost)
    return _lowest_thresholds(*half(choosing), is_used, target, confidence)


def _lowest_thresholds(scores, probabilities, agrees, is_used, target, confidence) -> Float[np.ndarray, "E"]:
    """Thresholds of the exits in use for the lowest limit that keeps to the target, infinite for the others."""
    from scipy import stats  # slow to import

    num_exits, num_tokens = scores.shape
    agrees = np.concatenate([agrees, np.ones((1, num_tokens), bool)])
    thresholds, limits = np.full(num_exits, np.inf), np.unique(probabilities[is_used])
    for limit in limits[np.linspace(len(limits) - 1, 0, min(len(limits), _MAX_LIMITS)).round().astype(int)]:
        leaves = (probabilities >= limit) & is_used[:, None]
        exits = np.where(leaves.any(axis=0), leaves.argmax(axis=0), num_exits)
        num_wrong = int((~agrees[exits, np.arange(num_tokens)]).sum())
        if num_wrong == num_tokens or stats.beta.ppf(confidence, num_wrong + 1, num_tokens - num_wrong) > target:
            break
        lowest = np.where(leaves, scores, np.inf).min(axis=1)
        below = np.nextafter(lowest.astype(np.float32), np.float32(-np.inf))
        thresholds = np.where(np.isfinite(lowest), below, np.inf).astype(np.float64)
    return thresholds


def _is_worthwhile(scores, thresholds, depths, score_cost: float) -> Bool[np.ndarray, "E"]:
    """Exits that pay for their scores."""

    def mean_cost(is_used):
        exits = first_exits(scores, np.where(is_used, thresholds, np.inf))
        num_scores = np.cumsum([*is_used, 0])[exits]
        return (depths[exits] + score_cost * num_scores).mean()

    is_used = np.isfinite(thresholds)
    while is_used.any():
        fewer = [is_used & (np.arange(len(is_used)) != i) for i in np.flatnonzero(is_used)]
        best = min(fewer, key=mean_cost)
        if mean_cost(best) > mean_cost(is_used):
            break
        is_used = best
    return is_used


def summarise_exits(trace: ExitTrace, exits: Int[np.ndarray, "n"], exit_layers: Sequence[int], num_layers: int):
    """The `ExitSummary` of tokens that leave at these exits."""
    from scipy import stats  # slow to import

    layers = np.array([*exit_layers, num_layers - 1])
    chosen = np.take_along_axis(trace.best, exits[None], axis=0)[0]
    num_wrong, has_target = int((chosen != trace.best[-1]).sum()), trace.targets >= 0
    interval = stats.binomtest(num_wrong, len(exits)).proportion_ci(method="exact")
    mean_layer = layers[exits].mean()
    right = lambda ids: float((ids == trace.targets)[has_target].mean()) if has_target.any() else np.nan
    return ExitSummary(
        num_tokens=len(exits),
        disagreement=num_wrong / len(exits),
        disagreement_low=interval.low,
        disagreement_high=interval.high,
        accuracy=right(chosen),
        full_accuracy=right(trace.best[-1]),
        exit_shares=np.bincount(exits, minlength=len(layers)) / len(exits),
        mean_depth=float(mean_layer + 1),
        layer_speedup=float(num_layers / (mean_layer + 1)),
        published_speedup=float(num_layers / mean_layer) if mean_layer else np.inf,
    )
