"""From a synthetic task to batches."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from path_jax.data.associative_recall import AssociativeRecall
from path_jax.data.batch import Batch
from path_jax.data.boxes import Boxes
from path_jax.data.code_variables import CodeVariables
from path_jax.data.examples import Examples, Task
from path_jax.data.flip_flop import FlipFlop
from path_jax.data.group_words import GroupWords
from path_jax.data.motif import Motif
from path_jax.data.recall import MultiQueryRecall, RepeatedRecall
from path_jax.data.records import Records
from path_jax.data.treecall import Treecall

TASKS = {
    "flip_flop": FlipFlop,
    "group_words": GroupWords,
    "mqrar": RepeatedRecall,
    "mqar": MultiQueryRecall,
    "code_variables": CodeVariables,
    "boxes": Boxes,
    "ar": AssociativeRecall,
    "atr": Treecall,
    "records": Records,
    "motif": Motif,
}


def make_task(name: str, length: int, options: Mapping[str, Any]) -> Task:
    """The task with these settings.

    Raises:
      ValueError: for an unknown task or setting, or a value that does not fit.
    """
    if name not in TASKS:
        raise ValueError(f"task {name!r} is unknown; choose from {', '.join(TASKS)}")
    known = [field.name for field in dataclasses.fields(TASKS[name]) if field.name != "length"]
    if unknown := sorted(set(options) - set(known)):
        raise ValueError(f"task {name} has no {', '.join(unknown)}; it has {', '.join(known)}")
    try:
        return TASKS[name](length=length, **options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"task {name}: {error}") from error


@dataclasses.dataclass(frozen=True)
class TaskStream:
    """One endless side of a task, examples 0, 1, 2, ...

    Attributes:
      task: the task.
      seed: of the run; is_heldout: the other side draws from a series of its own.
    """

    task: Task
    seed: int
    is_heldout: bool = False

    def examples(self, index: np.ndarray) -> Examples:
        """Examples by number."""
        return self.task.examples(2 * self.seed + self.is_heldout, index)

    def batch(self, index: np.ndarray) -> Batch:
        """A batch of the examples with these numbers."""
        return as_batch(self.examples(index))


def as_batch(examples: Examples) -> Batch:
    """Every row is one document."""
    is_there = examples.tokens >= 0
    positions = np.broadcast_to(np.arange(examples.tokens.shape[1], dtype=np.int32), is_there.shape)
    return Batch(
        tokens=np.maximum(examples.tokens, 0),
        targets=np.where(is_there, examples.targets, 0),
        weights=examples.weights,
        segment_ids=is_there.astype(np.int32),
        positions=np.where(is_there, positions, 0),
    )
