"""One run from a configuration to its report: what train.py does once, and a sweep again and again."""

import json
import logging
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from path_jax import report
from path_jax.evaluation import run_report, runner
from path_jax.evaluation.pretrained import codec_of_run
from path_jax.parallel import cluster
from path_jax.training import loop
from path_jax.training.experiment import make_experiment
from path_jax.training.state import local_params
from path_jax.training.step_times import slowest_process


def train_and_report(config: Mapping[str, Any], workdir: Path, *, start: float | None = None) -> dict[str, Any] | None:
    """Trains, or resumes, the run in `workdir`, evaluates it and writes its report.

    Args:
      config: Resolved configuration.
      workdir: Created if absent, resumed if present.
      start: `time.perf_counter()` when the job started; now by default.

    Returns:
      The summary, with where the time of all launches went; None for a run that SIGTERM has stopped and saved.
      Processes other than the first evaluate on their own devices, too, but write nothing and return {}.

    Raises:
      ValueError, FloatingPointError, NotImplementedError, ImportError, OSError: with a reason in one line.
    """
    start = time.perf_counter() if start is None else start
    experiment = make_experiment(config)
    evaluators = runner.make_evaluators(
        config["evals"], experiment.model, experiment.corpus, experiment.data.sequence_length,
        codec=codec_of_run(experiment.config),
    )  # fmt: skip
    result = loop.run(experiment, workdir, evaluators, start_time=start)
    say = lambda line: print(line, file=sys.stderr, flush=True) if cluster.is_first() else None
    if result.interrupted:
        say(f"stopped at step {result.step}, saved in {result.checkpoint}; the same command resumes")
        return None
    with result.goodput.phase("evaluation"):
        params = local_params(result.params)
        results = runner.run(evaluators, params, on_progress=lambda name: say(f"evaluating {name}"))
    if not cluster.is_first():
        return {}
    summary = run_report.finish(
        workdir, config=experiment.config, model=experiment.model, params=params, records=result.records,
        results=results, checkpoint=result.checkpoint, start=start,
    )  # fmt: skip
    summary |= result.goodput.summary()
    if jax.process_count() > 1 and (slowest := slowest_process(workdir, jax.process_count())):
        summary |= {"slowest_process": f"{slowest['process']} on {slowest['host']}"}
        summary |= {"slowest_busy_seconds": slowest["busy_seconds"]}
    report.write_file(workdir / "summary.json", (json.dumps(summary, indent=2) + "\n").encode())
    return summary


def main() -> None:
    """`python -m path_jax.run CONFIG.json WORKDIR`: the run of a resolved configuration."""
    logging.getLogger("absl").setLevel(logging.WARNING)  # Orbax writes a screenful of INFO per checkpoint
    if len(sys.argv) != 3:
        sys.exit(f"usage: {main.__doc__}")
    try:
        done = train_and_report(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
    except (ValueError, FloatingPointError, NotImplementedError, ImportError, OSError) as error:
        sys.exit(f"path_jax.run: {' '.join(str(error).split())}")
    sys.exit(0 if done else 3)


if __name__ == "__main__":
    main()
