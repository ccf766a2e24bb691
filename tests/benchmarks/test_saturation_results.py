"""The page of saturation analyses says what the analyses' files say."""

import csv

import pytest

from benchmarks import saturation_results

pytest.importorskip("matplotlib")

_NUMBERS = {
    ("num_tokens", ""): 1234, ("num_kept", ""): 700, ("tau", ""): 0.25, ("p_value", ""): 0.001,
    ("probe_balanced_accuracy", ""): 0.75, ("probe_chance", ""): 0.2,
    ("implant_switch_trials", "-1"): 10, ("implant_switch_rates", "-1"): 0.5,
    ("implant_switch_trials", "0"): 20, ("implant_switch_rates", "0"): 0.875,
}  # fmt: skip


def _write(directory, numbers):
    directory.mkdir()
    with (directory / "saturation.csv").open("w", newline="") as file:
        rows = [("prose", *key, value) for key, value in numbers.items()]
        csv.writer(file).writerows([("source", "quantity", "at", "value"), *rows])


def test_page(tmp_path):
    _write(tmp_path / "a", _NUMBERS)
    _write(tmp_path / "b", {("num_tokens", ""): 50, ("tau", ""): float("nan")})
    page = tmp_path / "page.md"
    analyses = [f"large={tmp_path / 'a'}", f"small={tmp_path / 'b'}"]
    saturation_results.main([*analyses, "--title=Order", "--text=Of two.", f"--output={page}"])
    lines = page.read_text().splitlines()
    assert lines[0] == "# Order" and "Of two." in lines
    assert "| large, prose | 1,234 | 700 | 0.25 | 0.001 | - | - | - | - |" in lines
    assert "| small, prose | 50 | - | - | - | - | - | - | - |" in lines
    assert "| large, prose | 0.75 | 0.2 | - | - | - |" in lines
    assert "| large, prose | switch | 30 | 0.5 | 0.875 |" in lines
    assert not any("Second rank" in line for line in lines)  # neither has one
    assert page.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    with page.with_suffix(".csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(_NUMBERS) + 2 and rows[0] == dict(
        source="large, prose", quantity="num_tokens", at="", value="1234"
    )


def test_a_directory_without_an_analysis_is_named(tmp_path, capsys):
    with pytest.raises(SystemExit):
        saturation_results.main([f"x={tmp_path}", "--title=t", f"--output={tmp_path / 'page.md'}"])
    assert f"x={tmp_path}" in capsys.readouterr().err
    assert not (tmp_path / "page.md").exists()
