"""Two runs do not share a directory; the lock of a dead process holds nobody up."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from path_jax.training.lock import owned

ROOT = Path(__file__).parents[2]
HOLDER = """
import sys, time
from pathlib import Path
from path_jax.training.lock import owned
with owned(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_directory_in_use_is_refused_until_its_owner_is_dead(tmp_path, holder):
    with pytest.raises(ValueError, match=f"in use by process {holder.pid} on {socket.gethostname()}"):
        with owned(tmp_path):
            pass
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with owned(tmp_path):
        assert json.loads((tmp_path / "lock.json").read_text())["process"] == os.getpid()


def test_it_is_given_back(tmp_path):
    for _ in range(2):
        with pytest.raises(KeyError), owned(tmp_path):
            raise KeyError
    with owned(tmp_path), pytest.raises(ValueError, match="in use"):
        with owned(tmp_path):
            pass


def test_a_file_that_holds_no_owner(tmp_path):
    (tmp_path / "lock.json").write_text("[torn")
    with owned(tmp_path):
        (tmp_path / "lock.json").write_text("[torn")
        with pytest.raises(ValueError, match="in use by another process"), owned(tmp_path):
            pass


def test_a_file_system_without_locks(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("path_jax.training.lock.fcntl.flock", refuse)
    with owned(tmp_path):
        pass
    assert "has no file locks" in capsys.readouterr().err
