"""k-means backends. G groups, N points, K codes, D dims."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from revq.errors import CodebookError
from revq.models.kmeans import kmeans
from revq.models.nearest import nearest_codes
from revq.models.quantizer import code_counts, usage


def points(groups: int = 3, count: int = 2000, dims: int = 4) -> Tensor:
    return torch.randn(groups, count, dims, generator=torch.Generator().manual_seed(5))


def mean_error(data: Tensor, codebooks: Tensor) -> float:
    indices = nearest_codes(data, codebooks)
    return float((data - codebooks.gather(1, indices.unsqueeze(2).expand(-1, -1, data.shape[2]))).square().mean())


@pytest.mark.parametrize("backend", ["faiss", "torch"])
def test_the_same_seed_gives_the_same_codes_bit_for_bit(backend: str) -> None:
    first, second = (kmeans(points(), 32, iterations=5, seeds=[1, 2, 3], backend=backend) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("backend", ["faiss", "torch"])
def test_a_group_is_fitted_the_same_alone_or_among_others(backend: str) -> None:
    together = kmeans(points(), 32, iterations=5, seeds=[1, 2, 3], backend=backend)
    alone = kmeans(points()[1:2], 32, iterations=5, seeds=[2], backend=backend)
    assert torch.equal(together[1:2], alone)


def test_both_backends_reach_the_same_error_within_one_percent() -> None:
    data = points(groups=8, count=4000)
    errors = [mean_error(data, kmeans(data, 64, iterations=20, seeds=list(range(8)), backend=backend)) for backend in ("faiss", "torch")]
    assert errors[0] == pytest.approx(errors[1], rel=0.01)


@pytest.mark.parametrize("backend", ["faiss", "torch"])
def test_kmeans_beats_random_data_points(backend: str) -> None:
    data = points()
    assert mean_error(data, kmeans(data, 64, iterations=10, seeds=[0, 1, 2], backend=backend)) < 0.9 * mean_error(data, data[:, :64])


@pytest.mark.parametrize("backend", ["faiss", "torch"])
def test_as_many_codes_as_points_leaves_no_error(backend: str) -> None:
    data = points(count=40)
    assert mean_error(data, kmeans(data, 40, iterations=3, seeds=[0, 1, 2], backend=backend)) < 1e-8


def test_empty_clusters_are_repaired() -> None:
    data = torch.cat([torch.zeros(1, 500, 2), points(1, 500, 2)], dim=1)
    codes = kmeans(data, 64, iterations=15, seeds=[0], backend="torch")
    assert float(usage(code_counts(nearest_codes(data, codes).T, 64)).min()) > 0.95


def test_fewer_points_than_codes_is_an_error_that_names_the_largest_number() -> None:
    with pytest.raises(CodebookError, match=r"2000 latents cannot fill 2001 codes; use --codes 2000"):
        kmeans(points(), 2001, iterations=1, seeds=[0, 1, 2], backend="faiss")
