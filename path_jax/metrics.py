"""Weighted sums, the metrics file and device peaks. Knows nothing about models."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path

import jax

# Dense bfloat16 peak FLOP/s of one device, from the vendors' data sheets, by the start of jax's device_kind.
_PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
}


def peak_flops(device_kind: str) -> float | None:
    """Peak FLOP/s of one device, or None where it is not known (CPUs among them)."""
    return next((peak for kind, peak in _PEAK_FLOPS.items() if device_kind.startswith(kind)), None)


def means(sums: Mapping[str, tuple[jax.Array, jax.Array]]) -> dict[str, float]:
    """{name: sum / weight} of (sum, weight) pairs; waits for the device."""
    return {name: float(total) / max(float(weight), 1e-30) for name, (total, weight) in jax.device_get(sums).items()}


class MetricsFile:
    """Append-only JSON lines, one record per step, that survives being killed.

    Opening it for a run that resumes at `step` drops what was written after that step and a torn last line, so every
    step stands in the file exactly once.
    """

    def __init__(self, path: Path, step: int):
        self.records = [record for record in read_metrics(path) if record["step"] <= step]
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(record) + "\n" for record in self.records))
        os.replace(temporary, path)
        self._file = path.open("a")

    def append(self, record: dict) -> None:
        """Writes one record; it has left this process when the call returns."""
        self.records.append(record)
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_metrics(path: Path) -> list[dict]:
    """Records of a metrics file; a torn last line, as a killed process leaves it, is ignored."""
    if not path.exists():
        return []
    lines = path.read_text().split("\n")
    return [json.loads(line) for line in lines[:-1]]


def first_bad(record: Mapping[str, float]) -> str | None:
    """Name of the first value that is NaN or infinite."""
    return next((name for name, value in record.items() if not math.isfinite(value)), None)
