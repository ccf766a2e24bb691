"""The GPU benchmark without a GPU: what happens to cells that fail, hang or end their worker, and the table."""

import dataclasses
import datetime
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import gpu_jax, gpu_worker
from benchmarks.gpu_speed import Cell, Store, all_cells, measure
from benchmarks.gpu_table import write_table

WORKER = """
import json, os, sys, time
print(json.dumps({"machine": {"gpu": "none"}}), flush=True)
for cell in json.load(sys.stdin):
    if cell["op"] == "hangs":
        time.sleep(60)
    if cell["op"] == "dies":
        os._exit(3)
    print(json.dumps({"failure": "refused"} if cell["op"] == "fails" else {"ms": 1.0}), flush=True)
"""


@pytest.fixture
def stub(tmp_path, monkeypatch):
    """A worker module that measures nothing, and a store."""
    (tmp_path / "stub_worker.py").write_text(WORKER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(Cell, "worker", property(lambda self: "stub_worker"))
    return Store(tmp_path / "results.json")


def test_a_lost_worker_costs_one_cell(stub, tmp_path):
    cells = [Cell("time", op, "gpu", 1) for op in ("good", "dies", "fails", "hangs", "last")]
    assert measure(cells, stub, time.monotonic() + 60, cell_limit=3)
    found = json.loads((tmp_path / "results.json").read_text())
    results = {cell["op"]: cell.get("failure") for cell in found["cells"].values()}
    assert results["good"] is None and results["last"] is None and results["fails"] == "refused"
    assert "status 3" in results["dies"] and "no result within" in results["hangs"]
    assert found["machines"] == [{"gpu": "none"}]
    reopened = Store(tmp_path / "results.json")
    assert not any(reopened.lacks(cell, retry=False) for cell in cells)
    assert [cell.op for cell in cells if reopened.lacks(cell, retry=True)] == ["dies", "fails", "hangs"]


def test_stops_in_time(stub):
    cells = [Cell("time", op, "gpu", 1) for op in ("good", "hangs", "last")]
    start = time.monotonic()
    assert not measure(cells, stub, start + 3, cell_limit=60)
    assert time.monotonic() - start < 20
    assert [stub.lacks(cell, retry=False) for cell in cells] == [False, True, True]  # what was cut off is not a failure


def test_cells_have_names_of_their_own():
    names = [cell.name for cell in all_cells()]
    assert len(set(names)) == len(names)


def test_measures_and_writes_the_table(tmp_path, monkeypatch):
    for module in (gpu_jax, gpu_worker):
        monkeypatch.setattr(module, "NUM_HEADS", 1, raising=False)
        monkeypatch.setattr(module, "TOKENS", 128, raising=False)
    monkeypatch.setattr(gpu_worker, "SAMPLE_SECONDS", 0)
    cells = {}
    for kind, op, by in (("time", "path_fox", "xla"), ("time", "fox", "xla"), ("accuracy", "path", "xla")):
        cell = Cell(kind, op, by, 128)
        measured = {"time": gpu_jax.time_cell, "accuracy": gpu_jax.accuracy_cell}[kind](dataclasses.asdict(cell))
        cells[cell.name] = dataclasses.asdict(cell) | json.loads(json.dumps(measured))
    peer = cells["time fox xla T128 H128"]
    cells["peer"] = peer | {"op": "causal", "by": "cudnn"}
    cells["ours"] = peer | {"by": "gpu", "forward": {"ms": 3 * peer["forward"]["ms"]}}
    cells["broken"] = dataclasses.asdict(Cell("time", "path", "fla", 128)) | {"failure": "ImportError: a | b"}
    losses = {"losses": [5.0, 4.0], "tokens_per_second": 1e5, "utilisation": 0.4}
    cells["train"] = dataclasses.asdict(Cell("train", "rope", "cudnn", 4096)) | losses
    assert set(cells["accuracy path xla T128 H128"]["errors"]) == {"out", "dq", "dk", "dv", "dw", "dbeta"}
    path = tmp_path / "gpu.md"
    write_table(path, {"machines": [{"gpu": "none"}], "cells": cells}, datetime.date(2026, 1, 2))
    text = path.read_text()
    assert "| 3.00 |" in text and "ImportError: a / b" in text and "40.0%" in text and "5.00 to 4.00" in text
    assert path.with_suffix(".png").exists()
    rows = [line for line in text.splitlines() if line.startswith("| 128 |")]
    assert len({line.count("|") for line in rows}) == 1 and len(rows) == 5


@pytest.mark.slow
@pytest.mark.parametrize("op, by", [("path_fox", "xla"), ("rope", "xla")])
def test_measures_a_training_step(op, by, monkeypatch):
    monkeypatch.setattr(gpu_jax, "TRAINED", "debug")
    measured = gpu_jax.train_cell(dataclasses.asdict(Cell("train", op, by, 64)))
    assert measured["losses"][-1] < measured["losses"][0] and measured["tokens_per_second"] > 0


def test_workers_share_no_framework(tmp_path):
    """PyTorch and JAX in one process would load two cuDNNs."""
    (tmp_path / "torch.py").write_text("")
    program = "import sys, benchmarks.gpu_torch; assert 'jax' not in sys.modules"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])])}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True)
