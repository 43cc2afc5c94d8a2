"""Small line charts by matplotlib: SVG inside the page, whose colours follow its style sheet into dark mode, and PNG for everything else.

matplotlib is imported where a chart is drawn, for it takes most of a second. The same chart gives the same bytes.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure, FigureBase

Point = tuple[float, float]
_SIZE_INCHES = (4.6, 3.2)
_LEGEND_ROW_INCHES = 0.2
_PNG_DOTS_PER_INCH = 200
# Drawn in the page's light colours; in the page each is a variable of report.css.
_LINES = ("#0f6f6b", "#c46210", "#5c54a8")
_INK, _SOFT, _RULE, _PAPER = "#1d1f24", "#666a73", "#e3e0da", "#fbfaf8"
_VARIABLES = {
    **{colour: f"var(--c{i})" for i, colour in enumerate(_LINES)},
    **{_INK: "var(--ink)", _SOFT: "var(--soft)", _RULE: "var(--line)", _PAPER: "var(--paper)"},
}
_STYLE = {
    "axes.axisbelow": True,
    "axes.edgecolor": _RULE,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.labelcolor": _SOFT,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": _INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "figure.constrained_layout.h_pad": 0.08,
    "figure.constrained_layout.w_pad": 0.08,
    "font.size": 10,
    "grid.color": _RULE,
    "legend.frameon": False,
    "legend.labelcolor": _SOFT,
    "lines.linewidth": 1.8,
    "lines.markersize": 7,
    "svg.fonttype": "none",
    "xtick.color": _SOFT,
    "xtick.major.size": 0,
    "ytick.color": _SOFT,
    "ytick.major.size": 0,
}


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

    def spoken(self) -> str:
        """The chart in words, for a screen reader."""
        lines = [f"{line.name} from {line.points[0][1]:.4g} to {line.points[-1][1]:.4g}" for line in self.lines if line.points]
        marks = [f"{mark.name} at {mark.point[0]:.3g}: {mark.point[1]:.4g}" for mark in self.marks]
        return f"{self.title}, {self.y_label} against {self.x_label}: " + "; ".join([*lines, *marks])


def svg(chart: Chart) -> str:
    """The chart as an <svg> element to stand in a page; colours and font are the page's."""
    # Ids are hashes with this salt, and a page has one space of ids for all its charts.
    with _style({"svg.hashsalt": chart.title}):
        figure = _figure([chart])
        _draw(figure, chart)
        text = _saved(figure, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))).decode()
    text = re.sub(
        r"<metadata>.*?</metadata>|<style.*?</style>| xmlns:xlink=\"[^\"]*\"|font-family: [^;\"]*;? ?", "", text[text.index("<svg") :], flags=re.S
    )
    text = text.replace("xlink:href", "href")
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, variable)
    referred = set(re.findall(r"#([\w.-]+)", text))
    return re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in referred else "", text)


def png(charts: Sequence[Chart]) -> bytes:
    """The charts beside each other as one picture, on white."""
    with _style({}):
        figure = _figure(charts)
        for part, chart in zip(figure.subfigures(1, len(charts), squeeze=False)[0], charts, strict=True):
            _draw(part, chart)
        return _saved(figure, format="png", dpi=_PNG_DOTS_PER_INCH, metadata={"Software": None})


@contextmanager
def _style(more: dict[str, Any]) -> Iterator[None]:
    """Our look on top of matplotlib's own, whatever the user's matplotlibrc says."""
    from matplotlib import style

    with style.context(["default", _STYLE, more]):
        yield


def _figure(charts: Sequence[Chart]) -> Figure:
    """An empty figure, without pyplot and its global state, with room for the longest of the legends."""
    from matplotlib.figure import Figure

    width, height = _SIZE_INCHES
    rows = max(len(chart.lines) + len(chart.marks) for chart in charts)
    return Figure(figsize=(width * len(charts), height + _LEGEND_ROW_INCHES * rows), layout="constrained")


def _saved(figure: Figure, **options: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, **options)
    return buffer.getvalue()


def _draw(figure: FigureBase, chart: Chart) -> None:
    """Title, axes, lines and marks, and the legend below."""
    axes = figure.subplots()
    axes.set(title=chart.title, xlabel=chart.x_label)
    for line in chart.lines:
        axes.plot([x for x, _ in line.points], [y for _, y in line.points], color=_LINES[line.colour], label=line.name)
    for mark in chart.marks:
        colour = _LINES[mark.colour]
        face = colour if mark.filled else _PAPER
        axes.plot(*mark.point, "o", color=colour, markerfacecolor=face, markeredgewidth=1.8, label=mark.name, zorder=3)
    axes.ticklabel_format(useOffset=False)
    if chart.zero:
        axes.set_ylim(bottom=0)
    figure.legend(loc="outside lower left")
