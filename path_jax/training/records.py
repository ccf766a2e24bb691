"""The files of records of a run, written by process 0 alone, which outlive a full disk."""

import sys
from pathlib import Path

from path_jax.metrics import MetricsFile
from path_jax.parallel import cluster


class Records:
    """A MetricsFile on process 0, and records in memory only elsewhere.

    A record that cannot be written is reported in one line, once, and written with a later one.

    Args:
      path: of the file; step: the run's, records after it are dropped.
    """

    def __init__(self, path: Path, step: int):
        self._path, self._written, self._waiting = path, step, []
        self._file = MetricsFile(path, step) if cluster.is_first() else None
        self.records = list(self._file.records) if self._file else []

    def append(self, record: dict) -> None:
        """Adds a record, which has `step`."""
        self.records.append(record)
        if not cluster.is_first():
            return
        is_behind = bool(self._waiting)
        self._waiting.append(record)
        try:
            self._write()
        except OSError as error:
            self._file = None  # it may end in part of a record, which opening it again drops
            if not is_behind:
                print(
                    f"{self._path} cannot be written ({error.strerror}); trying on with every record", file=sys.stderr
                )

    def close(self) -> None:
        """Writes what could not be written before.

        Raises:
          OSError: if it still cannot.
        """
        if cluster.is_first():
            self._write()
            self._file.close()

    def _write(self):
        self._file = self._file or MetricsFile(self._path, self._written)
        while self._waiting:
            self._file.append(self._waiting[0])
            self._written = self._waiting.pop(0)["step"]
