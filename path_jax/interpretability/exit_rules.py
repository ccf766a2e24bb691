"""Rules by which a token leaves a model early, and how they are chosen.

A rule gives every token a score at every exit, and lets it leave at the first one where the score is above that exit's
threshold; `path_jax.interpretability.exit_calibration` chooses thresholds by a text. Rules are pytrees, for
`path_jax.models.early_exit.generate_with_exits`.

Axes: E exits, n tokens, D width.

Source: Schuster et al., "Confident adaptive language modeling", 2022 (arXiv 2207.07061): softmax gap and similarity of
hidden states; Lioubashevski et al., 2024 (arXiv 2410.20210): a probe for the rank that is being decided. The published
code of the latter counts layers only, and lets its rules edit one array in turn; here each rule stands for itself.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from path_jax.models.config import ModelConfig
from path_jax.models.sampling import largest


class _Rule:
    """Leaves where the score is above the exit's threshold."""

    def __call__(self, exit, x, before, lens):
        return self.scores(exit, x, before, lens) > self.thresholds[exit]

    def with_thresholds(self, thresholds: Sequence[float]):
        """The same scores, other thresholds."""
        return self.replace(thresholds=jnp.asarray(thresholds, jnp.float32))

    def without_unused(self, exit_layers: Sequence[int]) -> tuple["Rule", list[int]]:
        """The rule for the exits with a finite threshold alone, and their layers."""
        used = np.flatnonzero(np.isfinite(self.thresholds))
        return jax.tree.map(lambda x: x[used], self), [exit_layers[i] for i in used]


@flax.struct.dataclass
class GapRule(_Rule):
    """Score: how far the likeliest token's probability is above the second one's by the logit lens.

    Costs a product with the whole vocabulary at every exit.
    """

    thresholds: Float[Array, "E"]

    def scores(self, exit, x, before, lens) -> Float[Array, "n"]:
        """In 0 ... 1."""
        del exit, before
        probabilities = largest(jax.nn.softmax(lens(x)), 2)[0]
        return probabilities[:, 0] - probabilities[:, 1]


@flax.struct.dataclass
class SimilarityRule(_Rule):
    """Score: cosine between the residual stream before and after the last layer of the exit."""

    thresholds: Float[Array, "E"]

    def scores(self, exit, x, before, lens) -> Float[Array, "n"]:
        """In -1 ... 1."""
        del exit, lens
        x, before = x.astype(jnp.float32), before.astype(jnp.float32)
        norms = jnp.linalg.norm(x, axis=-1) * jnp.linalg.norm(before, axis=-1)
        return (x * before).sum(axis=-1) / jnp.maximum(norms, 1e-30)


@flax.struct.dataclass
class LinearRule(_Rule):
    """Score: a linear function of the residual stream, one for each exit.

    Fitted by `settled_rule` to whether the best token is that of full depth, or the log-odds of a transition probe.
    """

    thresholds: Float[Array, "E"]
    weights: Float[Array, "E D"]
    bias: Float[Array, "E"]

    def scores(self, exit, x, before, lens) -> Float[Array, "n"]:
        """Log-odds."""
        del before, lens
        return x.astype(jnp.float32) @ self.weights[exit] + self.bias[exit]


Rule = GapRule | SimilarityRule | LinearRule
_KINDS = {"gap": GapRule, "similarity": SimilarityRule, "linear": LinearRule}


def score_cost(rule: Rule, config: ModelConfig, params) -> float:
    """Multiplications of a score over those of a layer: the vocabulary's for a gap; other rules' are few.

    Args:
      config, params: of the model, unrolled or scanned.
    """
    if not isinstance(rule, GapRule):
        return 0.0
    layers = {name: x for name, x in params.items() if name.startswith("layers")}
    layer_size = sum(x.size for x in jax.tree.leaves(layers)) / config.num_layers
    return config.vocab_size * config.embed_dim / layer_size


def settled_rule(streams: Float[Array, "E n D"], agrees: Bool[Array, "E n"], *, strength: float = 1.0) -> LinearRule:
    """Fits at each exit a logistic regression of whether the best token there is already that of full depth.

    Thresholds are infinite: no token leaves until they are chosen. An exit at which all tokens agree, or none does, has
    a score without weights.

    Args:
      streams: residual streams at the exits; agrees: whether their best tokens are those of full depth.
      strength: of the L2 penalty on weights of standardised features.

    Raises:
      ImportError: scikit-learn is missing.
      ValueError: if the shapes do not fit.
    """
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError as error:
        raise ImportError("a fitted exit rule needs scikit-learn; run: pip install path-jax[interp]") from error

    streams, agrees = np.asarray(streams, np.float32), np.asarray(agrees, bool)
    if streams.ndim != 3 or streams.shape[:2] != agrees.shape or not agrees.size:
        raise ValueError(f"streams {streams.shape} and agrees {agrees.shape} are not [E, n, D] and [E, n]")
    weights, bias = np.zeros((len(streams), streams.shape[2]), np.float32), np.zeros(len(streams), np.float32)
    for i, (x, is_settled) in enumerate(zip(streams, agrees)):
        if is_settled.all() or not is_settled.any():
            bias[i] = 10.0 if is_settled.all() else -10.0  # log-odds beyond what some thousand tokens can show
            continue
        mean, scale = x.mean(axis=0), x.std(axis=0) + 1e-6
        fit = LogisticRegression(C=1 / strength, max_iter=300).fit((x - mean) / scale, is_settled)
        weights[i] = fit.coef_[0] / scale
        bias[i] = fit.intercept_[0] - weights[i] @ mean
    thresholds = jnp.full(len(streams), jnp.inf, jnp.float32)
    return LinearRule(thresholds, jnp.asarray(weights), jnp.asarray(bias))


def save_rule(path: str | os.PathLike[str], rule: Rule, exit_layers: Sequence[int]) -> None:
    """Writes a rule with the layers of its exits as an .npz file."""
    (kind,) = (name for name, cls in _KINDS.items() if isinstance(rule, cls))
    arrays = {name: np.asarray(getattr(rule, name)) for name in type(rule).__dataclass_fields__}
    with Path(path).open("wb") as file:
        np.savez(file, kind=kind, exit_layers=np.asarray(exit_layers, np.int64), **arrays)


def load_rule(path: str | os.PathLike[str]) -> tuple[Rule, list[int]]:
    """A rule that `save_rule` wrote, and the layers of its exits.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if it holds something else.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
        layers, cls = arrays.pop("exit_layers"), _KINDS[str(arrays.pop("kind"))]
        rule = cls(**{name: jnp.asarray(x) for name, x in arrays.items()})
    except (ValueError, KeyError, TypeError, EOFError, OSError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise ValueError(f"{path} is not an exit rule: {error}") from error
    if rule.thresholds.shape != layers.shape or layers.ndim != 1:
        raise ValueError(f"{path} has {rule.thresholds.shape} thresholds for layers {layers.tolist()}")
    return rule, layers.tolist()
