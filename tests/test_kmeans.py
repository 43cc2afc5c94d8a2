"""k-means backends. G groups, N points, K codes, D dims."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch  # before FAISS
from torch import Tensor

from revq import LatentStore
from revq.cache.batches import ResidentLatents
from revq.errors import CodebookError
from revq.models.kmeans import _faiss_kmeans, faiss_uses, kmeans
from revq.models.nearest import nearest_codes
from revq.models.quantizer import code_counts, usage

faiss = pytest.importorskip("faiss")


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


def clusters(groups: int, count: int, dims: int) -> Tensor:
    """Points about eight centres. Much further apart, or with about as many codes as centres, the error is the luck of the start."""
    generator = torch.Generator().manual_seed(6)
    centres = 2 * torch.randn(groups, 8, dims, generator=generator)
    owner = torch.randint(8, (groups, count), generator=generator)
    return centres.gather(1, owner.unsqueeze(2).expand(-1, -1, dims)) + 0.5 * torch.randn(groups, count, dims, generator=generator)


def latents(store: Path, dims: int) -> Tensor:
    """(7,N,D) standardised real latents: the points of a group are D channels of the 120 latents at each of their 64 places."""
    read = ResidentLatents(LatentStore.open(store)["train"])
    channels = read.batch(torch.arange(len(read))).flatten(2).permute(1, 0, 2).flatten(1)  # (C,N*H*W)
    channels = (channels - channels.mean(1, keepdim=True)) / channels.std(1, keepdim=True)
    return torch.stack([channels[4 * group : 4 * group + dims].T for group in range(7)])


def assert_the_backends_agree(data: Tensor, codes: int) -> None:
    seeds = list(range(len(data)))
    errors = [mean_error(data, kmeans(data, codes, iterations=20, seeds=seeds, backend=backend)) for backend in ("faiss", "torch")]
    assert errors[0] == pytest.approx(errors[1], rel=0.01)


@pytest.mark.parametrize("dims", [4, 8])
@pytest.mark.parametrize(("codes", "groups"), [(64, 16), (512, 2)])
@pytest.mark.parametrize("kind", [points, clusters])
def test_both_backends_reach_the_same_error_within_one_percent(kind: Callable[..., Tensor], codes: int, groups: int, dims: int) -> None:
    assert_the_backends_agree(kind(groups, 4000 if codes == 64 else 8000, dims), codes)


@pytest.mark.parametrize("dims", [4, 8])
def test_both_backends_reach_the_same_error_on_real_latents(small_store: Path, dims: int) -> None:
    assert_the_backends_agree(latents(small_store, dims), 64)


@pytest.mark.parametrize("backend", ["faiss", "torch"])
def test_kmeans_beats_random_data_points(backend: str) -> None:
    data = points()
    assert mean_error(data, kmeans(data, 64, iterations=10, seeds=[0, 1, 2], backend=backend)) < 0.9 * mean_error(data, data[:, :64])


@pytest.mark.parametrize("backend", ["faiss", "torch"])
def test_as_many_codes_as_points_leaves_no_error(backend: str) -> None:
    data = points(count=40)
    assert mean_error(data, kmeans(data, 40, iterations=3, seeds=[0, 1, 2], backend=backend)) < 1e-8


@pytest.mark.parametrize("backend", ["faiss", "torch"])
def test_empty_clusters_are_repaired(backend: str) -> None:
    data = torch.cat([torch.zeros(1, 500, 2), points(1, 500, 2)], dim=1)
    codes = kmeans(data, 64, iterations=15, seeds=[0], backend=backend)
    assert float(usage(code_counts(nearest_codes(data, codes).T, 64)).min()) > 0.95


def test_fewer_points_than_codes_is_an_error_that_names_the_largest_number() -> None:
    with pytest.raises(CodebookError, match=r"2000 points cannot fill 2001 codes; ask for 2000 codes or fewer"):
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


def test_faiss_stops_early_too_where_it_has_converged(monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = []
    train = faiss.Kmeans.train

    def counted(self: faiss.Kmeans, data: np.ndarray) -> float:
        error = train(self, data)
        rounds.append(len(self.obj))
        return error

    monkeypatch.setattr("faiss.Kmeans.train", counted)
    kmeans(points(), 32, iterations=200, seeds=[0, 1, 2], backend="faiss")
    monkeypatch.setattr("revq.models.kmeans._SETTLED_ERROR", 0.0)  # only once nothing improves at all
    kmeans(points(), 32, iterations=200, seeds=[0, 1, 2], backend="faiss")
    assert max(rounds) < 100
    assert sum(rounds[:3]) < sum(rounds[3:])


def test_on_a_gpu_faiss_takes_that_of_the_points(monkeypatch: pytest.MonkeyPatch) -> None:
    placed = []

    class OnSecondGPU:
        """All that is asked of the points but their values."""

        shape, device = (2, 40, 4), torch.device("cuda:1")

        def cpu(self) -> Tensor:
            return points(groups=2, count=40)

    monkeypatch.setattr("faiss.StandardGpuResources", object, raising=False)
    monkeypatch.setattr("faiss.index_cpu_to_gpu", lambda resources, device, index: placed.append(device) or index, raising=False)
    monkeypatch.setattr("torch.Tensor.to", lambda self, device: self)
    _faiss_kmeans(OnSecondGPU(), 8, 5, [0, 1])  # type: ignore[arg-type]
    assert placed == [1, 1]


def test_faiss_for_the_cpu_alone_does_not_use_a_gpu() -> None:
    assert faiss_uses(torch.device("cpu"))
    assert faiss_uses(torch.device("cuda:1")) == hasattr(faiss, "StandardGpuResources")


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


PICKED = """
import sys, torch
for missing in sys.argv[2:]:
    sys.modules[missing] = None  # what an import finds where it is not installed
if sys.argv[1] == "faiss-gpu":
    import faiss
    faiss.StandardGpuResources = object  # what faiss-cpu lacks
from revq.models.kmeans import pick_backend
print(pick_backend("auto", torch.device("cpu")), pick_backend("auto", torch.device("cuda")), pick_backend("torch", torch.device("cpu")))
pick_backend("faiss", torch.device("cpu"))
"""


@pytest.mark.parametrize(
    ("build", "missing", "on_cpu", "on_gpu"),
    [
        ("faiss-cpu", (), "torch", "torch"),
        ("faiss-cpu", ("numba",), "faiss", "torch"),
        ("faiss-gpu", (), "torch", "faiss"),
        ("faiss-gpu", ("numba",), "faiss", "faiss"),
        ("no FAISS", ("faiss",), "torch", "torch"),
        ("no FAISS", ("numba", "faiss"), "torch", "torch"),
    ],
)
def test_auto_takes_faiss_on_a_gpu_it_computes_on_and_on_a_cpu_without_numba(build: str, missing: tuple[str, ...], on_cpu: str, on_gpu: str) -> None:
    done = subprocess.run([sys.executable, "-c", PICKED, build, *missing], capture_output=True, text=True, check=False)
    assert done.stdout == f"{on_cpu} {on_gpu} torch\n"
    if "faiss" in missing:
        message = "FAISS is not installed; install revq[cpu] (faiss-cpu) or revq[gpu] (faiss-gpu), or pass --backend torch"
        assert done.stderr.splitlines()[-1].endswith(f"ConfigError: {message}")
    else:
        assert done.returncode == 0, done.stderr
