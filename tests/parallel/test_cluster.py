"""What a process is told about its run: flags, environment, schedulers; and what it says when that does not fit."""

import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from jax._src.clusters import ClusterEnv

from path_jax.parallel import cluster
from path_jax.parallel.cluster import settings

ROOT = Path(__file__).parents[2]
SLURM = {
    "SLURM_JOB_ID": "1234",
    "SLURM_STEP_NODELIST": "node[007-010],login1",
    "SLURM_NTASKS": "8",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
}
VARIABLES = {"JAX_COORDINATOR_ADDRESS": "host-0:1234", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}
EXPLICIT = {"coordinator": "host-0:1234", "num_processes": 4, "process_id": 3}


@pytest.mark.parametrize(
    "flags, environment, expected",
    [
        ((None, None, None), {}, None),
        (("host-0:1234", 4, 3), {}, EXPLICIT),
        ((None, None, None), VARIABLES, EXPLICIT),
        ((None, None, 3), VARIABLES | {"JAX_PROCESS_ID": "0"}, EXPLICIT),  # flags come first
        (("host-0:1234", 4, 3), SLURM, EXPLICIT),
        (("host-0:1234", 1, 0), {}, None),
        (("[::1]:1234", 2, 0), {}, {"coordinator": "[::1]:1234", "num_processes": 2, "process_id": 0}),
        ((None, None, None), SLURM, {}),
        ((None, None, None), SLURM | {"SLURM_NTASKS": "1"}, None),
        ((None, None, None), {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8"}, None),  # a batch script, not srun
        ((None, None, None), {"TPU_WORKER_HOSTNAMES": "a,b"}, {}),
        ((None, None, None), {"TPU_WORKER_HOSTNAMES": "a"}, None),
        ((None, None, None), {"MEGASCALE_NUM_SLICES": "2"}, {}),
        (("auto", None, None), {}, {}),
    ],
)
def test_settings(flags, environment, expected):
    assert settings(*flags, environment) == expected


@pytest.mark.parametrize(
    "flags, environment, reason",
    [
        (("host:1", None, None), {}, r"needs --num_processes or \$JAX_NUM_PROCESSES, --process_id or"),
        ((None, 4, 0), {}, r"needs --coordinator or \$JAX_COORDINATOR_ADDRESS, too"),
        (("host:1", 4, 4), {}, r"process_id=4 must be in \[0, num_processes=4\)"),
        (("host", 4, 0), {}, "coordinator 'host' is not host:port"),
        (("host:x", 4, 0), {}, "is not host:port"),
        (("host:99999", 4, 0), {}, "is not host:port"),
        (("auto", 4, 0), {}, "go with an explicit --coordinator"),
        ((None, None, None), VARIABLES | {"JAX_PROCESS_ID": "first"}, r"\$JAX_PROCESS_ID='first' is not a number"),
        ((None, 2, None), SLURM, "go with an explicit --coordinator"),
    ],
)
def test_settings_that_do_not_fit(flags, environment, reason):
    with pytest.raises(ValueError, match=reason):
        settings(*flags, environment)


def test_jax_reads_slurm(monkeypatch):
    """What jax.distributed.initialize() makes of the variables that `settings` leaves to it."""
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("JAX_COORDINATOR_PORT", "4321")
    detected = ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, 10)
    assert detected == ("node007:4321", 8, 5, [1])


def python(program: str, timeout=60):
    return subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=timeout)


JOIN = """
from path_jax.parallel import cluster
with cluster.ending_in_one_line("train.py", (ValueError, OSError)):
    cluster.initialize("127.0.0.1:{port}", 2, {process}, timeout=2)
"""


def test_a_coordinator_that_does_not_answer():
    begin = time.monotonic()
    done = python(JOIN.format(port=1, process=1))
    assert done.returncode == 1 and time.monotonic() - begin < 50
    (line,) = done.stderr.splitlines()
    assert line.startswith("train.py: coordinator 127.0.0.1:1 did not answer within 2 s (")
    assert "is process 0 running" in line


def test_processes_that_do_not_come():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    done = python(JOIN.format(port=port, process=0))
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("process 0 of 2 waited 2 s for the others in vain"), done.stderr


def test_alone_nothing_changes():
    done = []
    cluster.on_first(lambda: done.append(1))
    cluster.check_same("anything", "x")
    assert done and cluster.is_first() and cluster.all_true(True) and not cluster.all_true(False)
    with pytest.raises(ValueError, match="reason"):
        cluster.on_first(lambda: (_ for _ in ()).throw(ValueError("reason")))
    with pytest.raises(SystemExit, match="train.py: one line"):
        with cluster.ending_in_one_line("train.py", (ValueError,)):
            raise ValueError("one\nline")
    with pytest.raises(KeyError), cluster.ending_in_one_line("train.py", (ValueError,)):
        raise KeyError
