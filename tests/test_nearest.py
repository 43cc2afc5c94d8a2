"""Nearest-code search against a float64 oracle. T tokens, N points, K codes, D dims."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from revq import nearest_codes
from revq.errors import CodebookError, ConfigError, MismatchError
from revq.models import box_search, nearest
from revq.models.nearest import NearestCodes, _pick_backend

BACKENDS = ["boxes", "scan", "product"]
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def oracle_distances(coordinates: Tensor, codebooks: Tensor) -> Tensor:
    """(T,N,K) float64 squared distances, all of them, directly."""
    return (coordinates.double().unsqueeze(2) - codebooks.double().unsqueeze(1)).square().sum(3)


def assert_nearest(indices: Tensor, coordinates: Tensor, codebooks: Tensor) -> None:
    """Each chosen code is as near as the oracle's, up to float32 rounding of nearly equal distances."""
    distances = oracle_distances(coordinates, codebooks)
    chosen = distances.gather(2, indices.unsqueeze(2)).squeeze(2)
    assert torch.allclose(chosen, distances.min(2).values, rtol=1e-5, atol=1e-12)


@dataclass(frozen=True)
class Case:
    tokens: int
    points: int
    codes: int
    dims: int
    offset: float = 0.0

    @property
    def id(self) -> str:
        return f"T{self.tokens}-N{self.points}-K{self.codes}-D{self.dims}-offset{self.offset:g}"


CASES = [
    Case(3, 200, 64, 4),
    Case(2, 100, 1024, 4),
    Case(1, 50, 16, 32),
    Case(4, 1, 2, 1),
    Case(2, 100, 700, 4, offset=1000.0),
    Case(2, 50, 300, 4, offset=1e6),
    Case(1, 30, 1, 8),
    Case(2, 0, 9, 4),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_every_backend_finds_a_code_as_near_as_the_float64_oracle(case: Case, backend: str) -> None:
    generator = torch.Generator().manual_seed(1)
    coordinates = torch.randn(case.tokens, case.points, case.dims, generator=generator) + case.offset
    codebooks = torch.randn(case.tokens, case.codes, case.dims, generator=generator) + case.offset
    indices = NearestCodes(codebooks, backend).query(coordinates)
    assert indices.shape == (case.tokens, case.points)
    assert indices.dtype == torch.int64
    assert_nearest(indices, coordinates, codebooks)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("codes", [1, 600])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
def test_a_point_that_is_not_finite_finds_some_code_and_its_neighbours_their_own(backend: str, codes: int, value: float) -> None:
    generator = torch.Generator().manual_seed(4)
    points, codebooks = torch.randn(3, 50, 4, generator=generator), torch.randn(3, codes, 4, generator=generator)
    search = NearestCodes(codebooks, backend)
    expected = search.query(points)
    points[1, 20, 2] = points[1, 21, :] = points[2, 0, 0] = value
    found = search.query(points)
    assert int(found.min()) >= 0
    assert int(found.max()) < codes
    finite = points.isfinite().all(2)
    assert torch.equal(found[finite], expected[finite])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(1, 3, 4), (3, 3, 4), (2, 3, 5), (3, 4)], ids=str)
def test_points_of_other_tokens_or_dims_than_the_codebooks_are_refused(backend: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(MismatchError, match=r"codebooks \(2, 600, 4\) need coordinates \(2,N,4\), not "):
        NearestCodes(torch.zeros(2, 600, 4), backend).query(torch.zeros(shape))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(2, 0, 4), (2, 9, 0), (0, 9, 4), (9, 4)], ids=str)
def test_codebooks_without_codes_are_refused(backend: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(CodebookError, match="at least one code"):
        NearestCodes(torch.zeros(shape), backend)


def test_moved_codebooks_keep_their_shape() -> None:
    with pytest.raises(MismatchError, match=r"must keep their shape \(2, 9, 4\)"):
        NearestCodes(torch.zeros(2, 9, 4)).move(torch.zeros(2, 8, 4))


@pytest.mark.parametrize("backend", BACKENDS)
def test_of_equal_codes_the_lowest_index_is_chosen(backend: str) -> None:
    codebook = torch.randn(1, 40, 4, generator=torch.Generator().manual_seed(2))
    repeated = torch.cat([codebook, codebook, codebook], dim=1)
    indices = NearestCodes(repeated, backend).query(codebook)
    assert torch.equal(indices[0], torch.arange(40))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seed", range(12))
def test_of_codes_at_equal_distance_the_lowest_index_is_chosen_whatever_their_order(backend: str, seed: int) -> None:
    corners = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0], [5.0, 0.0], [0.0, 5.0]])
    order = torch.randperm(6, generator=torch.Generator().manual_seed(seed))
    found = NearestCodes(corners[order][None], backend).query(torch.zeros(1, 1, 2)).item()
    assert found == min(index for index, corner in enumerate(order.tolist()) if corner < 4)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 3), st.integers(1, 30), st.integers(1, 80), st.integers(1, 9), st.integers(0, 2**31))
def test_a_code_is_its_own_nearest_code(tokens: int, points: int, codes: int, dims: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codebooks = torch.randn(tokens, codes, dims, generator=generator)
    chosen = torch.randint(codes, (tokens, points), generator=generator)
    coordinates = codebooks.gather(1, chosen.unsqueeze(2).expand(-1, -1, dims))
    found = nearest_codes(coordinates, codebooks)
    assert torch.equal(codebooks.gather(1, found.unsqueeze(2).expand(-1, -1, dims)), coordinates)


@settings(max_examples=80, deadline=None)
@given(
    st.integers(1, 3), st.integers(0, 20), st.integers(1, 40), st.integers(1, 6), st.sampled_from([0.0, 7.0, 1e3, 1e6]),
    st.sampled_from([1e-6, 1.0, 1e4]), st.integers(1, 3), st.integers(0, 2**31), st.sampled_from(BACKENDS),
)  # fmt: skip
def test_whatever_the_numbers_the_code_found_is_the_oracles(
    tokens: int, count: int, codes: int, dims: int, offset: float, scale: float, copies: int, seed: int, backend: str
) -> None:
    generator = torch.Generator().manual_seed(seed)
    codebooks = (scale * torch.randn(tokens, codes, dims, generator=generator) + offset).repeat(1, copies, 1)
    coordinates = scale * torch.randn(tokens, count, dims, generator=generator) + offset
    found = NearestCodes(codebooks, backend).query(coordinates)
    distances = oracle_distances(coordinates, codebooks)
    chosen = distances.gather(2, found.unsqueeze(2))
    assert torch.allclose(chosen, distances.amin(2, keepdim=True), rtol=1e-12, atol=0)
    assert bool((found < codes).all())  # the first of the copies


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_codebook_of_one_code_repeated_many_times_answers_with_the_first(backend: str) -> None:
    codebooks = torch.full((2, 1000, 4), 0.3)
    assert not NearestCodes(codebooks, backend).query(torch.randn(2, 9, 4)).any()


def test_the_backend_is_chosen_by_device_codes_dims_points_and_what_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr("revq.models.nearest._has", lambda package: True)
    monkeypatch.setattr("revq.models.nearest._fused_fault", lambda device, dims: "")
    assert _pick_backend(cpu, 1024, 4) == _pick_backend(cpu, 1024, 4, points=256) == "boxes"
    assert _pick_backend(cpu, 512, 4) == _pick_backend(cpu, 1024, 16) == _pick_backend(cpu, 1024, 4, points=16) == "scan"
    assert _pick_backend(gpu, 1024, 4) == "fused"
    assert _pick_backend(gpu, 1024, 64) == "product"
    monkeypatch.setattr("revq.models.nearest._has", lambda package: False)
    monkeypatch.setattr("revq.models.nearest._fused_fault", lambda device, dims: "ModuleNotFoundError")
    assert _pick_backend(cpu, 1024, 4) == _pick_backend(gpu, 1024, 4) == "product"
    for backend, package in (("fused", "Triton"), ("boxes", "Numba"), ("scan", "Numba")):
        with pytest.raises(ConfigError, match=f"needs {package}"):
            NearestCodes(torch.randn(1, 4, 4), backend)


@needs_triton
def test_a_kernel_that_cannot_be_launched_is_tried_once_and_the_product_takes_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    from revq.models import fused_nearest

    tries = []

    def launch(points: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        tries.append(points.shape)
        raise RuntimeError("Failed to find C compiler.\nPlease specify via CC environment variable")

    monkeypatch.setattr(fused_nearest, "fused_nearest", launch)
    monkeypatch.setattr(nearest, "_is_for_fused", lambda device, dims: dims <= 8)  # as a GPU would be
    monkeypatch.setattr(nearest, "_has", lambda package: False)
    nearest._fused_fault.cache_clear()
    codebooks, points = torch.randn(2, 30, 4), torch.randn(2, 9, 4)
    for _ in range(2):
        search = NearestCodes(codebooks)
        assert search.backend == "product"
        assert torch.equal(search.query(points), oracle_distances(points, codebooks).argmin(2))
    note = nearest.search_note(codebooks.device, 4)
    assert note.startswith("the fused search of nearest codes is not to be had here (RuntimeError: Failed to find C compiler. Please")
    assert nearest.search_note(codebooks.device, 9) == ""
    assert tries == [(1, 1, 4)]
    nearest._fused_fault.cache_clear()


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 600), st.integers(1, 5), st.sampled_from([0.0, 0.01, 1.0, 30.0]), st.booleans(), st.integers(0, 2**31))
def test_codes_that_moved_are_found_as_in_a_new_search(codes: int, dims: int, step: float, whole_numbers: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codebooks, points = torch.randn(2, codes, dims, generator=generator), torch.randn(2, 50, dims, generator=generator)
    moved = codebooks + step * torch.randn(codebooks.shape, generator=generator)
    if whole_numbers:  # many codes at the very same distance
        points, moved = points.round(), moved.round()
    search = NearestCodes(codebooks, "boxes")
    search.move(moved)
    found = search.query(points)
    assert torch.equal(found, NearestCodes(moved, "boxes").query(points))
    distances = oracle_distances(points, moved)
    lowest = torch.where(distances == distances.amin(2, keepdim=True), torch.arange(codes), codes).amin(2)
    assert torch.equal(found, lowest)


@pytest.mark.parametrize("size", [1e-30, 1e-22, 1e17, 1e25])
def test_codes_whose_squared_distances_leave_float32_are_still_told_apart(size: float) -> None:
    generator = torch.Generator().manual_seed(5)
    codebooks, points = size * torch.randn(2, 300, 4, generator=generator), size * torch.randn(2, 40, 4, generator=generator)
    assert torch.equal(NearestCodes(codebooks, "boxes").query(points), oracle_distances(points, codebooks).argmin(2))


def awkward(kind: str) -> Tensor:
    """(2,5000,3) codes whose spread says little about where most of them are."""
    codes = torch.randn(2, 5000, 3, generator=torch.Generator().manual_seed(6))
    if kind == "a few far away":
        codes[:, ::999] *= 1e20
    elif kind == "as wide as float32":
        codes[:, ::2, 1], codes[:, 1::2, 1] = 3e38, -3e38
    elif kind == "on a line":
        codes[..., 1:] = 0
    elif kind == "in two clumps":
        codes = codes.sign() * torch.tensor([1e-4, 1.0, 0.0]) + 1e-6 * codes
    return codes


@pytest.mark.parametrize("backend", ["boxes", "scan"])
@pytest.mark.parametrize("kind", ["a few far away", "as wide as float32", "on a line", "in two clumps"])
def test_codebooks_that_do_not_cut_into_even_boxes_are_searched_all_the_same(kind: str, backend: str) -> None:
    codebooks = awkward(kind)
    points = codebooks[:, ::13] + 1e-3 * torch.randn(2, 385, 3, generator=torch.Generator().manual_seed(7))
    assert torch.equal(NearestCodes(codebooks, backend).query(points), oracle_distances(points, codebooks).argmin(2))


@pytest.mark.parametrize("backend", ["boxes", "scan"])
def test_codes_that_are_no_numbers_still_give_an_index_of_the_codebook(backend: str) -> None:
    codebooks, points = torch.randn(2, 3000, 4), torch.randn(2, 300, 4)
    codebooks[0, 5:2000:7, 2] = codebooks[1] = float("nan")
    found = NearestCodes(codebooks, backend).query(points)
    assert 0 <= int(found.min()) <= int(found.max()) < 3000


@pytest.mark.parametrize("backend", ["boxes", "scan"])
@pytest.mark.parametrize("tokens", [1, 5])
def test_any_number_of_threads_finds_the_same_codes(tokens: int, backend: str) -> None:
    generator = torch.Generator().manual_seed(8)
    codebooks = torch.randn(tokens, 4096, 6, generator=generator).mul(4).round()  # ties wherever threads could differ
    points, before, found = torch.randn(tokens, 2000, 6, generator=generator).mul(4).round(), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            found.append(NearestCodes(codebooks, backend).query(points))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0][:, :100], oracle_distances(points[:, :100], codebooks).argmin(2))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("backend", BACKENDS)
def test_codes_that_float32_cannot_tell_apart_are_told_apart_in_float64(backend: str) -> None:
    generator = torch.Generator().manual_seed(9)
    codebooks = torch.nn.functional.normalize(torch.randn(2, 600, 6, generator=generator), dim=2)  # all as far from 0, but for the rounding
    points = 1e-8 * torch.randn(2, 40, 6, generator=generator)
    assert torch.equal(NearestCodes(codebooks, backend).query(points), oracle_distances(points, codebooks).argmin(2))


def test_boxes_are_cut_anew_only_when_codes_have_moved_far(monkeypatch: pytest.MonkeyPatch) -> None:
    cuts = []
    cut = box_search._cut
    monkeypatch.setattr(box_search, "_cut", lambda *given: cuts.append(given) or cut(*given))
    codebooks = torch.randn(1, 1024, 4)
    search = NearestCodes(codebooks, "boxes")
    search.move(codebooks + 0.001)
    assert len(cuts) == 1
    search.move(codebooks.flip(1))
    assert len(cuts) == 2


READ_ONLY = """
import torch
from numba.core import caching
caching.CacheImpl._locator_classes = []  # as where no folder can be written
from revq.models.nearest import NearestCodes
points = torch.randn(1, 9, 4)
assert torch.equal(NearestCodes(points, "boxes").query(points)[0], torch.arange(9))
"""


def test_the_boxes_work_where_machine_code_cannot_be_kept() -> None:
    done = subprocess.run([sys.executable, "-c", READ_ONLY], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


INTERPRETED = """
import torch
from revq.models.nearest import NearestCodes
generator = torch.Generator().manual_seed(0)
for tokens, count, codes, dims, offset in [(3, 70, 150, 4, 0.0), (2, 33, 64, 8, 1000.0), (2, 1, 1, 1, 0.0), (1, 40, 65, 3, 0.0)]:
    codebooks, points = (torch.randn(tokens, size, dims, generator=generator) + offset for size in (codes, count))
    codebooks = codebooks.repeat(1, 2, 1)
    assert torch.equal(NearestCodes(codebooks, "fused").query(points), NearestCodes(codebooks, "boxes").query(points)), (tokens, count, codes, dims)
corners = torch.tensor([[5.0, 0.0], [1.0, -1.0], [-1.0, 1.0], [1.0, 1.0]]).repeat(30, 1)
assert NearestCodes(corners[None], "fused").query(torch.zeros(1, 1, 2)).item() == 1
assert NearestCodes(corners[None], "fused").query(torch.zeros(1, 0, 2)).shape == (1, 0)
assert 0 <= NearestCodes(corners[None, :70], "fused").query(torch.full((1, 1, 2), float("nan"))).item() < 70
"""


@needs_triton
def test_the_gpu_kernel_finds_the_same_codes_in_tritons_interpreter() -> None:
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED], capture_output=True, text=True, env={**os.environ, "TRITON_INTERPRET": "1"}, check=False
    )
    assert done.returncode == 0, done.stderr


COMPILED = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from revq.models.fused_nearest import _BLOCK_CODES, _BLOCK_POINTS, _kernel
types = {"points": "*fp32", "codes": "*fp32", "indices": "*i64", "N": "i32", "K": "i32"}
constants = {"D": 4, "BLOCK_N": _BLOCK_POINTS, "BLOCK_K": _BLOCK_CODES}
source = ASTSource(_kernel, types | dict.fromkeys(constants, "constexpr"), {(5 + i,): value for i, value in enumerate(constants.values())})
ptx = compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]
assert "fma.rn.f32" in ptx and ".local" not in ptx and ptx.count("st.global") == 1, ptx
"""


@needs_triton
def test_the_gpu_kernel_compiles_and_stores_nothing_but_indices() -> None:
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", COMPILED], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_on_a_gpu_the_code_found_is_as_near_as_the_float64_oracle(case: Case) -> None:
    generator = torch.Generator().manual_seed(1)
    coordinates = torch.randn(case.tokens, case.points, case.dims, generator=generator) + case.offset
    codebooks = torch.randn(case.tokens, case.codes, case.dims, generator=generator) + case.offset
    assert_nearest(nearest_codes(coordinates.cuda(), codebooks.cuda()).cpu(), coordinates, codebooks)


def test_many_points_are_searched_in_blocks_with_the_same_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(3)
    coordinates, codebooks = torch.randn(2, 300, 16, generator=generator), torch.randn(2, 50, 16, generator=generator)
    whole = nearest_codes(coordinates, codebooks)
    monkeypatch.setattr("revq.models.nearest._BLOCK_VALUES", 2 * 50 * 7)
    assert np.array_equal(nearest_codes(coordinates, codebooks), whole)
