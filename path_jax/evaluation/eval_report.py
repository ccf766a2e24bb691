"""What evaluations of any number of checkpoints came to: one page, one PNG and tidy CSV files, and a table."""

import csv
import dataclasses
import io
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from path_jax import report
from path_jax.evaluation.run_report import length_curve

_WITH_DEPTHS = ("needle", "phonebook")  # tasks drawn by length and depth
_QUESTIONS = ("needle", "ruler", "babilong", "phonebook")


@dataclasses.dataclass(frozen=True)
class Evaluated:
    """One checkpoint's numbers.

    Attributes:
      config: With the sections `model`, `data` and `evals` of a run, of a published checkpoint only the last two.
      results: {evaluator: {metric: value}}.
      token_losses: Mean loss in nats at each position [T], where it was measured.
      skipped: {evaluator: why it was left out}.
    """

    config: Mapping[str, Any]
    results: Mapping[str, Mapping[str, float]]
    token_losses: np.ndarray | None = None
    skipped: Mapping[str, str] = dataclasses.field(default_factory=dict)


def write_eval_report(directory: str | os.PathLike[str], evaluated: Mapping[str, Evaluated]) -> Path:
    """Writes the report of evaluations into a directory.

    `results.csv` has one row for each checkpoint, evaluator, metric and value, `loss_by_token.csv` the loss at every
    position. Figures are the loss by position of all checkpoints, the accuracy of answers by length, and that of
    needles and phone books by length and depth for each checkpoint; one without numbers is left out.

    Args:
      directory: Created if missing; files of the same names are replaced.
      evaluated: {label of a checkpoint: its numbers}.

    Returns:
      Path of report.html.

    Raises:
      ImportError: matplotlib is missing; the first two files are there.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    rows = [
        (label, evaluator, metric, value)
        for label, item in evaluated.items()
        for evaluator, metrics in item.results.items()
        for metric, value in metrics.items()
    ]
    _write_csv(directory / "results.csv", ("checkpoint", "evaluator", "metric", "value"), rows)
    measured = {label: item.token_losses for label, item in evaluated.items() if item.token_losses is not None}
    if measured:
        points = [(label, i + 1, float(x)) for label, losses in measured.items() for i, x in enumerate(losses)]
        _write_csv(directory / "loss_by_token.csv", ("checkpoint", "position", "loss"), points)
    figures = [*_loss_curves(evaluated), *_accuracy_curves(evaluated), *_heat_maps(evaluated)]
    left_out = [f"{label}: {name}: {why}" for label, item in evaluated.items() for name, why in item.skipped.items()]
    return report.write_report(
        directory,
        title=f"Evaluation: {', '.join(evaluated)}",
        summary={},
        figures=figures,
        texts={"Results": _as_text(comparison_table(evaluated))}
        | ({"Left out": "\n".join(left_out)} if left_out else {}),
    )


def comparison_table(evaluated: Mapping[str, Evaluated]) -> Table:
    """Returns evaluators and metrics as rows, checkpoints as columns.

    Accuracies of answers have one row for each length; other metrics of many parts (`beta/layer0/head0`) one mean.
    """
    columns = [_rows(item.results) for item in evaluated.values()]
    table = Table("evaluator", "metric", *(evaluated if len(evaluated) > 1 else ("value",)))
    for key in dict.fromkeys(key for column in columns for key in column):
        values = (report.format_value(column[key]) if key in column else "" for column in columns)
        table.add_row(*key, *values)
    return table


def _rows(results) -> dict[tuple[str, str], float]:
    rows: dict[tuple[str, str], list[float]] = {}
    for name, metrics in results.items():
        groups: dict[str, list[float]] = {}
        for metric, value in metrics.items():
            is_accuracy = name in _QUESTIONS and metric.split("/")[0] not in ("exact", "loss")
            if not (is_accuracy and metric.count("/") == 2):  # of one depth
                groups.setdefault(metric if is_accuracy else metric.split("/")[0], []).append(value)
        for metric, values in groups.items():
            rows[name, metric if metric in metrics else f"{metric} (mean of {len(values)})"] = values
    return {key: float(np.mean(values)) for key, values in rows.items()}


def _loss_curves(evaluated) -> list[report.Curve]:
    """One for each unit."""
    by_unit: dict[str, report.Curve] = {}
    for label, item in evaluated.items():
        if not (curve := length_curve(item.config, item.results.get("length", {}))):
            continue
        (points,) = curve.series.values()
        known = by_unit.get(curve.y_label, dataclasses.replace(curve, series={}, vertical_lines={}))
        by_unit[curve.y_label] = dataclasses.replace(
            known,
            series={**known.series, label: points},
            vertical_lines={**known.vertical_lines, **curve.vertical_lines},
        )
    return list(by_unit.values())


def _accuracy_curves(evaluated) -> list[report.Curve]:
    figures = []
    for evaluator in _QUESTIONS:
        series: dict[str, tuple[list[int], list[float]]] = {}
        for label, item in evaluated.items():
            for metric, value in item.results.get(evaluator, {}).items():
                if match := re.fullmatch(r"(\w+)/(\d+)", metric):
                    parts = [label] if len(evaluated) > 1 else []
                    parts += [match[1]] if match[1] != evaluator or not parts else []
                    x, y = series.setdefault(" ".join(parts), ([], []))
                    x.append(int(match[2]))
                    y.append(value)
        if series:
            title = f"Accuracy by length: {evaluator}"
            figures.append(
                report.Curve(title, "prompt [tokens]", "share of answers found", series, log_x=True, y_range=(0, 1))
            )
    return figures


def _heat_maps(evaluated) -> list[report.HeatMap]:
    figures = []
    for task in _WITH_DEPTHS:
        for label, item in evaluated.items():
            cells = {
                (match[2], int(match[1])): value
                for metric, value in item.results.get(task, {}).items()
                if (match := re.fullmatch(rf"{task}/(\d+)/([\d.]+)", metric))
            }
            if not cells:
                continue
            depths, lengths = sorted({depth for depth, _ in cells}), sorted({length for _, length in cells})
            values = [[cells.get((depth, length), np.nan) for length in lengths] for depth in depths]
            figures.append(
                report.HeatMap(
                    f"{task}, {label}" if len(evaluated) > 1 else task,
                    "prompt [tokens]",
                    "depth",
                    values,
                    "share of answers found",
                    x_names=[str(length) for length in lengths],
                    y_names=depths,
                    value_range=(0, 1),
                )
            )
    return figures


def _as_text(table: Table) -> str:
    buffer = io.StringIO()
    Console(file=buffer, width=160).print(table)
    return buffer.getvalue()


def _write_csv(path: Path, header: Sequence[str], rows) -> None:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows([header, *rows])
    report.write_file(path, buffer.getvalue().encode())
