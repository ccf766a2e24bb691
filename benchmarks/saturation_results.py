"""What saturation analyses of several models came to, as a page beside the paper's findings.

    python -m path_jax.interpretability saturation --checkpoint=DIR --untrained --pairs=100 --output=runs/saturation/DIR
    python -m benchmarks.saturation_results SmolLM2=runs/saturation/DIR ... --title=Saturation \
        --output=results/saturation.md

Takes directories that the command wrote, named, and writes the Markdown file and, beside it, the implants' success as
curves (PNG) and all numbers (CSV).
"""

from collections.abc import Mapping, Sequence

import numpy as np

from benchmarks.pages import heading, missing_files_are_named, parse_arguments, read_rows
from path_jax.report import Curve, markdown_table, write_csv, write_image

# Column: quantity and where it is, of saturation.csv.
_ORDER = {
    "tokens": ("num_tokens", ""),
    "kept": ("num_kept", ""),
    "tau": ("tau", ""),
    "p": ("p_value", ""),
    "in order": ("strict_share", ""),
    "rank 1 before 2": ("before_next_share", "1"),
    "layer of rank 1": ("mean_layer", "1"),
    "of rank 5": ("mean_layer", "5"),
}
_PROBE = {
    "balanced accuracy": ("probe_balanced_accuracy", ""),
    "chance": ("probe_chance", ""),
    "by the layer alone": ("probe_layer_chance", ""),
    "labels shuffled": ("probe_shuffled", ""),
    "Gaussian features": ("probe_gaussian", ""),
}
_SECOND = {
    "late": ("second_late_accuracy", ""),
    "of": ("second_num_late", ""),
    "early": ("second_early_accuracy", ""),
    "of ": ("second_num_early", ""),
    "p": ("second_p_value", ""),
}
_ORDER_TEXT = """\
Order, of the tokens kept, whose best one is decided before 85 % of the layers: mean strict Kendall tau between ranks \
1 to 5 and their layers; p by shuffling each token's layers; share of tokens with all ranks in order."""
_PROBE_TEXT = """\
Probe of the rank in progress, from the residual stream alone, on tokens that it has not seen; beside it what the \
layer's number alone gives, and two controls."""
_IMPLANT_TEXT = """\
Implants by distance of their layer from where the source decides: share of trials in which the other token then \
decides at once, and for the same. switch: from a token that decides early. same: its own stream. late: from one whose \
decision is still to come. random: from one with another best token."""
_SECOND_TEXT = "Second rank right where the first is wrong, by whether it is decided late or early."
_IMPLANTS = ("switch", "same", "late", "random")

Numbers = Mapping[tuple[str, str], float]  # {(quantity, at): value}


def read_numbers(named: Sequence[str]) -> dict[str, Numbers]:
    """{name and source: numbers} of what the saturation command wrote."""
    found: dict[str, dict[tuple[str, str], float]] = {}
    for name, row in read_rows(named, "saturation.csv"):
        found.setdefault(f"{name}, {row['source']}", {})[row["quantity"], row["at"]] = float(row["value"])
    return found


def page(found: Mapping[str, Numbers], title: str, text: str) -> list[str]:
    """Lines of the page."""
    return [
        *heading(title, text, "saturation_results"),
        *_section(_ORDER_TEXT, _table(found, _ORDER)),
        *_section(_PROBE_TEXT, _table(found, _PROBE)),
        *_section(_IMPLANT_TEXT, _implant_table(found)),
        *_section(_SECOND_TEXT, _table(found, _SECOND)),
    ]


def _section(text: str, table: list[str]) -> list[str]:
    """Nothing where the table has no rows."""
    return [text, "", *table, ""] if len(table) > 2 else []


def _table(found: Mapping[str, Numbers], columns: Mapping[str, tuple[str, str]]) -> list[str]:
    rows = [
        [name, *(_cell(numbers.get(key, np.nan)) for key in columns.values())]
        for name, numbers in found.items()
        if next(iter(columns.values())) in numbers
    ]
    return markdown_table(["", *columns], rows)


def _distances(numbers: Numbers, control: str) -> list[int]:
    return sorted(int(at) for quantity, at in numbers if quantity == f"implant_{control}_rates")


def _implant_table(found: Mapping[str, Numbers]) -> list[str]:
    distances = sorted({at for numbers in found.values() for at in _distances(numbers, "switch")})
    rows = []
    for name, numbers in found.items():
        for control in _IMPLANTS:
            key = lambda quantity, at, control=control: (f"implant_{control}_{quantity}", str(at))
            counts = [numbers.get(key("trials", at), 0) for at in distances]
            if sum(counts):
                shares = [numbers.get(key("rates", at), np.nan) for at in distances]
                rows.append([name, control, f"{sum(counts):,.0f}", *map(_cell, shares)])
    return markdown_table(["", "implant", "trials", *map(str, distances)], rows)


def _cell(value: float) -> str:
    if np.isnan(value):
        return "-"
    return f"{value:,.0f}" if value == round(value) and abs(value) > 1 else f"{value:.3g}"


def curves(found: Mapping[str, Numbers]) -> list[Curve]:
    """Success of implants by distance, one panel for each source that has them."""
    panels = []
    for name, numbers in found.items():
        series = {}
        for control in _IMPLANTS:
            at = [x for x in _distances(numbers, control) if numbers[f"implant_{control}_trials", str(x)]]
            if at:
                series[control] = (at, [numbers[f"implant_{control}_rates", str(x)] for x in at])
        if series:
            panels.append(
                Curve(name, "layers from where the source decides", "implants that succeed", series, y_range=(0, 1))
            )
    return panels


def main(argv=None) -> None:
    """Command line."""
    args = parse_arguments(argv, __doc__, "analyses", nargs="+", metavar="NAME=DIR", help="what the command wrote")
    with missing_files_are_named():
        found = read_numbers(args.analyses)
    table, image = (args.output.with_suffix(suffix) for suffix in (".csv", ".png"))
    rows = [(name, *key, value) for name, numbers in found.items() for key, value in numbers.items()]
    write_csv(table, ("source", "quantity", "at", "value"), rows, digits=6)
    lines = [*page(found, args.title, args.text), f"All numbers: [{table.name}]({table.name})."]
    if panels := curves(found):
        write_image(image, panels)
        lines += ["", f"![implants]({image.name})"]
    args.output.write_text("\n".join([*lines, ""]))


if __name__ == "__main__":
    main()
