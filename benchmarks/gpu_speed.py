"""Times attention on the NVIDIA GPU at hand: our kernels, and beside them those of others.

    python -m pallas_kernels.benchmark gpu --output=results/gpu_h200.md --time-limit=540

Every cell of the grid is one operation by one implementation at one size: first how exact ours are, then medians of
at least 20 samples of the forward pass and of forward and backward pass, and the memory that they need beyond their
inputs; at last the training step of a 125M model. Results are kept in a JSON file next to the table, failures with
their reason, so that a call that ran out of time is continued by the next one. Cells run in processes of their own, one
for JAX and one for PyTorch at a time: a kernel that hangs costs its cell and nothing else.

Peers are cuDNN's causal attention through `jax.nn`, tokamax, PyTorch's scaled_dot_product_attention and the Triton
kernels of flash-linear-attention; those that are not installed are listed as such.
"""

import argparse
import dataclasses
import datetime
import json
import queue
import subprocess
import sys
import threading
import time
from pathlib import Path

from benchmarks.gpu_table import write_table

OURS = ("fox", "path_fox", "path")


@dataclasses.dataclass(frozen=True)
class Cell:
    """One measurement.

    Attributes:
      kind: "accuracy", "time" or "train".
      op: "causal" (softmax), "fox", "path_fox", "path", "fox_strong" (strongly decaying gates), "fox_pruned" (the same,
        pruned); for "train" the mixer.
      by: the implementation: ours by name, or a peer.
      length: T.
      head_dim: H.
    """

    kind: str
    op: str
    by: str
    length: int
    head_dim: int = 128

    @property
    def name(self) -> str:
        """Unique and readable."""
        return f"{self.kind} {self.op} {self.by} T{self.length} H{self.head_dim}"

    @property
    def worker(self) -> str:
        """Module that measures it."""
        return "benchmarks.gpu_torch" if self.by in ("sdpa", "fla") else "benchmarks.gpu_jax"


def all_cells() -> list[Cell]:
    """The grid, what matters most first; in runs of cells for one worker."""

    def times(lengths, head_dim, ops):
        return [Cell("time", op, by, length, head_dim) for length in lengths for op, by in ops]

    ours, peers = [(op, "gpu") for op in OURS], [("causal", "cudnn")]
    torch = [("causal", "sdpa"), ("fox", "fla"), ("path_fox", "fla"), ("path", "fla")]
    pruned = [("fox_strong", "gpu"), ("fox_pruned", "gpu")]
    return [
        *(Cell("accuracy", op, by, 2048, head_dim) for by in ("gpu", "xla") for op in OURS for head_dim in (128, 64)),
        *times((8192, 4096), 128, peers + ours),
        *times((8192, 4096), 128, torch),
        Cell("train", "path_fox", "gpu", 4096, 64),
        Cell("train", "rope", "cudnn", 4096, 64),
        *times((16384, 32768), 128, peers + ours),
        *times((16384,), 128, pruned),
        *times((8192, 32768), 64, peers + ours),
        *times((16384, 32768), 128, torch),
        *times((8192, 32768), 64, torch),
        *(Cell("accuracy", op, "triton", 2048, head_dim) for op in OURS for head_dim in (128, 64)),
        *times((8192,), 128, [(op, "triton") for op in OURS] + [("causal", "tokamax")]),
        *times((4096, 8192), 128, [(op, "xla") for op in OURS]),
        *times((65536,), 128, peers + ours),
        *times((65536,), 64, peers + ours),
        *times((65536,), 128, torch),
    ]


class Store:
    """Results in a JSON file, written after every cell."""

    def __init__(self, path: Path):
        self._path = path
        self.content = json.loads(path.read_text()) if path.exists() else {"machines": [], "cells": {}}

    def lacks(self, cell: Cell, retry: bool) -> bool:
        found = self.content["cells"].get(cell.name)
        return found is None or (retry and "failure" in found)

    def keep(self, cell: Cell, result: dict) -> None:
        self.content["cells"][cell.name] = dataclasses.asdict(cell) | result
        self._save()

    def add_machine(self, description: dict) -> None:
        """Versions and the GPU that a worker reports."""
        if description not in self.content["machines"]:
            self.content["machines"].append(description)
            self._save()

    def _save(self):
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.content, indent=1) + "\n")
        temporary.replace(self._path)


class _Worker:
    """A process that measures cells and prints a line of JSON for each."""

    def __init__(self, module: str, cells: list[Cell]):
        request = json.dumps([dataclasses.asdict(cell) for cell in cells])
        command = [sys.executable, "-m", module]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._process.stdin.write(request)
        self._process.stdin.close()
        self._lines = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self):
        for line in self._process.stdout:
            if line.startswith("{"):
                self._lines.put(json.loads(line))
        self._lines.put({"failure": f"the worker ended with status {self._process.wait()}", "ended": True})

    def next_line(self, timeout: float) -> dict:
        """What the worker says next; a failure when it says nothing or is gone."""
        try:
            return self._lines.get(timeout=max(timeout, 0.1))
        except queue.Empty:
            return {"failure": f"no result within {timeout:.0f} s", "ended": True}

    def stop(self):
        self._process.kill()
        self._process.wait()


def measure(cells: list[Cell], store: Store, deadline: float, cell_limit: float) -> bool:
    """Measures cells of one worker. Returns whether there was time for all."""
    cells = list(cells)
    while cells:
        worker = _Worker(cells[0].worker, cells)
        try:
            line = worker.next_line(min(cell_limit, deadline - time.monotonic()))  # first it introduces itself
            if "machine" in line:
                store.add_machine(line["machine"])
            while cells and not line.get("ended"):
                line = worker.next_line(min(cell_limit, deadline - time.monotonic()))
                if line.get("ended"):
                    break
                cell = cells.pop(0)
                store.keep(cell, line)
                print(f"{cell.name}: {_short(line)}", flush=True)
        finally:
            worker.stop()
        if time.monotonic() >= deadline:
            return not cells
        if cells:  # the one it was at took the worker with it; the others get a new one
            cell = cells.pop(0)
            store.keep(cell, {"failure": line["failure"]})
            print(f"{cell.name}: {line['failure']}", flush=True)
    return True


def _short(result):
    shown = {key: value for key, value in result.items() if key != "samples"}
    return json.dumps(shown)[:200]


def _runs(cells):
    """Neighbours with one worker."""
    runs = []
    for cell in cells:
        if not runs or runs[-1][-1].worker != cell.worker:
            runs.append([])
        runs[-1].append(cell)
    return runs


def main(argv=None):
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m pallas_kernels.benchmark gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", type=Path, required=True, help="Markdown file; JSON and a plot are kept next to it")
    parser.add_argument("--time-limit", type=float, default=3600, metavar="S", help="stop after so many seconds")
    parser.add_argument("--cell-limit", type=float, default=120, metavar="S", help="give a cell up after so many")
    parser.add_argument("--only", default="", help="measure cells whose name contains this")
    parser.add_argument("--retry", action="store_true", help="measure failed cells again")
    parser.add_argument("--list", action="store_true", help="print the names of the cells and stop")
    args = parser.parse_args(argv)
    cells = [cell for cell in all_cells() if args.only in cell.name]
    if args.list:
        print(*(cell.name for cell in cells), sep="\n")
        return
    deadline = time.monotonic() + args.time_limit
    store = Store(args.output.with_suffix(".json"))
    missing = [cell for cell in cells if store.lacks(cell, args.retry)]
    in_time = all(measure(run, store, deadline, args.cell_limit) for run in _runs(missing))
    write_table(args.output, store.content, datetime.date.today())
    left = sum(store.lacks(cell, False) for cell in cells)
    print(f"{args.output}: {len(cells) - left} of {len(cells)} cells" + ("" if in_time else "; run again to continue"))
