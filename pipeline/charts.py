"""Small line charts, drawn twice from one description: as SVG for the report (inline, so that it follows dark mode) and as a PNG by Pillow."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from PIL import Image, ImageDraw, ImageFont

Point = tuple[float, float]
_WIDTH, _HEIGHT = 480, 320
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 14, 14, 48
_PNG_SCALE, _PNG_FINER = 2, 2
_COLOURS = ((15, 111, 107), (196, 98, 16), (92, 84, 168))
_INK, _SOFT, _RULE = (29, 31, 36), (102, 106, 115), (227, 224, 218)


@dataclass(frozen=True, kw_only=True)
class Line:
    """One curve."""

    name: str
    points: Sequence[Point]
    colour: int = 0
    """Number of its colour, from 0 to 2."""


@dataclass(frozen=True, kw_only=True)
class Mark:
    """One measured point beside the curves."""

    name: str
    point: Point
    colour: int = 0
    filled: bool = True


@dataclass(frozen=True, kw_only=True)
class Chart:
    """Lines and marks over two axes."""

    title: str
    x_label: str
    y_label: str
    lines: Sequence[Line]
    marks: Sequence[Mark] = ()
    zero: bool = False
    """Whether the y axis starts at 0."""

    def limits(self) -> tuple[tuple[float, float], tuple[float, float]]:
        """((least, largest) x, (least, largest) y) of everything that is drawn, y widened to whole ticks."""
        points = [*(point for line in self.lines for point in line.points), *(mark.point for mark in self.marks)]
        xs, ys = [x for x, _ in points], [y for _, y in points]
        steps = ticks(0.0 if self.zero else min(ys), max(ys))
        return (min(xs), max(max(xs), min(xs) + 1e-9)), (steps[0], steps[-1])


def ticks(least: float, largest: float, most: int = 6) -> list[float]:
    """Round numbers that reach from `least` or below to `largest` or above, about `most` of them."""
    width = max(largest - least, abs(largest) * 1e-6, 1e-12)
    magnitude = 10.0 ** math.floor(math.log10(width / most))
    step = next(factor * magnitude for factor in (1, 2, 5, 10) if width / (factor * magnitude) <= most)
    first, last = math.floor(least / step + 1e-9), math.ceil(largest / step - 1e-9)
    return [number * step for number in range(first, max(last, first + 1) + 1)]


def tick_label(value: float) -> str:
    """A tick without noise digits; thousands shortened."""
    if abs(value) >= 10_000:
        return f"{value / 1000:.6g}k"
    return f"{value + 0.0:.6g}" if abs(value) > 1e-12 else "0"


class _Axes:
    """From the chart's units to pixels."""

    def __init__(self, chart: Chart) -> None:
        (self.x0, self.x1), (self.y0, self.y1) = chart.limits()
        self.x_ticks = [value for value in ticks(self.x0, self.x1, 5) if self.x0 - 1e-9 <= value <= self.x1 * (1 + 1e-9)]
        self.y_ticks = ticks(self.y0, self.y1)

    def x(self, value: float) -> float:
        return _LEFT + (value - self.x0) / (self.x1 - self.x0) * (_WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        return _HEIGHT - _BOTTOM - (value - self.y0) / (self.y1 - self.y0) * (_HEIGHT - _TOP - _BOTTOM)


def svg(chart: Chart) -> str:
    """The chart as an inline SVG; colours come from the page's style sheet."""
    axes = _Axes(chart)
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
    parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(_spoken(chart))}">']
    for value in axes.y_ticks:
        y = axes.y(value)
        parts.append(f'<line class="rule" x1="{_LEFT}" y1="{y:.1f}" x2="{right}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{_LEFT - 8}" y="{y + 4.5:.1f}" text-anchor="end">{tick_label(value)}</text>')
    parts += [
        f'<text class="tick" x="{axes.x(value):.1f}" y="{bottom + 18}" text-anchor="middle">{tick_label(value)}</text>' for value in axes.x_ticks
    ]
    parts.append(f'<text class="axis" x="{(_LEFT + right) / 2}" y="{_HEIGHT - 8}" text-anchor="middle">{escape(chart.x_label)}</text>')
    for line in chart.lines:
        path = " ".join(f"{axes.x(x):.1f},{axes.y(y):.1f}" for x, y in line.points)
        parts.append(f'<polyline class="c{line.colour}" points="{path}"/>')
    for mark in chart.marks:
        x, y = axes.x(mark.point[0]), axes.y(mark.point[1])
        kind = "filled" if mark.filled else "hollow"
        parts.append(f'<circle class="c{mark.colour} {kind}" cx="{x:.1f}" cy="{y:.1f}" r="5.5"><title>{escape(mark.name)}</title></circle>')
    return "".join(parts) + "</svg>"


def legend(chart: Chart) -> str:
    """The chart's title and names as HTML."""
    items = [f'<span class="key c{line.colour}"><i></i>{escape(line.name)}</span>' for line in chart.lines]
    for mark in chart.marks:
        kind = "filled" if mark.filled else "hollow"
        items.append(f'<span class="key c{mark.colour}"><b class="{kind}"></b>{escape(mark.name)}</span>')
    return f"<strong>{escape(chart.title)}</strong> {''.join(items)}"


def png(charts: Sequence[Chart]) -> bytes:
    """The charts beside each other as one picture."""
    scale = _PNG_SCALE * _PNG_FINER
    rows = max(len(chart.lines) + len(chart.marks) for chart in charts)
    height = 40 + _HEIGHT + 22 * rows + 10
    sheet = Image.new("RGB", (_WIDTH * len(charts) * scale, height * scale), "white")
    for number, chart in enumerate(charts):
        _paint(ImageDraw.Draw(sheet), chart, number * _WIDTH, scale)
    sheet = sheet.resize((sheet.width // _PNG_FINER, sheet.height // _PNG_FINER), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _paint(draw: ImageDraw.ImageDraw, chart: Chart, left: int, scale: int) -> None:
    """One chart at `left`: title, axes, lines, marks, legend below."""
    axes, top = _Axes(chart), 40

    def at(x: float, y: float) -> tuple[float, float]:
        return (left + x) * scale, (top + y) * scale

    def text(x: float, y: float, content: str, *, anchor: str, size: int = 13, fill: tuple[int, int, int] = _SOFT) -> None:
        draw.text(at(x, y), content, font=ImageFont.load_default(size * scale), fill=fill, anchor=anchor)

    text(_LEFT, -18, chart.title, anchor="lm", size=16, fill=_INK)
    for value in axes.y_ticks:
        draw.line([at(_LEFT, axes.y(value)), at(_WIDTH - _RIGHT, axes.y(value))], fill=_RULE, width=scale)
        text(_LEFT - 8, axes.y(value), tick_label(value), anchor="rm")
    for value in axes.x_ticks:
        text(axes.x(value), _HEIGHT - _BOTTOM + 14, tick_label(value), anchor="mm")
    text((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 12, chart.x_label, anchor="mm")
    for line in chart.lines:
        draw.line([at(axes.x(x), axes.y(y)) for x, y in line.points], fill=_COLOURS[line.colour], width=5 * scale // 2, joint="curve")
    for mark in chart.marks:
        _dot(draw, at(axes.x(mark.point[0]), axes.y(mark.point[1])), mark, scale)
    entries: list[Line | Mark] = [*chart.lines, *chart.marks]
    for row, entry in enumerate(entries):
        y = _HEIGHT + 12 + 22 * row
        if isinstance(entry, Line):
            draw.line([at(_LEFT, y), at(_LEFT + 22, y)], fill=_COLOURS[entry.colour], width=5 * scale // 2)
        else:
            _dot(draw, at(_LEFT + 11, y), entry, scale)
        text(_LEFT + 32, y, entry.name, anchor="lm", fill=_INK)


def _dot(draw: ImageDraw.ImageDraw, centre: tuple[float, float], mark: Mark, scale: int) -> None:
    (x, y), radius = centre, 5.5 * scale
    box = [x - radius, y - radius, x + radius, y + radius]
    draw.ellipse(box, fill=_COLOURS[mark.colour] if mark.filled else "white", outline=_COLOURS[mark.colour], width=5 * scale // 2)


def _spoken(chart: Chart) -> str:
    """The chart in words, for a screen reader."""
    lines = [f"{line.name} from {line.points[0][1]:.4g} to {line.points[-1][1]:.4g}" for line in chart.lines if line.points]
    marks = [f"{mark.name} at {mark.point[0]:.3g}: {mark.point[1]:.4g}" for mark in chart.marks]
    return f"{chart.title}, {chart.y_label} against {chart.x_label}: " + "; ".join([*lines, *marks])
