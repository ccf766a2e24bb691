"""Which rank a model is deciding at a layer, and how well a linear classifier reads that off its residual stream.

If a model decides on its best token first, then on the second best and so on, it works on rank i from 1 + the layer at
which rank i - 1 saturates up to the layer at which rank i does. Axes: k ranks, n tokens, m samples, L layers from 0,
c classes; layers as in `saturation`, residual streams after each of them.

Published code, which `as_published=True` follows, differs: ranks out of order give one residual stream several labels,
a rank that is the same in all layers is in progress in all that remain, and one token's layers are both in training
and test. Not repeated: it applies the filter `is_early` to the layers alone, so that streams of other tokens meet the
labels. Whoever wants the filter chooses from both: streams[:, is_kept], layers[:, is_kept].

Source: Lioubashevski et al., "Looking beyond the top-1: Transformers determine top tokens in order", 2024 (arXiv
2410.20210), and its code beyond_top1.

Not supported: other classifiers. Runs on the host but for the model and `TransitionProbe`.
"""

from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


class Transitions(NamedTuple):
    """Samples: after this layer, of this token, this rank is in progress."""

    layer: Int[np.ndarray, "m"]
    token: Int[np.ndarray, "m"]
    rank: Int[np.ndarray, "m"]


class TransitionProbe(NamedTuple):
    """One-vs-rest logistic regression on standardised residual streams; a pytree, for NumPy and inside `jax.jit`."""

    mean: Float[Array, "D"]
    scale: Float[Array, "D"]
    weights: Float[Array, "c D"]
    bias: Float[Array, "c"]
    classes: Int[Array, "c"]  # ranks

    def log_odds(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch c"]:
        """Of each class against the rest, float32."""
        x = (jnp.asarray(x, jnp.float32) - self.mean) / self.scale
        return jnp.matmul(x, jnp.asarray(self.weights).T, precision="highest") + self.bias

    def probabilities(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch c"]:
        """Sigmoids of the log odds, divided by their sum as scikit-learn does."""
        return jax.nn.softmax(jax.nn.log_sigmoid(self.log_odds(x)))  # the same, without 0 / 0

    def save(self, path: str | Path) -> None:
        """Writes it as .npz, to this very path."""
        with open(path, "wb") as file:
            np.savez(file, **{name: np.asarray(x) for name, x in self._asdict().items()})

    @classmethod
    def load(cls, path: str | Path) -> "TransitionProbe":
        """Reads what `save` wrote.

        Raises:
          ValueError: if the file has other arrays.
        """
        with np.load(path, allow_pickle=False) as file:
            if set(file.files) != set(cls._fields):
                raise ValueError(f"{path} has {', '.join(file.files)}, a probe has {', '.join(cls._fields)}")
            return cls(**file)


class ProbeReport(NamedTuple):
    """How well a probe reads the rank in progress, on tokens that it was not fitted to.

    Balanced accuracy is the mean over classes of the share of a class that is recognised. Controls are balanced
    accuracies too. `gaussian`, the published one, has random features, normal with the mean and standard deviation of
    the sample's class, over samples and dimensions. `shuffled` permutes the labels within each layer.
    """

    balanced_accuracy: float  # mean over folds
    balanced_accuracy_std: float  # over folds; published divided by sqrt(folds)
    class_accuracy: Float[np.ndarray, "c"]  # share of each class that is recognised, mean over folds
    class_auc: Float[np.ndarray, "c"]  # area under the ROC curve of each class against the rest, mean over folds
    confusion: Int[np.ndarray, "c c"]  # number of samples by class and predicted class, of all folds
    layer_accuracy: dict[int, float]  # {layer: balanced accuracy there, over the classes it has}
    counts: Int[np.ndarray, "c"]  # samples
    chance: float  # 1 / c, what a constant guess gives
    layer_chance: float  # the most that a guess from the layer's number gives; above chance where layers lack classes
    gaussian: float
    shuffled: float


def rank_in_progress(
    layers: Int[np.ndarray, "k n"], num_layers: int, *, first_layer: int | None = None, as_published: bool = False
) -> Transitions:
    """The rank that is in progress at each layer of each token; none once all have saturated.

    Rank 0 is in progress from the start. A token ends before its first rank that does not saturate after the better
    one, so each of its layers has one rank.

    Args:
      layers: of `saturation_layers`, with the same option. Without it, L counts as 0: the same in all layers.
      first_layer: leaves out earlier ones; by default min(5, L // 4), the published 5 for 20 layers and more.
      as_published: take every rank that saturates after the better one, whatever came before, but none that saturates
        at `first_layer` itself; L, the same in all layers, counts as saturating at the last one.

    Returns:
      Samples by layer, then rank, then token.

    Raises:
      ValueError: if the layers or the first one do not fit.
    """
    layers = np.asarray(layers)
    if layers.ndim != 2 or not len(layers) or not np.issubdtype(layers.dtype, np.integer):
        raise ValueError(f"layers are {layers.dtype} {layers.shape}, not integers of some ranks and tokens [k, n]")
    if layers.size and not 0 <= layers.min() <= layers.max() <= num_layers:
        raise ValueError(f"layers are {layers.min()} ... {layers.max()}, but the model has {num_layers}")
    if first_layer is None:
        first_layer = min(5, num_layers // 4)
    if not 0 <= first_layer < num_layers:
        raise ValueError(f"{first_layer=} is not among the model's {num_layers}")
    if not as_published:
        layers = layers % num_layers
    starts = np.concatenate([np.zeros_like(layers[:1]), layers[:-1] + 1])
    if as_published:
        takes_part = layers > first_layer
    else:
        takes_part = np.logical_and.accumulate(layers >= starts, axis=0)
    layer = np.arange(first_layer, num_layers)[:, None, None]
    layer, rank, token = np.nonzero(takes_part & (starts <= layer) & (layer <= layers))
    return Transitions(layer + first_layer, token, rank)


def balance(
    transitions: Transitions,
    *,
    min_count: int = 5,
    max_samples: int | None = None,
    seed: int = 0,
    as_published: bool = False,
) -> Transitions:
    """A part of the samples in which each layer has as many of every rank that it has at all.

    So a layer's number tells which ranks are possible there, but not which of them it is.

    Args:
      min_count: ranks with fewer samples at a layer are left out there; so are layers with fewer than two ranks left.
      max_samples: takes at most so many, the same share of every layer.
      seed: of the random choice.
      as_published: take the first samples instead of random ones, and leave out layers where any of the ranks has too
        few, so that the layer tells nothing. The two agree where no layer lacks a rank.
    """
    rng, all_ranks = np.random.default_rng(seed), np.unique(transitions.rank)
    classes = []  # indices of the samples of one rank at one layer, and how many of them stay
    for layer in np.unique(transitions.layer):
        here = np.flatnonzero(transitions.layer == layer)
        ranks = [here[transitions.rank[here] == rank] for rank in all_ranks]
        enough = [rank for rank in ranks if len(rank) >= min_count]
        if len(enough) > 1 and not (as_published and len(enough) < len(all_ranks)):
            classes += [(rank, min(map(len, enough))) for rank in enough]
    total = sum(size for _, size in classes)
    share = 1 if max_samples is None else min(1, max_samples / max(total, 1))
    chosen = [
        rank[: int(share * size)] if as_published else rng.choice(rank, int(share * size), replace=False)
        for rank, size in classes
    ]
    chosen = np.sort(np.concatenate([np.zeros(0, int), *chosen]))
    return Transitions(*(x[chosen] for x in transitions))


def fit_transition_probe(
    streams: Float[Array, "L n D"],
    layers: Int[np.ndarray, "k n"],
    *,
    groups: Int[np.ndarray, "n"] | None = None,
    folds: int = 5,
    seed: int = 0,
    first_layer: int | None = None,
    min_count: int = 5,
    max_samples: int | None = 20_000,
    as_published: bool = False,
) -> tuple[TransitionProbe, ProbeReport]:
    """Fits a probe of the rank in progress to all samples, and reports how well such probes do in a cross-validation.

    Args:
      streams: residual streams after every layer of the tokens that `layers` is of.
      groups: what stays on one side of the cross-validation, such as a token's text; every token for itself by default.
      folds: of the cross-validation, at least 2; seed: of these, the balance and the controls.
      first_layer: see `rank_in_progress`; min_count, max_samples: see `balance`.
      as_published: see these; and folds of samples, whatever token they are of.

    Returns:
      (the probe, the report).

    Raises:
      ImportError: scikit-learn is missing.
      ValueError: if shapes do not fit, or there are too few samples.
    """
    try:
        from sklearn.metrics import roc_auc_score
    except ImportError as error:
        raise ImportError("probes need scikit-learn; run: pip install path-jax[interp]") from error

    streams, layers = np.asarray(streams), np.asarray(layers)
    if streams.ndim != 3 or layers.ndim != 2 or streams.shape[1] != layers.shape[1]:
        raise ValueError(f"streams {streams.shape} and layers {layers.shape} are not [L, n, D] and [k, n]")
    groups = np.arange(layers.shape[1]) if groups is None else np.asarray(groups)
    if groups.shape != layers.shape[1:]:
        raise ValueError(f"groups are {groups.shape}, not one for each of {layers.shape[1]} tokens")
    if folds < 2:
        raise ValueError(f"{folds=} must be at least 2")
    samples = rank_in_progress(layers, len(streams), first_layer=first_layer, as_published=as_published)
    samples = balance(samples, min_count=min_count, max_samples=max_samples, seed=seed, as_published=as_published)
    ranks, labels, counts = np.unique(samples.rank, return_inverse=True, return_counts=True)
    groups = None if as_published else groups[samples.token]
    num_groups = len(labels) if groups is None else len(np.unique(groups))
    if len(ranks) < 2 or min(*counts, num_groups) < folds:
        raise ValueError(
            f"{folds} folds need as many samples of each of two ranks or more, and as many groups; there are "
            f"{dict(zip(ranks.tolist(), counts.tolist()))} samples by rank and {num_groups} groups"
        )
    features = np.asarray(streams[samples.layer, samples.token], np.float32)

    rng = np.random.default_rng(seed)
    noise, shuffled = np.empty_like(features), np.empty_like(labels)
    for i in range(len(ranks)):
        of_rank = features[labels == i]
        noise[labels == i] = rng.normal(of_rank.mean(), of_rank.std(), of_rank.shape)
    for layer in np.unique(samples.layer):
        shuffled[samples.layer == layer] = rng.permutation(labels[samples.layer == layer])

    def control(features, labels):
        fold, probabilities = _cross_validated(features, labels, ranks, groups, folds, seed)
        return float(_balanced(_confusions(fold, labels, probabilities)).mean())

    fold, probabilities = _cross_validated(features, labels, ranks, groups, folds, seed)
    confusions, by_layer = (_confusions(part, labels, probabilities) for part in (fold, samples.layer))
    accuracies, num_at_layer = _balanced(confusions), by_layer.sum(axis=2)
    aucs = np.full((folds, len(ranks)), np.nan)
    for f, i in np.ndindex(aucs.shape):
        if 0 < (is_rank := labels[fold == f] == i).sum() < len(is_rank):
            aucs[f, i] = roc_auc_score(is_rank, probabilities[fold == f, i])
    report = ProbeReport(
        balanced_accuracy=float(accuracies.mean()),
        balanced_accuracy_std=float(accuracies.std()),
        class_accuracy=np.nanmean(_recalls(confusions), axis=0),
        class_auc=np.nanmean(aucs, axis=0),
        confusion=confusions.sum(axis=0),
        layer_accuracy={int(layer): float(_balanced(by_layer[layer])) for layer in np.unique(samples.layer)},
        counts=counts,
        chance=1 / len(ranks),
        layer_chance=float((num_at_layer / counts).max(axis=1).sum() / len(ranks)),
        gaussian=control(noise, labels),
        shuffled=control(features, shuffled),
    )
    return _fitted(features, ranks[labels]), report


_probabilities = jax.jit(TransitionProbe.probabilities)


def _fitted(features, ranks) -> TransitionProbe:
    from sklearn.linear_model import LogisticRegression
    from sklearn.multiclass import OneVsRestClassifier
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(features)
    probe = OneVsRestClassifier(LogisticRegression(max_iter=1000)).fit(scaler.transform(features), ranks)
    weights = np.concatenate([estimator.coef_ for estimator in probe.estimators_])
    bias = np.concatenate([estimator.intercept_ for estimator in probe.estimators_])
    if len(probe.classes_) == 2:  # one estimator, of the second class against the first
        weights, bias = np.concatenate([-weights, weights]), np.concatenate([-bias, bias])
    arrays = (x.astype(np.float32) for x in (scaler.mean_, scaler.scale_, weights, bias))
    return TransitionProbe(*arrays, probe.classes_)


def _cross_validated(features, labels, ranks, groups, folds, seed):
    """Each sample's fold, and its probabilities [m, c] by the probe that was fitted without this fold."""
    from sklearn.model_selection import KFold, StratifiedGroupKFold

    split = (KFold if groups is None else StratifiedGroupKFold)(folds, shuffle=True, random_state=seed)
    fold, probabilities = np.zeros(len(labels), int), np.zeros((len(labels), len(ranks)))
    for i, (train, test) in enumerate(split.split(features, labels, groups)):
        if missing := set(range(len(ranks))) - set(labels[train]):
            raise ValueError(f"all samples of rank {ranks[min(missing)]} are in one fold; take more tokens")
        fold[test] = i
        # Of all samples, so that one shape is compiled, and not one for each fold.
        probabilities[test] = _probabilities(_fitted(features[train], ranks[labels[train]]), features)[test]
    return fold, probabilities


def _confusions(part, labels, probabilities) -> Int[np.ndarray, "parts c c"]:
    """Samples of each part by class and predicted class."""
    counts = np.zeros((part.max() + 1, *[probabilities.shape[1]] * 2), int)
    np.add.at(counts, (part, labels, probabilities.argmax(axis=1)), 1)
    return counts


def _recalls(confusions: Int[np.ndarray, "*parts c c"]) -> Float[np.ndarray, "*parts c"]:
    """Share of each class that is recognised; NaN for a class without samples."""
    with np.errstate(invalid="ignore"):
        return np.diagonal(confusions, axis1=-2, axis2=-1) / confusions.sum(axis=-1)


def _balanced(confusions: Int[np.ndarray, "*parts c c"]) -> Float[np.ndarray, "*parts"]:
    """Balanced accuracy, over the classes that a part has."""
    return np.nanmean(_recalls(confusions), axis=-1)
