"""The multi-group quantizer, how its codes are used, and the reset of dead ones. B batch, T tokens, D dims, K codes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from revq.models.nearest import nearest_codes
from revq.models.quantizer import MultiGroupQuantizer, code_counts, dead_codes, perplexity, reset_unused, usage


def points(tokens: int, count: int, dims: int) -> Tensor:
    return torch.randn(tokens, count, dims, generator=torch.Generator().manual_seed(5))


def test_usage_perplexity_and_dead_codes_of_known_counts() -> None:
    counts = torch.tensor([[10, 10, 10, 10], [40, 0, 0, 0], [20, 20, 0, 0]])
    assert usage(counts).tolist() == [1.0, 0.25, 0.5]
    assert perplexity(counts).tolist() == pytest.approx([4.0, 1.0, 2.0])
    assert dead_codes(counts).tolist() == [0, 3, 2]


def test_counts_of_batches_add_up_to_those_of_the_whole_split() -> None:
    indices = torch.randint(7, (50, 3), generator=torch.Generator().manual_seed(1))
    whole = code_counts(indices, 7)
    assert torch.equal(whole, sum(code_counts(batch, 7) for batch in indices.split(8)))
    assert whole.sum(1).tolist() == [50, 50, 50]
    assert int(whole[2, 4]) == int((indices[:, 2] == 4).sum())


@pytest.mark.parametrize("codes", [40, 600])
def test_the_quantizer_searches_its_present_codebooks_after_an_optimizer_moved_them(codes: int) -> None:
    quantizer = MultiGroupQuantizer(points(2, codes, 4))
    coordinates = points(2, 50, 4).transpose(0, 1)
    optimizer = torch.optim.AdamW(quantizer.parameters(), lr=0.5)
    for _ in range(3):
        first, second = quantizer.encode(coordinates), quantizer.encode(coordinates)
        assert torch.equal(first, second)
        assert torch.equal(first, nearest_codes(coordinates.transpose(0, 1), quantizer.codebooks.detach()).T)
        optimizer.zero_grad()
        quantizer.decode(first).square().sum().backward()
        optimizer.step()


def counts_with_unused() -> Tensor:
    counts = torch.full((4, 32), 5)
    counts[3, 10:] = 0
    counts[3, 7] = 100
    return counts


def test_unused_codes_move_beside_the_most_used_ones_of_their_codebook() -> None:
    codebooks, counts = points(4, 32, 4), counts_with_unused()
    before = codebooks.clone()
    assert reset_unused(codebooks, counts, seed=0) == 6  # 20 % of 32
    moved = (codebooks != before).any(2)
    assert moved.nonzero().tolist() == [[3, code] for code in range(10, 16)]
    assert float((codebooks[3, 10] - before[3, 7]).norm()) < 1
    assert torch.equal(counts, counts_with_unused())


def test_the_reset_is_the_same_for_the_same_seed() -> None:
    made = [points(4, 32, 4) for _ in range(3)]
    for codebooks, seed in zip(made, (0, 0, 1), strict=True):
        reset_unused(codebooks, counts_with_unused(), seed=seed)
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])


def test_a_codebook_that_nothing_used_is_left_alone() -> None:
    codebooks = points(1, 32, 4)
    before = codebooks.clone()
    assert reset_unused(codebooks, torch.zeros(1, 32, dtype=torch.int64), seed=0) == 0
    assert torch.equal(codebooks, before)


def test_moved_codes_are_used_afterwards() -> None:
    data = points(1, 4000, 4)
    codebooks = torch.cat([data[:, :24], data[:, :8] + 100], dim=1)
    counts = code_counts(nearest_codes(data, codebooks).T, 32)
    assert dead_codes(counts).item() == 8
    reset_unused(codebooks, counts, seed=0, share=1.0)
    assert dead_codes(code_counts(nearest_codes(data, codebooks).T, 32)).item() == 0
