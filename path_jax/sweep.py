"""A resumable grid of runs: `python -m path_jax.sweep --config=FILE --vary KEY=A,B,... --output=DIR`.

Runs every combination of the varied settings, each in DIR/runs/KEY=VALUE,..., and gathers their results in
DIR/results.csv (a row per run and metric), DIR/table.md (means over the seeds) and DIR/report.html (the table, training
loss and errors by level as curves). The same command continues a sweep that was interrupted, and skips what is done;
another grid with the same DIR adds to it.

A KEY without a dot is an argument of the configuration file, one with dots a value inside it, as in optim.lr. `seed` is
what the table averages over. --select KEY=A,B,... chooses a value before the grid is run: each combination of the other
settings tries all of them with the first seed and a share of the steps, and keeps the one with the least --metric.
"""

import argparse
import concurrent.futures
import csv
import functools
import importlib.util
import io
import itertools
import json
import math
import operator
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from path_jax.metrics import read_metrics
from path_jax.report import Curve, format_value, markdown_table, write_file, write_report

# Two-sided 95 % points of Student's t with 1, 2, ... degrees of freedom.
_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


class Run(NamedTuple):
    """One run of a sweep."""

    stage: str  # "select" or "runs"
    settings: tuple[tuple[str, str], ...]
    share: float  # of the configuration's steps

    @property
    def name(self) -> str:
        """Its folder below that of its stage."""
        return ",".join(f"{key}={value}" for key, value in self.settings) or "run"

    def without(self, *keys: str) -> tuple[tuple[str, str], ...]:
        """Its other settings."""
        return tuple(item for item in self.settings if item[0] not in keys)


def resolve(config: str, run: Run) -> dict:
    """The configuration of a run.

    Args:
      config: path of a configuration file, with arguments behind a colon.

    Raises:
      ValueError: for a setting that the file does not have.
      FileNotFoundError: if there is no such file.
    """
    path, _, argument = config.partition(":")
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no configuration file {path}")
    spec = importlib.util.spec_from_file_location("configuration", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    arguments = [f"{key}={value}" for key, value in run.settings if "." not in key]
    resolved = module.get_config(",".join(filter(None, [argument, *arguments])))
    for key, value in run.settings:
        if "." in key:
            try:
                *sections, name = key.split(".")
                section = functools.reduce(operator.getitem, sections, resolved)
                kind = type(section[name])
                section[name] = {"true": True, "false": False}[value.lower()] if kind is bool else kind(value)
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"--vary {key}={value} does not fit the configuration: {error}") from error
    if run.share != 1:
        resolved.train.num_steps = max(1, round(run.share * resolved.train.num_steps))
        resolved.optim.warmup_steps = round(run.share * resolved.optim.warmup_steps)
        if "task" in resolved.evals:  # as exact as a choice needs
            resolved.evals.task.num_scored = min(resolved.evals.task.num_scored, 10_000)
    return resolved.to_dict()


class Sweep:
    """The runs below one directory."""

    def __init__(self, config: str, output: Path, *, jobs: int, metric: str):
        self.failures: list[str] = []
        self._processes: set[subprocess.Popen] = set()
        self._config, self._output, self._jobs, self._metric = config, output, jobs, metric
        self._cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []

    def folder(self, run: Run) -> Path:
        """Where the run lives."""
        return self._output / run.stage / run.name

    def results(self, run: Run) -> dict[str, float] | None:
        """{evaluator/metric: value} of a finished run."""
        path = self.folder(run) / "results.json"
        if not path.exists():
            return None
        return {
            f"{name}/{key}": x for name, values in json.loads(path.read_text()).items() for key, x in values.items()
        }

    def run_all(self, runs: Sequence[Run]) -> None:
        """Runs what has no results yet, `jobs` at a time, each on its share of the cores."""
        missing = [run for run in runs if self.results(run) is None]
        jobs, start = min(self._jobs, len(missing)), time.monotonic()
        slots = [self._cores[slot::jobs] if len(self._cores) >= jobs > 1 else self._cores for slot in range(jobs)]
        with concurrent.futures.ThreadPoolExecutor(jobs or 1) as pool:

            def work(run):
                cores = slots.pop()
                try:
                    return self._run(run, cores)
                finally:
                    slots.append(cores)

            futures = {pool.submit(work, run): run for run in missing}
            try:
                for count, future in enumerate(concurrent.futures.as_completed(futures), 1):
                    run, reason = futures[future], future.result()
                    self.failures += [f"{run.name}: {reason}"] if reason else []
                    found = (self.results(run) or {}).get(self._metric, math.nan)
                    said = f"FAILED {reason}" if reason else f"{self._metric} {format_value(found)}"
                    left = (time.monotonic() - start) / count * (len(missing) - count)
                    print(f"{run.stage} {count}/{len(missing)}  {run.name}  {said}  ETA {left:.0f} s", file=sys.stderr)
            except KeyboardInterrupt:
                for future in futures:
                    future.cancel()
                for process in list(self._processes):
                    process.terminate()  # saves and ends
                raise

    def _run(self, run: Run, cores) -> str | None:
        """Runs it in a process of its own; returns why it failed."""
        folder = self.folder(run)
        folder.mkdir(parents=True, exist_ok=True)
        config, log = folder / "resolved.json", folder / "log.txt"
        write_file(config, json.dumps(resolve(self._config, run)).encode())
        pin = (lambda: os.sched_setaffinity(0, cores)) if cores else None  # XLA makes a thread per core it may use
        with log.open("w") as stream:
            command = [sys.executable, "-m", "path_jax.run", str(config), str(folder)]
            # Runs that differ by the seed are one program.
            cache = {"JAX_COMPILATION_CACHE_DIR": str(self._output.resolve() / "compilation_cache")}
            process = subprocess.Popen(  # of a session of its own: Ctrl-C is for the sweep, which lets runs save first
                command, stdout=stream, stderr=stream, preexec_fn=pin, env=cache | os.environ, start_new_session=True
            )
            self._processes.add(process)
            status = process.wait()
            self._processes.discard(process)
        if status == 0:
            return None
        lines = log.read_text().strip().splitlines()
        return lines[-1] if lines else f"exit status {status}"

    def choose(self, grid: Sequence[Run], key: str, values: Sequence[str], share: float) -> list[Run]:
        """The grid with the value of `key` that did best, for each combination of the settings other than the seed."""
        first = {}
        for run in grid:
            first.setdefault(run.without("seed"), run)
        trials = {
            group: [Run("select", (*run.settings, (key, value)), share) for value in values]
            for group, run in first.items()
        }
        self.run_all([run for runs in trials.values() for run in runs])
        chosen = {}
        for group, runs in trials.items():
            losses = {run: (self.results(run) or {}).get(self._metric, math.nan) for run in runs}
            losses = {run: loss for run, loss in losses.items() if not math.isnan(loss)}
            if losses:
                chosen[group] = min(losses, key=losses.get).settings[-1]
        return [
            run._replace(settings=(*run.settings, chosen[group]))
            for run in grid
            if (group := run.without("seed")) in chosen
        ]

    def write(self, runs: Sequence[Run], metrics: Sequence[str]) -> Table:
        """Writes results.csv and table.md, and returns the latter for a terminal. Other grids' runs are there too."""
        runs = list(dict.fromkeys([*runs, *self._finished("runs", 1.0)]))
        stages = [*self._finished("select", math.nan), *runs]
        keys = list(dict.fromkeys(key for run in stages for key, _ in run.settings))
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        writer.writerow(["stage", *keys, "metric", "value"])
        for run in stages:
            settings = dict(run.settings)
            row = [run.stage, *(settings.get(key, "") for key in keys)]
            writer.writerows([*row, metric, value] for metric, value in (self.results(run) or {}).items())
        write_file(self._output / "results.csv", buffer.getvalue().encode())
        header, rows = self._summary(runs, metrics)
        lines = markdown_table(header, rows)
        write_file(self._output / "table.md", ("\n".join(lines) + "\n").encode())
        table = Table(*header)
        for row in rows:
            table.add_row(*row)
        figures = [figure for figure in (self._loss_curve(runs), *self._level_curves(runs)) if figure]
        try:
            write_report(
                self._output,
                title=f"Sweep: {self._config}",
                summary={},
                figures=figures,
                texts={"Results": "\n".join(lines)},
            )
        except ImportError as error:
            print(f"no report.html: {error}", file=sys.stderr)
        return table

    def _groups(self, runs):
        """{settings other than the seed, as a name: finished runs}."""
        groups: dict[str, list[Run]] = {}
        for run in runs:
            if self.results(run) is not None:
                name = ", ".join(value for _, value in run.without("seed")) or "all"
                groups.setdefault(name, []).append(run)
        return groups

    def _loss_curve(self, runs) -> Curve | None:
        """Means over the seeds, at a hundred points of training."""
        series = {}
        for name, members in self._groups(runs).items():
            losses = [
                [record["loss"] for record in read_metrics(self.folder(run) / "metrics.jsonl")] for run in members
            ]
            if num_steps := min(map(len, losses)):
                edges = np.unique(np.linspace(0, num_steps, 101).astype(int))
                mean = np.mean([loss[:num_steps] for loss in losses], axis=0)
                series[name] = (edges[1:].tolist(), [mean[a:b].mean() for a, b in zip(edges, edges[1:])])
        return Curve("Training loss", "step", "loss [nats]", series, log_y=True) if series else None

    def _level_curves(self, runs) -> list[Curve]:
        """One for each variant of a synthetic task: mean error over the seeds by level."""
        errors: dict[str, dict[str, dict[str, list[float]]]] = {}
        for name, members in self._groups(runs).items():
            for run in members:
                for metric, value in self.results(run).items():
                    if metric.startswith("task/") and metric.count("/") == 3:
                        _, variant, _, level = metric.split("/")
                        errors.setdefault(variant, {}).setdefault(name, {}).setdefault(level, []).append(value)
        figures = []
        for variant, groups in errors.items():
            levels = list(dict.fromkeys(level for found in groups.values() for level in found))
            series = {
                name: ([levels.index(level) for level in found], [statistics.fmean(x) for x in found.values()])
                for name, found in groups.items()
            }
            figures.append(
                Curve(
                    f"Error by level: {variant}",
                    "level",
                    "share of wrong answers",
                    series,
                    x_names=levels,
                    y_range=(0, 1),
                )
            )
        return figures

    def _finished(self, stage: str, share: float) -> list[Run]:
        """What this command or an earlier one has run."""
        names = sorted(path.parent.name for path in self._output.glob(f"{stage}/*/results.json"))
        settings = lambda name: () if name == "run" else tuple(tuple(part.split("=", 1)) for part in name.split(","))
        return [Run(stage, settings(name), share) for name in names]

    def _summary(self, runs, metrics):
        groups: dict[tuple, list[Mapping[str, float]]] = {}
        for run in runs:
            if (found := self.results(run)) is not None:
                groups.setdefault(run.without("seed"), []).append(found)
        if not metrics:
            known = dict.fromkeys(name for results in groups.values() for result in results for name in result)
            metrics = [name for name in known if name.endswith("/error")] or list(known)
        keys = list(dict.fromkeys(key for group in groups for key, _ in group))
        rows = []
        for group, results in groups.items():
            settings = dict(group)
            cells = [mean_and_interval([x[name] for x in results if name in x]) for name in metrics]
            rows.append([*(settings.get(key, "") for key in keys), str(len(results)), *cells])
        return [*keys, "seeds", *(name.removeprefix("task/") for name in metrics)], rows


def mean_and_interval(values: Sequence[float]) -> str:
    """Mean over seeds, with half of the 95 % interval by Student's t where there are several."""
    if not values:
        return "-"
    text = format_value(statistics.fmean(values))
    if len(values) < 2:
        return text
    points = _T95[min(len(values) - 1, len(_T95)) - 1]
    return f"{text} +- {format_value(points * statistics.stdev(values) / math.sqrt(len(values)))}"


def _parse(text: str) -> tuple[str, list[str]]:
    key, separator, values = text.partition("=")
    values = values.split(",")
    if not key or not separator or not all(values) or len(set(values)) < len(values) or "/" in text:
        raise ValueError(f"{text!r} is not KEY=A,B,... with different values and without '/'")
    return key, values


def _parse_arguments(arguments) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m path_jax.sweep", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--config", required=True, help="configuration file, with the arguments that all runs share behind a colon")
    add("--output", required=True, type=Path, help="directory of the sweep")
    add("--vary", action="append", default=[], metavar="KEY=A,B", help="a setting of the grid; may be repeated")
    add("--select", metavar="KEY=A,B", help="a setting to choose, of at least two values")
    add("--select-share", type=float, default=0.25, help="share of the steps to choose by (default %(default)s)")
    add("--metric", default="task/in_distribution/error", help="evaluator/metric to choose by (default %(default)s)")
    add("--table", default="", metavar="M,N", help="metrics of the table (default: all that end in /error)")
    add("--jobs", type=int, default=1, help="runs at a time (default %(default)s)")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Ends in one line and status 1 for input that cannot work or runs that failed."""
    args = _parse_arguments(arguments)
    try:
        if not 0 < args.select_share <= 1 or args.jobs < 1:
            raise ValueError(f"--select-share={args.select_share} must be in (0, 1] and --jobs={args.jobs} at least 1")
        varied = [_parse(text) for text in args.vary]
        grid = [
            Run("runs", tuple(zip([key for key, _ in varied], values)), 1.0)
            for values in itertools.product(*(values for _, values in varied))
        ]
        key, values = _parse(args.select) if args.select else (None, [])
        if args.select and len(values) < 2:
            raise ValueError(f"--select {args.select} has nothing to choose from")
        for run in grid:  # every configuration is built once before anything runs
            for value in values or [None]:
                resolve(args.config, run._replace(settings=(*run.settings, (key, value))) if value else run)
        sweep = Sweep(args.config, args.output, jobs=args.jobs, metric=args.metric)
        args.output.mkdir(parents=True, exist_ok=True)
        if args.select:
            grid = sweep.choose(grid, key, values, args.select_share)
        sweep.run_all(grid)
        Console().print(sweep.write(grid, [name for name in args.table.split(",") if name]))
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"path_jax.sweep: {' '.join(str(error).split())}")
    except KeyboardInterrupt:
        sys.exit("path_jax.sweep: stopped; what ran is saved, the same command continues")
    if sweep.failures:
        sys.exit(f"path_jax.sweep: {len(sweep.failures)} runs failed; the last one: {sweep.failures[-1]}")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    main()
