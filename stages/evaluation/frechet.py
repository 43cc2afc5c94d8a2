"""The Frechet distance between two sets of features seen as Gaussians, and the inception score; all sums in float64.

    d^2 = |m1 - m2|^2 + tr S1 + tr S2 - 2 tr (S1 S2)^(1/2)

With S = F F^T the last trace is the sum of the singular values of F1^T F2. Taken so it has the accuracy of a singular value, where the
eigenvalues of the product S1 S2 lose half of the digits to a square root; and of equal sets it is tr S to the last digits.

Shapes: B batch, N images, F features, L classes of the logits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.linalg
import torch
from torch import Tensor

from .. import ranks

_SPLITS = 10
_SHUFFLE_SEED = 2020


@dataclass(frozen=True)
class Gaussian:
    """Mean (F,) and a factor (F,R) of the covariance, `factor @ factor.T`, of a set of features."""

    mean: Tensor
    factor: Tensor


class Moments:
    """Count, sum and products of features that come in batches. Its size does not depend on their number."""

    def __init__(self, features: int, device: torch.device) -> None:
        """Start empty; the sums are float64 on `device`, or on the CPU where that is MPS, which has none."""
        place = torch.device("cpu") if device.type == "mps" else device
        self.sums = torch.zeros(features, dtype=torch.float64, device=place)
        self.products = torch.zeros(features, features, dtype=torch.float64, device=place)
        self.count = 0

    def add(self, features: Tensor) -> None:
        """Take in (B,F)."""
        vectors = features.to(self.sums)
        self.sums += vectors.sum(0)
        self.products.addmm_(vectors.T, vectors)
        self.count += len(vectors)

    def all_reduce(self) -> None:
        """Add up what every rank has."""
        ranks.sum_tensors(self.sums)
        ranks.sum_tensors(self.products)
        self.count = sum(ranks.gather(self.count))

    def gaussian(self) -> Gaussian:
        """The set as a Gaussian; needs 2 images."""
        mean = self.sums / self.count
        covariance = (self.products - self.count * torch.outer(mean, mean)).div_(self.count - 1).cpu()
        # What rounding leaves of a singular covariance must not add up: of N images at most N-1 axes are real.
        noise = float(self.products.diagonal().max()) / (self.count - 1) * len(mean) * torch.finfo(torch.float64).eps
        return Gaussian(mean.cpu(), _factor(covariance, noise))

    def state_dict(self) -> dict[str, Any]:
        return {"sums": self.sums, "products": self.products, "count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.sums.copy_(state["sums"])
        self.products.copy_(state["products"])
        self.count = state["count"]


def _factor(covariance: Tensor, noise: float) -> Tensor:
    """(F,R) with `factor @ factor.T` the covariance (F,F), by Cholesky with pivots, which stops where less than `noise` is left.

    At rank R it costs F R^2 where the eigenvectors cost 10 F^3.
    """
    triangle, pivots, rank, _ = scipy.linalg.lapack.dpstrf(covariance.numpy(), tol=noise, lower=1)
    factor = np.zeros((len(covariance), rank))
    factor[pivots - 1] = np.tril(triangle)[:, :rank]
    return torch.from_numpy(factor)


def gaussian_of(features: Tensor) -> Gaussian:
    """(N,F) features, at least 2, as a Gaussian: exact and quick where N is far below F, for no F x F matrix is made."""
    vectors = features.double().cpu()
    mean = vectors.mean(0)
    return Gaussian(mean, (vectors - mean).T / math.sqrt(len(vectors) - 1))


def frechet_distance(first: Gaussian, second: Gaussian) -> float:
    """d^2 of the formula above; never below zero."""
    between = torch.linalg.svdvals(first.factor.T @ second.factor).sum()
    spread = first.factor.square().sum() + second.factor.square().sum()
    return max(0.0, float((first.mean - second.mean).square().sum() + spread - 2 * between))


def split_of_images(count: int) -> Tensor:
    """(count,) the split that each image belongs to: torch-fidelity's shuffle, so that its inception score is the same."""
    order = np.random.RandomState(_SHUFFLE_SEED).permutation(count)
    splits = torch.empty(count, dtype=torch.int64)
    for split in range(_SPLITS):
        splits[torch.from_numpy(order[split * count // _SPLITS : (split + 1) * count // _SPLITS])] = split
    return splits


class InceptionScore:
    """exp of the mean KL divergence between the classes of an image and of its split, mean over the splits."""

    def __init__(self, classes: int) -> None:
        self.probabilities = torch.zeros(_SPLITS, classes, dtype=torch.float64)
        self.negative_entropy = torch.zeros(_SPLITS, dtype=torch.float64)
        self.counts = torch.zeros(_SPLITS, dtype=torch.float64)

    def add(self, logits: Tensor, splits: Tensor) -> None:
        """Take in (B,L) logits and the split (B,) of each image."""
        logs = logits.cpu().double().log_softmax(1)
        probabilities = logs.exp()
        self.probabilities.index_add_(0, splits, probabilities)
        self.negative_entropy.index_add_(0, splits, (probabilities * logs).sum(1))
        self.counts.index_add_(0, splits, torch.ones(len(splits), dtype=torch.float64))

    def all_reduce(self) -> None:
        """Add up what every rank has."""
        for tensor in self.state_dict().values():
            ranks.sum_tensors(tensor)

    def compute(self) -> float | None:
        """The score, at least 1; None while a split is empty."""
        if not bool((self.counts > 0).all()):
            return None
        shares = self.probabilities / self.counts.unsqueeze(1)
        entropies = torch.special.entr(shares).sum(1)
        return float((self.negative_entropy / self.counts + entropies).exp().mean())

    def state_dict(self) -> dict[str, Any]:
        return {"probabilities": self.probabilities, "negative_entropy": self.negative_entropy, "counts": self.counts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, tensor in self.state_dict().items():
            tensor.copy_(state[name])
