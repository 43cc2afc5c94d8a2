"""How much of each codebook a whole split uses: usage.parquet of the codebooks folder, one row for each token.

Shapes: N latents, B batch, T tokens per image, K codes per codebook, D dims per token.
"""

from __future__ import annotations

import io
from collections.abc import Generator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from ..cache.batches import open_latents
from ..cache.store import LatentSplit
from ..errors import CodebookError, one_line
from ..files import write_bytes
from ..models.quantizer import MultiGroupQuantizer, code_counts, dead_codes, perplexity, usage
from ..models.transform import LatentTransform
from . import ranks
from .events import Advance, Begin, Event

USAGE_NAME = "usage.parquet"
_BATCH = 1024
_WORST = 3


def count_codes(split: LatentSplit, transform: LatentTransform, codebooks: Tensor) -> Generator[Event, None, tuple[Tensor, Tensor]]:
    """(T,K) int64 uses of each code over every ok row of the split, and (T,) float64 mean squared error of the coordinates, on the CPU.

    Every rank must call it; each reads its own run of whole batches, so that the sums are the same, to the bit, whatever the number of ranks.

    Args:
        split: read from disk in bounded memory where it is larger than what is free.
        transform: on the device to compute on.
        codebooks: (T,K,D).
    """
    device = transform.mean.device
    quantizer = MultiGroupQuantizer(codebooks).to(device).requires_grad_(False).eval()
    rows = np.flatnonzero(split.ok)
    batches = -(-len(rows) // _BATCH)
    first, last = (_BATCH * (batches * (ranks.rank() + end) // ranks.world_size()) for end in (0, 1))
    mine = rows[first:last]
    counts = torch.zeros(codebooks.shape[:2], dtype=torch.int64, device=device)
    sums = []
    yield Begin(task=ranks.task_of_share("code usage"), total=len(mine), unit="latents")
    for positions, latents in open_latents(split, mine, device).sequential(_BATCH) if len(mine) else ():
        coordinates = transform(latents)
        indices = quantizer.encode(coordinates)
        counts += code_counts(indices, counts.shape[1])
        sums.append((quantizer.decode(indices) - coordinates).square().sum((0, 2)).cpu().double())
        yield Advance(done=int(positions[-1]) + 1)
    errors = torch.stack([batch for part in ranks.gather(sums) for batch in part]).sum(0) / (len(rows) * codebooks.shape[2])
    return ranks.sum_tensors(counts).cpu(), errors


def write_usage(folder: Path, counts: Tensor, errors: Tensor) -> None:
    """Write usage.parquet from counts (T,K) and mean squared errors (T,)."""
    columns = {"usage": usage(counts), "perplexity": perplexity(counts), "dead_codes": dead_codes(counts), "mse": errors.double()}
    table = pa.table({"token": range(len(counts)), **{name: column.tolist() for name, column in columns.items()}})
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    write_bytes(folder / USAGE_NAME, buffer.getvalue())


def summarize_usage(folder: Path) -> dict[str, Any]:
    """Spread of usage and perplexity over the tokens, all dead codes, and the tokens of lowest perplexity; empty where there is no usage.parquet.

    Raises:
        CodebookError: it is damaged.
    """
    path = folder / USAGE_NAME
    if not path.is_file():
        return {}
    try:
        rows = {row.pop("token"): row for row in pq.read_table(path).to_pylist()}
        worst = sorted(rows, key=lambda token: (rows[token]["perplexity"], token))[:_WORST]
        return {
            **{name: spread(torch.tensor([row[name] for row in rows.values()])) for name in ("usage", "perplexity")},
            "dead_codes": sum(row["dead_codes"] for row in rows.values()),
            "worst_tokens": {str(token): rows[token] for token in worst},
        }
    except Exception as error:  # pyarrow has its own errors for a damaged file
        raise CodebookError(f"{path} is damaged ({one_line(error)}); remove the folder and fit the codebooks again") from error


def spread(values: Tensor) -> dict[str, float]:
    """Smallest, median and largest of (T,) values."""
    return {"min": float(values.min()), "median": float(values.median()), "max": float(values.max())}
