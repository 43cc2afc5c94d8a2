"""Where the figures of train-rectifier go: metrics.parquet, TensorBoard, and Weights & Biases if asked for. Only rank 0 writes."""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor

from ...errors import ConfigError
from ...files import replacing
from .. import ranks

METRICS_NAME = "metrics.parquet"


def require_wandb() -> None:
    """Raises ConfigError where Weights & Biases is not installed."""
    if importlib.util.find_spec("wandb") is None:
        raise ConfigError("wandb needs the package of Weights & Biases, which is not installed: pip install wandb, or leave the option out")


class TrainingLog:
    """Opened once in a run; on every rank but the first it does nothing."""

    def __init__(self, out: Path, *, step: int, wandb: bool, settings: dict[str, Any]) -> None:
        """Open what is written to.

        Args:
            out: run folder.
            step: where the run goes on; TensorBoard drops what an interrupted run wrote after it.
            wandb: also log to Weights & Biases, as one run for this folder however often it is resumed.
            settings: shown there.
        """
        self.path = out / METRICS_NAME
        self._writer: Any = None
        self._wandb: Any = None
        if ranks.rank() > 0:
            return
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(out / "tensorboard"), purge_step=step)
        if wandb:
            import wandb as package

            run_id = hashlib.sha256(str(out.resolve()).encode()).hexdigest()[:12]
            self._wandb = package.init(project="revq", dir=str(out), id=run_id, name=out.name, resume="allow", config=settings)

    def row(self, history: list[dict[str, Any]]) -> None:
        """Write the newest row of `history`, and metrics.parquet anew with all of them, whole or not at all."""
        if self._writer is None:
            return
        values = {name: value for name, value in history[-1].items() if name != "step"}
        for name, value in values.items():
            self._writer.add_scalar(name, value, history[-1]["step"])
        if self._wandb is not None:
            self._wandb.log(values, step=history[-1]["step"])
        write_metrics(history, self.path)

    def picture(self, name: str, picture: Tensor, step: int) -> None:
        """Show a uint8 picture (3,rows,columns)."""
        if self._writer is None:
            return
        self._writer.add_image(name, picture, step)
        if self._wandb is not None:
            import wandb as package

            self._wandb.log({name: package.Image(picture.permute(1, 2, 0).numpy())}, step=step)

    def close(self) -> None:
        """Flush what is buffered."""
        if self._writer is not None:
            self._writer.close()
        if self._wandb is not None:
            self._wandb.finish()


def write_metrics(history: list[dict[str, Any]], path: Path) -> None:
    """Write these rows; a figure that one of them does not have is null there."""
    names = list(dict.fromkeys(name for row in history for name in row))
    table = pa.table({name: [row.get(name) for row in history] for name in names})
    with replacing(path) as temporary:
        pq.write_table(table, temporary)
