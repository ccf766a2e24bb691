"""What early exits of several models came to, as a page.

    python -m path_jax.interpretability early-exit --checkpoint=DIR --output=runs/early_exit/DIR
    python -m benchmarks.exit_results SmolLM2=runs/early_exit/DIR ... --title="Early exit" \
        --output=results/early_exit.md

Takes directories that the command wrote, named, and writes the Markdown file and all numbers beside it (CSV).
"""

from collections.abc import Mapping, Sequence

from benchmarks.pages import heading, missing_files_are_named, parse_arguments, read_rows
from path_jax.report import markdown_table, write_csv

_HELDOUT = {
    "tokens": ("num_tokens", "{:,.0f}"),
    "disagreement": ("disagreement", "{:.2%}"),
    "at most": ("disagreement_high", "{:.2%}"),
    "accuracy": ("accuracy", "{:.1%}"),
    "full depth": ("full_accuracy", "{:.1%}"),
    "layers": ("mean_depth", "{:.2f}"),
    "layer speed-up": ("layer_speedup", "{:.3f}"),
}
_GENERATED = {
    "tokens/s": ("tokens_per_second", "{:.1f}"),
    "speed-up": ("speedup", "{:.3f}"),
    "layers below a token": ("mean_depth", "{:.2f}"),
    "layers run a step": ("layer_runs", "{:.2f}"),
    "disagreement": ("disagreement", "{:.2%}"),
}

Numbers = Mapping[tuple[str, ...], Mapping[str, float]]  # {(model, text, rule): {quantity: value}}


def read_numbers(named: Sequence[str]) -> Numbers:
    """Of directories given as NAME=DIR, in their order.

    Raises:
      FileNotFoundError: if one has no early_exit.csv.
    """
    found: dict[tuple[str, ...], dict[str, float]] = {}
    for name, row in read_rows(named, "early_exit.csv"):
        found.setdefault((name, row["text"], row["rule"]), {})[row["quantity"]] = float(row["value"])
    return found


def page(found: Numbers, title: str, text: str) -> list[str]:
    """Lines of the page."""
    heldout = [
        [*key, *(form.format(numbers[name]) for name, form in _HELDOUT.values())]
        for key, numbers in found.items()
        if "num_tokens" in numbers
    ]
    generated = [
        [model, rule, batch, *(form.format(numbers[f"{name}_batch_{batch}"]) for name, form in _GENERATED.values())]
        for (model, text, rule), numbers in found.items()
        for batch in sorted((x.rpartition("_")[2] for x in numbers if x.startswith("speedup_batch_")), key=int)
    ]
    targets = [
        [model, rule, f"{float(target):.1%}", f"{value:.2%}", f"{numbers[f'layer_speedup_at_target_{target}']:.3f}"]
        for (model, text, rule), numbers in found.items()
        for name, value in numbers.items()
        if (target := name.removeprefix("disagreement_at_target_")) != name
    ]
    return [
        *heading(title, text, "exit_results"),
        "Tokens that no rule was fitted to and no threshold chosen by; disagreement: the likeliest next token is not "
        "that of full depth, with the end of an exact 95 % interval. accuracy: it is the text's. oracle: leaves as "
        "soon as no exit behind changes the token, which nothing can know.",
        "",
        *markdown_table(["model", "text", "rule", *_HELDOUT], heldout),
        "",
        "Layers saved by the disagreement allowed, on other tokens of the text that thresholds are from:",
        "",
        *markdown_table(["model", "rule", "allowed", "disagreement", "layer speed-up"], targets),
        *(
            [
                "",
                "Greedy generation from the same prompts, seconds on the clock against full depth in the same run; "
                "disagreement: tokens that full depth would not have taken after the same text.",
                "",
                *markdown_table(["model", "rule", "rows", *_GENERATED], generated),
            ]
            if generated
            else []
        ),
        "",
    ]


def main(argv=None) -> None:
    """Command line."""
    args = parse_arguments(argv, __doc__, "analyses", nargs="+", metavar="NAME=DIR", help="what the command wrote")
    with missing_files_are_named():
        found = read_numbers(args.analyses)
    table = args.output.with_suffix(".csv")
    rows = [(*key, name, value) for key, numbers in found.items() for name, value in numbers.items()]
    write_csv(table, ("model", "text", "rule", "quantity", "value"), rows, digits=6)
    args.output.write_text(
        "\n".join([*page(found, args.title, args.text), f"All numbers: [{table.name}]({table.name}).", ""])
    )


if __name__ == "__main__":
    main()
