"""The page of recall runs: seeds side by side, mechanism from the analysis, nothing without it."""

import csv
import json

import pytest

from benchmarks import recall_results


def write_sweep(
    folder, analysed=("mixer=path,seed=0,lr=1e-3", "mixer=path,seed=1,lr=1e-3"), task="ar", longer="pairs_x2"
):
    for seed in range(2):
        run = folder / "runs" / f"mixer=path,seed={seed},lr=1e-3"
        run.mkdir(parents=True)
        model = dict(num_layers=2, embed_dim=64, num_heads=1, mixer="path")
        data = dict(task=task, task_options=dict(num_kv=60), sequence_length=20, batch_size=32)
        results = {"in_distribution/error": 0.25 * seed, f"{longer}/error": 0.5}
        for name, values in (
            ("resolved", dict(model=model, data=data, train=dict(num_steps=4000))),
            ("results", {"task": results}),
            ("summary", dict(parameters=1234, seconds=1800)),
        ):
            (run / f"{name}.json").write_text(json.dumps(values))
    (folder / "analysis").mkdir()
    with (folder / "analysis" / "attribution.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["model", "corrupted", "site", "token", "mean", "low", "high"])
        for label, mean in zip(analysed, (0.5, 1.0)):
            writer.writerow([label, "key", "1.resid_pre", "value", mean, 0, 1])
            writer.writerow([label, "key", "0.mixer.w + 0.mixer.beta", "all", mean, 0, 1])
            writer.writerow([label, "value", "1.resid_pre", "value", 0.125, 0, 1])
    (folder / "analysis" / "behaviour.csv").write_text("model\n")


def test_seeds_are_side_by_side(tmp_path):
    write_sweep(tmp_path / "sweep")
    page = tmp_path / "ar.md"
    recall_results.main([str(tmp_path / "sweep"), "--title=Recall", "--text=Small.", f"--output={page}"])
    text = page.read_text()
    row = "| path | 1e-3 | 1,234 | **0.88** (1.00, 0.75) | **0.50** (0.50, 0.50) | **0.75** (0.50, 1.00) |  |  |  |"
    assert row in text and "accuracy | twice the pairs |" in text and "1.0 hours" in text and "Small." in text
    header, _, parts = text[text.index("| mixer | lr | layer 0") :].splitlines()[:3]
    assert parts.split(" | ")[header.split(" | ").index("layer 0: w, beta")] == "0.75" and "0.12" not in text
    assert page.with_suffix(".png").stat().st_size > 10_000
    assert (tmp_path / "ar_attribution.csv").exists() and (tmp_path / "ar_behaviour.csv").exists()


def test_settings_beside_mixer_and_rate_are_named(tmp_path):
    write_sweep(tmp_path / "sweep", analysed=())
    runs = tmp_path / "sweep" / "runs"
    for seed in range(2):
        old = runs / f"mixer=path,seed={seed},lr=1e-3"
        resolved = json.loads((old / "resolved.json").read_text()) | {"optim": {"lr": 0.003}}
        (old / "resolved.json").write_text(json.dumps(resolved))
        old.rename(runs / f"mixer=path,conv_size=0,seed={seed}")
    with (tmp_path / "sweep" / "analysis" / "attribution.csv").open("a", newline="") as file:
        for seed in range(2):
            row = [f"mixer=path,conv_size=0,seed={seed}", "key", "1.resid_pre", "value", 1, 0, 1]
            csv.writer(file).writerow(row)
    page = tmp_path / "ar.md"
    recall_results.main([str(tmp_path / "sweep"), "--title=Recall", f"--output={page}"])
    assert "| path, convolution 0 | 3e-3 |" in page.read_text()


def test_treecall_has_its_own_columns(tmp_path):
    write_sweep(tmp_path / "sweep", task="atr", longer="long_sentences")
    page = tmp_path / "atr.md"
    recall_results.main([str(tmp_path / "sweep"), "--title=Treecall", f"--output={page}"])
    assert "accuracy | longest sentences | induction" in page.read_text() and "pairs" not in page.read_text()


def test_runs_without_analysis_have_no_page(tmp_path, capsys):
    write_sweep(tmp_path / "sweep", analysed=("mixer=path,seed=0,lr=1e-3",))
    with pytest.raises(SystemExit):
        recall_results.main([str(tmp_path / "sweep"), "--title=x", f"--output={tmp_path / 'x.md'}"])
    assert "has no mixer=path,seed=1,lr=1e-3" in capsys.readouterr().err and not (tmp_path / "x.md").exists()
