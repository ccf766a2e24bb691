"""Trains a language model from a configuration, then evaluates it and writes a report.

    python train.py --config=configs/lm_path.py:size=debug --workdir=runs/debug [--config.optim.lr=1e-3 ...]

Run the same command again to resume. Several processes train together when each is told which one it is, by

    python train.py ... --coordinator=HOST:PORT --num_processes=N --process_id=I

by the environment variables JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, or by Slurm, GKE or, with
--coordinator=auto, a Cloud TPU VM (docs/cluster.md).

The working directory receives config.json, train_files.txt, heldout_files.txt, metrics.jsonl, goodput.json,
checkpoints/, and at the end summary.json, results.json, report.html and report.png.
"""

import sys
import time
from logging import getLogger
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags
from rich.console import Console

from path_jax.command_flags import flags_parser
from path_jax.evaluation import run_report
from path_jax.parallel import cluster
from path_jax.run import train_and_report

_START = time.perf_counter()
_CONFIG = config_flags.DEFINE_config_file("config", None, "Configuration file, e.g. configs/lm_path.py:size=debug")
_WORKDIR = flags.DEFINE_string("workdir", None, "Where the run lives; created if absent, resumed if present.")
_COORDINATOR = flags.DEFINE_string("coordinator", None, "host:port of process 0, or auto to let JAX find it.")
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Processes of the run.", lower_bound=1)
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Number of this process, from 0.", lower_bound=0)
_CLUSTER_TIMEOUT = flags.DEFINE_integer("cluster_timeout", 300, "Seconds to wait for the others.", lower_bound=1)
_HEARTBEAT = flags.DEFINE_integer("heartbeat", 100, "Seconds until a silent process counts as dead.", lower_bound=1)
_STOPPED_STATUS = flags.DEFINE_integer("stopped_status", 0, "Status of a run that SIGTERM has stopped and saved.")


def main(argv):
    """Trains, evaluates, reports. Bad input ends in one line and status 1."""
    if len(argv) > 1:
        sys.exit(f"unexpected arguments {argv[1:]}; settings are given as --config.section.key=value")
    # Orbax writes a screenful for every checkpoint, and several for one that fails, which the run tells in one line.
    logging.set_verbosity(logging.FATAL)
    getLogger("asyncio").setLevel("CRITICAL")
    expected = (ValueError, FloatingPointError, NotImplementedError, ImportError, OSError)
    with cluster.ending_in_one_line("train.py", expected):
        cluster.initialize(
            _COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value,
            timeout=_CLUSTER_TIMEOUT.value, heartbeat=_HEARTBEAT.value,
        )  # fmt: skip
        summary = train_and_report(_CONFIG.value.to_dict(), Path(_WORKDIR.value), start=_START)
        if summary is None:
            sys.exit(_STOPPED_STATUS.value)
        if summary:
            Console().print(run_report.summary_table(summary))


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir"])
    app.run(main, flags_parser=flags_parser("train.py"))
