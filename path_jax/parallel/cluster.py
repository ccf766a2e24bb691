"""Several processes as one run: joining them, agreeing on what one of them found, and leaving.

A process joins by explicit settings (flags of train.py, or the environment variables JAX_COORDINATOR_ADDRESS,
JAX_NUM_PROCESSES and JAX_PROCESS_ID), or by what JAX finds itself on Slurm, GKE and Cloud TPU. Without any of them a
process stays alone, and nothing here does anything. Elastic membership is not offered: a process that dies ends the
others, and the same command resumes, with as many processes as then exist.
"""

import contextlib
import hashlib
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from typing import NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

_VARIABLES = {
    "coordinator": "JAX_COORDINATOR_ADDRESS",
    "num_processes": "JAX_NUM_PROCESSES",
    "process_id": "JAX_PROCESS_ID",
}
_SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
# Process 0 may write its report for so long while the others wait for it at the end.
_SHUTDOWN_SECONDS = 3600
_MESSAGE_BYTES = 2048
# Set once the process has joined. JAX cannot be asked without starting its devices, which must not happen before.
_has_joined = threading.Event()


class ClusterError(OSError):
    """The processes of a run did not come together, or do not match."""


def settings(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    environment: Mapping[str, str] = os.environ,
) -> dict[str, str | int] | None:
    """What to start jax.distributed with.

    Args:
      coordinator: "host:port" of process 0, or "auto" to let JAX detect everything (needed on a Cloud TPU VM only).
      num_processes, process_id: with an explicit coordinator; 0 <= process_id < num_processes.
      environment: where to look for what is None, and for a scheduler.

    Returns:
      {coordinator, num_processes, process_id}; {} to let JAX detect; None for a process on its own.

    Raises:
      ValueError: for settings that are incomplete or contradict each other.
    """
    given = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
    for name, variable in _VARIABLES.items():
        if given[name] is None:
            given[name] = environment.get(variable) or None
    if given["coordinator"] == "auto" or (None in given.values() and _is_scheduled(environment)):
        if num_processes is not None or process_id is not None:
            raise ValueError("--num_processes and --process_id go with an explicit --coordinator=host:port")
        return {}
    missing = [name for name, value in given.items() if value is None]
    if len(missing) == len(given):
        return None
    if missing:
        raise ValueError(
            f"a run of several processes needs {', '.join(f'--{name} or ${_VARIABLES[name]}' for name in missing)}, too"
        )
    for name in ("num_processes", "process_id"):
        try:
            given[name] = int(given[name])
        except ValueError:
            raise ValueError(f"${_VARIABLES[name]}={given[name]!r} is not a number") from None
    host, _, port = given["coordinator"].rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 2**16:
        raise ValueError(f"coordinator {given['coordinator']!r} is not host:port")
    if not 0 <= given["process_id"] < given["num_processes"]:
        raise ValueError(
            f"process_id={given['process_id']} must be in [0, num_processes={given['num_processes']}); "
            "processes are counted from 0"
        )
    return given if given["num_processes"] > 1 else None


def _is_scheduled(environment: Mapping[str, str]) -> bool:
    """Whether Slurm started several tasks, or GKE several TPU hosts; asks no server."""
    is_slurm = all(name in environment for name in _SLURM) and environment["SLURM_NTASKS"] != "1"
    return is_slurm or "," in environment.get("TPU_WORKER_HOSTNAMES", "") or "MEGASCALE_NUM_SLICES" in environment


def initialize(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    timeout: int = 300,
    heartbeat: int = 100,
) -> None:
    """Joins this process to its run; to be called before JAX touches a device.

    Args:
      coordinator, num_processes, process_id: see `settings`.
      timeout: seconds to wait for the coordinator and the other processes.
      heartbeat: seconds after which a silent process counts as dead, which ends the others.

    Raises:
      ValueError: for settings that do not fit each other.
      ClusterError: if the processes did not come together in time.
    """
    chosen = settings(coordinator, num_processes, process_id)
    if chosen is None:
        return
    if chosen and chosen["process_id"]:
        _wait_for(chosen["coordinator"], timeout)
    options = {}
    if chosen:
        options = {
            "coordinator_address": chosen["coordinator"],
            "num_processes": chosen["num_processes"],
            "process_id": chosen["process_id"],
            "cluster_detection_method": "deactivate",
        }
    where = f"process {chosen['process_id']} of {chosen['num_processes']}" if chosen else "this process"
    # JAX aborts the process when its own time is up, with a page of C++ frames, so ours ends before.
    timer = threading.Timer(
        timeout, fail, [f"{where} waited {timeout} s for the others in vain; were all of them started?"]
    )
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(
            **options,
            initialization_timeout=timeout + 60,
            heartbeat_timeout_seconds=heartbeat,
            shutdown_timeout_seconds=_SHUTDOWN_SECONDS,
        )
    except (RuntimeError, ValueError, OSError, KeyError, IndexError) as error:
        raise ClusterError(f"{where} could not join the others: {_first_line(error)}") from error
    finally:
        timer.cancel()
    _has_joined.set()


def _wait_for(address: str, timeout: float) -> None:
    """Returns once the coordinator's port accepts connections."""
    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + timeout
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=2).close()
            return
        except OSError as error:
            if time.monotonic() >= deadline:
                raise ClusterError(
                    f"coordinator {address} did not answer within {timeout} s ({error.strerror or error}); is process "
                    "0 running, and its port open?"
                ) from error
        time.sleep(0.2)


def is_first() -> bool:
    """Whether this process writes what there is to be written once."""
    return jax.process_index() == 0


def on_first(action: Callable[[], object]) -> None:
    """Runs `action` on process 0 and waits for it; what it raises, every process raises.

    Raises:
      ValueError, OSError: of the action; on the other processes with the same text.
    """
    failure = None
    if is_first():
        try:
            action()
        except (ValueError, OSError) as error:
            failure = error
    if jax.process_count() > 1:
        text = f"{type(failure).__name__}: {failure}" if failure else ""
        text = _broadcast(text.encode()[:_MESSAGE_BYTES].decode(errors="ignore"))
        if text and failure is None:
            raise ClusterError(f"process 0 stopped: {text}")
    if failure:
        raise failure


def all_true(value: bool) -> bool:
    """Whether `value` is true in every process."""
    return bool(np.all(multihost_utils.process_allgather(np.array(value)))) if jax.process_count() > 1 else value


def check_same(what: str, content: str) -> None:
    """Raises ClusterError in every process unless all of them hold the same `content`."""
    if jax.process_count() == 1:
        return
    digest = np.frombuffer(hashlib.sha256(content.encode()).digest(), np.uint8)
    digests = np.asarray(multihost_utils.process_allgather(digest))
    others = [process for process, row in enumerate(digests) if not np.array_equal(row, digests[0])]
    if others:
        raise ClusterError(f"{what} of process {others[0]} differs from that of process 0")


def _broadcast(text: str) -> str:
    message = np.zeros(_MESSAGE_BYTES, np.uint8)
    content = np.frombuffer(text.encode(), np.uint8)
    message[: len(content)] = content
    return bytes(np.asarray(multihost_utils.broadcast_one_to_all(message))).rstrip(b"\0").decode()


@contextlib.contextmanager
def ending_in_one_line(name: str, expected: tuple[type[Exception], ...]):
    """Ends the process with status 1 and one line for what is `expected`.

    In a run of several processes everything else ends it, too, a failure of the runtime in one line: it is how a
    process learns that another one has died.
    """
    try:
        yield
    except expected as error:
        fail(f"{name}: {' '.join(str(error).split())}")
    except Exception as error:
        if not _has_joined.is_set():
            raise
        if isinstance(error, jax.errors.JaxRuntimeError):
            fail(f"{name}: the runtime failed, perhaps because another process has died ({_first_line(error)})")
        traceback.print_exc()
        fail(f"{name}: ended by {type(error).__name__}")


def fail(message: str) -> NoReturn:
    """Ends this process with status 1 and one line, from any thread.

    In a run of several processes it ends at once: the usual way out waits for the others, which wait for this one.
    """
    if not _has_joined.is_set() and threading.current_thread() is threading.main_thread():
        sys.exit(message)
    where = f" [process {jax.process_index()} of {jax.process_count()}]" if _has_joined.is_set() else ""
    print(message + where, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
