"""A run that no longer moves says where it stands and ends, so that whoever started it can start it again."""

import contextlib
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path


class HangWatchdog:
    """Context manager around a loop of steps; `step_ended` after every step.

    When no step has ended for `seconds`, all Python stacks go to workdir/hang-<process>.txt and to stderr, and the
    process ends with status 1 (or only reports, once, until steps end again). The clock is monotonic. The first step,
    which compiles, has `FIRST_STEP` times as long. A thread that blocks while it holds the interpreter's lock cannot be
    reported; JAX gives the lock up while it waits.

    Args:
      workdir: of the run; process: number of this process.
      seconds: 0 turns it off.
      ends: ends the process with the reason; None to report only.
    """

    FIRST_STEP = 4

    def __init__(self, workdir: Path, process: int, seconds: float, ends: Callable[[str], None] | None):
        self._path = workdir / f"hang-{process}.txt"
        self._process, self._seconds, self._ends = process, seconds, ends
        self._last, self._step, self._limit = time.monotonic(), None, seconds * self.FIRST_STEP
        self._lock, self._closed, self._pauses = threading.Lock(), threading.Event(), 0
        self._has_reported = False
        self._thread = threading.Thread(target=self._watch, name="hang-watchdog", daemon=True)

    def __enter__(self):
        if self._seconds:
            self._thread.start()
        return self

    def __exit__(self, *_):
        self._closed.set()
        if self._seconds:
            self._thread.join()

    def step_ended(self, step: int) -> None:
        """Starts the wait for the step after `step`."""
        with self._lock:
            self._last, self._step, self._limit = time.monotonic(), step, self._seconds
            self._has_reported = False

    @contextlib.contextmanager
    def paused(self):
        """No step is expected to end inside, as during an evaluation."""
        with self._lock:
            self._pauses += 1
        try:
            yield
        finally:
            with self._lock:
                self._pauses -= 1
                self._last = time.monotonic()

    def _watch(self):
        while not self._closed.wait(min(self._seconds / 4, 10.0)):
            with self._lock:
                waited = time.monotonic() - self._last
                is_due = waited > self._limit and not self._pauses and not self._has_reported
                self._has_reported |= is_due
            if is_due:
                self._report(waited)

    def _report(self, waited: float) -> None:
        last = "the first step has not ended" if self._step is None else f"the last was step {self._step}"
        reason = f"no step ended for {waited:.0f} s ({last}); stacks of process {self._process} are in {self._path}"
        try:
            with self._path.open("a") as file:
                file.write(reason + "\n")
                file.flush()  # what follows is written past this file's buffer
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError as error:  # a hung disk may be the cause
            reason += f", which could not be written ({os.strerror(error.errno or 0)})"
        with contextlib.suppress(OSError, ValueError, AttributeError):  # stderr without a file descriptor
            faulthandler.dump_traceback(sys.stderr, all_threads=True)
        if self._ends:
            self._ends(reason)
        else:
            print(reason, file=sys.stderr, flush=True)
