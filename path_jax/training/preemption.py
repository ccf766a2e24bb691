"""Stopping early: SIGTERM, or a platform's notice of preemption, becomes a step after which every process stops."""

import signal
import threading

import jax
from jax.experimental import multihost_utils


class Stop:
    """Context manager around the steps; `before` each of them says whether to stop first.

    A process on its own listens for SIGTERM, which only the main thread can. In a run of several, JAX listens in all of
    them and agrees on a step that none has passed.
    """

    def __init__(self):
        self._is_requested = False
        self._listens = jax.process_count() == 1 and threading.current_thread() is threading.main_thread()

    def __enter__(self):
        if self._listens:
            self._previous = signal.signal(signal.SIGTERM, self._request)
        return self

    def __exit__(self, *_):
        if self._listens:
            signal.signal(signal.SIGTERM, self._previous)

    def before(self, step: int) -> bool:
        """Whether to save and leave after `step` updates; asked once for each step, by every process."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._is_requested

    def _request(self, *_):
        self._is_requested = True
