"""What recall analyses say of models whose answers are known, and their report."""

import csv

import numpy as np
import pytest
from interpretability.tiny import tiny

from path_jax.data.associative_recall import AssociativeRecall
from path_jax.interpretability.__main__ import main
from path_jax.interpretability.hooks import Site
from path_jax.interpretability.recall import (
    RecallAnalysis,
    analyse_recall,
    decode_state_bytes,
    mean_and_interval,
    mechanism,
    mixer_parts,
)
from path_jax.interpretability.recall_report import Analysed, recall_table, write_recall_report
from path_jax.models import ModelConfig

TASK = AssociativeRecall(length=16, num_kv=20, min_length=4, max_length=8)


def test_what_the_first_layer_reads_decides_all():
    """Documents differ at the corrupted token alone: restoring it restores all, and elsewhere there is nothing."""
    model, params = tiny("rope", vocab_size=TASK.vocab_size)
    analysis = analyse_recall(
        model, params, TASK,
        num_examples=64, patched=["0.resid_pre", "1.resid_pre", "1.resid_post"], threshold=3e-4,
        parts=[["0.resid_pre"], ["0.mixer.q", "0.mixer.k", "0.mixer.v"]],
    )  # fmt: skip
    for parts in analysis.parts.values():
        there = parts["0.resid_pre"]
        np.testing.assert_allclose(there[np.isfinite(there)], 1, atol=2e-3)
        some = parts["0.mixer.q + 0.mixer.k + 0.mixer.v"]  # the rest of the corrupted token is in the residual stream
        assert np.array_equal(np.isfinite(some), np.isfinite(there)) and np.nanmax(np.abs(some - there)) > 0.01
    assert analysis.roles == ("key", "value", "divider", "query")
    for corrupted, other in (("key", "value"), ("value", "key")):
        there = analysis.at("0.resid_pre", corrupted, corrupted)
        assert 10 < np.isfinite(there).sum() < 64
        np.testing.assert_allclose(there[np.isfinite(there)], 1, atol=2e-3)
        elsewhere = analysis.at("0.resid_pre", other, corrupted)
        np.testing.assert_allclose(elsewhere[np.isfinite(elsewhere)], 0, atol=2e-3)
        last = analysis.at("1.resid_post", "query", corrupted)  # from which the answer is read
        np.testing.assert_allclose(last[np.isfinite(last)], 1, atol=2e-3)
    assert analysis.behaviour["accuracy"].shape == (64,) and set(analysis.behaviour["accuracy"]) <= {0, 1}
    ways = mechanism(analysis)
    np.testing.assert_allclose(ways["induction"][0], np.nanmean(analysis.at("1.resid_pre", "value")))


def test_batches_are_joined():
    model, params = tiny("nope", vocab_size=TASK.vocab_size)
    whole, parts = (
        analyse_recall(
            model, params, TASK, num_examples=32, batch_size=size, patched=["1.mixer_out"], corrupted=["key"]
        )
        for size in (32, 16)
    )
    for name, values in whole.behaviour.items():
        np.testing.assert_allclose(parts.behaviour[name], values, atol=1e-6)
    np.testing.assert_allclose(parts.attribution["key"], whole.attribution["key"], atol=1e-3)
    with pytest.raises(ValueError, match="corrupted=.'query'"):
        analyse_recall(model, params, TASK, corrupted=["query"])
    with pytest.raises(ValueError, match="no attribution of 1.resid_pre"):
        mechanism(whole)


def test_parts_of_mixers():
    parts = mixer_parts(tiny("path_fox")[0].config)
    assert [" + ".join(map(str, part)) for part in parts[:4]] == [
        "0.mixer.w + 0.mixer.beta", "0.mixer.k + 0.mixer.v", "0.mixer.q", "0.mixer.log_forget",
    ]  # fmt: skip
    assert len(parts) == 10 and parts[4] == (Site(0, "conv_out"),)
    assert [str(site) for (site,) in mixer_parts(tiny("mamba", 1)[0].config)] == [
        "0.mixer.conv_out", "0.mixer.recurrence", "0.mixer.gate",
    ]  # fmt: skip


def test_intervals_hold_the_mean():
    """Coverage over many samples, and rows without numbers."""
    draws = np.random.default_rng(0)
    mean, low, high = mean_and_interval(draws.normal(size=(300, 50)))
    assert 0.89 < ((low < 0) & (0 < high)).mean() < 0.98
    np.testing.assert_allclose(np.median(high - low), 2 * 1.96 / np.sqrt(50), rtol=0.1)
    values = np.array([[1.0, np.nan, 3.0, 2.0], [np.nan] * 4])
    mean, low, high = mean_and_interval(values)
    assert mean[0] == 2 and low[0] >= 1 and high[0] <= 3 and np.isnan([mean[1], low[1], high[1]]).all()


def test_states_of_recurrences_do_not_grow():
    size = lambda mixer, length: decode_state_bytes(
        ModelConfig(vocab_size=9, num_layers=2, embed_dim=32, num_heads=2, mixer=mixer, scan_layers=False), length
    )
    assert size("mamba", 4096) == size("mamba", 1024) < size("path", 1024) < size("path", 4096)


def make_analysed(accuracy):
    sites, roles = (Site(0, "resid_pre"), Site(1, "resid_pre")), ("key", "value", "divider", "query")
    values = np.full((2, 4, 10), 0.25)
    values[1, 1] = 0.75
    behaviour = {name: np.full(10, accuracy) for name in ("accuracy", "probability", "logit_difference")}
    analysis = RecallAnalysis(
        behaviour, sites, roles, {"key": values}, {"key": {"0.mixer.q": values[0, 0]}}, threshold=0.02
    )
    return Analysed({}, analysis, {"parameters": 1000}, {10: analysis, 20: analysis})


def test_report(tmp_path):
    analysed = {"path": make_analysed(1.0), "mamba": make_analysed(0.5)}
    assert write_recall_report(tmp_path, analysed) == tmp_path / "report.html"
    with (tmp_path / "attribution.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * (2 * 4 + 1)
    assert [row["mean"] for row in rows if row["site"] == "1.resid_pre" and row["token"] == "value"] == ["0.75"] * 2
    with (tmp_path / "behaviour.csv").open() as file:
        found = {(row["model"], row["quantity"]): float(row["mean"]) for row in csv.DictReader(file)}
    assert found["mamba", "accuracy"] == 0.5 and found["path", "induction"] == 0.75
    assert (tmp_path / "induction_over_training.csv").exists() and (tmp_path / "report.png").stat().st_size > 10_000
    text = (tmp_path / "report.html").read_text()
    assert "0.750 [0.750, 0.750]" in text and "direct, layer 0" in text
    assert "lose more than 0.02;" in text and "mamba:  0.mixer.q 0.25" in text
    assert [column.header for column in recall_table(analysed).columns][:3] == ["model", "accuracy", "induction"]


@pytest.mark.parametrize(
    "arguments, reason",
    [
        (["--checkpoint=nowhere"], "nowhere"),
        (["--config=nowhere.py"], "no configuration file nowhere.py"),
        (["--config=configs/recall.py:task=ar,size=huge"], "size=huge"),
    ],
)
def test_bad_arguments_end_in_one_line(arguments, reason, tmp_path):
    with pytest.raises(SystemExit, match=reason):
        main(["recall", *arguments, f"--output={tmp_path / 'out'}"])
    assert not list(tmp_path.glob("out/*"))


@pytest.mark.slow
def test_a_run_is_trained_and_analysed(tmp_path, capsys):
    arguments = ["recall", "--config=configs/recall.py:task=ar,size=debug,mixer=nope", f"--output={tmp_path}"]
    main([*arguments, "--num-examples=32"])
    assert "accuracy" in capsys.readouterr().out and (tmp_path / "report.html").exists()
    for name in ("r*n", "mixer=nope,seed=0"):  # as a sweep names it
        if "*" not in name:
            (tmp_path / "run").rename(tmp_path / name)
        main(["recall", f"--checkpoint={tmp_path}/{name}", f"--output={tmp_path / 'again'}", "--num-examples=32"])
        again = (tmp_path / "again" / "behaviour.csv").read_text()
        assert [line.split(",")[-3:] for line in again.splitlines()[1:]] == [
            line.split(",")[-3:] for line in (tmp_path / "behaviour.csv").read_text().splitlines()[1:]
        ]
