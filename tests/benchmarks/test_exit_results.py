"""The page of early exits says what the analyses' files say."""

import csv

import pytest

from benchmarks import exit_results

_NUMBERS = [
    ("prose", "gap", "num_tokens", 5000),
    ("prose", "gap", "disagreement", 0.0077),
    ("prose", "gap", "disagreement_high", 0.0103),
    ("prose", "gap", "accuracy", 0.463),
    ("prose", "gap", "full_accuracy", 0.466),
    ("prose", "gap", "mean_depth", 29.64),
    ("prose", "gap", "layer_speedup", 1.012),
    ("", "gap", "disagreement_at_target_0.05", 0.0333),
    ("", "gap", "layer_speedup_at_target_0.05", 1.035),
]
_TIMING = dict(tokens_per_second=21.5, speedup=0.75, mean_depth=29.5, layer_runs=29.75, disagreement=0.0)


def _write(directory, rows):
    directory.mkdir()
    with (directory / "early_exit.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("text", "rule", "quantity", "value"), *rows])


def test_page(tmp_path):
    timings = [
        ("generated", "gap, recompute", f"{name}_batch_{batch}", x) for name, x in _TIMING.items() for batch in (1, 16)
    ]
    _write(tmp_path / "a", [*_NUMBERS, *timings])
    page = tmp_path / "page.md"
    exit_results.main([f"large={tmp_path / 'a'}", "--title=Exit", "--text=Of one.", f"--output={page}"])
    lines = page.read_text().splitlines()
    assert lines[0] == "# Exit" and "Of one." in lines
    assert "| large | prose | gap | 5,000 | 0.77% | 1.03% | 46.3% | 46.6% | 29.64 | 1.012 |" in lines
    assert "| large | gap | 5.0% | 3.33% | 1.035 |" in lines
    generated = [line for line in lines if line.startswith("| large | gap, recompute")]
    assert generated == [f"| large | gap, recompute | {n} | 21.5 | 0.750 | 29.50 | 29.75 | 0.00% |" for n in (1, 16)]
    with page.with_suffix(".csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == len(_NUMBERS) + len(timings)


def test_without_timings_there_is_no_table_of_them(tmp_path, capsys):
    _write(tmp_path / "a", _NUMBERS)
    exit_results.main([f"x={tmp_path / 'a'}", "--title=t", f"--output={tmp_path / 'page.md'}"])
    assert "Greedy generation" not in (tmp_path / "page.md").read_text()
    with pytest.raises(SystemExit):
        exit_results.main([f"y={tmp_path}", "--title=t", f"--output={tmp_path / 'other.md'}"])
    assert f"y={tmp_path}" in capsys.readouterr().err and not (tmp_path / "other.md").exists()
