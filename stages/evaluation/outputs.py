"""What an evaluation leaves in its folder: metrics.json, images.parquet, and two sheets of pictures.

Shapes: N images, S image side in pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch

from ...errors import OutputError
from ...files import local_path, read_json, write_bytes, write_json
from .loader import Loader
from .metrics import ROWS, finite_or_none
from .pictures import draw_grid, extreme_positions, spread_positions
from .reconstruct import reconstruct
from .state import EvaluationState
from .summary import Context, image_table, summarize, thinned
from .weights import FoundWeights

EVALUATION_KIND = "revq-evaluation"
METRICS_NAME = "metrics.json"
IMAGES_NAME = "images.parquet"
GRID_NAME = "reconstructions.png"
EXTREMES_NAME = "extremes.png"


def write_evaluation(
    out: Path, state: EvaluationState, context: Context, loader: Loader, *, tolerance: dict[str, Any] | None, claim: Callable[[], None] | None
) -> dict[str, Any]:
    """Everything that an evaluation leaves, metrics.json last; returns its content.

    Args:
        claim: takes the folder over from another evaluation; None where it is ours already.
    """
    metrics = summarize(state, context, tolerance=tolerance, training=_training(context.tokenizer_name))
    psnr_db = state.column("rectified", "psnr_db").numpy()
    worst, best = extreme_positions(psnr_db)
    sheets = {}
    sheets[GRID_NAME], metrics["pictures"] = _draw(state, context, loader, spread_positions(state.images))
    if worst:
        sheets[EXTREMES_NAME], metrics["extremes"] = _draw(state, context, loader, worst + best)
        metrics["extremes"]["kinds"] = ["worst"] * len(worst) + ["best"] * len(best)
    if claim is not None:
        claim()
    write_bytes(out / IMAGES_NAME, image_table(state, context.source))
    for name, sheet in sheets.items():
        write_bytes(out / name, sheet)
    write_json(out / METRICS_NAME, metrics)
    for path in out.glob("partial-*-of-*.pt"):
        path.unlink()
    return metrics


def _draw(state: EvaluationState, context: Context, loader: Loader, positions: Sequence[int]) -> tuple[bytes, dict[str, Any]]:
    """A sheet of the images at these positions of the state, decoded again, and its layout with their keys and own PSNR by row."""
    pictures = []
    for position in positions:
        crop = loader.load(state.index[position])
        assert crop.pixels is not None
        pixels = torch.from_numpy(crop.pixels).unsqueeze(0).to(context.tokenizer.device)
        way = {"bf16": context.settings["precision"] == "bf16", "refine": context.settings["refine_steps"]}
        rows = reconstruct(context.tokenizer, pixels, [context.source.items[crop.index].key], **way).rows
        pictures.append([rows[row][0].cpu() for row in ROWS])
    sheet, layout = draw_grid(pictures, ROWS)
    psnr_db = {row: state.column(row, "psnr_db") for row in ROWS[1:]}
    return sheet, {
        **layout,
        "keys": [context.source.items[state.index[position]].key for position in positions],
        "psnr_db": [{row: finite_or_none(float(values[position])) for row, values in psnr_db.items()} for position in positions],
    }


def _training(name: str) -> dict[str, Any] | None:
    """The columns of metrics.parquet where `name` is a run folder of train-rectifier, or the tokenizer in one; None where there are none."""
    folder = local_path(name)
    for path in (folder / "metrics.parquet", folder.parent / "metrics.parquet"):
        try:
            table = pq.read_table(path).to_pydict() if path.is_file() else {}
        except Exception:  # pyarrow raises its own for a torn file; curves are an extra
            table = {}
        if table.get("step"):
            return thinned({str(column): [_plain(value) for value in values] for column, values in table.items()})
    return None


def finished_metrics(out: Path, weights: dict[str, FoundWeights]) -> dict[str, Any] | None:
    """The metrics of an earlier run of the same evaluation; None where there are none yet, or weights that it lacked are here now.

    Raises:
        OutputError: it was measured with other weights of rFID or LPIPS.
    """
    metrics = read_json(out / METRICS_NAME)
    if metrics is None or not (out / GRID_NAME).is_file():
        return None
    for name, found in weights.items():
        there = metrics["protocol"]["weights"][name]
        before = there["sha256"]
        if found.sha256 and before is None:
            return None
        if found.sha256 and found.sha256 != before and not (found.published and there["published"]):  # one network in two formats
            raise OutputError(
                f"{out} holds this evaluation with other weights for {name} (SHA-256 {before[:8]} there, {found.sha256[:8]} now); "
                "choose another folder or pass --overwrite"
            )
    return metrics


def _plain(value: Any) -> float | None:
    return finite_or_none(float(value)) if isinstance(value, int | float) else None
