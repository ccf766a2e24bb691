"""The table and the plot of what `gpu_speed` measured."""

from pathlib import Path

from benchmarks.gpu_worker import NUM_HEADS, SAMPLES, TOKENS
from path_jax import report

_LABELS = {
    "causal": "softmax", "fox": "FoX", "path_fox": "PaTH-FoX", "path": "PaTH", "fox_strong": "FoX, strong decay",
    "fox_pruned": "FoX, strong decay, pruned", "rope": "RoPE",
}  # fmt: skip
_PEERS = {
    "cudnn": "cuDNN", "tokamax": "tokamax", "sdpa": "PyTorch SDPA", "fla": "flash-linear-attention",
    "gpu": "ours, `gpu`", "triton": "ours, `triton`", "xla": "ours, `xla`",
}  # fmt: skip
_PLOTTED = (("fox", "gpu"), ("path_fox", "gpu"), ("path", "gpu"), ("fox", "fla"), ("path_fox", "fla"), ("path", "fla"))


def write_table(path: Path, content: dict, date) -> None:
    """Writes the Markdown file, and a PNG beside it when there is something to draw.

    Args:
      content: of `gpu_speed.Store`.
      date: of the last measurement.
    """
    cells = list(content["cells"].values())
    lines = [
        "# Attention on a GPU",
        "",
        f"Written by `python -m pallas_kernels.benchmark gpu` on {date}. bfloat16, {NUM_HEADS} heads, batches of "
        f"{TOKENS:,} tokens or one sequence. Milliseconds are medians of {SAMPLES} samples; memory is what a call "
        "takes besides its inputs. Raw samples are in the JSON file of the same name.",
        "",
        *(f"- {', '.join(f'{key} {value}' for key, value in machine.items())}" for machine in content["machines"]),
    ]
    for head_dim in (128, 64):
        timed = [cell for cell in cells if cell["kind"] == "time" and cell["head_dim"] == head_dim]
        if timed:
            lines += ["", f"## Heads of {head_dim}", "", *_time_lines(timed)]
    lines += _accuracy_lines([cell for cell in cells if cell["kind"] == "accuracy"])
    lines += _train_lines([cell for cell in cells if cell["kind"] == "train"])
    curves = [curve for direction in ("forward", "both") if (curve := _curve(cells, direction)).series]
    if curves:
        image = path.with_suffix(".png")
        report.write_image(image, curves)
        lines += ["", f"![time over cuDNN]({image.name})"]
    report.write_file(path, ("\n".join(lines) + "\n").encode())


def _find(cells, op, by, length, head_dim):
    for cell in cells:
        if (cell["op"], cell["by"], cell["length"], cell["head_dim"]) == (op, by, length, head_dim):
            return cell if "failure" not in cell else None
    return None


def _ratio(cell, peer, direction):
    return cell[direction]["ms"] / peer[direction]["ms"] if cell and peer else None


def _time_lines(cells):
    yield "| T | operation | by | forward ms | / cuDNN | / FLA | forward + backward ms | / cuDNN | / FLA | MiB |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"
    for cell in sorted(cells, key=lambda cell: (cell["length"], list(_LABELS).index(cell["op"]))):
        start = f"| {cell['length']} | {_LABELS[cell['op']]} | {_PEERS[cell['by']]} | "
        if "failure" in cell:
            yield start + _one_line(cell["failure"]) + " |" * 7
            continue
        size = cell["length"], cell["head_dim"]
        peers = _find(cells, "causal", "cudnn", *size), _find(cells, cell["op"], "fla", *size)
        entries = []
        for direction in ("forward", "both"):
            ratios = [_ratio(cell, peer, direction) for peer in peers]
            entries += [f"{cell[direction]['ms']:.3f}", *("" if r is None else f"{r:.2f}" for r in ratios)]
        yield start + " | ".join([*entries, f"{cell['both']['bytes'] / 2**20:,.0f}"]) + " |"


def _one_line(text):
    return text.splitlines()[0].replace("|", "/")[:100]


def _accuracy_lines(cells):
    if not cells:
        return []
    lines = ["", "## Accuracy", "", "Largest error over the largest number, against float32; T = 2048."]
    lines += ["", "| operation | by | H | errors |", "| --- | --- | --- | --- |"]
    for cell in cells:
        errors = ", ".join(f"{name} {error:.1e}" for name, error in cell.get("errors", {}).items())
        found = errors or _one_line(cell["failure"])
        lines.append(f"| {_LABELS[cell['op']]} | {_PEERS[cell['by']]} | {cell['head_dim']} | {found} |")
    return lines


def _train_lines(cells):
    if not cells:
        return []
    lines = ["", "## A training step of the 125M configuration", "", "| mixer | by | T | tokens/s | MFU | loss |"]
    lines.append("| --- | --- | --- | --- | --- | --- |")
    for cell in cells:
        start = f"| {_LABELS[cell['op']]} | {_PEERS[cell['by']]} | {cell['length']} | "
        if "failure" in cell:
            lines.append(start + _one_line(cell["failure"]) + " | | |")
            continue
        utilisation = f"{cell['utilisation']:.1%}" if cell["utilisation"] else ""
        losses = f"{cell['losses'][0]:.2f} to {cell['losses'][-1]:.2f}"
        lines.append(start + f"{cell['tokens_per_second']:,.0f} | {utilisation} | {losses} |")
    return lines


def _curve(cells, direction):
    timed = [cell for cell in cells if cell["kind"] == "time" and cell["head_dim"] == 128]
    series = {}
    for op, by in _PLOTTED:
        points = []
        for length in sorted({cell["length"] for cell in timed}):
            found, peer = _find(timed, op, by, length, 128), _find(timed, "causal", "cudnn", length, 128)
            if (ratio := _ratio(found, peer, direction)) is not None:
                points.append((length, ratio))
        if points:
            series[f"{_LABELS[op]}, {'ours' if by == 'gpu' else 'FLA'}"] = tuple(zip(*points))
    title = "forward" if direction == "forward" else "forward and backward"
    return report.Curve(f"{title}, heads of 128", "tokens", "time over cuDNN's softmax", series, log_x=True)
