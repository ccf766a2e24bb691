"""What an intervention is judged by: a number for each row of a batch.

A metric is a function of `LMOutput` that gives an array [B]. Those made here are pytrees (`jax.tree_util.Partial`), so
that a compiled grid takes new answers without being compiled again; any other function works too.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, Float, Int

from path_jax.models import LMOutput

Metric = Callable[[LMOutput], Float[Array, "B"]]


def answer_probability(positions: Int[Array, "B"], answers: Int[Array, "B"]) -> Metric:
    """Probability of the answer where it is predicted: one position per row, that of the token before it."""
    return Partial(_probability, jnp.asarray(positions), jnp.asarray(answers))


def logit_difference(positions: Int[Array, "B"], answers: Int[Array, "B"], others: Int[Array, "B"]) -> Metric:
    """Logit of the answer less that of another token, at one position per row."""
    return Partial(_difference, *map(jnp.asarray, (positions, answers, others)))


def accuracy(positions: Int[Array, "B"], answers: Int[Array, "B"]) -> Metric:
    """1 where the answer has the largest logit at its row's position, else 0."""
    return Partial(_is_largest, jnp.asarray(positions), jnp.asarray(answers))


def attribution_score(
    restored: Float[Array, "*cells B"], corrupted: Float[Array, "B"], clean: Float[Array, "B"], threshold: float = 0.01
) -> Float[Array, "*cells B"]:
    """(restored - corrupted) / (clean - corrupted): how much of what was lost an intervention brings back.

    Args:
      restored: metric of corrupted runs with values of clean runs in them; corrupted, clean: of the runs themselves.
      threshold: rows where clean - corrupted does not exceed it give NaN: nothing was lost. Average with `nanmean`.

    Source: Arora et al., "Mechanistic evaluation of Transformers and state space models", 2025 (arXiv 2505.15105).
    """
    lost = clean - corrupted
    is_kept = lost > threshold
    return jnp.where(is_kept, (restored - corrupted) / jnp.where(is_kept, lost, 1), jnp.nan)


def _at(out: LMOutput, positions):
    return jnp.take_along_axis(out.logits, positions[:, None, None], axis=1)[:, 0]


def _of(values, tokens):
    return jnp.take_along_axis(values, tokens[:, None], axis=1)[:, 0]


def _probability(positions, answers, out):
    return jnp.exp(_of(jax.nn.log_softmax(_at(out, positions)), answers))


def _difference(positions, answers, others, out):
    logits = _at(out, positions)
    return _of(logits, answers) - _of(logits, others)


def _is_largest(positions, answers, out):
    return (_at(out, positions).argmax(axis=-1) == answers).astype(jnp.float32)
