"""A run killed at random moments ends exactly like one left alone."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

SCRIPT = Path(__file__).with_name("interrupted_run.py")
ROOT = SCRIPT.parents[2]
NUM_STEPS, SAVE_EVERY = 96, 9


def start(workdir):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
    command = [sys.executable, str(SCRIPT), str(workdir), str(NUM_STEPS), str(SAVE_EVERY)]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)


def finish(process):
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors


def num_records(workdir):
    path = workdir / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait_for_records(process, workdir, count):
    while num_records(workdir) < count and process.poll() is None:
        time.sleep(0.01)
    assert process.poll() is None, process.stderr.read()


def outcome(workdir):
    """Records without their times, and the final state."""
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    for record in records:
        del record["step_seconds"]
    with ocp.StandardCheckpointer() as checkpointer:
        state = checkpointer.restore((workdir / "checkpoints" / str(NUM_STEPS) / "state").absolute())
    return records, state


def assert_same(left, right):
    assert left[0] == right[0]
    assert [record["step"] for record in left[0]] == list(range(1, NUM_STEPS + 1))
    jax.tree.map(np.testing.assert_array_equal, left[1], right[1])


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("undisturbed")
    finish(start(workdir))
    return outcome(workdir)


def interrupt(workdir, sent, rng):
    """Starts a run and signals it after a random number of further steps and a random delay."""
    process = start(workdir)
    already = num_records(workdir)
    wait_for_records(process, workdir, 1)
    if already:  # resuming drops the records after the checkpoint first
        time.sleep(rng.uniform(1, 3))
    wait_for_records(process, workdir, min(num_records(workdir) + rng.randrange(1, NUM_STEPS // 8), NUM_STEPS - 40))
    time.sleep(rng.uniform(0, 0.05))
    process.send_signal(sent)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == (-signal.SIGKILL if sent == signal.SIGKILL else 0), errors


@pytest.mark.parametrize(
    "sent, times",
    [
        pytest.param(signal.SIGKILL, 1, marks=pytest.mark.slow),
        (signal.SIGTERM, 1),
        pytest.param(signal.SIGKILL, 5, marks=pytest.mark.slow),
    ],
    ids=["kill", "terminate", "kill-5"],
)
def test_interrupted_run_equals_undisturbed(undisturbed, tmp_path, sent, times):
    rng = random.Random(times)
    for _ in range(times):
        interrupt(tmp_path, sent, rng)
        assert num_records(tmp_path) < NUM_STEPS, "the signal came too late to test anything"
    finish(start(tmp_path))
    assert_same(outcome(tmp_path), undisturbed)
