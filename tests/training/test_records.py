"""Records of a run on a disk that is full for a while."""

import errno
import json

import pytest

from path_jax.metrics import MetricsFile
from path_jax.training.records import Records


class Disk:
    """Makes MetricsFile fail while `is_full`, after half of a record where that is possible."""

    def __init__(self, monkeypatch):
        self.is_full, write = False, MetricsFile.append

        def append(file, record):
            if self.is_full:
                with file._file as torn:
                    torn.write(json.dumps(record)[:5])
                raise OSError(errno.ENOSPC, "No space left on device")
            write(file, record)

        monkeypatch.setattr(MetricsFile, "append", append)


def steps(path):
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_records_of_a_full_disk_are_written_later(tmp_path, monkeypatch, capsys):
    disk, records = Disk(monkeypatch), Records(tmp_path / "metrics.jsonl", 0)
    for step in range(1, 8):
        disk.is_full = step in (3, 4, 6)
        records.append({"step": step})
    records.close()
    assert steps(tmp_path / "metrics.jsonl") == list(range(1, 8)) == [record["step"] for record in records.records]
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 2 and all("No space left on device" in line for line in warnings)


def test_a_disk_that_stays_full_is_an_error_at_the_end(tmp_path, monkeypatch):
    disk, records = Disk(monkeypatch), Records(tmp_path / "metrics.jsonl", 0)
    records.append({"step": 1})
    disk.is_full = True
    records.append({"step": 2})
    with pytest.raises(OSError, match="No space left"):
        records.close()
    assert [record.get("step") for record in Records(tmp_path / "metrics.jsonl", 9).records] == [1]


def test_only_the_first_process_writes(tmp_path, monkeypatch):
    monkeypatch.setattr("path_jax.training.records.cluster.is_first", lambda: False)
    records = Records(tmp_path / "metrics.jsonl", 0)
    records.append({"step": 1})
    records.close()
    assert records.records == [{"step": 1}] and not list(tmp_path.iterdir())
