"""Charts: their ticks, and that SVG and PNG show the same points."""

from __future__ import annotations

import io
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from revq.pipeline.charts import Chart, Line, Mark, legend, png, svg, tick_label, ticks

CHART = Chart(
    title="PSNR <dB>",
    x_label="noise",
    y_label="PSNR",
    lines=[Line(name="a & b", points=[(0.0, 30.0), (0.5, 20.0), (1.0, 12.0)], colour=1)],
    marks=[Mark(name="quantized", point=(0.25, 27.0), filled=False)],
)


@given(st.floats(-1e6, 1e6), st.floats(0, 1e6))
def test_ticks_are_few_rise_evenly_and_reach_around_the_values(least: float, width: float) -> None:
    found = ticks(least, least + width)
    assert 2 <= len(found) <= 9
    steps = np.diff(found)
    assert (steps > 0).all()
    assert np.allclose(steps, steps[0])
    slack = 1e-6 * max(1.0, steps[0])
    assert found[0] <= least + slack
    assert found[-1] >= least + width - slack


@dataclass(frozen=True)
class Label:
    """A value and how it is written."""

    value: float
    text: str


@pytest.mark.parametrize(
    "case", [Label(0.0, "0"), Label(-0.0, "0"), Label(0.30000000000000004, "0.3"), Label(20_000, "20k"), Label(1e-17, "0")], ids=str
)
def test_a_tick_has_no_noise_digits(case: Label) -> None:
    assert tick_label(case.value) == case.text


def test_the_svg_is_well_formed_and_has_every_point_inside_its_box() -> None:
    root = ElementTree.fromstring(svg(CHART))
    left, top, width, height = map(float, root.attrib["viewBox"].split())
    line = next(root.iter("polyline")).attrib["points"]
    points = [tuple(map(float, point.split(","))) for point in line.split()]
    assert len(points) == 3
    assert all(left < x < left + width and top < y < top + height for x, y in points)
    assert [y for _, y in points] == sorted(y for _, y in points)  # lower values lie lower
    circle = next(root.iter("circle"))
    assert points[0][0] < float(circle.attrib["cx"]) < points[1][0]
    assert root.attrib["aria-label"].startswith("PSNR <dB>, PSNR against noise: a & b from 30 to 12; quantized at 0.25: 27")
    assert "PSNR &lt;dB&gt;" in legend(CHART)


def test_the_png_shows_line_and_mark_in_their_colours() -> None:
    image = np.asarray(Image.open(io.BytesIO(png([CHART, CHART]))).convert("RGB")).astype(int)
    assert image.shape[1] == 2 * 960
    for colour in ((15, 111, 107), (196, 98, 16)):
        assert (np.abs(image - colour).max(axis=2) < 12).sum() > 50


def test_a_flat_line_still_has_an_axis() -> None:
    flat = Chart(title="flat", x_label="x", y_label="y", lines=[Line(name="l", points=[(0, 5.0), (1, 5.0)])])
    assert not re.search("nan|inf", svg(flat))
