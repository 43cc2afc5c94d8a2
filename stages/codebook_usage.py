"""How the codebooks are used while they train, and in the end.

Shapes: T tokens (= codebooks), K codes per codebook.
"""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from ..files import replacing
from ..models.quantizer import code_counts, dead_codes, perplexity, usage
from . import ranks
from .events import Advance, Begin, Event
from .train_state import TrainState
from .training_data import Inputs

USAGE_NAME = "usage.parquet"
_BATCH = 256
_CODEBOOKS_AT_ONCE = 16


def mean_usage(counts: Tensor) -> Tensor:
    """(T,K) counts -> (3,) float32: mean share of the codes used, mean perplexity, and how many codes of all codebooks were never used.

    It stays on the device, and so is float32, which MPS has too; a few codebooks at a time, since counts may fill half a gigabyte.
    """
    parts = []
    for some in counts.split(_CODEBOOKS_AT_ONCE):
        frequency = some.float() / some.sum(1, keepdim=True).clamp_min(1)
        used = (some > 0).sum(1)
        parts.append(torch.stack([used / some.shape[1], torch.special.entr(frequency).sum(1).exp(), some.shape[1] - used]))
    share, spread, dead = torch.cat(parts, 1)
    return torch.stack([share.mean(), spread.mean(), dead.sum()])


def codebook_figures(state: TrainState) -> dict[str, float]:
    """Of the train latents of all ranks: in the last whole epoch, or so far in the first; none before the first step. Waits for the device."""
    if state.usage is None:
        counts = ranks.sum_tensors(state.counts.clone())
        if not bool(counts.any()):
            return {}
        figures = mean_usage(counts)
    else:
        figures = state.usage
    return dict(zip(("codebook_usage", "codebook_perplexity", "codebook_dead"), figures.tolist(), strict=True))


def write_final_usage(inputs: Inputs, state: TrainState, out: Path) -> Generator[Event, None, None]:
    """Write usage.parquet, a row for each codebook as it is now, over the train latents of all ranks; yields progress."""
    counts = torch.zeros_like(state.counts)
    done = 0
    yield Begin(task="count codes", total=len(inputs.train), unit="latents")
    for _, latents in inputs.train.sequential(_BATCH):
        counts += code_counts(state.quantizer.encode(inputs.transform(latents)), counts.shape[1])
        done += len(latents)
        yield Advance(done=done)
    counts = ranks.sum_tensors(counts)
    figures = {"usage": usage(counts), "perplexity": perplexity(counts), "dead": dead_codes(counts)}
    if ranks.rank() == 0:
        table = pa.table({"token": list(range(len(counts))), **{name: values.tolist() for name, values in figures.items()}})
        with replacing(out / USAGE_NAME) as temporary:
            pq.write_table(table, temporary)
