"""Results of a sweep over a synthetic task as a page: errors of all seeds, with intervals, beside the paper's.

    python -m benchmarks.task_results runs/flip_flop --title="Flip-flop" --output=results/flip_flop.md

Takes the directory of a finished `python -m path_jax.sweep` and writes the Markdown file and, beside it, the sweep's
curves (PNG) and all its numbers (CSV).
"""

import json
import shutil
from pathlib import Path

from benchmarks.pages import heading, missing_files_are_named, parse_arguments
from path_jax.evaluation.task_accuracy import wilson_interval
from path_jax.report import markdown_table

# Errors in percent; Yang et al., "PaTH Attention" (arXiv 2505.16381), table 1.
_PAPER = {
    "flip_flop": {
        "rope": {"in_distribution": "6.9", "sparse": "40.3", "dense": "0.01"},
        "stick_breaking": {"in_distribution": "9.6", "sparse": "38.9", "dense": "0"},
        "fox": {"in_distribution": "8.3", "sparse": "36.3", "dense": "0"},
        "path": {"in_distribution": "0", "sparse": "0.0001", "dense": "0"},
    },
}


def load_run(folder: Path) -> dict:
    """Label and settings (from the name), configuration, results and summary of a finished run."""
    read = lambda name: json.loads((folder / name).read_text())
    return {
        "label": folder.name,
        "settings": dict(part.split("=", 1) for part in folder.name.split(",")),
        "config": read("resolved.json"),
        "results": read("results.json")["task"],
        "summary": read("summary.json"),
    }


def group_runs(runs: list[dict]) -> dict[tuple, list[dict]]:
    """Runs that differ by the seed alone."""
    groups: dict[tuple, list[dict]] = {}
    for run in runs:
        key = tuple(item for item in run["settings"].items() if item[0] != "seed")
        groups.setdefault(key, []).append(run)
    return groups


def _percent(share: float) -> str:
    return f"{100 * share:.2g}" if share < 0.1 else f"{100 * share:.1f}"


def _cell(runs: list[dict], variant: str) -> str:
    """Pooled error with its interval, and the seeds' own."""
    errors, scored = (round(sum(run["results"][f"{variant}/{name}"] for run in runs)) for name in ("errors", "scored"))
    low, high = wilson_interval(errors, scored)
    seeds = ", ".join(_percent(run["results"][f"{variant}/error"]) for run in runs)
    return f"**{_percent(errors / scored)}** [{_percent(low)}, {_percent(high)}] ({seeds})"


def setting(config: dict) -> str:
    """Sizes of model, task and training in a line."""
    model, data, train = config["model"], config["data"], config["train"]
    options = ", ".join(f"{name} {value}" for name, value in data["task_options"].items())
    layers = "1 layer" if model["num_layers"] == 1 else f"{model['num_layers']} layers"
    return (
        f"{layers}, width {model['embed_dim']}, {model['num_heads']} heads; {data['task']}"
        f"{f' ({options})' if options else ''}, {data['sequence_length']} tokens, {train['num_steps']} steps of "
        f"{data['batch_size']} rows"
    )


def page(sweep: Path, title: str, text: str) -> list[str]:
    """Lines of the page.

    Raises:
      FileNotFoundError: if the sweep has not finished.
    """
    runs = [load_run(path.parent) for path in sorted(sweep.glob("runs/*/results.json"))]
    if not runs or not (sweep / "report.png").exists():
        raise FileNotFoundError(f"{sweep} is not the directory of a finished sweep")
    task = runs[0]["config"]["data"]["task"]
    paper = _PAPER.get(task, {})
    variants = [name.removesuffix("/errors") for name in runs[0]["results"] if name.endswith("/errors")]
    groups = group_runs(runs)
    keys = [key for key, _ in next(iter(groups))]
    settings = list(dict.fromkeys(setting(group[0]["config"]) for group in groups.values()))
    scored = {
        name: min(sum(run["results"][f"{name}/scored"] for run in group) for group in groups.values())
        for name in variants
    }
    lines = [
        *heading(title, text, "task_results", sum(run["summary"]["seconds"] for run in runs) / 3600),
        *[f"- {setting}" for setting in settings],
        "",
        "Errors in percent: all seeds together with the 95 % interval of that many independent answers, and each seed. "
        "Answers scored for each row, at least: " + ", ".join(f"{n} {x:,.0f}" for n, x in scored.items()) + ".",
        "",
    ]
    header = [*keys, "parameters", "seeds", *variants, *(["paper"] if paper else [])]
    rows = []
    for key, group in groups.items():
        found = dict(key)
        known = paper.get(group[0]["config"]["model"]["mixer"], {})
        rows.append([
            *(found.get(name, "") for name in keys), f"{group[0]['summary']['parameters']:,}", str(len(group)),
            *(_cell(group, variant) for variant in variants),
            *([" / ".join(known.get(variant, "-") for variant in variants)] if paper else []),
        ])  # fmt: skip
    return [*lines, *markdown_table(header, rows)]


def main(argv=None) -> None:
    """Command line."""
    args = parse_arguments(argv, __doc__, "sweep", type=Path, help="directory of the sweep")
    with missing_files_are_named():
        lines = page(args.sweep, args.title, args.text)
    image, table = (args.output.with_suffix(suffix) for suffix in (".png", ".csv"))
    shutil.copyfile(args.sweep / "report.png", image)
    shutil.copyfile(args.sweep / "results.csv", table)
    lines += ["", f"All numbers: [{table.name}]({table.name}). Training loss, and errors by level:", ""]
    args.output.write_text("\n".join([*lines, f"![curves]({image.name})", ""]))


if __name__ == "__main__":
    main()
