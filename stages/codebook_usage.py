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
_CODEBOOKS_AT_ONCE = 16  # in float64, beside counts that may fill a gigabyte


def usage_by_codebook(counts: Tensor) -> Tensor:
    """(T,K) counts -> (T,3) float64: share of the codes used, perplexity, and codes never used. Does not wait for the device."""
    parts = [torch.stack([usage(part), perplexity(part), dead_codes(part).double()], 1) for part in counts.split(_CODEBOOKS_AT_ONCE)]
    return torch.cat(parts)


def mean_usage(counts: Tensor) -> Tensor:
    """(T,K) counts -> (3,) float64: mean share of the codes used, mean perplexity, and how many codes of all codebooks were never used."""
    share, spread, dead = usage_by_codebook(counts).unbind(1)
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
    share, spread, dead = usage_by_codebook(ranks.sum_tensors(counts)).T.tolist()
    if ranks.rank() == 0:
        table = pa.table({"token": list(range(len(share))), "usage": share, "perplexity": spread, "dead": [int(value) for value in dead]})
        with replacing(out / USAGE_NAME) as temporary:
            pq.write_table(table, temporary)
