"""Reports as files: figures in one PNG, one self-contained HTML page, and the numbers behind each figure as CSV.

The only user of matplotlib (extra [plot]), which is imported when a figure is drawn. Nothing is interactive.
"""

import base64
import csv
import dataclasses
import html
import io
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

_PANEL_SIZE = (6.4, 4.2)  # inches
_DPI = 120
_MAX_ANNOTATED_CELLS = 64
_MAX_LEGEND = 8  # names in a legend
_MAX_NAMED_PLACES = 10  # ticks of a logarithmic axis that are the data's own


@dataclasses.dataclass(frozen=True)
class Curve:
    """Lines over one pair of axes.

    Attributes:
      title: Heading; names the CSV file. x_label, y_label: with units.
      series: {name: (x, y)}, both of one length.
      log_x, log_y: Logarithmic axes.
      vertical_lines: {label: x}, dashed.
      x_names: Names of x = 0, 1, ..., where they are not numbers.
      y_range: Of the axis, where the data's own would mislead; shares have (0, 1).
    """

    title: str
    x_label: str
    y_label: str
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]]
    log_x: bool = False
    log_y: bool = False
    vertical_lines: Mapping[str, float] = dataclasses.field(default_factory=dict)
    x_names: Sequence[str] = ()
    y_range: tuple[float, float] | None = None

    def __post_init__(self):
        for name, (x, y) in self.series.items():
            if len(x) != len(y):
                raise ValueError(f"series {name!r} of {self.title!r} has {len(x)} x and {len(y)} y values")


@dataclasses.dataclass(frozen=True)
class HeatMap:
    """A matrix as colours, row 0 on top.

    Attributes:
      title: Heading; names the CSV file. x_label: of columns; y_label: of rows.
      values: [rows, columns], not empty.
      value_label: What the colours mean.
      x_names, y_names: Of columns and rows, instead of numbers.
      value_range: What the ends of the colours mean; the data's own range by default.
    """

    title: str
    x_label: str
    y_label: str
    values: Any
    value_label: str
    x_names: Sequence[str] = ()
    y_names: Sequence[str] = ()
    value_range: tuple[float, float] | None = None

    def __post_init__(self):
        shape = np.shape(self.values)
        if len(shape) != 2 or 0 in shape:
            raise ValueError(f"values of {self.title!r} have shape {shape}; give [rows, columns]")
        for names, size in ((self.y_names, shape[0]), (self.x_names, shape[1])):
            if names and len(names) != size:
                raise ValueError(f"{self.title!r} has {size} rows or columns and the names {', '.join(names)}")


Figure = Curve | HeatMap


def write_report(
    directory: str | os.PathLike[str],
    *,
    title: str,
    summary: Mapping[str, Any],
    figures: Sequence[Figure],
    texts: Mapping[str, str],
) -> Path:
    """Writes report.html, report.png (where there are figures) and a CSV file for each figure.

    Every file appears whole or not at all; files of the same names are replaced.

    Args:
      directory: Created if missing.
      title: Heading of the page.
      summary: {label: value} of the table on top.
      figures: In order.
      texts: {heading: text}, shown as they are.

    Returns:
      Path of report.html.

    Raises:
      ImportError: matplotlib is missing and there are figures.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    images = [_png([figure]) for figure in figures]
    if figures:
        write_image(directory / "report.png", figures)
    for name, figure in zip(_file_names(figures), figures):
        write_csv(directory / f"{name}.csv", *_numbers(figure))
    page = directory / "report.html"
    write_file(page, _html(title, summary, figures, images, texts).encode())
    return page


def write_image(path: str | os.PathLike[str], figures: Sequence[Figure]) -> None:
    """Writes all figures as one PNG, atomically.

    Raises:
      ImportError: matplotlib is missing.
    """
    write_file(Path(path), _png(figures))


def format_value(value: Any) -> str:
    """Number with the digits that a reader needs: 12,345 or 2.345 or 1.2e-05; anything else as it is."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.number)):
        return str(value)
    if isinstance(value, (int, np.integer)) or 1000 <= abs(value) < 1e15:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table."""
    return ["| " + " | ".join(line) + " |" for line in [header, ["---"] * len(header), *rows]]


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Lines of a table for a fixed-width font."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)) for row in rows)


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]], *, digits: int | None = None) -> None:
    """Writes a CSV file, atomically; floats with so many digits, all of them by default."""
    cell = lambda x: f"{x:.{digits}g}" if digits and isinstance(x, (float, np.floating)) else x
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows([header, *([cell(x) for x in row] for row in rows)])
    write_file(path, buffer.getvalue().encode())


def _png(figures: Sequence[Figure]) -> bytes:
    """Draws figures side by side, two in a row."""
    try:
        # Without pyplot there is no global state, and saving as PNG draws with Agg whatever the display.
        import matplotlib.figure
    except ImportError as error:
        raise ImportError("figures need matplotlib; run: pip install path-jax[plot]") from error
    num_columns = min(len(figures), 2)
    num_rows = math.ceil(len(figures) / num_columns)
    size = (_PANEL_SIZE[0] * num_columns, _PANEL_SIZE[1] * num_rows)
    canvas = matplotlib.figure.Figure(figsize=size, dpi=_DPI, layout="constrained")
    for number, figure in enumerate(figures):
        axes = canvas.add_subplot(num_rows, num_columns, number + 1)
        axes.set_title(figure.title)
        axes.set_xlabel(figure.x_label)
        axes.set_ylabel(figure.y_label)
        (_draw_curve if isinstance(figure, Curve) else _draw_heat_map)(axes, figure)
    buffer = io.BytesIO()
    canvas.savefig(buffer, format="png")
    return buffer.getvalue()


def _draw_curve(axes, figure: Curve) -> None:
    count = len(figure.series)
    if is_many := count > _MAX_LEGEND:
        # One colour after the other from dark to light; the legend names some of them.
        import matplotlib

        axes.set_prop_cycle(color=matplotlib.colormaps["viridis"](np.linspace(0, 0.95, count)))
    named = np.unique(np.linspace(0, count - 1, min(count, _MAX_LEGEND)).round())
    for number, (name, (x, y)) in enumerate(figure.series.items()):
        axes.plot(
            x, y, label=name if number in named else None, linewidth=1 if is_many else 1.5,
            marker="o" if len(x) <= 32 else None, markersize=3,
        )  # fmt: skip
    for label, x in figure.vertical_lines.items():
        axes.axvline(x, label=label, color="0.4", linewidth=1, linestyle="--")
    if figure.x_names:
        axes.set_xticks(range(len(figure.x_names)), figure.x_names, fontsize="small")
    if figure.log_x:
        axes.set_xscale("log")
        places = sorted({x for xs, _ in figure.series.values() for x in xs})
        if len(places) <= _MAX_NAMED_PLACES:  # powers of ten would name none of them
            axes.set_xticks(places, [format_value(x) for x in places], fontsize="small")
            axes.set_xticks([], minor=True)
    if figure.y_range:
        margin = 0.03 * (figure.y_range[1] - figure.y_range[0])
        axes.set_ylim(figure.y_range[0] - margin, figure.y_range[1] + margin)
    if figure.log_y:
        axes.set_yscale("log")
    if len(figure.series) + len(figure.vertical_lines) > 1:
        axes.legend(frameon=False, fontsize="small")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_heat_map(axes, figure: HeatMap) -> None:
    values = np.asarray(figure.values, float)
    low, high = figure.value_range or (None, None)
    image = axes.imshow(values, aspect="auto", vmin=low, vmax=high)
    axes.figure.colorbar(image, ax=axes, label=figure.value_label)
    for axis, size, names in (
        (axes.xaxis, values.shape[1], figure.x_names),
        (axes.yaxis, values.shape[0], figure.y_names),
    ):
        places = range(0, size, math.ceil(size / 16))
        axis.set_ticks(places, [names[place] for place in places] if names else None)
    if values.size <= _MAX_ANNOTATED_CELLS:
        middle = sum(image.get_clim()) / 2 if np.isfinite(values).any() else 0
        for (row, column), value in np.ndenumerate(values):
            color = "white" if value <= middle else "black"  # the map runs from dark to light
            text = f"{value:.2f}" if figure.value_range else f"{value:.3g}"  # shares next to zero are zero
            axes.text(column, row, text, ha="center", va="center", color=color, fontsize="small")


def _numbers(figure: Figure) -> tuple[tuple[str, ...], list[tuple]]:
    """Names of columns, and tidy rows: series,x,y of a Curve and row,column,value of a HeatMap."""
    if isinstance(figure, Curve):
        rows = [(name, *point) for name, (x, y) in figure.series.items() for point in zip(x, y)]
        return ("series", "x", "y"), rows
    rows = [(row, column, value) for (row, column), value in np.ndenumerate(np.asarray(figure.values))]
    return ("row", "column", "value"), rows


def _file_names(figures: Sequence[Figure]) -> list[str]:
    """Slugs of the titles; a repeated one gets a number."""
    names: list[str] = []
    for figure in figures:
        slug = re.sub(r"[^a-z0-9]+", "_", figure.title.lower()).strip("_") or "figure"
        name, number = slug, 2
        while name in names:
            name, number = f"{slug}_{number}", number + 1
        names.append(name)
    return names


_STYLE = """
:root { color-scheme: light dark; --text: #1b1b1b; --page: #ffffff; --soft: #f2f2f2; --line: #d5d5d5; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e6e6e6; --page: #181818; --soft: #242424; --line: #444444; }
}
body { color: var(--text); background: var(--page); font: 16px/1.5 system-ui, sans-serif;
       max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; }
th, td { text-align: left; padding: 0.3rem 1.5rem 0.3rem 0; border-bottom: 1px solid var(--line); }
th { font-weight: 500; }
td { font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(26rem, 100%), 1fr)); gap: 1rem; }
figure { margin: 0; }
img { width: 100%; height: auto; background: #ffffff; border-radius: 6px; }
pre { background: var(--soft); padding: 1rem; border-radius: 6px; overflow-x: auto; white-space: pre-wrap; }
"""


def _html(
    title: str,
    summary: Mapping[str, Any],
    figures: Sequence[Figure],
    images: Sequence[bytes],
    texts: Mapping[str, str],
) -> str:
    # Figures keep their white ground in dark mode: recolouring a PNG would change what its colours mean.
    escape = lambda value: html.escape(format_value(value))
    rows = [f'<tr><th scope="row">{escape(key)}</th><td>{escape(value)}</td></tr>' for key, value in summary.items()]
    encoded = [base64.b64encode(image).decode() for image in images]
    pictures = [
        f'<figure><img alt="{escape(figure.title)}" src="data:image/png;base64,{image}"></figure>'
        for figure, image in zip(figures, encoded)
    ]
    sections = [f"<h2>{escape(heading)}</h2>\n<pre>{html.escape(text)}</pre>" for heading, text in texts.items()]
    head = [
        '<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title)}</title>",
        f"<style>{_STYLE}</style>",
    ]
    body = [f"<h1>{escape(title)}</h1>"]
    body += ["<table>", *rows, "</table>"] if rows else []
    body += ["<h2>Figures</h2>", '<div class="figures">', *pictures, "</div>"] if pictures else []
    lines = ["<!doctype html>", '<html lang="en">', "<head>", *head, "</head>", "<body>", *body, *sections]
    return "\n".join([*lines, "</body>", "</html>", ""])


def write_file(path: Path, data: bytes) -> None:
    """Replaces a file in one step: a reader, or a crash, never sees half of it."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(data)
    os.replace(temporary, path)
