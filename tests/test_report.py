"""Report files: self-contained, escaped, tidy, whole."""

import base64
import builtins
import csv
import re

import numpy as np
import pytest

from path_jax import report
from path_jax.report import Curve, HeatMap, format_value, write_image, write_report

CURVE = Curve(
    "Loss, by step!",
    "step",
    "loss <nats>",
    {"train": ([1, 10, 100], [3.0, 2.0, 1.5]), "a,b": ([1, 100], [2.5, 2.5])},
    log_x=True,
    vertical_lines={"half": 50},
)
MAP = HeatMap("Gate", "head", "layer", np.arange(6.0).reshape(2, 3), "mean", y_names=("first", "second"))
PNG = b"\x89PNG\r\n"


@pytest.fixture
def matplotlib():
    pytest.importorskip("matplotlib.figure")
    return pytest.importorskip("matplotlib")


def read_csv(path):
    with path.open(newline="") as file:
        return list(csv.reader(file))


def test_report_directory(tmp_path, matplotlib):
    page = write_report(
        tmp_path / "new",
        title="A & B",
        summary={"parameters": 12345678, "note": "<b>"},
        figures=[CURVE, MAP, MAP],
        texts={"Sample": "<script>alert('x')</script>\nline"},
    )
    assert page == tmp_path / "new" / "report.html"
    names = {"report.html", "report.png", "loss_by_step.csv", "gate.csv", "gate_2.csv"}
    assert {path.name for path in page.parent.iterdir()} == names  # no temporary file stays
    assert (page.parent / "report.png").read_bytes().startswith(PNG)

    text = page.read_text()
    assert "A &amp; B" in text and "12,345,678" in text and "&lt;b&gt;" in text
    assert "<script" not in text and "&lt;script&gt;" in text
    assert "prefers-color-scheme: dark" in text
    sources = re.findall(r'(?:src|href)\s*=\s*"([^"]*)"', text)
    assert len(sources) == 3 and all(source.startswith("data:image/png;base64,") for source in sources)
    assert "http" not in re.sub(r"base64,[^\"]*", "", text) and "url(" not in text
    assert all(base64.b64decode(source.split(",")[1]).startswith(PNG) for source in sources)


def test_csv_is_tidy(tmp_path, matplotlib):
    write_report(tmp_path, title="t", summary={}, figures=[CURVE, MAP], texts={})
    assert read_csv(tmp_path / "loss_by_step.csv") == [
        ["series", "x", "y"],
        ["train", "1", "3.0"],
        ["train", "10", "2.0"],
        ["train", "100", "1.5"],
        ["a,b", "1", "2.5"],
        ["a,b", "100", "2.5"],
    ]
    rows = read_csv(tmp_path / "gate.csv")
    assert rows[0] == ["row", "column", "value"]
    assert rows[1:] == [[str(i), str(j), str(3.0 * i + j)] for i in range(2) for j in range(3)]


def test_drawing_leaves_the_backend_alone(tmp_path, matplotlib):
    before = matplotlib.get_backend()
    write_image(tmp_path / "one.png", [MAP])
    assert (tmp_path / "one.png").read_bytes().startswith(PNG)
    assert matplotlib.get_backend() == before


def test_many_curves_leave_room_for_the_axes(tmp_path, matplotlib):
    """A legend with a line for each of them would squeeze the axes to nothing."""
    figure = matplotlib.figure.Figure()
    axes = figure.add_subplot()
    report._draw_curve(axes, Curve("layers", "x", "y", {f"layer {i}": ([0, 1], [1.0, 2.0]) for i in range(30)}))
    assert len(axes.get_lines()) == 30
    names = [text.get_text() for text in axes.get_legend().get_texts()]
    assert names[0] == "layer 0" and names[-1] == "layer 29" and len(names) == 8


def test_figures_with_gaps(tmp_path, matplotlib):
    gaps = HeatMap("gaps", "x", "y", [[np.nan, 1.0]], "v")
    nothing = HeatMap("nothing", "x", "y", [[np.nan]], "v")
    write_image(tmp_path / "gaps.png", [gaps, nothing, Curve("empty", "x", "y", {})])


def test_missing_matplotlib_names_the_extra(tmp_path, monkeypatch):
    real = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ImportError, match=r"pip install path-jax\[plot\]"):
        write_image(tmp_path / "x.png", [CURVE])
    write_report(tmp_path, title="t", summary={"a": 1}, figures=[], texts={})  # needs none
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


@pytest.mark.parametrize(
    "value, text",
    [(12345, "12,345"), (12345.6, "12,346"), (2.34567, "2.346"), (1.2e-5, "1.2e-05"), ("x", "x"), (True, "True")]
    + [(float("nan"), "nan"), (float("inf"), "inf"), (np.float32(0.5), "0.5"), (np.int64(7), "7"), (None, "None")],
)
def test_format_value(value, text):
    assert format_value(value) == text


def test_bad_figures():
    with pytest.raises(ValueError, match="2 x and 1 y"):
        Curve("t", "x", "y", {"a": ([1, 2], [1])})
    with pytest.raises(ValueError, match=r"shape \(3,\)"):
        HeatMap("t", "x", "y", [1, 2, 3], "v")
    with pytest.raises(ValueError, match="has 3 rows or columns and the names a, b"):
        HeatMap("t", "x", "y", [[1, 2, 3]], "v", x_names=("a", "b"))
