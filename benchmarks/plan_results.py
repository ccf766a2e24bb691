"""Plans of the shipped configurations, as a page.

    python -m path_jax.plan --config=configs/lm_path.py:size=760m --topology=v5e:16x16 --json > runs/plans/760m.json
    python -m benchmarks.plan_results runs/plans/*.json --title=Plans --output=results/plans.md

Takes what the command prints with --json and writes the Markdown file: for every plan whether it fits, how long a step
takes at least, and what its devices send, beside the bytes that follow from the shapes by hand.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.pages import heading, missing_files_are_named, parse_arguments
from path_jax.report import markdown_table

_GIB = 2**30
_BYTES = {"float32": 4, "bfloat16": 2}


def name_of(plan: Mapping[str, Any]) -> str:
    """The configuration of a plan with its overrides, in short."""
    settings = [x.removeprefix("--config") for x in plan["arguments"] if x.startswith("--config")]
    return " ".join(x.removeprefix("=configs/").removeprefix(".") for x in settings)


def mesh_of(plan: Mapping[str, Any]) -> str:
    """ "fsdp 8, tensor 8"."""
    return ", ".join(f"{axis} {size}" for axis, size in plan["mesh"].items() if size > 1) or "one device"


def flops_by_hand(plan: Mapping[str, Any]) -> float:
    """6 P T for P parameters and T tokens, and 12 N H for every visible key, head N and head dimension H."""
    model, tokens = plan["model"], plan["batch_size"] * plan["sequence_length"]
    heads = model["num_layers"] * model["num_heads"] * model["head_dim"]
    return tokens * (6 * plan["num_parameters"] + 12 * heads * (plan["sequence_length"] + 1) / 2)


def by_hand(plan: Mapping[str, Any]) -> dict[str, float]:
    """Bytes that a device sends for the layers of a recomputed PaTH language model.

    With M parameters in the kernels of a layer's MLP and A in those of its mixer, n devices on the axis fsdp, t on
    tensor, all in the compute dtype:  gathered for the forward pass and the recomputation, and the mixer's once more
    for the gradients of its inputs, L (2 M + 3 A) / t (n - 1) / n;  gradients scattered once, L (M + A) / t (n - 1) /
    n;  activations [B T D] summed over tensor five times in a layer (behind o_proj and down_proj forward, o_proj
    recomputed, and the inputs of mixer and MLP backward), each 2 (t - 1) / t.
    """
    model, mesh = plan["model"], plan["mesh"]
    size, width, heads = _BYTES[model["dtype"]], model["embed_dim"], model["num_heads"] * model["head_dim"]
    mlp = 3 * width * model["mlp_dim"]
    mixer = 4 * width * heads + 32 * (width + heads) + 2 * width * model["num_heads"]
    layers = size * model["num_layers"] / mesh["tensor"]
    share = lambda axis: 1 - 1 / mesh[axis]
    tokens = plan["batch_size"] * plan["sequence_length"] / (mesh["data"] * mesh["fsdp"] * mesh["sequence"])
    return {
        "kernels gathered over fsdp": layers * (2 * mlp + 3 * mixer) * share("fsdp"),
        "gradients scattered over fsdp": layers * (mlp + mixer) * share("fsdp"),
        "activations summed over tensor": 5 * model["num_layers"] * 2 * share("tensor") * tokens * width * size,
    }


def compiled(plan: Mapping[str, Any]) -> dict[str, float]:
    """The same of the compiled program."""
    sent = lambda kind, axes: sum(
        x["sent_bytes"] for x in plan["layer_collectives"] if x["kind"] == kind and x["axes"] == axes
    )
    return {
        "kernels gathered over fsdp": sent("all-gather", "fsdp"),
        "gradients scattered over fsdp": sent("reduce-scatter", "fsdp"),
        "activations summed over tensor": sent("all-reduce", "tensor"),
    }


def page(plans: list[Mapping[str, Any]], title: str, text: str) -> list[str]:
    """Lines of the page."""
    fits = [
        [
            name_of(plan),
            plan["topology"],
            mesh_of(plan),
            f"{plan['batch_size']} x {plan['sequence_length']}",
            f"{plan['peak_bytes'] / _GIB:.2f} of {plan['memory_bytes'] / _GIB:.2f}",
            "yes" if plan["fits"] else "no",
            f"{plan['compile_seconds']:.0f}",
        ]
        for plan in plans
    ]
    timed = [plan for plan in plans if plan["step_seconds"] is not None]
    times = [
        [
            name_of(plan),
            f"{plan['flops']['model']:.4g}",
            f"{plan['flops']['model'] / flops_by_hand(plan) - 1:+.1%}",
            f"{plan['flops']['program']:.4g}",
            *(f"{plan['seconds'][name]:.3f}" for name in ("compute", "hbm", "network")),
            plan["bound"],
            f"{plan['tokens_per_second']:,.0f}",
        ]
        for plan in timed
    ]
    sent = [
        [name_of(plan), row["kind"], row["axes"], str(row["count"]), f"{row['sent_bytes'] / 1e9:.3f}"]
        for plan in timed
        for row in plan["collectives"]
        if row["sent_bytes"] >= 1e6
    ]
    hand = [
        [name_of(plan), what, f"{expected / 1e9:.3f}", f"{actual / 1e9:.3f}", f"{actual / expected - 1:+.1%}"]
        for plan in timed
        for (what, expected), actual in zip(by_hand(plan).items(), compiled(plan).values())
        if expected
    ]
    return [
        *heading(title, text, "plan_results"),
        "Compiled ahead of time; nothing ran. GiB are of one device, seconds of compilation are on the clock.",
        "",
        *markdown_table(["configuration", "topology", "mesh", "batch", "GiB", "fits", "compiled in s"], fits),
        "",
        "FLOPs of a step on all devices: the model's, which leave out an untied embedding, beside six per parameter "
        "and token and those of causal attention; and the program's with what it recomputes. Seconds at the chip's "
        "public rates; a step takes at least the longest of the three.",
        "",
        *markdown_table(
            [
                "configuration",
                "model",
                "to 6 P T + attention",
                "program",
                "compute s",
                "HBM s",
                "network s",
                "bound",
                "tokens/s at most",
            ],
            times,
        ),
        "",
        "What a device sends in a step, loops multiplied out, by rings: GB, rows below 1 MB left out.",
        "",
        *markdown_table(["configuration", "collective", "mesh axes", "runs", "GB"], sent),
        "",
        "The layers' share of it beside what follows from the shapes by hand (`benchmarks.plan_results.by_hand`), GB:",
        "",
        *markdown_table(["configuration", "bytes", "by hand", "compiled", "difference"], hand),
        "",
    ]


def main(argv=None) -> None:
    """Command line."""
    args = parse_arguments(argv, __doc__, "plans", nargs="+", type=Path, help="what the command printed with --json")
    with missing_files_are_named():
        plans = [json.loads(path.read_text()) for path in args.plans]
    args.output.write_text("\n".join(page(plans, args.title, args.text)))


if __name__ == "__main__":
    main()
