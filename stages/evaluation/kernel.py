"""The kernel distance KID between two sets of features (Binkowski et al. 2018): what rFID asks, without its bias on few pictures.

    KID = mean of k(x_i,x_j), i != j  +  mean of k(y_i,y_j), i != j  -  2 mean of k(x_i,y_j),   k(x,y) = (x.y / F + 1)^3

It is an unbiased estimate of the squared distance of two distributions, and so may fall below zero where they are (nearly) one.

Shapes: N images, F features.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

WHOLE_UP_TO = 5000
"""Images over which the estimate is one over all pairs; above it is the mean over `_SUBSETS` subsets of `_SUBSET_IMAGES`."""
_SUBSETS, _SUBSET_IMAGES, _SEED = 10, 1000, 2020


def kid_subsets(count: int) -> Tensor:
    """(count,) int64: the subset that each of so many images belongs to, -1 for none; all are of subset 0 where there is but one."""
    if count <= WHOLE_UP_TO:
        return torch.zeros(count, dtype=torch.int64)
    subsets = torch.full((count,), -1, dtype=torch.int64)
    order = torch.from_numpy(np.random.RandomState(_SEED).permutation(count)[: _SUBSETS * _SUBSET_IMAGES])
    subsets[order] = torch.arange(_SUBSETS).repeat_interleave(_SUBSET_IMAGES)
    return subsets


def kernel_distance(ours: Tensor, theirs: Tensor, subsets: Tensor) -> tuple[float, float | None] | None:
    """KID of two sets of features (N,F) and its standard error.

    Row n of both is the same picture, so the error is that of drawing pictures: over one set by the jackknife, which leaves out each picture
    once; over subsets by how these differ.

    Args:
        subsets: (N,) the subset of each row, as in `kid_subsets`.

    Returns:
        None where a subset has fewer than 2 pictures; no error of 2 pictures.
    """
    numbers = subsets.unique().tolist()
    found = [_estimate(ours[subsets == number], theirs[subsets == number]) for number in numbers]
    values = torch.tensor([value for value, _ in found], dtype=torch.float64)
    if not found or bool(values.isnan().any()):
        return None
    error = found[0][1] if len(found) == 1 else float(values.std() / math.sqrt(len(found)))
    return float(values.mean()), error if math.isfinite(error) else None


def _estimate(ours: Tensor, theirs: Tensor) -> tuple[float, float]:
    """The estimate over all pairs, and its jackknife error; NaN for what needs more pictures."""
    count, features = ours.shape
    if count < 2:
        return math.nan, math.nan
    x, y = ours.double().cpu(), theirs.double().cpu()

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T).div_(features).add_(1).pow_(3)

    xx, yy, xy = kernel(x, x), kernel(y, y), kernel(x, y)
    within = xx.sum(1) - xx.diagonal() + yy.sum(1) - yy.diagonal()
    value = float(within.sum() / (count * (count - 1)) - 2 * xy.sum() / count**2)
    if count < 3:
        return value, math.nan
    # What each picture adds to the sums goes with it.
    left = count - 1
    without = (within.sum() - 2 * within) / (left * (left - 1)) - 2 * (xy.sum() - xy.sum(0) - xy.sum(1) + xy.diagonal()) / left**2
    return value, float(((without - without.mean()).square().sum() * left / count).sqrt())
