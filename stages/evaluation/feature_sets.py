"""What one pass adds up of one network's features, row by row: the sums of the Frechet distance, the features of KID, the classes.

Shapes: B batch, N images so far, F features, L classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import ranks
from .frechet import Gaussian, InceptionScore, Moments, frechet_distance, split_of_images
from .kernel import kernel_distance, kid_subsets


@dataclass(frozen=True, kw_only=True)
class SetMetrics:
    """The distances of one row from the originals; None for what needs more images or logits."""

    frechet: float | None
    kid: float | None
    kid_standard_error: float | None
    score: float | None
    """The inception score of the row itself."""
    agreement: float | None
    """Share of the images whose first class is that of the original."""


class FeatureSets:
    """The features of the rows of one pass. Above `kernel.WHOLE_UP_TO` images its size no longer grows."""

    def __init__(self, *, features: int, classes: int | None, rows: Sequence[str], images: int, device: torch.device) -> None:
        """Start empty.

        Args:
            features: F.
            classes: L; None where the network has no logits.
            rows: the rows that are measured, "original" among them.
            images: how many there will be.
        """
        self.rows = tuple(rows)
        self.moments = {row: Moments(features, device) for row in rows}
        self.scores = {row: InceptionScore(classes) for row in rows} if classes else {}
        self.agreeing = dict.fromkeys(rows, 0) if classes else {}
        self.splits, self.subsets = split_of_images(images), kid_subsets(images)
        self.kept_index: list[int] = []
        """Position of each image whose features are kept."""
        self.kept: dict[str, list[Tensor]] = {row: [] for row in rows}

    def add(self, features: Mapping[str, Tensor], logits: Mapping[str, Tensor], index: Sequence[int]) -> None:
        """Take in (B,F) and, where there are classes, (B,L) by row, of the images at these positions."""
        chosen = [at for at, i in enumerate(index) if self.subsets[i] >= 0]
        self.kept_index += [index[at] for at in chosen]
        first = logits["original"].argmax(1) if self.scores else None
        for row in self.rows:
            self.moments[row].add(features[row])
            self.kept[row].append(features[row][chosen].float().cpu())
            if first is not None:
                self.scores[row].add(logits[row], self.splits[list(index)])
                self.agreeing[row] += int((logits[row].argmax(1) == first).sum())

    def merge_ranks(self) -> None:
        """Make this the sums of all ranks, the kept features in the images' order."""
        for row in self.rows:
            self.moments[row].all_reduce()
            if self.scores:
                self.scores[row].all_reduce()
        parts = ranks.gather((self.kept_index, self._kept(), self.agreeing))
        index = [i for part in parts for i in part[0]]
        ranking = sorted(range(len(index)), key=index.__getitem__)
        self.kept_index = [index[i] for i in ranking]
        self.kept = {row: [torch.cat([part[1][row] for part in parts])[ranking]] for row in self.rows}
        self.agreeing = {row: sum(part[2][row] for part in parts) for row in self.agreeing}

    def metrics(self) -> dict[str, SetMetrics]:
        """By row."""
        images = self.moments["original"].count
        gaussians: dict[str, Gaussian] = {row: moments.gaussian() for row, moments in self.moments.items()} if images > 1 else {}
        kept, subsets = self._kept(), self.subsets[self.kept_index]
        found = {}
        for row in self.rows:
            kid = kernel_distance(kept["original"], kept[row], subsets)
            found[row] = SetMetrics(
                frechet=frechet_distance(gaussians["original"], gaussians[row]) if gaussians else None,
                kid=kid[0] if kid else None,
                kid_standard_error=kid[1] if kid else None,
                score=self.scores[row].compute() if self.scores else None,
                agreement=self.agreeing[row] / images if self.scores and images else None,
            )
        return found

    def _kept(self) -> dict[str, Tensor]:
        """(N,F) by row."""
        size = len(self.moments["original"].sums)
        return {row: torch.cat(parts) if parts else torch.empty(0, size) for row, parts in self.kept.items()}

    def state_dict(self) -> dict[str, Any]:
        """Everything, as tensors and plain values."""
        sums = {name: {row: part.state_dict() for row, part in getattr(self, name).items()} for name in ("moments", "scores")}
        return {**sums, "kept_index": list(self.kept_index), "kept": self._kept(), "agreeing": dict(self.agreeing)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        for name in ("moments", "scores"):
            for row, part in getattr(self, name).items():
                part.load_state_dict(state[name][row])
        self.kept_index, self.agreeing = list(state["kept_index"]), dict(state["agreeing"])
        self.kept = {row: [state["kept"][row]] for row in self.rows}
