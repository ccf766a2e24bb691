"""Sweeps: settings, choice, tables, and one real sweep that is interrupted and continued."""

import csv
import json
import math
import subprocess
import sys
import time

import pytest

from path_jax.sweep import Run, Sweep, main, mean_and_interval, resolve

CONFIG = "configs/flip_flop.py:size=debug"


def run(stage="runs", share=1.0, **settings):
    return Run(stage, tuple(settings.items()), share)


def test_settings_reach_the_configuration():
    settings = {"mixer": "rope", "seed": "3", "optim.lr": "1e-2", "data.batch_size": "4", "optim.b2": "0.99"}
    settings |= {"evals.task.num_scored": "7", "model.scan_layers": "True"}
    config = resolve(CONFIG, Run("runs", tuple(settings.items()), 1.0))
    assert (config["model"]["mixer"], config["data"]["seed"], config["train"]["seed"]) == ("rope", 3, 3)
    assert (config["optim"]["lr"], config["data"]["batch_size"], config["optim"]["b2"]) == (0.01, 4, 0.99)
    assert config["evals"]["task"]["num_scored"] == 7 and config["model"]["scan_layers"] is True
    short = resolve(CONFIG, run(share=0.25))
    assert (short["train"]["num_steps"], short["optim"]["warmup_steps"]) == (5, 0)


@pytest.mark.parametrize("settings", [{"optim.speed": "1"}, {"data.batch_size": "many"}, {"colour": "red"}])
def test_settings_that_do_not_exist_are_errors(settings):
    (key,) = settings
    with pytest.raises(ValueError, match=key):
        resolve(CONFIG, Run("runs", tuple(settings.items()), 1.0))


def finish(sweep, run, error):
    folder = sweep.folder(run)
    folder.mkdir(parents=True)
    metrics = {
        "in_distribution/error": error,
        "in_distribution/error/1 back": error,
        "in_distribution/error/2 back": 0.5,
    }
    (folder / "results.json").write_text(json.dumps({"task": metrics}))
    records = ({"step": step + 1, "loss": error + 1 / (step + 1)} for step in range(150))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def test_the_least_metric_is_chosen_and_done_runs_stay(tmp_path):
    """Nothing is run here: all trials are done already."""
    sweep = Sweep(CONFIG, tmp_path, jobs=1, metric="task/in_distribution/error")
    for mixer, errors in (("path", (0.1, 0.02)), ("rope", (0.3, 0.4))):
        for lr, error in zip(("1e-3", "1e-2"), errors):
            finish(sweep, run("select", mixer=mixer, seed="0", lr=lr), error)
    grid = [run(mixer=mixer, seed=seed) for mixer in ("path", "rope") for seed in "01"]
    chosen = sweep.choose(grid, "lr", ["1e-3", "1e-2"], 0.25)
    assert [dict(r.settings)["lr"] for r in chosen] == ["1e-2", "1e-2", "1e-3", "1e-3"]
    for seed, error in (("0", 0.01), ("1", 0.03)):
        finish(sweep, run(mixer="path", seed=seed, lr="1e-2"), error)
    table = sweep.write(chosen, [])
    assert [list(column.cells) for column in table.columns][:3] == [["path"], ["1e-2"], ["2"]]
    with (tmp_path / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["stage"] for row in rows] == ["select"] * 12 + ["runs"] * 6
    assert float(rows[-3]["value"]) == 0.03 and rows[-3]["mixer"] == "path"
    with (tmp_path / "training_loss.csv").open() as file:
        points = [(int(row["x"]), float(row["y"])) for row in csv.DictReader(file)]
    assert len(points) == 100 and points[0] == (1, pytest.approx(1.02)) and points[-1][0] == 150
    with (tmp_path / "error_by_level_in_distribution.csv").open() as file:
        assert [float(row["y"]) for row in csv.DictReader(file)] == [pytest.approx(0.02), 0.5]
    assert "| path | 1e-2 | 2 | 0.02 +- 0.1271 |" in (tmp_path / "table.md").read_text()
    other = run(mixer="fox", seed="0", lr="1e-3")  # of another grid in the same directory
    finish(sweep, other, 0.5)
    assert [list(column.cells) for column in sweep.write([other], []).columns][0] == ["fox", "path"]


def test_intervals_are_those_of_students_t():
    assert mean_and_interval([]) == "-" and mean_and_interval([0.5]) == "0.5"
    mean, half = map(float, mean_and_interval([1.0, 2.0, 3.0]).split(" +- "))
    assert mean == 2 and half == pytest.approx(4.303 / math.sqrt(3), rel=1e-3)


@pytest.mark.parametrize(
    "arguments, reason",
    [
        (["--vary", "mixer"], "is not KEY=A,B"),
        (["--vary", "seed=0,0"], "different values"),
        (["--select", "lr=1e-3"], "nothing to choose from"),
        (["--vary", "mixer=chess"], "mixer=chess is unknown"),
        (["--jobs", "0"], "--jobs=0"),
    ],
)
def test_bad_arguments_end_in_one_line(arguments, reason, tmp_path):
    with pytest.raises(SystemExit, match=reason):
        main(["--config", CONFIG, "--output", str(tmp_path / "sweep"), *arguments])
    assert not (tmp_path / "sweep").exists()


@pytest.mark.slow
def test_an_interrupted_sweep_saves_its_runs(tmp_path):
    command = [sys.executable, "-m", "path_jax.sweep", "--config", CONFIG, "--vary", "mixer=nope", "--vary"]
    command += ["train.num_steps=100000", "--vary", "optim.warmup_steps=1", "--output", str(tmp_path)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    records = tmp_path / "runs" / "mixer=nope,train.num_steps=100000,optim.warmup_steps=1" / "metrics.jsonl"
    while not (records.exists() and records.read_text().count("\n") > 20):
        assert process.poll() is None
        time.sleep(0.1)
    process.terminate()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1 and "the same command continues" in errors
    (saved,) = (path.name for path in (records.parent / "checkpoints").iterdir() if path.name.isdigit())
    assert int(saved) >= 20


@pytest.mark.slow
def test_a_real_sweep(tmp_path):
    """A run that fails is reported and does not stop the others; the second call runs only what is missing."""
    arguments = ["--config", CONFIG, "--vary", "mixer=rope,nope", "--output", str(tmp_path), "--jobs", "2"]
    broken = tmp_path / "runs" / "mixer=nope"
    broken.mkdir(parents=True)
    (broken / "config.json").write_text('{"model": {}}')  # of another run
    with pytest.raises(SystemExit, match="1 runs failed.*mixer=nope.*another run"):
        main(arguments)
    done = tmp_path / "runs" / "mixer=rope" / "results.json"
    before = done.stat().st_mtime_ns
    (broken / "config.json").unlink()
    main(arguments)
    assert (broken / "results.json").exists() and done.stat().st_mtime_ns == before
