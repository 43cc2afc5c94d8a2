"""Which charts an evaluation has: the tolerance curves, the codebooks' use, and the training curves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .charts import Chart, Line, Mark

_CURVES = {"psnr_db": "PSNR (dB)", "ssim": "SSIM", "lpips_alex": "LPIPS-Alex", "rfid": "rFID"}
_NOISE = "size of the noise, in deviations of the latent"


def report_charts(metrics: Mapping[str, Any]) -> dict[str, list[Chart]]:
    """The charts of each section that has any, by the name of its PNG."""
    charts = {
        "tolerance": tolerance_charts(metrics.get("tolerance")),
        "codebooks": codebook_charts(metrics),
        "training": training_charts(metrics.get("training")),
    }
    return {name: drawn for name, drawn in charts.items() if drawn}


def tolerance_charts(tolerance: Mapping[str, Any] | None) -> list[Chart]:
    """One chart for each metric that was measured: isotropic noise, noise in the decoder's metric, and the tokenizer's own errors."""
    if not tolerance:
        return []
    charts = []
    for metric, title in _CURVES.items():
        kinds = [kind for kind in ("isotropic", "decoder") if tolerance.get(kind)]
        lines, marks = [], []
        for colour, kind in enumerate(kinds):
            points = [(point["noise"], point[metric]) for point in tolerance[kind] if point.get(metric) is not None]
            if len(points) < 2:
                continue
            name = "isotropic noise" if kind == "isotropic" else "noise in the decoder's metric"
            lines.append(Line(name=name, points=points, colour=colour))
            for row in ("quantized", "rectified"):
                mark = tolerance["marks"][row]
                if mark.get(metric) is not None:
                    where = "" if len(kinds) == 1 else f", {'plain' if kind == 'isotropic' else 'decoder-metric'} error"
                    marks.append(Mark(name=f"{row}{where}", point=(mark["noise"][kind], mark[metric]), colour=colour, filled=row == "rectified"))
        if lines:
            label = f"{title}@{tolerance['images']}" if metric == "rfid" else title
            charts.append(Chart(title=label, x_label=_NOISE, y_label=label, lines=lines, marks=marks, zero=metric in {"lpips_alex", "rfid"}))
    return charts


def codebook_charts(metrics: Mapping[str, Any]) -> list[Chart]:
    """Perplexity and number of used codes of every codebook, each sorted on its own, so that a collapsed one stands out at the left."""
    each = metrics.get("codebooks")
    if not each or len(each["usage"]) < 2:
        return []
    codes = metrics["codebook_usage"]["codes"]
    perplexity, used = sorted(each["perplexity"]), sorted(value * codes for value in each["usage"])
    lines = [
        Line(name="codes used at least once", points=list(enumerate(used, 1)), colour=1),
        Line(name="perplexity", points=list(enumerate(perplexity, 1)), colour=0),
    ]
    return [Chart(title="Every codebook, least used first", x_label="codebooks, sorted", y_label="codes", lines=lines, zero=True)]


def training_charts(training: Mapping[str, Any] | None) -> list[Chart]:
    """Validation error before and after the rectifier, and the training loss, over the steps: whichever the run has written down."""
    if not training or not training.get("step"):
        return []
    charts = []
    groups = {
        "Validation error of the latents": {"val_mse_quantized": "quantized", "val_mse_rectified": "rectified"},
        "Training loss": {"train_loss": "loss"},
        "Learning rate": {"lr": "rectifier"},
    }
    for title, columns in groups.items():
        lines = []
        for column, name in columns.items():
            values = zip(training["step"], training.get(column) or [], strict=False)
            points = [(float(step), float(value)) for step, value in values if step is not None and value is not None]
            if len(points) > 1:
                lines.append(Line(name=name, points=points, colour=1 if name == "quantized" else 0))
        if lines:
            charts.append(Chart(title=title, x_label="step", y_label=title.lower(), lines=lines))
    return charts
