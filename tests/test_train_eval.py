"""The two scripts as a user runs them, and every kind of bad input."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from configs import lm_path
from path_jax.training import loop
from path_jax.training.experiment import make_experiment

ROOT = Path(__file__).parent.parent


def script(name, *arguments):
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
    return subprocess.run(
        [sys.executable, ROOT / name, *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Three documents of text with some structure."""
    directory = tmp_path_factory.mktemp("corpus")
    for i in range(3):
        (directory / f"{i}.txt").write_text(" ".join(f"{j} times {i} is {i * j}." for j in range(400)))
    return directory


def debug_config(corpus, **train):
    config = lm_path.get_config("size=debug")
    config.data.update(source="files", path=str(corpus), heldout_fraction=0.3)
    config.train.update(num_steps=4, save_every=2)
    config.train.update(train)
    return config


def test_train_then_eval(corpus, tmp_path):
    workdir = tmp_path / "run"
    trained = script(
        "train.py", "--config=configs/lm_path.py:size=debug", f"--workdir={workdir}", "--config.data.source=files",
        f"--config.data.path={corpus}", "--config.data.heldout_fraction=0.3", "--config.train.num_steps=8",
    )  # fmt: skip
    assert trained.returncode == 0, trained.stderr
    assert "held-out bits/byte" in trained.stdout and "ETA" in trained.stderr
    summary = json.loads((workdir / "summary.json").read_text())
    keys = {"parameters", "train_bits_per_byte", "heldout_bits_per_byte", "tokens_per_second", "seconds", "checkpoint"}
    assert keys <= set(summary) and Path(summary["checkpoint"]).is_dir()
    names = [set((workdir / f"{side}_files.txt").read_text().split()) for side in ("train", "heldout")]
    assert names[0] and names[1] and not names[0] & names[1]

    output = tmp_path / "results.json"
    evaluated = script("eval.py", f"--checkpoint={workdir}", "--evals=perplexity", f"--output={output}")
    assert evaluated.returncode == 0, evaluated.stderr
    assert "Metadata" not in evaluated.stderr  # of Orbax, which expects more than parameters
    results = json.loads(output.read_text())
    assert results["perplexity"]["bits_per_byte"] == pytest.approx(summary["heldout_bits_per_byte"], abs=1e-6)


def test_eval_of_a_published_checkpoint(tmp_path):
    golden = ROOT / "tests" / "golden" / "models" / "fla_path"
    (tmp_path / "text").write_text("to be or not to be")
    output = tmp_path / "results.json"
    evaluated = script(
        "eval.py", f"--checkpoint={golden}", f"--data={tmp_path / 'text'}", f"--output={output}", "--evals=perplexity",
        '--options={"perplexity": {"batch_size": 1, "window": 32}}',
    )  # fmt: skip
    assert evaluated.returncode == 0, evaluated.stderr
    assert json.loads(output.read_text())["perplexity"]["tokens"] == 17


@pytest.mark.parametrize(
    "arguments, reason",
    [
        (["--config=configs/lm_path.py:size=debug", "--config.optim.lrr=1"], "lrr"),
        (["--config=configs/lm_path.py:size=enormous"], "size=enormous is unknown; choose from debug"),
        (["--config=configs/lm_path.py:size=760m"], "set data.path"),
    ],
    ids=["misspelt-key", "unknown-size", "no-corpus"],
)
def test_train_says_why_in_one_line(arguments, reason, tmp_path):
    finished = script("train.py", *arguments, f"--workdir={tmp_path / 'run'}")
    assert finished.returncode != 0
    lines = finished.stderr.strip().splitlines()
    assert reason in lines[-1] and "Traceback" not in finished.stderr, finished.stderr
    assert not (tmp_path / "run").exists()


def test_bad_sections(corpus):
    config = debug_config(corpus).to_dict()
    for section, key in (("model", "num_layer"), ("data", "batchsize"), ("optim", "rate"), ("train", "steps")):
        with pytest.raises(ValueError, match=f"unknown keys in config.{section}: {key}"):
            make_experiment(config | {section: config[section] | {key: 1}})
    with pytest.raises(ValueError, match="mixer_options.*conv_sizes"):
        make_experiment(config | {"model": config["model"] | {"mixer_options": {"conv_sizes": 3}}})
    with pytest.raises(ValueError, match="expected"):
        make_experiment(config | {"extra": {}})
    with pytest.raises(ValueError, match="does not fit 8 devices"):
        make_experiment(config | {"mesh": {"data": 3}})
    with pytest.raises(ValueError, match="data.batch_size=9 is not a multiple of 8 data shards"):
        make_experiment(config | {"data": config["data"] | {"batch_size": 9}})


def test_missing_and_short_corpus_leave_nothing_behind(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        make_experiment(debug_config(tmp_path / "nowhere").to_dict())
    (tmp_path / "short.txt").write_text("too short")
    with pytest.raises(ValueError, match="fewer than one sequence"):
        loop.run(make_experiment(debug_config(tmp_path / "short.txt").to_dict()), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_workdir_that_cannot_be_used(corpus, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="Not a directory"):
        loop.run(make_experiment(debug_config(corpus).to_dict()), tmp_path / "file" / "run")
    loop.run(make_experiment(debug_config(corpus).to_dict()), tmp_path / "run")
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    other = debug_config(corpus)
    other.optim.lr = 0.5
    with pytest.raises(ValueError, match=r"holds another run \(config.optim.lr is 0.001 there, 0.5 here\)"):
        loop.run(make_experiment(other.to_dict()), tmp_path / "run")
    (corpus / "new.txt").write_text("another document " * 20)
    with pytest.raises(ValueError, match="the documents differ from those in .*_files.txt"):
        loop.run(make_experiment(debug_config(corpus).to_dict()), tmp_path / "run")
    (corpus / "new.txt").unlink()
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    "save_every, reason", [(1, "the last good checkpoint is that of step"), (50, "no checkpoint yet")]
)
def test_nan_stops_the_run_and_is_never_saved(corpus, tmp_path, save_every, reason):
    config = debug_config(corpus, num_steps=30, save_every=save_every)
    config.optim.update(lr=1e20, warmup_steps=8, clip_norm=0.0)
    with pytest.raises(FloatingPointError, match=rf"is (nan|inf) at step \d+; .*{reason}") as error:
        loop.run(make_experiment(config.to_dict()), tmp_path)
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    saved = [int(path.name) for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit()]
    assert f"at step {records[-1]['step'] + 1};" in str(error.value)
    assert max(saved, default=None) == (records[-1]["step"] if save_every == 1 else None)


def test_finished_run_is_left_alone(corpus, tmp_path):
    first = loop.run(make_experiment(debug_config(corpus).to_dict()), tmp_path)
    again = loop.run(make_experiment(debug_config(corpus).to_dict()), tmp_path)
    assert again.records == first.records and not again.interrupted
    jax.tree.map(np.testing.assert_array_equal, *(jax.device_get(result.params) for result in (first, again)))


def test_profiler_window_and_tensorboard(corpus, tmp_path):
    pytest.importorskip("tensorboardX")
    config = debug_config(corpus, profile_start=1, profile_steps=2, tensorboard=True)
    loop.run(make_experiment(config.to_dict()), tmp_path)
    assert list((tmp_path / "profile").rglob("*.xplane.pb")) and list((tmp_path / "tensorboard").iterdir())
