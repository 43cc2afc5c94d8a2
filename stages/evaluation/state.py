"""What one pass over the images adds up, on one rank: kept on disk so that a stopped pass goes on, and merged over the ranks at the end.

Sums are float64 and batches are always the same images, so that a resumed pass gives the same numbers to the last bit, and several ranks
the same up to the order of float64 sums.

Shapes: N images so far, R rows, M image metrics, T tokens per image (= codebooks), K codes per codebook.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...files import write_bytes
from .. import ranks
from .feature_sets import FeatureSets
from .loader import Batch
from .metrics import IMAGE_METRICS, ROWS, CodebookUsage

LATENT_METRICS = ("latent_mse", "decoder_mse")
# decoder_mse is the mean squared error of the coordinates: in the decoder's metric with its transform, and equal to latent_mse with the others.
COLUMNS = tuple(f"{row}.{name}" for row in ROWS for name in (*IMAGE_METRICS, *LATENT_METRICS))


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What one batch adds to a state."""

    scores: dict[str, dict[str, Tensor]]
    """(B,) float64 by row and metric."""
    indices: Tensor
    """(B,T) int64."""
    features: dict[str, dict[str, Tensor]]
    """(B,F) by network and row."""
    logits: dict[str, dict[str, Tensor]]
    """(B,L) by network and row; without rows where the network has none."""
    seconds: dict[str, float]
    round_trip: dict[str, int] | None


@dataclass(kw_only=True)
class EvaluationState:
    """One pass so far. Its size grows by about 250 bytes an image, and by the features of the first thousands (`kernel.kid_subsets`)."""

    usage: CodebookUsage
    sets: dict[str, FeatureSets]
    """By the network's name."""
    listed: int
    """Images in all, those that cannot be read among them."""
    index: list[int] = field(default_factory=list)
    """Position in the source of every image that was measured."""
    scores: list[Tensor] = field(default_factory=list)
    """(B,len(COLUMNS)) float64 for every batch."""
    digests: list[bytes] = field(default_factory=list)
    """SHA-256 of each crop's pixels."""
    enlarged: int = 0
    """Images whose shorter side is below the image size."""
    failed: list[tuple[int, str]] = field(default_factory=list)
    """(position, reason) of every image that cannot be read."""
    seconds: dict[str, float] = field(default_factory=lambda: {"encode": 0.0, "decode": 0.0})
    """Time spent on `timed` images."""
    timed: int = 0
    round_trip: dict[str, int] | None = None
    """The check of batch 0: {"images", "largest_difference"}; None on a rank that has not seen it."""
    batches: int = 0
    """Batches of this rank that are done."""
    whole: bool = True
    """False only while a batch is being taken in: such a state must not be saved."""

    @property
    def images(self) -> int:
        return len(self.index)

    @property
    def seen(self) -> int:
        """Images that were measured or cannot be read."""
        return len(self.index) + len(self.failed)

    def table(self) -> Tensor:
        """(N,len(COLUMNS)) float64."""
        return torch.cat(self.scores) if self.scores else torch.empty(0, len(COLUMNS), dtype=torch.float64)

    def column(self, row: str, metric: str) -> Tensor:
        """(N,) every image's value, NaN where it was not measured."""
        at = COLUMNS.index(f"{row}.{metric}")
        return torch.cat([batch[:, at] for batch in self.scores]) if self.scores else torch.empty(0, dtype=torch.float64)

    def commit(self, batch: Batch, measured: Measured | None) -> None:
        """Take in one batch; `measured` is None where none of its images can be read."""
        self.whole = False
        self.failed += [(crop.index, crop.reason) for crop in batch.failed]
        if measured is not None:
            self._add(batch, measured)
        self.batches += 1
        self.whole = True

    def _add(self, batch: Batch, measured: Measured) -> None:
        index = [crop.index for crop in batch.crops]
        nothing = torch.full((len(index),), torch.nan, dtype=torch.float64)
        columns = [measured.scores[row].get(name, nothing) for row in ROWS for name in (*IMAGE_METRICS, *LATENT_METRICS)]
        self.scores.append(torch.stack(columns, 1))
        self.index += index
        self.digests += [crop.digest for crop in batch.crops]
        self.enlarged += sum(crop.enlarged for crop in batch.crops)
        self.usage.update(measured.indices)
        for name, each in self.sets.items():
            each.add(measured.features[name], measured.logits[name], index)
        if self.batches > 0 or self.timed == 0:  # the first batch warms up, and is counted only while there is no other
            fresh = self.batches == 1
            self.seconds = {name: measured.seconds[name] + (0.0 if fresh else value) for name, value in self.seconds.items()}
            self.timed = len(index) + (0 if fresh else self.timed)
        self.round_trip = self.round_trip or measured.round_trip

    def merge_ranks(self) -> None:
        """Make this rank's state that of all ranks, images in the source's order."""
        order = ranks.gather((self.index, self.table(), self.digests, self.failed, self.enlarged, self.seconds, self.timed, self.round_trip))
        index = [i for part in order for i in part[0]]
        digests = [digest for part in order for digest in part[2]]
        ranking = sorted(range(len(index)), key=index.__getitem__)
        self.scores = [torch.cat([part[1] for part in order])[ranking]]
        self.index, self.digests = [index[i] for i in ranking], [digests[i] for i in ranking]
        self.failed = sorted(entry for part in order for entry in part[3])
        self.enlarged, self.timed = sum(part[4] for part in order), sum(part[6] for part in order)
        self.seconds = {name: sum(part[5][name] for part in order) for name in self.seconds}
        self.round_trip = next((part[7] for part in order if part[7] is not None), None)
        ranks.sum_tensors(self.usage.counts)
        for each in self.sets.values():
            each.merge_ranks()

    def state_dict(self) -> dict[str, Any]:
        """Everything, as tensors and plain values."""
        plain = ("index", "digests", "enlarged", "failed", "seconds", "timed", "round_trip", "batches")
        sets = {name: each.state_dict() for name, each in self.sets.items()}
        return {**{name: getattr(self, name) for name in plain}, "table": self.table(), "counts": self.usage.counts, "sets": sets}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        for name, each in self.sets.items():
            each.load_state_dict(state["sets"][name])
        self.usage.counts.copy_(state["counts"])
        self.scores = [state["table"]]
        for name in ("index", "digests", "enlarged", "seconds", "timed", "round_trip", "batches"):
            setattr(self, name, state[name])
        self.failed = [tuple(entry) for entry in state["failed"]]


def new_state(*, tokens: int, codes: int, images: int, device: torch.device, sets: Mapping[str, Callable[[], FeatureSets]]) -> EvaluationState:
    """An empty one for so many images; `sets` makes the sums of each network's features."""
    return EvaluationState(usage=CodebookUsage(tokens, codes, device), listed=images, sets={name: make() for name, make in sets.items()})


def partial_path(out: Path) -> Path:
    """Where this rank keeps its state while the pass runs."""
    return out / f"partial-{ranks.rank()}-of-{ranks.world_size()}.pt"


def save_partial(state: EvaluationState, out: Path, settings: Mapping[str, Any]) -> None:
    """Write the state, whole or not at all, with the settings that it depends on."""
    buffer = io.BytesIO()
    torch.save({"settings": dict(settings), "state": state.state_dict()}, buffer)
    write_bytes(partial_path(out), buffer.getvalue())


def resume(make: Callable[[], EvaluationState], out: Path, settings: Mapping[str, Any]) -> EvaluationState:
    """The state that `save_partial` wrote with the same settings, or a new one by `make` where there is none that can be read."""
    state = make()
    try:
        saved = torch.load(partial_path(out), map_location="cpu", weights_only=True)
        if saved["settings"] == dict(settings):
            state.load_state_dict(saved["state"])
            return state
    except Exception:  # not there, or torn; torch and zipfile raise many kinds
        return make()
    return state
