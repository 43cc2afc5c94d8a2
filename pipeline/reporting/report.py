"""What a person reads of an evaluation: report.html (one self-contained file), report.md and charts as PNG, made from a finished evaluation folder.

The stage writes metrics.json and the sheets of pictures; everything here is drawn from those, so a report can be made again at any time.
"""

from __future__ import annotations

from pathlib import Path

from ...errors import OutputError
from ...files import read_json, write_bytes
from .charts import png
from .figures import report_charts
from .html import html_report
from .markdown import markdown_report
from .pictures import read_tiles
from .tables import METRICS_NAME

GRID_NAME = "reconstructions.png"
EXTREMES_NAME = "extremes.png"


def write_report(directory: Path | str) -> Path:
    """Write report.md, report.html and the charts as PNG into a finished evaluation folder, over those of an earlier time.

    Returns:
        The path of report.html.

    Raises:
        OutputError: `directory` holds no finished evaluation, or cannot be written.
    """
    directory = Path(directory)
    metrics = read_json(directory / METRICS_NAME)
    if metrics is None or not (directory / GRID_NAME).is_file():
        raise OutputError(f"{directory} holds no finished evaluation: it needs {METRICS_NAME} and {GRID_NAME}; give the evaluate command first")
    tiles = read_tiles(directory / GRID_NAME, metrics["pictures"])
    extremes = read_tiles(directory / EXTREMES_NAME, metrics["extremes"]) if metrics.get("extremes") else []
    charts = report_charts(metrics)
    for name, drawn in charts.items():
        write_bytes(directory / f"{name}.png", png(drawn))
    write_bytes(directory / "report.md", markdown_report(metrics, charts).encode())
    write_bytes(directory / "report.html", html_report(metrics, charts, tiles, extremes).encode())
    return directory / "report.html"
