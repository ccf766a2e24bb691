"""Reports of one and several checkpoints, and eval.py with all evaluators on two of them."""

import csv
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from checkpoints.synthetic import MODELS, random_params

from path_jax.checkpoints import save_pretrained
from path_jax.evaluation.eval_report import Evaluated, comparison_table, write_eval_report

ROOT = Path(__file__).parents[2]
BYTES = {"data": {"sequence_length": 4}, "evals": {}}
TOKENS = {"data": {"sequence_length": 8, "source": "tokens", "path": "x"}, "evals": {}}
RESULTS = {
    "length": {"loss_at_00004": 2.0, "loss_at_00008": 1.0},
    "gates": {"beta/layer0/head0": 0.5, "beta/layer0/head1": 1.5},
    "needle": {"needle/64/0.00": 0.0, "needle/64/1.00": 1.0, "needle/64": 0.5, "loss/needle/64": 3.0},
    "ruler": {"multikey/64": 0.25, "exact/multikey/64": 0.0},
}


def rows(path):
    return list(csv.DictReader(path.open()))


def test_one_page_compares_checkpoints(tmp_path):
    pytest.importorskip("matplotlib")
    evaluated = {
        "a": Evaluated(BYTES, RESULTS, np.arange(8.0), {"task": "no task"}),
        "b": Evaluated(BYTES, {name: RESULTS[name] for name in ("length", "needle")}),
        "c": Evaluated(TOKENS, {"length": RESULTS["length"]}),
    }
    page = write_eval_report(tmp_path, evaluated).read_text()
    assert "a: task: no task" in page and page.count("data:image/png") == 2 + 2 + 2 and 'src="http' not in page
    assert {"checkpoint": "b", "evaluator": "needle", "metric": "needle/64/1.00", "value": "1.0"} in rows(
        tmp_path / "results.csv"
    )
    assert [row["loss"] for row in rows(tmp_path / "loss_by_token.csv")] == [str(float(i)) for i in range(8)]
    curve = rows(tmp_path / "loss_by_position.csv")
    assert {row["series"] for row in curve} == {"a", "b"} and float(curve[0]["y"]) == pytest.approx(2 / np.log(2))
    assert [row["value"] for row in rows(tmp_path / "needle_a.csv")] == ["0.0", "1.0"]
    assert (tmp_path / "report.png").stat().st_size > 1000


def test_table():
    table = comparison_table({"a": Evaluated(BYTES, RESULTS), "b": Evaluated(BYTES, {"gates": RESULTS["gates"]})})
    assert [column.header for column in table.columns] == ["evaluator", "metric", "a", "b"]
    cells = list(zip(*(column.cells for column in table.columns)))
    assert ("gates", "beta (mean of 2)", "1", "1") in cells and ("needle", "needle/64", "0.5", "") in cells
    assert not [cell for cell in cells if cell[1] == "needle/64/0.00"]
    assert comparison_table({"a": Evaluated(BYTES, RESULTS)}).columns[2].header == "value"


def test_a_report_without_figures(tmp_path):
    write_eval_report(tmp_path, {"a": Evaluated(BYTES, {"perplexity": {"loss": 1.0}})})
    assert {path.name for path in tmp_path.iterdir()} == {"report.html", "results.csv"}


def test_eval_of_everything_on_two_checkpoints(tmp_path):
    config = dataclasses.replace(MODELS["llama"][1], vocab_size=257, num_layers=1)
    for name in ("a", "b"):
        save_pretrained(tmp_path / name, config, random_params(config), "hf")
    (tmp_path / "text").write_text("\n".join(f"{i} times {i} is {i * i}." for i in range(300)))
    questions = dict(max_length=400, train_length=400, num_depths=1, samples=1, batch_size=4)
    options = dict(perplexity=dict(max_tokens=100, window=64), length=dict(train_length=64), gates=dict(length=64))
    options |= {name: questions for name in ("needle", "ruler", "babilong", "phonebook")}
    output, report = tmp_path / "results.json", tmp_path / "report"
    finished = subprocess.run(
        [sys.executable, ROOT / "eval.py", f"--checkpoint={tmp_path / 'a'},{tmp_path / 'b'}", "--evals=all",
         f"--data={tmp_path / 'text'}", f"--output={output}", f"--report={report}", f"--options={json.dumps(options)}"],
        cwd=ROOT, env=os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0"}, capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    assert "skipping task: " in finished.stderr and "skipping byte_baselines: " in finished.stderr
    results = json.loads(output.read_text())
    assert list(results) == ["a", "b"] and results["a"] == results["b"]
    assert {"perplexity", "length", "gates", "needle", "ruler", "babilong", "phonebook"} == set(results["a"])
    assert len(rows(report / "results.csv")) == 2 * sum(map(len, results["a"].values()))
    assert {row["checkpoint"] for row in rows(report / "loss_by_token.csv")} == {"a", "b"}
