"""Errors of a model on a synthetic task, by variant and level, with intervals."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from path_jax.data import TaskStream, as_batch
from path_jax.models import DecoderLM


def wilson_interval(errors: int, scored: int) -> tuple[float, float]:
    """95 % confidence interval of a proportion (Wilson, 1927); meaningful for no errors too."""
    z2 = 1.959964**2
    center = (errors + z2 / 2) / (scored + z2)
    half = math.sqrt(z2 * (errors * (scored - errors) / scored + z2 / 4)) / (scored + z2)
    return max(center - half, 0.0), min(center + half, 1.0)


class TaskAccuracy:
    """Share of the scored positions at which the likeliest token is not the answer.

    Calling the object with parameters returns, for each variant of the task, `VARIANT/error` with its 95 % confidence
    interval `VARIANT/error_low`, `VARIANT/error_high`, the counts `VARIANT/errors` and `VARIANT/scored`, and the error
    of each level that occurs, `VARIANT/error/LEVEL`. The interval is that of independent answers.

    Args:
      model: The language model.
      stream: The held-out side of a task.
      num_scored: Positions to score at least, in each variant.
      batch_size: Rows per forward pass.

    Raises:
      ValueError: for a number out of range, or a corpus that is not a task.
    """

    def __init__(self, model: DecoderLM, stream: TaskStream, *, num_scored: int = 10_000, batch_size: int = 64):
        if not isinstance(stream, TaskStream):
            raise ValueError("it scores a synthetic task, and this run's data is text")
        for name, value in (("num_scored", num_scored), ("batch_size", batch_size)):
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        self._stream, self._num_scored, self._batch_size = stream, num_scored, batch_size
        self._find_wrong = _make_find_wrong(model)

    def __call__(self, params: Mapping[str, Any]) -> dict[str, float]:
        """See the class."""
        metrics: dict[str, float] = {}
        for name, task in self._stream.task.variants().items():
            errors, scored = self._count(params, task)
            low, high = wilson_interval(errors.sum(), scored.sum())
            metrics |= {
                f"{name}/error": errors.sum() / scored.sum(),
                f"{name}/error_low": low,
                f"{name}/error_high": high,
                f"{name}/errors": errors.sum(),
                f"{name}/scored": scored.sum(),
            }
            rates = zip(task.levels, errors, scored)
            metrics |= {f"{name}/error/{level}": wrong / count for level, wrong, count in rates if count}
        return metrics

    def _count(self, params, task):
        """Wrong answers and answers by level, int64 [levels] each."""
        stream = TaskStream(task, self._stream.seed, self._stream.is_heldout)
        errors = scored = np.zeros(len(task.levels), np.int64)
        start = 0
        while scored.sum() < self._num_scored:
            examples = stream.examples(np.arange(start, start + self._batch_size))
            start += self._batch_size
            is_wrong = np.asarray(self._find_wrong(params, as_batch(examples)))
            is_scored = examples.weights > 0
            if not is_scored.any():
                raise ValueError(f"no position of {task} is scored")
            count = lambda mask: np.bincount(examples.level[mask], minlength=len(task.levels))
            errors, scored = errors + count(is_scored & is_wrong), scored + count(is_scored)
        return errors, scored


def _make_find_wrong(model: DecoderLM) -> Callable:
    @jax.jit
    def find_wrong(params, batch):
        out = model.apply({"params": params}, batch.tokens, positions=batch.positions, segment_ids=batch.segment_ids)
        return jnp.argmax(out.logits, axis=-1) != batch.targets

    return find_wrong
