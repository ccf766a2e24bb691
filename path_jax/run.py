"""One run from a configuration to its report: what train.py does once, and a sweep again and again."""

import json
import logging
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from path_jax.evaluation import run_report, runner
from path_jax.evaluation.pretrained import codec_of_run
from path_jax.training import loop
from path_jax.training.experiment import make_experiment


def train_and_report(config: Mapping[str, Any], workdir: Path, *, start: float | None = None) -> dict[str, Any] | None:
    """Trains, or resumes, the run in `workdir`, evaluates it and writes its report.

    Args:
      config: Resolved configuration.
      workdir: Created if absent, resumed if present.
      start: `time.perf_counter()` when the job started; now by default.

    Returns:
      The summary, or None for a run that SIGTERM has stopped and saved.

    Raises:
      ValueError, FloatingPointError, NotImplementedError, ImportError, OSError: with a reason in one line.
    """
    start = time.perf_counter() if start is None else start
    experiment = make_experiment(config)
    evaluators = runner.make_evaluators(
        config["evals"], experiment.model, experiment.corpus, experiment.data.sequence_length,
        codec=codec_of_run(experiment.config),
    )  # fmt: skip
    result = loop.run(experiment, workdir, evaluators)
    if result.interrupted:
        print(f"stopped at step {result.step}, saved in {result.checkpoint}; the same command resumes", file=sys.stderr)
        return None
    announce = lambda name: print(f"evaluating {name}", file=sys.stderr, flush=True)
    results = runner.run(evaluators, result.params, on_progress=announce)
    return run_report.finish(
        workdir, config=experiment.config, model=experiment.model, params=result.params, records=result.records,
        results=results, checkpoint=result.checkpoint, start=start,
    )  # fmt: skip


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
