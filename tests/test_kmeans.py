"""k-means backends. G groups, N points, K codes, D dims."""

from __future__ import annotations

import subprocess
import sys

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


@pytest.mark.parametrize("backend", ["faiss", "torch"])
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_far_from_the_origin_the_error_is_the_same(backend: str, offset: float) -> None:
    data = (points(groups=1) * 64).round() / 64  # exact in float32 beside an offset of 10,000
    near, far = (mean_error(data + shift, kmeans(data + shift, 32, iterations=10, seeds=[0], backend=backend)) for shift in (0.0, offset))
    assert far == pytest.approx(near, rel=0.01)


@pytest.mark.parametrize("backend", ["faiss", "torch"])
def test_every_code_is_the_mean_of_the_points_nearest_to_it_once_converged(backend: str) -> None:
    data = points(groups=1, count=300, dims=2)
    codes = kmeans(data, 8, iterations=200, seeds=[0], backend=backend)
    indices = nearest_codes(data, codes)
    means = torch.stack([data[0, indices[0] == code].mean(0) for code in range(8)])
    assert float((codes[0] - means).abs().max()) < 0.02


def test_a_group_that_has_converged_stops_early(monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = []
    search = nearest_codes
    monkeypatch.setattr("revq.models.kmeans.nearest_codes", lambda data, codes: rounds.append(len(data)) or search(data, codes))
    easy = torch.tensor([[0.0, 0.0], [9.0, 9.0]]).repeat(1, 100, 1)
    data = torch.cat([easy[:, :200], points(groups=1, count=200, dims=2)])
    kmeans(data, 2, iterations=50, seeds=[0, 1], backend="torch")
    assert rounds[0] == 2
    assert 1 in rounds[:-1]
    assert len(rounds) < 40


@pytest.mark.parametrize("backend", ["faiss", "torch"])
def test_fewer_distinct_points_than_codes_leave_no_error_and_some_codes_unused(backend: str) -> None:
    data = points(groups=2, count=5).repeat_interleave(20, dim=1)
    codes = kmeans(data, 16, iterations=30, seeds=[0, 1], backend=backend)
    assert bool(torch.isfinite(codes).all())
    assert mean_error(data, codes) < 1e-8
    assert usage(code_counts(nearest_codes(data, codes).T, 16)).tolist() == [5 / 16, 5 / 16]


@pytest.mark.parametrize("backend", ["faiss", "torch"])
@pytest.mark.parametrize("value", [0.0, 3e7])
def test_points_that_never_vary_get_codes_at_their_place(backend: str, value: float) -> None:
    data = torch.full((2, 50, 4), value)
    codes = kmeans(data, 8, iterations=5, seeds=[0, 1], backend=backend)
    assert mean_error(data, codes) <= (1e-12 if value == 0 else 1)
    assert bool(torch.isfinite(codes).all())


def test_points_that_are_not_finite_are_refused() -> None:
    data = points()
    data[1, 7, 2] = float("nan")
    with pytest.raises(CodebookError, match="group 1 of the points holds values that are not finite"):
        kmeans(data, 8, iterations=2, seeds=[0, 1, 2], backend="torch")


def test_the_torch_backend_never_holds_all_distances(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("revq.models.nearest._BLOCK_VALUES", 1000)
    monkeypatch.setattr("revq.models.nearest._has", lambda package: False)  # boxes and kernel hold no distances at all
    sizes = []
    product = torch.baddbmm

    def measured(*arguments: Tensor, **options: float) -> Tensor:
        scores = product(*arguments, **options)
        sizes.append(scores.numel())
        return scores

    monkeypatch.setattr("torch.baddbmm", measured)
    kmeans(points(count=300), 20, iterations=3, seeds=[0, 1, 2], backend="torch")
    assert max(sizes) <= 1000


def test_a_missing_faiss_is_an_error_that_names_both_extras_and_the_way_without() -> None:
    code = (
        "import sys, torch; sys.modules['faiss'] = None\n"  # what an import finds where it is not installed
        "from revq.models.kmeans import pick_backend\n"
        "print(pick_backend('torch', torch.device('cpu')))\n"
        "pick_backend('auto', torch.device('cpu'))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "torch\n"
    message = "FAISS is not installed; install revq[cpu] (faiss-cpu) or revq[gpu] (faiss-gpu), or pass --backend torch"
    assert done.stderr.splitlines()[-1].endswith(f"ConfigError: {message}")
