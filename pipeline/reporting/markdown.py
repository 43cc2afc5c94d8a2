"""The report for a terminal or a repository: the tables of `tables.py` as Markdown, with links to the pictures beside it."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from typing import Any

from .tables import (
    NOT_COMPARABLE,
    class_table,
    facts,
    headline_table,
    notes,
    provenance,
    shares,
    speed,
    subtitle,
    tolerance_table,
    usage_table,
    verdict,
)


def markdown_table(table: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table whose first column is text and the others numbers."""
    rule = "|" + "---|" + "---:|" * (len(table[0]) - 1)
    lines = ["| " + " | ".join(row) + " |" for row in table]
    return [lines[0], rule, *lines[1:]]


def markdown_report(metrics: Mapping[str, Any], charts: Container[str] = ()) -> str:
    """The whole report; `charts` are the names of the charts that lie beside it as PNG."""
    lines = ["# Evaluation of a ReVQ tokenizer", "", subtitle(metrics), "", *markdown_table(headline_table(metrics)), "", verdict(metrics), ""]
    if metrics.get("rfid_label") != "rFID":
        lines += [f"{metrics.get('rfid_label') or 'rFID'} is {NOT_COMPARABLE}.", ""]
    lines += [f"- {name}: {value}" for name, value in facts(metrics)]
    if shares(metrics):
        lines.append("- loss recovered by the rectifier: " + ", ".join(f"{name} {share}" for name, share in shares(metrics)))
    if speed(metrics):
        lines.append(f"- speed: {speed(metrics)}")
    lines += ["", "![original, vae, quantized, rectified](reconstructions.png)", ""]
    if metrics.get("extremes"):
        lines += ["## Worst and best images", "", "![the worst images, then the best](extremes.png)", ""]
    if metrics.get("tolerance"):
        chart = ["![quality against noise on the latents](tolerance.png)", ""] if "tolerance" in charts else []
        lines += ["## Tolerance of the decoder", "", *chart, *markdown_table(tolerance_table(metrics["tolerance"])), ""]
    chart = ["![use of every codebook](codebooks.png)", ""] if "codebooks" in charts else []
    lines += ["## Codebook usage", "", *chart, *markdown_table(usage_table(metrics["codebook_usage"])), ""]
    if metrics.get("classes"):
        lines += ["## Classes: the worst, then the best", "", *markdown_table(class_table(metrics["classes"])), ""]
    if "training" in charts:
        lines += ["## Training", "", "![validation error, loss and learning rate over the steps](training.png)", ""]
    if metrics["notes"]:
        lines += ["## Notes", "", *(f"- **{name}**: {text}" for name, text in notes(metrics)), ""]
    lines += ["## Provenance", "", *(f"- {name}: {value}" for name, value in provenance(metrics)), ""]
    return "\n".join(lines)
