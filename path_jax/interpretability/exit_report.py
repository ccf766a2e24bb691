"""What early exits came to: one page, one PNG, a tidy CSV file, and tables for the terminal."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.table import Table

from path_jax import report
from path_jax.interpretability.exit_calibration import ExitSummary


class Timing(NamedTuple):
    """Of greedy generation from the same prompts."""

    rule: str  # "full depth", or a rule and what layers behind its exits learn
    batch: int  # rows
    tokens_per_second: float
    speedup: float  # of full depth in the same batch
    mean_depth: float  # layers below a token's logits
    layer_runs: float  # layers run per step
    disagreement: float  # tokens that full depth, reading the same text, would not have taken


@dataclasses.dataclass(frozen=True)
class EarlyExits:
    """Numbers of one model.

    Attributes:
      num_layers: L; exit_layers: of the exits; target: share of tokens that may differ.
      summaries: {text: {rule: summary}} at the target, on tokens that no rule was fitted to.
      targets: {rule: [(target, disagreement, layer speed-up)]} on other tokens of the text that thresholds are from.
      timings: one for each rule and batch.
      monitor: lines about a monitor that meets a bad threshold.
    """

    num_layers: int
    exit_layers: Sequence[int]
    target: float
    summaries: Mapping[str, Mapping[str, ExitSummary]]
    targets: Mapping[str, Sequence[tuple[float, float, float]]]
    timings: Sequence[Timing]
    monitor: Sequence[str] = ()


_SUMMARY = {
    "tokens": lambda x: f"{x.num_tokens:,}",
    "disagreement": lambda x: f"{x.disagreement:.2%} [{x.disagreement_low:.2%}, {x.disagreement_high:.2%}]",
    "accuracy": lambda x: f"{x.accuracy:.2%}",
    "full accuracy": lambda x: f"{x.full_accuracy:.2%}",
    "layers": lambda x: f"{x.mean_depth:.2f}",
    "layer speed-up": lambda x: f"{x.layer_speedup:.3f}",
    "as published": lambda x: f"{x.published_speedup:.3f}",
}
_TIMING = {
    "rows": lambda x: str(x.batch),
    "tokens/s": lambda x: f"{x.tokens_per_second:.1f}",
    "speed-up": lambda x: f"{x.speedup:.3f}",
    "layers below a token": lambda x: f"{x.mean_depth:.2f}",
    "layers run a step": lambda x: f"{x.layer_runs:.2f}",
    "disagreement": lambda x: f"{x.disagreement:.2%}",
}


def _summary_rows(exits: EarlyExits) -> list[list[str]]:
    return [
        [text, rule, *(column(summary) for column in _SUMMARY.values())]
        for text, found in exits.summaries.items()
        for rule, summary in found.items()
    ]


def _timing_rows(exits: EarlyExits) -> list[list[str]]:
    return [[timing.rule, *(column(timing) for column in _TIMING.values())] for timing in exits.timings]


def exit_tables(exits: EarlyExits) -> list[Table]:
    """Held-out texts, and speeds."""
    tables = [
        Table("text", "rule", *_SUMMARY, title=f"at most {exits.target:.1%} disagreement"),
        Table("rule", *_TIMING),
    ]
    for table, rows in zip(tables, (_summary_rows(exits), _timing_rows(exits))):
        for row in rows:
            table.add_row(*row)
    return tables


def write_exit_report(directory: str | os.PathLike[str], exits: EarlyExits) -> Path:
    """Writes the report into a directory, created if missing; `early_exit.csv` has a row for each number.

    Returns:
      Path of report.html.

    Raises:
      ImportError: matplotlib is missing; the CSV file is there.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    report.write_csv(directory / "early_exit.csv", ("text", "rule", "quantity", "value"), _numbers(exits), digits=6)
    curves = [
        report.Curve(
            "Layers saved by the disagreement allowed", "disagreement", "layer speed-up",
            {rule: ([x for _, x, _ in points], [y for *_, y in points]) for rule, points in exits.targets.items()},
        )
    ]  # fmt: skip
    names = [*(f"after {layer}" for layer in exits.exit_layers), "full depth"]
    for text, found in exits.summaries.items():
        shares = np.stack([summary.exit_shares for summary in found.values()])
        curves.append(
            report.HeatMap(
                f"{text}: where tokens leave", "exit", "rule", shares, "share of tokens",
                x_names=names, y_names=list(found), value_range=(0, 1),
            )
        )  # fmt: skip
    texts = {
        "Held-out text": report.aligned([["text", "rule", *_SUMMARY], *_summary_rows(exits)]),
        "Greedy generation": report.aligned([["rule", *_TIMING], *_timing_rows(exits)]),
        "Monitor": "\n".join(exits.monitor),
        "How to read it": _EXPLANATION,
    }
    return report.write_report(
        directory,
        title="Early exit",
        summary={"layers": exits.num_layers, "exits after": ", ".join(map(str, exits.exit_layers)),
                 "disagreement allowed": exits.target},
        figures=curves,
        texts={heading: text for heading, text in texts.items() if text},
    )  # fmt: skip


_EXPLANATION = """\
disagreement: tokens whose likeliest next token is not that of full depth, with an exact 95 % interval. Thresholds were
chosen on other tokens of the first text so that it is at most the target with 95 % confidence there; other texts show
what it is where nothing was chosen for. accuracy: likeliest next token is the text's.
oracle: leaves as soon as no exit behind changes the token, which nothing can know.
layer speed-up: layers / mean layers below a token; as published counts the layers of exits from 0.
recompute: layers left out are run later, in one chunk with the next token that goes deeper, so that caches are exact.
propagate: they get the stream of the exit at once."""


def _numbers(exits: EarlyExits):
    for text, found in exits.summaries.items():
        for rule, summary in found.items():
            for name, value in summary._asdict().items():
                if name == "exit_shares":
                    layers = [*exits.exit_layers, exits.num_layers - 1]
                    yield from ((text, rule, f"exit_share_{layer}", float(x)) for layer, x in zip(layers, value))
                else:
                    yield text, rule, name, value
    for rule, points in exits.targets.items():
        for target, disagreement, speedup in points:
            yield "", rule, f"disagreement_at_target_{target:g}", disagreement
            yield "", rule, f"layer_speedup_at_target_{target:g}", speedup
    for timing in exits.timings:
        for name, value in timing._asdict().items():
            if name not in ("rule", "batch"):
                yield "generated", timing.rule, f"{name}_batch_{timing.batch}", value
