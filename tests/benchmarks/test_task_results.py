"""The page pools the seeds and sets the paper's numbers beside ours."""

import json

import pytest

from benchmarks import task_results


def write_run(folder, errors, scored=1000):
    folder.mkdir(parents=True)
    model = dict(num_layers=1, embed_dim=64, num_heads=2, mixer="path")
    data = dict(task="flip_flop", task_options=dict(ignore=0.8), sequence_length=256, batch_size=16)
    config = dict(model=model, data=data, train=dict(num_steps=2000))
    results = {"sparse/error": errors / scored, "sparse/errors": errors, "sparse/scored": scored}
    summary = dict(parameters=70786, seconds=1800)
    for name, values in (("resolved", config), ("results", {"task": results}), ("summary", summary)):
        (folder / f"{name}.json").write_text(json.dumps(values))


def test_seeds_are_pooled(tmp_path):
    sweep, page = tmp_path / "sweep", tmp_path / "flip_flop.md"
    for seed, errors in enumerate((0, 3)):
        write_run(sweep / "runs" / f"mixer=path,seed={seed},lr=1e-3", errors)
    for name in ("report.png", "results.csv"):
        (sweep / name).write_bytes(name.encode())
    task_results.main([str(sweep), "--title=Flip-flop", "--text=Small.", f"--output={page}"])
    text = page.read_text()
    # Wilson's interval of 3 in 2000.
    assert "| path | 1e-3 | 70,786 | 2 | **0.15** [0.051, 0.44] (0, 0.3) | 0.0001 |" in text
    assert "1.0 hours" in text and "sparse 2,000" in text and "Small." in text
    assert page.with_suffix(".png").read_bytes() == b"report.png" and page.with_suffix(".csv").exists()


def test_an_unfinished_sweep_has_no_page(tmp_path, capsys):
    write_run(tmp_path / "runs" / "mixer=path,seed=0", 1)
    with pytest.raises(SystemExit):
        task_results.main([str(tmp_path), "--title=x", f"--output={tmp_path / 'x.md'}"])
    assert "finished sweep" in capsys.readouterr().err and not (tmp_path / "x.md").exists()
