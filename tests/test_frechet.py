"""The Frechet distance and the inception score: against closed forms, SciPy and torch-fidelity, and whatever the batches."""

from __future__ import annotations

import math

import pytest
import scipy.linalg
import torch
from torch import Tensor
from torch_fidelity.metric_isc import isc_features_to_metric

from revq.stages.evaluation.frechet import InceptionScore, Moments, frechet_distance, gaussian_of, split_of_images

CPU = torch.device("cpu")


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def whitened(count: int, features: int, seed: int) -> Tensor:
    """(count,features) whose sample mean is 0 and sample covariance the identity, exactly."""
    values = random(count, features, seed=seed)
    values -= values.mean(0)
    factor = torch.linalg.cholesky(values.T @ values / (count - 1))
    return torch.linalg.solve_triangular(factor, values.T, upper=False).T


def moments_of(features: Tensor, batches: int = 1) -> Moments:
    moments = Moments(features.shape[1], CPU)
    for part in features.tensor_split(batches):
        moments.add(part)
    return moments


def test_the_distance_of_two_gaussians_is_the_closed_form() -> None:
    deviations = torch.linspace(0.1, 3, 16, dtype=torch.float64)
    shift = torch.linspace(-1, 2, 16, dtype=torch.float64)
    first = whitened(64, 16, seed=0) * deviations
    second = whitened(50, 16, seed=1) * deviations.flip(0) + shift
    expected = float(shift.square().sum() + (deviations - deviations.flip(0)).square().sum())
    for gaussian in (gaussian_of, lambda features: moments_of(features).gaussian()):
        assert frechet_distance(gaussian(first), gaussian(second)) == pytest.approx(expected, rel=1e-12)


def test_the_distance_equals_scipys_matrix_square_root_where_the_covariances_do_not_commute() -> None:
    first = random(200, 12, seed=0) @ random(12, 12, seed=1)
    second = random(300, 12, seed=2) @ random(12, 12, seed=3) + 0.5
    root = scipy.linalg.sqrtm((torch.cov(first.T) @ torch.cov(second.T)).numpy())
    spread = float(torch.cov(first.T).trace() + torch.cov(second.T).trace()) - 2 * root.trace().real
    expected = float((first.mean(0) - second.mean(0)).square().sum()) + spread
    assert frechet_distance(moments_of(first).gaussian(), moments_of(second).gaussian()) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("count", [2, 20, 200], ids=["two images", "singular covariance", "full covariance"])
def test_equal_sets_are_at_distance_zero(count: int) -> None:
    features = random(count, 64, seed=0).abs() * 10
    shuffled = features[torch.randperm(count, generator=torch.Generator().manual_seed(0))]
    scale = float(features.square().sum())
    assert frechet_distance(moments_of(features).gaussian(), moments_of(shuffled).gaussian()) < 1e-12 * scale
    assert frechet_distance(gaussian_of(features), gaussian_of(shuffled)) < 1e-12 * scale


@pytest.mark.parametrize("count", [30, 300], ids=["fewer images than features", "more"])
def test_moments_and_features_themselves_give_the_same_distance(count: int) -> None:
    first, second = random(count, 64, seed=0), random(count, 64, seed=1) * 1.5
    by_features = frechet_distance(gaussian_of(first), gaussian_of(second))
    by_moments = frechet_distance(moments_of(first).gaussian(), moments_of(second).gaussian())
    assert by_moments == pytest.approx(by_features, rel=1e-6)


def test_float32_features_are_summed_in_float64_so_that_a_large_mean_does_not_drown_the_covariance() -> None:
    features = (random(4000, 4, seed=0) * 1e-2 + 100).float()
    covariance = moments_of(features, batches=40).gaussian()
    assert (covariance.factor @ covariance.factor.T).diagonal().tolist() == pytest.approx(features.double().var(0).tolist(), rel=1e-5)


def test_the_distance_does_not_depend_on_the_batches() -> None:
    first, second = random(101, 32, seed=0), random(101, 32, seed=1)
    whole = frechet_distance(moments_of(first).gaussian(), moments_of(second).gaussian())
    for batches in (2, 101):
        assert frechet_distance(moments_of(first, batches).gaussian(), moments_of(second, batches).gaussian()) == pytest.approx(whole, rel=1e-11)


@pytest.mark.parametrize("count", [10, 57])
def test_the_inception_score_is_that_of_torch_fidelity(count: int) -> None:
    logits = (random(count, 40, seed=0) * 2).float()
    score, splits = InceptionScore(40), split_of_images(count)
    for part in torch.arange(count).split(7):
        score.add(logits[part], splits[part])
    assert score.compute() == pytest.approx(isc_features_to_metric(logits)["inception_score_mean"], rel=1e-12)


def test_an_inception_score_with_an_empty_split_is_none() -> None:
    score = InceptionScore(5)
    score.add(random(9, 5, seed=0), split_of_images(9))
    assert score.compute() is None


def test_a_saved_state_continues_to_the_same_bits() -> None:
    features, logits, splits = random(20, 8, seed=0), random(20, 6, seed=1), split_of_images(20)
    whole, first, rest = Moments(8, CPU), Moments(8, CPU), Moments(8, CPU)
    score, begun, ended = InceptionScore(6), InceptionScore(6), InceptionScore(6)
    for part in (torch.arange(12), torch.arange(12, 20)):
        whole.add(features[part])
        score.add(logits[part], splits[part])
    first.add(features[:12])
    begun.add(logits[:12], splits[:12])
    rest.load_state_dict(first.state_dict())
    ended.load_state_dict(begun.state_dict())
    rest.add(features[12:])
    ended.add(logits[12:], splits[12:])
    assert torch.equal(rest.products, whole.products)
    assert torch.equal(rest.sums, whole.sums)
    assert rest.count == 20
    assert ended.compute() == score.compute()
    assert not math.isnan(ended.compute() or math.nan)
