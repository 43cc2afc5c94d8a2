"""Latent transforms. C,H,W latent channels, rows, columns, P = C*H*W, T tokens, D = P/T dims."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from revq.errors import CodebookError
from revq.models.transform import (
    Covariance,
    LatentTransform,
    allocate_axes,
    blank_transform,
    fit_axes,
    scale_from_sensitivity,
    spatial_block,
    standard_deviation,
    stationary_part,
    water_level,
)

SHAPE = (4, 3, 2)


def correlated_latents(count: int, seed: int = 0) -> Tensor:
    """(N,4,3,2) latents whose positions are mixed by a fixed random matrix, off centre."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(24, 24, generator=torch.Generator().manual_seed(99)) * torch.linspace(0.1, 3, 24)
    return (torch.randn(count, 24, generator=generator) @ mixing.T + 5).reshape(count, *SHAPE)


def full_transform(tokens: int = 6) -> LatentTransform:
    latents = correlated_latents(5000)
    plain = LatentTransform(
        mean=latents.mean(0), std=standard_deviation(latents.var(0)), tokens=tokens, scale=torch.linspace(0.5, 2, 24).reshape(SHAPE)
    )
    covariance = Covariance(SHAPE)
    covariance.add(plain.standardize(latents) * plain.scale)
    return LatentTransform(mean=plain.mean, std=plain.std, scale=plain.scale, tokens=tokens, axes=fit_axes(covariance.shrunk(), tokens, bits=96)[0])


def test_the_inverse_gives_the_latent_back() -> None:
    transform, latents = full_transform(), correlated_latents(10, seed=1)
    assert transform(latents).shape == (10, 6, 4)
    assert torch.allclose(transform.inverse(transform(latents)), latents, atol=1e-4)


def test_without_a_rotation_coordinates_are_the_standardised_latent_cut_in_order() -> None:
    latents = correlated_latents(50)
    transform = LatentTransform(mean=latents.mean(0), std=latents.std(0), tokens=12)
    expected = ((latents - latents.mean(0)) / latents.std(0)).reshape(50, 12, 2)
    assert torch.allclose(transform(latents), expected, atol=1e-6)


def test_some_tokens_alone_are_the_same_as_a_part_of_all() -> None:
    transform, latents = full_transform(), correlated_latents(7, seed=2)
    standardised = transform.standardize(latents)
    assert torch.allclose(transform.to_coordinates(standardised, 2, 5), transform(latents)[:, 2:5], atol=1e-5)


def test_pca_coordinates_are_uncorrelated_and_tokens_share_the_variance_fairly() -> None:
    coordinates = full_transform()(correlated_latents(5000)).flatten(1)
    covariance = coordinates.T.cov()
    off_diagonal = covariance - torch.diag(covariance.diagonal())
    assert float(off_diagonal.abs().max()) < 0.02 * float(covariance.diagonal().max())
    products = covariance.diagonal().reshape(6, 4).log().sum(1)
    in_order = covariance.diagonal().sort().values.reshape(6, 4).log().sum(1)
    assert float(products.max() - products.min()) < 0.2 * float(in_order.max() - in_order.min())


def test_axes_without_a_metric_keep_squared_error_the_same() -> None:
    transform = full_transform()
    assert transform.axes is not None
    assert torch.allclose(transform.axes @ transform.axes.T, torch.eye(24), atol=1e-5)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 8), st.integers(1, 6), st.integers(0, 10_000))
def test_axes_are_dealt_out_each_once(tokens: int, dims: int, seed: int) -> None:
    variances = torch.rand(tokens * dims, generator=torch.Generator().manual_seed(seed)).tolist()
    assert sorted(allocate_axes(variances, tokens, bits=2.0 * tokens)) == list(range(tokens * dims))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=40), st.floats(0.5, 200))
def test_at_the_water_level_the_axes_take_all_bits(variances: list[float], bits: float) -> None:
    level = water_level(variances, bits)
    assert sum(max(0.0, math.log2(value) - level) / 2 for value in variances) == pytest.approx(bits, rel=1e-6)


def test_axes_too_small_for_a_bit_do_not_count_when_the_larger_ones_are_dealt_out() -> None:
    variances = [2.0**20, *[16.0] * 4, *[2.0**-20] * 3]
    assert water_level(variances, 18) == pytest.approx(0)
    order = allocate_axes(variances, 2, bits=18)
    # Equal products of variances would take one of the four away from the second token.
    assert sorted(order[4:]) == [1, 2, 3, 4]


def test_latents_that_never_vary_still_get_an_orthogonal_rotation() -> None:
    rotation, _ = fit_axes(torch.zeros(24, 24, dtype=torch.float64), 6, bits=24)
    assert torch.allclose(rotation @ rotation.T, torch.eye(24), atol=1e-6)


def test_a_singular_covariance_gives_an_orthogonal_rotation_with_its_axes_first_in_the_tokens() -> None:
    vectors = torch.randn(24, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    covariance = vectors @ vectors.T
    rotation = fit_axes(covariance, 6, bits=24)[0].double()
    assert torch.allclose(rotation @ rotation.T, torch.eye(24, dtype=torch.float64), atol=1e-5)
    variances = (rotation @ covariance @ rotation.T).diagonal().reshape(6, 4)
    assert int((variances > 1e-6 * variances.max()).sum(1).max()) == 1


BIG = (4, 6, 8)


def blocks_transform(monkeypatch: pytest.MonkeyPatch, tokens: int = 24) -> LatentTransform:
    """A transform of P = 192 in two blocks of (4,6,4), with axes that are not orthogonal."""
    monkeypatch.setattr("revq.models.transform.MAX_DENSE_POSITIONS", 100)
    generator = torch.Generator().manual_seed(3)
    transform = blank_transform(BIG, tokens, "decoder")
    assert transform.axes is not None
    axes = torch.stack([torch.eye(len(matrix)) + 0.03 * torch.randn(*matrix.shape, generator=generator) for matrix in transform.axes])
    scale, mean = (torch.rand(BIG, generator=generator) + 0.5 for _ in range(2))
    values = {"mean": mean, "std": torch.full(BIG, 2.0), "scale": scale, "axes": axes, "inverse_axes": torch.linalg.inv(axes)}
    transform.load_state_dict(values)
    return transform


def test_in_a_metric_squared_error_of_coordinates_is_the_metrics() -> None:
    generator = torch.Generator().manual_seed(8)
    mixing = torch.randn(24, 24, generator=generator, dtype=torch.float64) / 20 + torch.eye(24)
    metric = mixing @ mixing.T
    covariance = torch.cov(correlated_latents(2000).flatten(1).T.double())
    axes, inverse = fit_axes(covariance, 6, 96, metric)
    assert inverse is not None
    transform = LatentTransform(mean=torch.zeros(SHAPE), std=torch.ones(SHAPE), tokens=6, axes=axes, inverse_axes=inverse)
    first, second = torch.randn(2, 7, *SHAPE, generator=generator)
    error = (first - second).flatten(1).double()
    expected = torch.einsum("bp,pq,bq->b", error, metric, error)
    assert torch.allclose((transform(first) - transform(second)).square().sum((1, 2)).double(), expected, rtol=1e-4)
    assert torch.allclose(transform.inverse(transform(first)), first, atol=1e-4)
    spread = axes.double() @ covariance @ axes.T.double()
    assert float((spread - torch.diag(spread.diagonal())).abs().max()) < 1e-4 * float(spread.diagonal().max())


def test_a_metric_with_eigenvalues_below_zero_still_gives_axes_that_can_be_undone() -> None:
    metric = 0.5 * torch.eye(24, dtype=torch.float64) + 0.5 - 0.6 * torch.diag(torch.tensor([1.0] + [0.0] * 23, dtype=torch.float64))
    assert float(torch.linalg.eigvalsh(metric).min()) < 0
    axes, inverse = fit_axes(torch.eye(24, dtype=torch.float64), 6, 24, metric)
    assert inverse is not None
    assert torch.allclose(axes @ inverse, torch.eye(24), atol=1e-4)


def test_with_spatial_blocks_there_and_back_is_the_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    transform = blocks_transform(monkeypatch)
    latents = torch.randn(5, *BIG, generator=torch.Generator().manual_seed(4))
    assert transform.axes is not None
    assert transform.axes.shape == (2, 96, 96)
    assert torch.allclose(transform.inverse(transform(latents)), latents, atol=1e-5)
    coordinates = torch.randn(5, 24, 8, generator=torch.Generator().manual_seed(5))
    assert torch.allclose(transform(transform.inverse(coordinates)), coordinates, atol=1e-5)


def test_with_spatial_blocks_some_tokens_alone_are_a_part_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    transform = blocks_transform(monkeypatch)
    standardised = torch.randn(3, *BIG, generator=torch.Generator().manual_seed(6))
    whole = transform.to_coordinates(standardised)
    for first, last in ((0, 24), (0, 12), (12, 24), (10, 14), (3, 4), (12, 13), (11, 12)):
        assert torch.equal(transform.to_coordinates(standardised, first, last), whole[:, first:last])


def test_a_token_of_a_spatial_block_sees_that_block_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    transform = blocks_transform(monkeypatch)
    latents = torch.randn(1, *BIG, generator=torch.Generator().manual_seed(7))
    moved = latents.clone()
    moved[:, :, 0, 0] += 1
    changed = (transform(moved) - transform(latents)).abs().amax(2)[0] > 1e-6
    assert changed[:12].any()
    assert not changed[12:].any()


@pytest.mark.parametrize(
    ("shape", "tokens", "block"),
    [((32, 8, 8), 512, (8, 8)), ((8, 32, 32), 512, (16, 32)), ((8, 32, 32), 4, (16, 32)), ((4, 64, 64), 1024, (32, 32)), ((32, 24, 24), 9, (8, 8))],
    ids=str,
)
def test_blocks_are_the_largest_that_share_the_tokens_evenly(shape: tuple[int, int, int], tokens: int, block: tuple[int, int]) -> None:
    assert spatial_block(shape, tokens) == block


def test_latents_that_no_blocks_suit_are_refused_with_what_to_do() -> None:
    with pytest.raises(CodebookError, match=r"8x32x32 cannot be cut into blocks .* share 1 tokens evenly; use --transform standardize"):
        spatial_block((8, 32, 32), 1)


def test_a_covariance_of_batches_equals_that_of_all_at_once_and_many_samples_are_hardly_shrunk() -> None:
    latents = correlated_latents(20_000)
    latents = latents - latents.mean(0)
    covariance = Covariance(SHAPE)
    for batch in latents.split(777):
        covariance.add(batch)
    vectors = latents.flatten(1).double()
    expected = vectors.T @ vectors / len(vectors)
    assert torch.allclose(covariance.products / covariance.count, expected, rtol=1e-4, atol=1e-3)
    assert float((covariance.shrunk() - expected).norm() / expected.norm()) < 0.01


def test_the_stationary_part_averages_equal_offsets_of_equal_channels() -> None:
    covariance = torch.randn(24, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    part = stationary_part(covariance, SHAPE).reshape(*SHAPE, *SHAPE)
    whole = covariance.reshape(*SHAPE, *SHAPE)
    assert float(part[1, 0, 0, 2, 1, 1]) == pytest.approx(float(whole[1, 0, 0, 2, 1, 1] + whole[1, 1, 0, 2, 2, 1]) / 2)
    assert torch.equal(part[3, 2, 1, 0, 0, 0], whole[3, 2, 1, 0, 0, 0])
    assert torch.allclose(stationary_part(part.reshape(24, 24), SHAPE).reshape(part.shape), part)


def test_from_few_samples_of_a_stationary_field_the_shrunk_covariance_is_nearer_the_truth() -> None:
    side = torch.arange(6).double()
    decay = torch.exp(-(side[:, None] - side[None, :]).abs() / 3)
    truth = torch.kron(decay, decay)
    noise = torch.randn(20, 36, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    covariance = Covariance((1, 6, 6))
    covariance.add((noise @ torch.linalg.cholesky(truth).T).reshape(20, 1, 6, 6).float())
    sample = covariance.products / covariance.count
    assert float((covariance.shrunk() - truth).norm()) < 0.6 * float((sample - truth).norm())


def test_a_position_that_never_varies_stays_itself() -> None:
    latents = correlated_latents(100)
    latents[:, 1, 2, 0] = 7.0
    transform = LatentTransform(mean=latents.mean(0), std=standard_deviation(latents.var(0)), tokens=6)
    assert torch.isfinite(transform(latents)).all()
    assert torch.allclose(transform.inverse(transform(latents)), latents, atol=1e-4)


def test_tokens_that_do_not_divide_the_positions_are_refused_with_the_nearest_that_do() -> None:
    with pytest.raises(CodebookError, match=r"24 positions, which 7 tokens do not divide; nearest that do: .*6.*8"):
        LatentTransform(mean=torch.zeros(SHAPE), std=torch.ones(SHAPE), tokens=7)


def test_scales_have_mean_square_one_and_never_reach_zero() -> None:
    sensitivity = torch.ones(SHAPE)
    sensitivity[0] = 0
    scale = scale_from_sensitivity(sensitivity)
    assert float(scale.min()) > 0
    assert math.isclose(float(scale.square().mean()), 1, abs_tol=1e-3)


def test_a_decoder_that_reacts_to_nothing_is_an_error() -> None:
    with pytest.raises(CodebookError, match="--transform pca"):
        scale_from_sensitivity(torch.zeros(SHAPE))


@pytest.mark.parametrize("kind", ["standardize", "pca", "decoder"])
@pytest.mark.parametrize(("shape", "tokens"), [((32, 8, 8), 512), ((32, 16, 16), 1024), (BIG, 24)])
def test_an_empty_batch_goes_through_every_transform_and_back(kind: str, shape: tuple[int, int, int], tokens: int) -> None:
    transform = blank_transform(shape, tokens, kind)
    coordinates = transform(torch.empty(0, *shape))
    assert coordinates.shape == (0, tokens, math.prod(shape) // tokens)
    assert transform.inverse(coordinates).shape == (0, *shape)
