"""What saturation analyses of any number of texts or models came to: one page, one PNG, one tidy CSV file, a table."""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from jaxtyping import Int
from rich.table import Table

from path_jax import report
from path_jax.interpretability.implant_trials import ImplantReport
from path_jax.interpretability.saturation import SaturationSummary
from path_jax.interpretability.second_rank import SecondRank
from path_jax.interpretability.transitions import ProbeReport


@dataclasses.dataclass(frozen=True)
class Saturated:
    """Numbers of one model on one kind of text.

    Attributes:
      num_layers: L.
      layers: at which ranks saturate, of all tokens.
      summary: of those that the filter keeps.
      probe: of the rank in progress, where there were samples enough.
      implants: {"switch" or the name of a control: what implants did}.
      second: where the text says which tokens are right.
    """

    num_layers: int
    layers: Int[np.ndarray, "k n"]
    summary: SaturationSummary
    probe: ProbeReport | None = None
    implants: Mapping[str, ImplantReport] = dataclasses.field(default_factory=dict)
    second: SecondRank | None = None


_COLUMNS = {
    "tokens": lambda x: x.summary.num_tokens,
    "kept": lambda x: x.summary.num_kept,
    "tau": lambda x: x.summary.tau,
    "p": lambda x: x.summary.p_value,
    "in order": lambda x: x.summary.strict_share,
    "rank 1 before 2": lambda x: x.summary.before_shares[0],
    "layer of rank 1": lambda x: x.summary.mean_layers[0],
    "probe": lambda x: x.probe.balanced_accuracy if x.probe else np.nan,
    "probe, shuffled": lambda x: x.probe.shuffled if x.probe else np.nan,
    "chance": lambda x: x.probe.chance if x.probe else np.nan,
}
_ONLY_IN_REPORT = ("kept", "rank 1 before 2", "chance")


def write_saturation_report(directory: str | os.PathLike[str], analysed: Mapping[str, Saturated]) -> Path:
    """Writes the report into a directory, created if missing; `saturation.csv` has a row for each number.

    Returns:
      Path of report.html.

    Raises:
      ImportError: matplotlib is missing; the CSV file is there.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    rows = [(label, *row) for label, item in analysed.items() for row in _numbers(item)]
    report.write_csv(directory / "saturation.csv", ("source", "quantity", "at", "value"), rows, digits=6)
    table = [["", *_COLUMNS], *([label, *_cells(item)] for label, item in analysed.items())]
    second = [
        f"{label}: {x.late_accuracy:.1%} of {x.num_late:,} late, {x.early_accuracy:.1%} of {x.num_early:,} early, "
        f"z {x.z:.2f}, p {x.p_value:.2g}"
        for label, item in analysed.items()
        if (x := item.second)
    ]
    return report.write_report(
        directory,
        title="Saturation of the best tokens",
        summary={},
        figures=_figures(analysed),
        texts={"Results": report.aligned(table)}
        | ({"Second rank right where the first is wrong": "\n".join(second)} if second else {})
        | {"How to read it": _EXPLANATION},
    )


_EXPLANATION = """\
A token's rank saturates at the first layer from which on the logit lens has the same token at that rank.
kept: tokens whose best one has saturated after 85 % of the layers; all other columns are of these.
tau: mean strict Kendall tau between ranks and layers, 1 where each rank saturates after the better one; p by shuffling
each token's layers. in order: share of tokens whose ranks saturate one after the other.
probe: balanced accuracy of a linear classifier of the rank in progress on tokens it has not seen; shuffled: the same
with labels shuffled within each layer.
Implants: the stream of a token that saturates early, put into one with the same best token that does so late; success
is saturation at the implant's layer with the best token unchanged. same: its own stream; late: one whose decision is
still to come; random: one of another best token."""


def saturation_table(analysed: Mapping[str, Saturated]) -> Table:
    """The main results for the terminal."""
    names = [name for name in _COLUMNS if name not in _ONLY_IN_REPORT]
    table = Table("", *names)
    for label, item in analysed.items():
        table.add_row(label, *(cell for name, cell in zip(_COLUMNS, _cells(item)) if name in names))
    table.columns[0].overflow = "fold"  # a name is not cut off
    return table


def _cells(item: Saturated) -> list[str]:
    values = [float(column(item)) for column in _COLUMNS.values()]
    return ["-" if np.isnan(x) else f"{x:,.0f}" if name in ("tokens", "kept") else f"{x:.3g}"
            for name, x in zip(_COLUMNS, values)]  # fmt: skip


def _numbers(item: Saturated):
    """(quantity, at, value)."""
    summary = item.summary
    for name in ("num_tokens", "num_kept", "num_compared", "tau", "p_value", "strict_share", "weak_share"):
        yield name, "", getattr(summary, name)
    for rank, layer in enumerate(summary.mean_layers, 1):
        yield "mean_layer", rank, layer
        yield "mean_place", rank, summary.order.means[rank - 1]
        yield "place_standard_error", rank, summary.order.standard_errors[rank - 1]
    for rank, (share, p_value) in enumerate(zip(summary.before_shares, summary.order.p_values), 1):
        yield "before_next_share", rank, share
        yield "place_p_value", rank, p_value
    if item.probe:
        for name in ("balanced_accuracy", "balanced_accuracy_std", "chance", "layer_chance", "gaussian", "shuffled"):
            yield f"probe_{name}", "", getattr(item.probe, name)
        for i, count in enumerate(item.probe.counts.tolist()):
            yield "probe_count", i + 1, count
            yield "probe_accuracy", i + 1, item.probe.class_accuracy[i]
            yield "probe_auc", i + 1, item.probe.class_auc[i]
        for layer, accuracy in item.probe.layer_accuracy.items():
            yield "probe_layer_accuracy", layer, accuracy
    for name, implants in item.implants.items():
        for i, distance in enumerate(implants.distances.tolist()):
            yield f"implant_{name}_trials", distance, int(implants.num_trials[i])
            for key in ("rates", "lows", "highs", "mean_moved", "unchanged_shares"):
                yield f"implant_{name}_{key}", distance, getattr(implants, key)[i]
    if item.second:
        for name, value in item.second._asdict().items():
            yield f"second_{name}", "", value


def _figures(analysed: Mapping[str, Saturated]) -> list[report.Figure]:
    ranks = lambda item: range(1, len(item.layers) + 1)
    figures: list[report.Figure] = [
        report.Curve(
            "Layer at which a rank saturates", "rank", "share of the layers",
            {label: (list(ranks(x)), (x.summary.mean_layers / (x.num_layers - 1)).tolist())
             for label, x in analysed.items()},
        ),
        report.Curve(
            "Place of a rank among those of its token", "rank", "mean place",
            {label: (list(ranks(x)), x.summary.order.means.tolist()) for label, x in analysed.items()},
        ),
    ]  # fmt: skip
    for label, item in analysed.items():
        shares = np.stack([np.bincount(row % item.num_layers, minlength=item.num_layers) for row in item.layers])
        figures.append(
            report.HeatMap(
                f"{label}: layers of ranks", "layer", "rank", shares / item.layers.shape[1], "share of tokens",
                y_names=[str(rank) for rank in ranks(item)],
            )
        )  # fmt: skip
    if probes := {label: item.probe for label, item in analysed.items() if item.probe}:
        figures.append(
            report.Curve(
                "Probe of the rank in progress", "layer", "balanced accuracy",
                {label: (list(x.layer_accuracy), list(x.layer_accuracy.values())) for label, x in probes.items()},
                y_range=(0, 1),
            )
        )  # fmt: skip
        for label, probe in probes.items():
            names = [str(rank + 1) for rank in range(len(probe.counts))]
            shares = probe.confusion / np.maximum(probe.confusion.sum(axis=1, keepdims=True), 1)
            figures.append(
                report.HeatMap(
                    f"{label}: probe", "predicted rank", "rank in progress", shares, "share",
                    x_names=names, y_names=names, value_range=(0, 1),
                )
            )  # fmt: skip
    for label, item in analysed.items():
        if item.implants:
            series = {name: (x.distances.tolist(), x.rates.tolist()) for name, x in item.implants.items()}
            figures.append(
                report.Curve(
                    f"{label}: implants", "layers from where the source saturates", "success", series, y_range=(0, 1)
                )
            )
    return figures
