"""Nearest-code search against a float64 oracle. T tokens, N points, K codes, D dims."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from revq import nearest_codes
from revq.models.nearest import NearestCodes


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


CASES = [Case(3, 200, 64, 4), Case(2, 100, 1024, 4), Case(1, 50, 16, 32), Case(4, 1, 2, 1), Case(2, 100, 700, 4, offset=1000.0), Case(1, 30, 1, 8)]


@pytest.mark.parametrize("backend", ["tree", "product"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_every_backend_finds_a_code_as_near_as_the_float64_oracle(case: Case, backend: str) -> None:
    generator = torch.Generator().manual_seed(1)
    coordinates = torch.randn(case.tokens, case.points, case.dims, generator=generator) + case.offset
    codebooks = torch.randn(case.tokens, case.codes, case.dims, generator=generator) + case.offset
    indices = NearestCodes(codebooks, backend).query(coordinates)
    assert indices.shape == (case.tokens, case.points)
    assert indices.dtype == torch.int64
    assert_nearest(indices, coordinates, codebooks)


@pytest.mark.parametrize("backend", ["tree", "product"])
def test_of_equal_codes_the_lowest_index_is_chosen(backend: str) -> None:
    codebook = torch.randn(1, 40, 4, generator=torch.Generator().manual_seed(2))
    repeated = torch.cat([codebook, codebook, codebook], dim=1)
    indices = NearestCodes(repeated, backend).query(codebook)
    assert torch.equal(indices[0], torch.arange(40))


@pytest.mark.parametrize("backend", ["tree", "product"])
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


def test_many_points_are_searched_in_blocks_with_the_same_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(3)
    coordinates, codebooks = torch.randn(2, 300, 16, generator=generator), torch.randn(2, 50, 16, generator=generator)
    whole = nearest_codes(coordinates, codebooks)
    monkeypatch.setattr("revq.models.nearest._BLOCK_VALUES", 2 * 50 * 7)
    assert np.array_equal(nearest_codes(coordinates, codebooks), whole)
