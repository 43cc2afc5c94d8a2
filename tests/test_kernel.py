"""The kernel distance KID against torchmetrics, slow sums and a jackknife that leaves pictures out one by one."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchmetrics.image.kid import poly_mmd

from revq.stages.evaluation import kernel
from revq.stages.evaluation.kernel import kernel_distance, kid_subsets


def two_sets(count: int, features: int = 16, shift: float = 0.3, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Row n of the second is that of the first, moved a little, as a reconstruction is."""
    generator = torch.Generator().manual_seed(seed)
    ours = torch.randn(count, features, generator=generator)
    return ours, ours + shift * torch.rand(count, features, generator=generator)


@settings(deadline=None, max_examples=20)
@given(count=st.integers(2, 30), seed=st.integers(0, 100))
def test_kid_equals_torchmetrics_over_all_pairs(count: int, seed: int) -> None:
    ours, theirs = two_sets(count, seed=seed)
    found = kernel_distance(ours, theirs, kid_subsets(count))
    assert found is not None
    assert found[0] == pytest.approx(float(poly_mmd(ours.double(), theirs.double())), rel=1e-9, abs=1e-12)


def test_the_standard_error_is_that_of_leaving_out_each_picture_once() -> None:
    ours, theirs = two_sets(12)
    without = torch.stack([poly_mmd(*(torch.cat([each[:i], each[i + 1 :]]).double() for each in (ours, theirs))) for i in range(12)])
    jackknife = math.sqrt(float((without - without.mean()).square().sum()) * 11 / 12)
    found = kernel_distance(ours, theirs, kid_subsets(12))
    assert found is not None
    assert found[1] == pytest.approx(jackknife, rel=1e-9)


def test_the_estimate_is_unbiased_for_sets_of_one_distribution() -> None:
    generator = torch.Generator().manual_seed(3)
    values = []
    for _ in range(200):
        ours, theirs = torch.randn(2, 20, 16, generator=generator)
        found = kernel_distance(ours, theirs, kid_subsets(20))
        assert found is not None
        values.append(found[0])
    spread = torch.tensor(values)
    assert abs(float(spread.mean())) < 3 * float(spread.std()) / math.sqrt(200)
    assert float(spread.min()) < 0  # an unbiased one must fall below zero now and then


@pytest.mark.parametrize(("count", "expected"), [(0, None), (1, None), (2, "no error"), (3, "both")])
def test_too_few_pictures_have_no_distance_and_two_no_error(count: int, expected: str | None) -> None:
    found = kernel_distance(*two_sets(count), kid_subsets(count))
    if expected is None:
        assert found is None
    else:
        assert found is not None
        assert (found[1] is None) == (expected == "no error")


def test_above_some_thousands_the_distance_is_the_mean_over_disjoint_subsets_and_its_error_their_spread(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WHOLE_UP_TO": 50, "_SUBSETS": 4, "_SUBSET_IMAGES": 10}.items():
        monkeypatch.setattr(kernel, name, value)
    subsets = kid_subsets(60)
    assert (subsets + 1).bincount().tolist() == [20, 10, 10, 10, 10]
    ours, theirs = two_sets(60)
    chosen = subsets >= 0
    found = kernel_distance(ours[chosen], theirs[chosen], subsets[chosen])
    each = torch.stack([poly_mmd(ours[subsets == number].double(), theirs[subsets == number].double()) for number in range(4)])
    assert found is not None
    assert found[0] == pytest.approx(float(each.mean()), rel=1e-9)
    assert found[1] == pytest.approx(float(each.std()) / 2, rel=1e-9)
