"""train.py as several processes on this machine, and what a run came to."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

ROOT = Path(__file__).parents[2]
CONFIG = Path(__file__).with_name("tiny_config.py")


def write_corpus(directory):
    for i in range(3):
        (directory / f"{i}.txt").write_text(" ".join(f"{j} times {i} is {i * j}." for j in range(400)))
    return directory


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def environment(devices: int = 1, **variables) -> dict[str, str]:
    flags = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
    return os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags} | variables


def command(corpus, workdir, *flags, script=ROOT / "train.py") -> list[str]:
    return [sys.executable, str(script), f"--config={CONFIG}:{corpus}", f"--workdir={workdir}", *flags]


def start(corpus, workdir, count: int, *flags, devices: int = 1, script=ROOT / "train.py") -> list[subprocess.Popen]:
    """One run as `count` processes with `devices` fake devices each."""
    coordinator = f"127.0.0.1:{free_port()}"
    return [
        subprocess.Popen(
            command(corpus, workdir, *flags, *(
                [f"--coordinator={coordinator}", f"--num_processes={count}", f"--process_id={i}", "--heartbeat=20"]
                if count > 1 else []
            ), script=script),
            cwd=ROOT, env=environment(devices, PYTHONPATH=str(ROOT)),
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for i in range(count)
    ]  # fmt: skip


def finish(processes, timeout: float = 500) -> list[tuple[int, str, str]]:
    """(status, stdout, stderr) of each process."""
    deadline = time.monotonic() + timeout
    try:
        outputs = [process.communicate(timeout=max(deadline - time.monotonic(), 1)) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *output) for process, output in zip(processes, outputs)]


def succeed(processes) -> list[tuple[int, str, str]]:
    results = finish(processes)
    assert [status for status, *_ in results] == [0] * len(results), "\n".join(errors for *_, errors in results)
    return results


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def wait_for_records(processes, workdir, count: int) -> None:
    while len(lines(workdir / "metrics.jsonl")) < count and all(process.poll() is None for process in processes):
        time.sleep(0.02)
    ended = [process.communicate()[1] for process in processes if process.poll() is not None]
    assert not ended, ended


def losses(workdir) -> list[float]:
    return [record["loss"] for record in lines(workdir / "metrics.jsonl")]


def batches(workdir) -> list[str]:
    records = lines(workdir / "batches.jsonl")
    assert [record["step"] for record in records] == list(range(1, len(records) + 1))
    return [record["sha256"] for record in records]


def outcome(workdir, step: int):
    """Records without their times, and the state of a step, however many processes saved it."""
    records = [{k: v for k, v in record.items() if k != "step_seconds"} for record in lines(workdir / "metrics.jsonl")]
    path = (workdir / "checkpoints" / str(step) / "state").absolute()
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        tree = checkpointer.metadata(path).item_metadata.tree
        whole = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        return records, checkpointer.restore(path, args=ocp.args.PyTreeRestore(restore_args=whole))
