"""Charts: everything is where it belongs, the page's style sheet colours them, and the same chart is the same bytes."""

from __future__ import annotations

import io
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import revq
from revq.pipeline.reporting.charts import Chart, Line, Mark, png, svg

CHART = Chart(
    title="PSNR <dB>",
    x_label="noise",
    y_label="PSNR",
    lines=[Line(name="a & b", points=[(0.0, 30.0), (0.5, 20.0), (1.0, 12.0)], colour=1)],
    marks=[Mark(name="quantized", point=(0.25, 27.0), filled=False)],
)
Box = tuple[float, float, float, float]


class Drawing:
    """A chart's SVG taken apart. Boxes are (left, top, right, bottom); y grows downward."""

    def __init__(self, chart: Chart) -> None:
        self.root = ElementTree.fromstring(svg(chart).replace(' xmlns="http://www.w3.org/2000/svg"', ""))
        left, top, width, height = map(float, self.root.attrib["viewBox"].split())
        self.sheet = (left, top, left + width, top + height)
        left, top, width, height = (float(self.root.find(".//clipPath/rect").attrib[name]) for name in ("x", "y", "width", "height"))  # type: ignore[union-attr]
        self.panel = (left, top, left + width, top + height)

    def paths(self, colour: str) -> Iterator[list[tuple[float, float]]]:
        """The corners of every path that is stroked in a colour, in the order of drawing: what is in the panel before the legend."""
        for path in self.root.iter("path"):
            if f"stroke: var(--{colour})" in path.attrib.get("style", ""):
                numbers = list(map(float, re.findall(r"-?[\d.]+", path.attrib["d"])))
                yield list(zip(numbers[::2], numbers[1::2], strict=True))

    def texts(self) -> dict[str, tuple[float, float]]:
        """Where each text stands."""
        return {text.text or "": (float(text.attrib["x"]), float(text.attrib["y"])) for text in self.root.iter("text")}


def inside(point: tuple[float, float], box: Box) -> bool:
    return box[0] - 1e-3 <= point[0] <= box[2] + 1e-3 and box[1] - 1e-3 <= point[1] <= box[3] + 1e-3


def chart_from(least: float, largest: float) -> Chart:
    return replace(CHART, lines=[Line(name="line", points=[(0.0, least), (1.0, largest)])], marks=[])


def test_no_grid_line_leaves_the_panel_of_a_psnr_from_15_to_27() -> None:
    """Hand-drawn grid lines once went through the title and the legend here."""
    drawing = Drawing(chart_from(15.5, 26.8))
    grid = list(drawing.paths("line"))
    assert len(grid) >= 4, "the x axis and the grid"
    assert all(inside(corner, drawing.panel) for line in grid for corner in line)
    places = drawing.texts()
    assert places["PSNR <dB>"][1] < drawing.panel[1]
    assert places["noise"][1] > drawing.panel[3]
    assert places["line"][1] > places["noise"][1]


@dataclass(frozen=True)
class Range:
    """The values of a line."""

    id: str
    least: float
    largest: float


RANGES = [
    Range("flat", 5.0, 5.0),
    Range("all zero", 0.0, 0.0),
    Range("a learning rate", 2e-9, 3e-7),
    Range("far from zero", 0.3336, 0.3341),
    Range("very large", -1e6, 2e9),
    Range("falling", 500.0, -3.0),
]


@pytest.mark.parametrize("case", RANGES, ids=lambda case: case.id)
def test_grid_labels_and_points_lie_inside_whatever_the_values(case: Range) -> None:
    drawing = Drawing(chart_from(case.least, case.largest))
    grid, line = list(drawing.paths("line")), next(drawing.paths("c0"))
    assert 3 <= len(grid) <= 13, "the x axis and the grid"
    assert len(line) == 2
    assert all(inside(corner, drawing.panel) for corners in (*grid, line) for corner in corners)
    assert all(inside(place, drawing.sheet) for place in drawing.texts().values())
    assert drawing.panel[2] - drawing.panel[0] > 0.6 * drawing.sheet[2]


def test_lower_values_lie_lower_and_a_mark_lies_where_it_was_measured() -> None:
    drawing = Drawing(CHART)
    line = next(drawing.paths("c1"))
    assert [y for _, y in line] == sorted(y for _, y in line)
    marks = [use.attrib for use in drawing.root.iter("use") if inside((float(use.attrib["x"]), float(use.attrib["y"])), drawing.panel)]
    (x0, y0), (x1, y1), _ = line
    assert [float(marks[0]["x"]), float(marks[0]["y"])] == pytest.approx([(x0 + x1) / 2, y0 + (y1 - y0) * 0.3], abs=0.01)


def test_an_axis_that_starts_at_zero_does_and_numbers_are_written_out() -> None:
    assert "0.0000" in Drawing(replace(chart_from(1e-4, 1.2e-3), zero=True)).texts()
    assert "0.0002" in Drawing(chart_from(1e-4, 1.2e-3)).texts()
    assert "0.33361" in Drawing(chart_from(0.3336, 0.33364)).texts()


def test_an_svg_has_no_colour_font_or_address_of_its_own() -> None:
    text = svg(CHART)
    assert re.findall(r"#(?!p|m)\w+|rgb|font-family|https?://(?!www.w3.org/2000/svg)", text) == []
    style = (Path(revq.__file__).parent / "pipeline" / "assets" / "report.css").read_text()
    for name in set(re.findall(r"var\((--\w+)\)", text)):
        assert style.count(f"{name}: ") == 3, f"{name} has no value in light, dark and print"


def test_charts_of_one_page_share_no_id() -> None:
    ids = [set(re.findall(r' id="([^"]+)"', svg(replace(CHART, title=title)))) for title in ("one", "two")]
    assert ids[0]
    assert not ids[0] & ids[1]


def test_a_chart_in_words_names_every_line_and_mark() -> None:
    assert CHART.spoken() == "PSNR <dB>, PSNR against noise: a & b from 30 to 12; quantized at 0.25: 27"


def test_the_png_shows_line_and_mark_in_their_colours_beside_each_other() -> None:
    one, two = (np.asarray(Image.open(io.BytesIO(png(charts))).convert("RGB")).astype(int) for charts in ([CHART], [CHART, chart_from(0, 1)]))
    assert two.shape[1] == 2 * one.shape[1]
    for half, colour in ((two[:, : one.shape[1]], (196, 98, 16)), (two[:, one.shape[1] :], (15, 111, 107))):
        assert (np.abs(half - colour).max(axis=2) < 12).sum() > 500


DRAW = """
import hashlib, sys
from revq.pipeline.reporting.charts import Chart, Line, png, svg
assert "matplotlib" not in sys.modules
chart = Chart(title="t", x_label="x", y_label="y", lines=[Line(name="l", points=[(0, 5.0), (1, 5.0)])])
print(hashlib.sha256(svg(chart).encode() + png([chart])).hexdigest())
assert "matplotlib.pyplot" not in sys.modules
"""


def test_other_processes_draw_the_same_bytes_whatever_the_users_settings_without_pyplot(tmp_path: Path) -> None:
    (tmp_path / "matplotlibrc").write_text("lines.linewidth: 9\nfont.size: 30\naxes.facecolor: red\nsavefig.dpi: 30\n")
    draw = [subprocess.run([sys.executable, "-c", DRAW], capture_output=True, text=True, check=True, cwd=folder) for folder in (tmp_path, "/")]
    assert draw[0].stdout == draw[1].stdout
