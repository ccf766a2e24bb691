"""Several processes train like one, and survive losing one of them."""

import json
import signal
import subprocess
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from training.processes import (
    ROOT,
    batches,
    command,
    environment,
    finish,
    free_port,
    lines,
    losses,
    outcome,
    start,
    succeed,
    wait_for_records,
    write_corpus,
)

SHARDED = "--config.mesh.fsdp=2", "--config.mesh.data=2"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def alone(corpus, tmp_path_factory):
    """A run of one process with one device."""
    workdir = tmp_path_factory.mktemp("alone") / "run"
    succeed(start(corpus, workdir, 1))
    return workdir


def assert_same_outcome(left, right, step):
    (left_records, left_state), (right_records, right_state) = outcome(left, step), outcome(right, step)
    assert left_records == right_records
    jax.tree.map(np.testing.assert_array_equal, left_state, right_state)


def test_two_processes_train_like_one(corpus, alone, tmp_path):
    results = succeed(start(corpus, tmp_path, 2, "--config.train.num_steps=20"))
    np.testing.assert_allclose(losses(tmp_path), losses(alone), rtol=1e-5)
    assert batches(tmp_path) == batches(alone) and len(batches(alone)) == 20
    summaries = [json.loads((path / "summary.json").read_text()) for path in (tmp_path, alone)]
    assert summaries[0]["heldout_bits_per_byte"] == pytest.approx(summaries[1]["heldout_bits_per_byte"], rel=1e-5)
    assert "goodput" in results[0][1] and "goodput" not in results[1][1]  # only process 0 reports
    assert "ETA" in results[0][2] and "ETA" not in results[1][2]
    assert summaries[0]["slowest_process"].startswith(("0 on", "1 on"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "count, devices, mesh",
    [
        (2, 2, dict(data=2, fsdp=2)),
        (2, 2, dict(data=1, fsdp=4)),
        (4, 1, dict(data=2, fsdp=2)),
        (4, 2, dict(data=2, fsdp=2, tensor=2)),
        (4, 2, dict(data=2, fsdp=2, sequence=2)),
        (2, 2, dict(data=2, fsdp=1, sequence=2)),
        (4, 1, dict(data=1, fsdp=2, sequence=2)),
        (4, 1, dict(data=1, fsdp=1, sequence=4)),
    ],
    ids=str,
)
def test_meshes_train_like_one_process(corpus, alone, tmp_path, count, devices, mesh):
    flags = [f"--config.mesh.{axis}={size}" for axis, size in mesh.items()]
    succeed(start(corpus, tmp_path, count, *flags, "--config.train.eval_every=10", devices=devices))
    np.testing.assert_allclose(losses(tmp_path), losses(alone), rtol=1e-5)
    assert batches(tmp_path) == batches(alone)
    assert [record["step"] for record in lines(tmp_path / "evals.jsonl")] == [10]


@pytest.mark.slow
def test_four_then_two_then_one_process(corpus, alone, tmp_path):
    mesh = {4: dict(data=2, fsdp=2), 2: dict(data=1, fsdp=2), 1: dict(data=1, fsdp=1)}
    for count, steps in ((4, 7), (2, 14), (1, 20)):
        flags = [f"--config.mesh.{axis}={size}" for axis, size in mesh[count].items()]
        processes = start(corpus, tmp_path, count, *flags, "--config.train.save_every=2")
        if steps < 20:
            wait_for_records(processes, tmp_path, steps)
            processes[0].send_signal(signal.SIGTERM)
        succeed(processes)
    np.testing.assert_allclose(losses(tmp_path), losses(alone), rtol=1e-5)
    assert batches(tmp_path) == batches(alone) and len(batches(tmp_path)) == 20
    launches = json.loads((tmp_path / "goodput.json").read_text())
    assert [launch["processes"] for launch in launches] == [4, 2, 1]
    assert launches[1]["first_step"] >= 7 and launches[2]["first_step"] >= launches[1]["first_step"]


@pytest.fixture(scope="module")
def undisturbed(corpus, tmp_path_factory):
    """A run of two processes, longer than those that are interrupted can get."""
    workdir = tmp_path_factory.mktemp("undisturbed")
    succeed(start(corpus, workdir, 2, "--config.train.num_steps=60", *SHARDED, devices=2))
    return workdir


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM], ids=["kill", "terminate"])
def test_interrupted_run_equals_undisturbed(corpus, undisturbed, tmp_path, sent, victim):
    begin = lambda: start(corpus, tmp_path, 2, "--config.train.num_steps=60", *SHARDED, devices=2)
    processes = begin()
    wait_for_records(processes, tmp_path, 13)
    processes[victim].send_signal(sent)
    since = time.monotonic()
    results = finish(processes, timeout=60)
    assert time.monotonic() - since < 60
    other = results[1 - victim]
    if sent == signal.SIGTERM:
        assert [status for status, *_ in results] == [0, 0]
        saved = max(int(path.name) for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit())
        assert f"stopped at step {saved}, saved in" in results[0][2] and "stopped at" not in results[1][2]
        assert lines(tmp_path / "metrics.jsonl")[-1]["step"] == saved < 60
    else:
        assert other[0] not in (0, None)
        assert "train.py: the runtime failed" in other[2] or "another task died" in other[2]
    succeed(begin())
    assert_same_outcome(tmp_path, undisturbed, 60)
    assert batches(tmp_path) == batches(undisturbed)


@pytest.mark.slow
def test_the_slow_host_is_named(corpus, tmp_path):
    script = Path(__file__).with_name("slow_host.py")
    results = succeed(start(corpus, tmp_path, 2, "--config.train.log_batches=False", script=script))
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["slowest_process"].startswith("1 on ") and summary["slowest_busy_seconds"] > 0.3
    assert "slowest_process" in results[0][1]
    (fast,), (slow,) = (lines(tmp_path / f"steps-{i}.jsonl") for i in range(2))
    assert slow["data_seconds"] > 0.3 > fast["data_seconds"]
    assert fast["step_seconds"] == pytest.approx(slow["step_seconds"], rel=0.3)  # the fast one waits


@pytest.mark.slow
def test_a_damaged_file_is_found_by_the_process_that_reads_it(corpus, alone, tmp_path):
    succeed(start(corpus, tmp_path, 2, "--config.train.num_steps=20"))
    for path in sorted((tmp_path / "checkpoints" / "20" / "state").rglob("d/*")):
        path.write_bytes(path.read_bytes()[:-1])
    results = succeed(start(corpus, tmp_path, 2, "--config.train.num_steps=20"))
    assert "checkpoint of step 20 is damaged (" in results[0][2] and "goes on from step 15" in results[0][2]
    assert "damaged" not in results[1][2]
    np.testing.assert_allclose(losses(tmp_path), losses(alone), rtol=1e-5)


@pytest.mark.slow
def test_processes_that_do_not_match(corpus, tmp_path):
    port = free_port()
    flags = [f"--coordinator=127.0.0.1:{port}", "--num_processes=2"]
    processes = [
        subprocess.Popen(
            command(corpus, tmp_path, *flags, f"--process_id={i}", f"--config.optim.lr={0.1 * (i + 1)}"),
            cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for i in range(2)
    ]  # fmt: skip
    results = finish(processes)
    assert all(status not in (0, None) for status, *_ in results)
    said = "".join(errors for *_, errors in results)
    assert "train.py: configuration of process 1 differs from that of process 0" in said
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_slurm_variables_start_a_run(corpus, tmp_path):
    """JAX's own detection of Slurm, on variables as srun sets them."""
    slurm = {
        "SLURM_JOB_ID": "77", "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2", "SLURM_STEP_NUM_NODES": "1",
        "JAX_COORDINATOR_PORT": str(free_port()),
    }  # fmt: skip
    processes = [
        subprocess.Popen(
            command(corpus, tmp_path, "--config.train.num_steps=2", "--config.mesh.data=2"),
            env=environment(1, **slurm, SLURM_PROCID=str(i), SLURM_LOCALID=str(i)),
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for i in range(2)
    ]  # fmt: skip
    succeed(processes)
    assert json.loads((tmp_path / "goodput.json").read_text())[0]["processes"] == 2
