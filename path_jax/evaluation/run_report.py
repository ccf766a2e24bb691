"""What one training run came to: a report directory for reading, and tables for the terminal."""

import json
import math
import os
import re
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.table import Table

from path_jax import report
from path_jax.data import ByteTokenizer, DataConfig, encoding_of
from path_jax.models import DecoderLM, ModelConfig
from path_jax.models.generate import generate

# What the loss of a conversion's stage is: key of its mean in the summary, label of its axis.
_STAGE_LOSSES = {
    "mse": ("train_imitation_error", "squared error / squared output of the teacher"),
    "kl": ("train_divergence", "divergence from the teacher [nats/token]"),
}
# Keys of a run's summary, in the order of the table.
_SUMMARY_LABELS = {
    "parameters": "parameters",
    "train_bits_per_byte": "train bits/byte",
    "train_imitation_error": "train imitation error",
    "train_divergence": "train nats/token from the teacher",
    "heldout_bits_per_byte": "held-out bits/byte",
    "gzip_bits_per_byte": "gzip -9 bits/byte",
    "order3_bits_per_byte": "order-3 byte model bits/byte",
    "tokens_per_second": "tokens/s",
    "seconds": "seconds",
    "checkpoint": "checkpoint",
}


def finish(
    workdir: Path,
    *,
    config: Mapping[str, Any],
    model: DecoderLM,
    params: Mapping[str, Any],
    records: Sequence[Mapping[str, float]],
    results: Mapping[str, Mapping[str, float]],
    checkpoint: Path,
    start: float,
) -> dict[str, Any]:
    """Writes results.json, summary.json and, where matplotlib is installed, the report of a finished run.

    Args:
      workdir: Directory of the run.
      config, model, params: What was trained.
      records: Records of metrics.jsonl.
      results: {evaluator: {metric: value}} of the finished model.
      checkpoint: Where its last checkpoint lies.
      start: `time.perf_counter()` when the job started.

    Returns:
      The summary. Its training loss is the mean over the last twentieth of the steps, its speed the median step's.
    """
    last = records[-max(1, len(records) // 20) :]
    unit = "bits_per_byte" if _is_bytes(config) else "bits_per_token"
    sample = _sample(model, params) if _is_bytes(config) else ""
    tokens_per_step = config["data"]["batch_size"] * config["data"]["sequence_length"]
    loss = statistics.fmean(record["loss"] for record in last)
    stage_key, _ = _STAGE_LOSSES.get(_stage(config), (None, None))
    summary = {
        "parameters": sum(x.size for x in jax.tree.leaves(params)),
        stage_key or f"train_{unit}": loss if stage_key else loss / math.log(2),
        "tokens_per_second": tokens_per_step / statistics.median(record["step_seconds"] for record in records),
    }
    if "perplexity" in results:
        summary[f"heldout_{unit}"] = results["perplexity"]["bits_per_byte"]
    summary |= results.get("byte_baselines", {})
    summary |= {"seconds": time.perf_counter() - start, "checkpoint": str(checkpoint)}
    for name, content in (("results.json", results), ("summary.json", summary)):
        report.write_file(workdir / name, (json.dumps(content, indent=2) + "\n").encode())
    try:
        write_run_report(workdir, config=config, summary=summary, results=results, metrics=records, sample=sample)
    except ImportError as error:
        print(f"no report.html: {error}", file=sys.stderr)
    return summary


def _sample(model: DecoderLM, params: Mapping[str, Any], prompt: str = "def ", size: int = 240) -> str:
    """Text that a byte-level model writes, always the same."""
    tokenizer = ByteTokenizer()
    tokens = np.concatenate([[tokenizer.bos_id], tokenizer.encode(prompt)])
    key = jax.random.key(0)
    text = generate(model, params, tokens, max_new_tokens=size, temperature=0.7, top_p=0.95, rng=key)
    return tokenizer.decode(np.asarray(text[0]))


def write_run_report(
    workdir: str | os.PathLike[str],
    *,
    config: Mapping[str, Any],
    summary: Mapping[str, Any],
    results: Mapping[str, Mapping[str, float]],
    metrics: Sequence[Mapping[str, float]],
    sample: str,
) -> None:
    """Writes report.html, report.png and a CSV file per figure into the run's directory.

    Figures are the loss over training, the error of each layer where layers are imitated, the loss by position beyond
    the training length, and the mean gates by layer and head; one without numbers is left out.

    Args:
      workdir: Directory of the run.
      config: Resolved configuration, with the sections of a config file.
      summary: See `summary_rows`.
      results: {evaluator: {metric: value}} of the finished model.
      metrics: Records of the run in order; those with `step` and `loss` (nats) are drawn, over `tokens` if present.
      sample: Text that the model generated.

    Raises:
      ImportError: matplotlib is missing.
    """
    figures = [_loss_curve(config, results, metrics), _layer_curve(config, metrics)]
    figures.append(length_curve(config, results.get("length", {})))
    gates = results.get("gates", {})
    figures += [_gate_map(gates, "forget_gate", "forget gate"), _gate_map(gates, "beta", "beta")]
    report.write_report(
        workdir,
        title=f"Training run: {ModelConfig(**config['model']).mixer}",
        summary=summary_rows(summary),
        figures=[figure for figure in figures if figure is not None],
        texts={"Sample": sample, "Configuration": json.dumps(config, indent=2, sort_keys=True, default=str)},
    )


def summary_rows(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Returns {label: value} of a run's summary, in order; unknown keys follow under their own names."""
    ordered = [key for key in _SUMMARY_LABELS if key in summary] + [
        key for key in summary if key not in _SUMMARY_LABELS
    ]
    return {_SUMMARY_LABELS.get(key, key): summary[key] for key in ordered}


def summary_table(summary: Mapping[str, Any]) -> Table:
    """Returns `summary_rows` as a table for the terminal."""
    table = Table(show_header=False)
    table.add_column()
    table.add_column(overflow="fold")  # a path must not be cut short
    for label, value in summary_rows(summary).items():
        table.add_row(label, report.format_value(value))
    return table


def length_curve(config: Mapping[str, Any], length: Mapping[str, float]) -> report.Curve | None:
    """Returns the figure of a `length` evaluation, or None without one."""
    points = {int(match[1]): value for key, value in length.items() if (match := re.fullmatch(r"loss_at_(\d+)", key))}
    if not points:
        return None
    unit, scale = _unit(config)
    options = config["evals"].get("length") or {}
    train_length = options.get("train_length") or DataConfig(**config["data"]).sequence_length
    return report.Curve(
        "Loss by position",
        "position [tokens], end of range",
        f"held-out loss [{unit}]",
        {"held-out": (sorted(points), [points[x] * scale for x in sorted(points)])},
        vertical_lines={f"training length {train_length}": train_length},
    )


def _unit(config: Mapping[str, Any]) -> tuple[str, float]:
    """Returns the unit of losses and what nats are multiplied with: bits per byte only where tokens are bytes."""
    return ("bits/byte", 1 / math.log(2)) if _is_bytes(config) else ("nats/token", 1.0)


def _is_bytes(config: Mapping[str, Any]) -> bool:
    encoding = encoding_of(DataConfig(**config["data"]))
    return encoding is not None and encoding.kind == "bytes"


def _stage(config: Mapping[str, Any]) -> str:
    return config["conversion"]["stage"] if "conversion" in config else "lm"


def _over_training(records) -> tuple[str, list[float]]:
    """Label and values of the x axis."""
    name = "tokens" if all("tokens" in record for record in records) else "step"
    return f"training {name}", [record[name] for record in records]


def _loss_curve(config, results, metrics) -> report.Curve | None:
    records = [record for record in metrics if "loss" in record]
    if not records:
        return None
    x_label, x = _over_training(records)
    if _stage(config) in _STAGE_LOSSES:
        _, label = _STAGE_LOSSES[_stage(config)]
        return report.Curve("Loss over training", x_label, label, {"train": (x, [r["loss"] for r in records])})
    unit, scale = _unit(config)
    series = {"train": (x, [record["loss"] * scale for record in records])}
    levels = {}
    if "perplexity" in results:
        levels["held-out, at the end"] = results["perplexity"]["loss"] * scale
    if "byte_baselines" in results:
        levels["gzip -9"] = results["byte_baselines"]["gzip_bits_per_byte"]
        levels["order-3 byte model"] = results["byte_baselines"]["order3_bits_per_byte"]
    series |= {name: ([x[0], x[-1]], [level, level]) for name, level in levels.items()}
    return report.Curve("Loss over training", x_label, f"loss [{unit}]", series)


def _layer_curve(config, metrics) -> report.Curve | None:
    records = [record for record in metrics if "layer_0" in record]
    if not records:
        return None
    x_label, x = _over_training(records)
    _, label = _STAGE_LOSSES["mse"]
    layers = range(config["model"]["num_layers"])
    series = {f"layer {i}": (x, [record[f"layer_{i}"] for record in records]) for i in layers}
    return report.Curve("Imitation error by layer", x_label, label, series, log_y=True)


def _gate_map(gates: Mapping[str, float], name: str, label: str) -> report.HeatMap | None:
    cells = {
        (int(match[1]), int(match[2])): value
        for key, value in gates.items()
        if (match := re.fullmatch(rf"{name}/layer(\d+)/head(\d+)", key))
    }
    if not cells:
        return None
    values = np.full(np.max(list(cells), axis=0) + 1, np.nan)
    for cell, value in cells.items():
        values[cell] = value
    return report.HeatMap(f"Mean {label}", "head", "layer", values, f"mean {label}")
