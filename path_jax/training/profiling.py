"""A window of steps traced by JAX's profiler."""

from pathlib import Path

import jax

from path_jax.training.experiment import TrainConfig


class ProfilerWindow:
    """Traces `profile_steps` steps from `profile_start` on into workdir/profile."""

    def __init__(self, train: TrainConfig, workdir: Path):
        self._first, self._last = train.profile_start, train.profile_start + train.profile_steps
        self._directory, self._is_tracing = str(workdir / "profile"), False

    def __enter__(self):
        return self

    def at(self, step: int) -> None:
        """Called before step `step` (counted from 0)."""
        if (self._first <= step < self._last) != self._is_tracing:
            self.__exit__() if self._is_tracing else jax.profiler.start_trace(self._directory)
            self._is_tracing = self._first <= step < self._last

    def __exit__(self, *_):
        if self._is_tracing:
            jax.profiler.stop_trace()
