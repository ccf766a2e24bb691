"""What analyses of associative recall came to, as a page: behaviour and mechanism of all seeds, beside the paper's.

    python -m path_jax.interpretability recall --checkpoint='runs/ar/runs/*' --output=runs/ar/analysis
    python -m benchmarks.recall_results runs/ar --title="Associative recall" --output=results/associative_recall.md

Takes the directory of a sweep over the task ar or atr, with the analysis of its runs in DIR/analysis, and writes the
Markdown file and, beside it, heat maps (PNG) and all numbers of the analysis (CSV).
"""

import csv
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks.pages import heading, missing_files_are_named, parse_arguments
from benchmarks.task_results import group_runs, load_run, setting
from path_jax.report import HeatMap, markdown_table, write_image

# What Arora et al. (arXiv 2505.15105) report for 8192 keys and values (ar), and for sentences of depth 10 with 20
# terminals (atr): accuracy, best over widths and learning rates, and mechanism.
_PAPER = {
    "ar": {
        "attention": "100 % from width 32 on; induction",
        "based": "99.1 %; induction",
        "mamba": "91.3 %; direct retrieval by the SSM, induction by the short convolution",
        "h3": "fails; direct retrieval",
        "hyena": "fails; direct retrieval",
        "deltanet": "close to Mamba",
        "nope": "5.6 % at width 256",
    },
    "atr": {"attention": "80.9 %", "mamba": "92.2 %"},
}
_LONGER = {
    "pairs_x2": "twice the pairs",
    "records_x2": "twice the records",
    "long_sentences": "longest sentences",
    "sentences_x2": "sentences twice as long",
}
_SETTINGS = {"conv_size": "convolution {}", "steps": "{} steps"}
_WAYS = {"induction": "value", "direct, layer 1": "key", "direct, layer 0": "query"}
_PARTS = {
    "k, v": ("mixer.k", "mixer.v"),
    "w, beta": ("mixer.w", "mixer.beta"),
    "q": ("mixer.q",),
    "convolution": ("mixer.conv_out",),
    "recurrence": ("mixer.recurrence",),
}


class _Group(NamedTuple):
    """Runs that differ by the seed alone."""

    name: str
    lr: str
    runs: list[dict]
    ways: dict[str, list[float]]  # restored at a token in the second layer's input, of all seeds
    parts: dict[str, list[float]]  # restored by a part of a mixer at all tokens


def read_groups(sweep: Path) -> list[_Group]:
    """Runs and their analysis, by settings.

    Raises:
      FileNotFoundError: if runs or their analysis are missing.
    """
    runs = [load_run(path.parent) for path in sorted(sweep.glob("runs/*/results.json"))]
    path = sweep / "analysis" / "attribution.csv"
    if not runs or not path.exists():
        raise FileNotFoundError(f"{sweep} has no finished runs with their analysis in {path.parent}")
    with path.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["corrupted"] == "key"]
    restored = {(row["model"], row["site"], row["token"]): float(row["mean"]) for row in rows}
    if missing := {run["label"] for run in runs} - {row["model"] for row in rows}:
        raise FileNotFoundError(f"{path} has no {', '.join(sorted(missing))}")
    groups = []
    for key, members in group_runs(runs).items():
        found, labels = dict(key), [run["label"] for run in members]
        values = lambda site, token, labels=labels: [
            restored[label, site, token] for label in labels if (label, site, token) in restored
        ]
        parts = {
            f"layer {layer}: {part}": values(" + ".join(f"{layer}.{tap}" for tap in taps), "all")
            for layer in range(members[0]["config"]["model"]["num_layers"])
            for part, taps in _PARTS.items()
        }
        ways = {way: values("1.resid_pre", token) for way, token in _WAYS.items()}
        settings = [text.format(found[key]) for key, text in _SETTINGS.items() if key in found]
        rate = found.get("lr") or f"{members[0]['config']['optim']['lr']:.0e}".replace("e-0", "e-")
        groups.append(_Group(", ".join([found["mixer"], *settings]), rate, members, ways, parts))
    return groups


def page(groups: Sequence[_Group], title: str, text: str) -> list[str]:
    """Lines of the page."""
    rows = []
    reported = _PAPER.get(groups[0].runs[0]["config"]["data"]["task"], {})
    longer = next((x for x in _LONGER if f"{x}/error" in groups[0].runs[0]["results"]), None)
    for group in groups:
        results = [run["results"] for run in group.runs]
        rows.append([
            group.name, group.lr, f"{group.runs[0]['summary']['parameters']:,}",
            _cell([1 - found["in_distribution/error"] for found in results]),
            *([_cell([1 - found[f"{longer}/error"] for found in results])] if longer else []),
            *(_cell(values) for values in group.ways.values()), reported.get(group.name.partition(",")[0], ""),
        ])  # fmt: skip
    runs = [run for group in groups for run in group.runs]
    return [
        *heading(title, text, "recall_results", sum(run["summary"]["seconds"] for run in runs) / 3600),
        *[f"- {line}" for line in dict.fromkeys(setting(run["config"]) for run in runs)],
        "",
        f"Accuracy on new documents{f', and with {_LONGER[longer]}' if longer else ''}. Then attribution: the key "
        "that is asked for is replaced, and the input of the second layer restored at one token; the share of the "
        "answer's probability that comes back. Induction: at the value. Direct, layer 1: at the key. Direct, layer 0: "
        "at the query, where the first layer has found the answer already. Means, and each seed.",
        "",
        *markdown_table(
            ["mixer", "lr", "parameters", "accuracy", *([_LONGER[longer]] if longer else []), *_WAYS, "paper"], rows
        ),
        "",
        "What parts of the mixers restore, patched at all tokens; means over the seeds:",
        "",
        *markdown_table(
            ["mixer", "lr", *groups[0].parts],
            [
                [group.name, group.lr, *(_number(_mean(x)) if x else "" for x in group.parts.values())]
                for group in groups
            ],
        ),
    ]  # fmt: skip


def figures(groups: Sequence[_Group]) -> list[HeatMap]:
    """Ways of the association, and what carries it, by mixer."""
    names = [f"{group.name} {group.lr}" for group in groups]
    return [
        HeatMap(
            title,
            "",
            "",
            np.array([[_mean(x) for x in getattr(group, what).values()] for group in groups]),
            "attribution",
            x_names=list(getattr(groups[0], what)),
            y_names=names,
            value_range=(0, 1),
        )
        for what, title in (("ways", "Way of the association"), ("parts", "Part of the mixer, at all tokens"))
    ]


def _mean(values: Sequence[float]) -> float:
    """Of the seeds that have a value: where a model never finds the answer, corruption loses nothing."""
    known = [x for x in values if not math.isnan(x)]
    return sum(known) / len(known) if known else math.nan


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.2f}"


def _cell(values: Sequence[float]) -> str:
    """Mean and each seed's value."""
    return f"**{_number(_mean(values))}** ({', '.join(map(_number, values))})" if values else ""


def main(argv=None) -> None:
    """Command line."""
    args = parse_arguments(argv, __doc__, "sweep", type=Path, help="directory of the sweep")
    with missing_files_are_named():
        groups = read_groups(args.sweep)
    image = args.output.with_suffix(".png")
    write_image(image, figures(groups))
    lines, names = page(groups, args.title, args.text), []
    for name in ("behaviour", "attribution"):
        path = args.output.with_name(f"{args.output.stem}_{name}.csv")
        shutil.copyfile(args.sweep / "analysis" / f"{name}.csv", path)
        names.append(f"[{path.name}]({path.name})")
    lines += ["", f"All numbers: {', '.join(names)}.", "", f"![heat maps]({image.name})", ""]
    args.output.write_text("\n".join(lines))


if __name__ == "__main__":
    main()
