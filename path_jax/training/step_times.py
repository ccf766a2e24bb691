"""Which host the others wait for."""

import contextlib
import json
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from path_jax.metrics import read_metrics


class StepTimes:
    """Writes how long this process was busy: workdir/steps-<process>.jsonl, one record every `window` steps.

    All processes of a run take the same time for a step, because they wait for each other; the one they wait for is the
    one that spends most of it on its own host: `busy_seconds`, the mean seconds per step between the end of the wait
    for one step and the dispatch of the next, `data_seconds` of them waiting for data. A slow device is not seen
    here, only a slow host. Nothing is sent to other processes.
    """

    def __init__(self, workdir: Path, process: int, window: int = 50):
        self._path, self._process, self._window = workdir / f"steps-{process}.jsonl", process, window
        self._totals = self._count = self._begin = None
        self._reset()

    def add(self, step: int, busy: float, data: float) -> None:
        """Takes the seconds before step `step` (counted from 1)."""
        self._count += 1
        self._totals = (self._totals[0] + busy, self._totals[1] + data)
        if step % self._window == 0:
            self.write(step)

    def write(self, step: int) -> None:
        """Writes what has been gathered."""
        if not self._count:
            return
        record = {
            "step": step,
            "host": socket.gethostname(),
            "process": self._process,
            "steps": self._count,
            "step_seconds": (time.perf_counter() - self._begin) / self._count,
            "busy_seconds": self._totals[0] / self._count,
            "data_seconds": self._totals[1] / self._count,
        }
        with contextlib.suppress(OSError), self._path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        self._reset()

    def _reset(self):
        self._totals, self._count, self._begin = (0.0, 0.0), 0, time.perf_counter()


def slowest_process(workdir: Path, num_processes: int) -> dict[str, float | str] | None:
    """The process with the most busy seconds per step in its last record: {process, host, busy_seconds, ...}.

    Returns None unless all processes have written.
    """
    last = [read_metrics(workdir / f"steps-{process}.jsonl")[-1:] for process in range(num_processes)]
    records: Sequence[Mapping] = [record for records in last for record in records]
    return max(records, key=lambda record: record["busy_seconds"]) if len(records) == num_processes else None
