"""What recall analyses of any number of models came to: one page, one PNG, tidy CSV files and a table."""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from path_jax import report
from path_jax.interpretability.recall import RecallAnalysis, mean_and_interval, mechanism


@dataclasses.dataclass(frozen=True)
class Analysed:
    """One model's numbers.

    Attributes:
      config: Resolved configuration of its run.
      analysis: Of the finished model.
      costs: {"parameters", "tokens_per_second", "step_bytes", "decode_state_bytes": number}, those that are known.
      history: {training step: analysis of the second layer's input}, of the checkpoints that were kept.
    """

    config: Mapping[str, Any]
    analysis: RecallAnalysis
    costs: Mapping[str, float]
    history: Mapping[int, RecallAnalysis] = dataclasses.field(default_factory=dict)


def write_recall_report(directory: str | os.PathLike[str], analysed: Mapping[str, Analysed]) -> Path:
    """Writes the report into a directory.

    `behaviour.csv` has one row for each model and quantity with its 95 % interval, `attribution.csv` for each model,
    corrupted token, site and token, and for parts of mixers at all tokens. Figures are accuracy and ways of the
    association over training, and each model's attribution by site and token.

    Args:
      directory: Created if missing; files of the same names are replaced.
      analysed: {label of a model: its numbers}.

    Returns:
      Path of report.html.

    Raises:
      ImportError: matplotlib is missing; the CSV files are there.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    behaviour = [
        (label, name, *values)
        for label, item in analysed.items()
        for name, values in _quantities(item.analysis).items()
    ]
    intervals = {
        label: {corrupted: mean_and_interval(values) for corrupted, values in item.analysis.attribution.items()}
        for label, item in analysed.items()
    }
    attribution = [
        (label, corrupted, str(site), role, *intervals[label][corrupted][:, i, j])
        for label, item in analysed.items()
        for corrupted in item.analysis.attribution
        for i, site in enumerate(item.analysis.sites)
        for j, role in enumerate(item.analysis.roles)
    ] + [
        (label, corrupted, part, "all", *mean_and_interval(values))
        for label, item in analysed.items()
        for corrupted, parts in item.analysis.parts.items()
        for part, values in parts.items()
    ]
    interval = ("mean", "low", "high")
    report.write_csv(directory / "behaviour.csv", ("model", "quantity", *interval), behaviour, digits=6)
    report.write_csv(
        directory / "attribution.csv", ("model", "corrupted", "site", "token", *interval), attribution, digits=6
    )
    header, rows = _table(analysed)
    return report.write_report(
        directory,
        title="Recall: which tokens carry the association",
        summary={},
        figures=[
            *_curves(analysed),
            *(_heat_map(label, item.analysis, intervals[label]) for label, item in analysed.items()),
        ],
        texts={
            "Results": report.aligned([header, *rows]),
            "Parts of mixers, key corrupted": "\n".join(_part_lines(analysed)),
            "How to read it": _explanation(analysed),
        },
    )


def _part_lines(analysed) -> list[str]:
    parts = {label: item.analysis.parts.get("key", {}) for label, item in analysed.items()}
    return [
        f"{label}:  " + ",  ".join(f"{part} {mean_and_interval(x)[0]:.2f}" for part, x in found.items())
        for label, found in parts.items()
        if found
    ]


def _explanation(analysed) -> str:
    thresholds = sorted({item.analysis.threshold for item in analysed.values()})
    return _EXPLANATION.format(threshold=" or ".join(map(report.format_value, thresholds)))


_EXPLANATION = """\
A document tells pairs and asks for one. Its key is corrupted, and one site at one token gets its value from the run on
the clean document. Attribution is the share of the answer's lost probability that this restores, over documents that
lose more than {threshold}; intervals are 95 % bootstrap intervals over documents.

induction: the input of the second layer at the value. The first layer has stored there which key it belongs to.
direct, layer 1: the same at the key. The second layer finds the key itself, and the value beside it.
direct, layer 0: the same at the query. The first layer has found the answer already.
parts: what sites inside a layer's mixer restore together, patched at all tokens."""

_COSTS = {"tokens_per_second": "tokens/s", "step_bytes": "step bytes", "decode_state_bytes": "state bytes"}
_WAYS = {"induction": "induction", "direct_second": "direct, layer 1", "direct_first": "direct, layer 0"}


def recall_table(analysed: Mapping[str, Analysed]) -> Table:
    """The main results as a table for the terminal, without intervals and most costs."""
    header, rows = _table(analysed, is_short=True)
    table = Table(*header)
    for row in rows:
        table.add_row(*row)
    table.columns[0].overflow = "fold"  # a name is not cut off
    return table


def _quantities(analysis: RecallAnalysis) -> dict[str, np.ndarray]:
    found = {name: mean_and_interval(values) for name, values in analysis.behaviour.items()}
    return found | (mechanism(analysis) if _has_two_layers(analysis) else {})


def _has_two_layers(analysis):
    return any(site.layer == 1 for site in analysis.sites) and "key" in analysis.attribution


def _table(analysed, is_short: bool = False) -> tuple[list[str], list[list[str]]]:
    costs = list(dict.fromkeys(name for item in analysed.values() for name in item.costs))
    costs = [name for name in costs if not is_short or name == "decode_state_bytes"]
    quantities = {label: _quantities(item.analysis) for label, item in analysed.items()}
    names = dict.fromkeys(name for found in quantities.values() for name in found)
    names = [name for name in names if not is_short or name in ("accuracy", *_WAYS)]
    template = "{:.2f}" if is_short else "{:.3f} [{:.3f}, {:.3f}]"
    rows = [
        [
            label,
            *(template.format(*quantities[label][name]) if name in quantities[label] else "-" for name in names),
            *(report.format_value(item.costs[name]) if name in item.costs else "-" for name in costs),
        ]
        for label, item in analysed.items()
    ]
    labels = _WAYS | _COSTS
    return ["model", *(labels.get(name, name).replace("_", " ") for name in (*names, *costs))], rows


def _heat_map(label: str, analysis: RecallAnalysis, intervals: Mapping[str, np.ndarray]) -> report.HeatMap:
    """With the key corrupted, or the value if only that was."""
    corrupted, (means, *_) = next(iter(intervals.items()))
    return report.HeatMap(
        f"{label}: {corrupted} corrupted",
        "restored at",
        "site",
        means,
        "attribution",
        x_names=analysis.roles,
        y_names=[str(site) for site in analysis.sites],
        value_range=(0, 1),
    )


def _curves(analysed) -> list[report.Curve]:
    """Accuracy, and the ways of the association, over training."""
    histories = {label: item.history for label, item in analysed.items() if len(item.history) > 1}
    if not histories:
        return []

    def over_training(measure):
        return {
            label: (list(history), [float(measure(analysis)) for analysis in history.values()])
            for label, history in histories.items()
        }

    mean = lambda name: lambda analysis: np.mean(analysis.behaviour[name])
    way = lambda name: lambda analysis: mechanism(analysis)[name][0]
    figures = {"Accuracy over training": mean("accuracy")}
    if all(map(_has_two_layers, (x for history in histories.values() for x in history.values()))):
        figures |= {f"{label.capitalize()} over training": way(name) for name, label in _WAYS.items()}
    # Attribution is beyond 0 ... 1 where a patch does more than the clean document.
    return [
        report.Curve(title, "step", "share", over_training(measure), y_range=(-0.25, 1.25) if i else (0, 1))
        for i, (title, measure) in enumerate(figures.items())
    ]
