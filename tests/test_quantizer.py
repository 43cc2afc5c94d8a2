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


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("codes", [40, 600])
def test_the_quantizer_searches_its_present_codebooks_after_an_optimizer_moved_them(codes: int, fused: bool) -> None:
    quantizer = MultiGroupQuantizer(points(2, codes, 4))
    coordinates = points(2, 50, 4).transpose(0, 1)
    optimizer = torch.optim.AdamW(quantizer.parameters(), lr=0.5, fused=fused)
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
    assert 0 < float((codebooks[3, 10] - before[3, 7]).norm()) < 1
    assert torch.equal(counts, counts_with_unused())


def test_the_reset_is_the_same_for_the_same_seed() -> None:
    made = [points(4, 32, 4) for _ in range(3)]
    for codebooks, seed in zip(made, (0, 0, 1), strict=True):
        reset_unused(codebooks, counts_with_unused(), seed=seed)
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])


@pytest.mark.parametrize("size", [1e-4, 1.0, 300.0])
def test_the_noise_is_a_tenth_of_what_the_used_codes_spread(size: float) -> None:
    codebooks = torch.cat([size * points(2, 500, 4) + 7 * size, torch.full((2, 500, 4), 1e6)], 1)  # those far off are never used
    counts = torch.cat([torch.randint(1, 1000, (2, 500), generator=torch.Generator().manual_seed(3)), torch.zeros(2, 500, dtype=torch.int64)], 1)
    before = codebooks.clone()
    assert reset_unused(codebooks, counts, seed=0, share=0.5) == 1000
    donors = counts.argsort(dim=1, descending=True, stable=True)[:, :500]
    shift = codebooks[:, 500:] - before.gather(1, donors.unsqueeze(2).expand(-1, -1, 4))
    assert shift.std(dim=(1, 2)).tolist() == pytest.approx([0.1 * size] * 2, rel=0.1)


def test_each_codebook_has_a_noise_of_its_own_scale() -> None:
    codebooks = points(2, 64, 4) * torch.tensor([1e-3, 10.0])[:, None, None]
    counts, before = torch.cat([torch.ones(2, 48), torch.zeros(2, 16)], 1).long(), codebooks.clone()
    reset_unused(codebooks, counts, seed=0, share=0.25)
    shift = (codebooks[:, 48:] - before[:, :16]).std(dim=(1, 2))
    assert float(shift[1] / shift[0]) == pytest.approx(1e4, rel=0.3)


def reset_one_by_one(codebooks: Tensor, counts: Tensor) -> Tensor:
    """What `reset_unused` does to which codes, the slow way, with noise zero."""
    made = codebooks.clone()
    for token in range(len(codebooks)):
        unused = [code for code in range(counts.shape[1]) if counts[token, code] == 0][: int(0.2 * counts.shape[1])]
        used = sorted((code for code in range(counts.shape[1]) if counts[token, code] > 0), key=lambda code: -int(counts[token, code]))
        for code, source in zip(unused, used, strict=False):
            made[token, code] = codebooks[token, source]
    return made


@pytest.mark.parametrize("used", [0.02, 0.5, 0.95, 1.0])
def test_all_codebooks_at_once_are_reset_like_one_code_after_the_other(used: float) -> None:
    generator = torch.Generator().manual_seed(8)
    counts = torch.randint(1, 9, (6, 50), generator=generator) * (torch.rand(6, 50, generator=generator) < used)
    codebooks = points(6, 50, 3)
    expected = reset_one_by_one(codebooks, counts)
    reset_unused(codebooks, counts, seed=0, noise=0.0)
    assert torch.equal(codebooks, expected)


@pytest.mark.gpu
def test_on_a_gpu_the_reset_never_waits_and_moves_the_same_codes() -> None:
    here, counts = points(4, 32, 4), counts_with_unused()
    there, counts_there = here.cuda(), counts.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        reset_unused(there, counts_there, seed=0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    reset_unused(here, counts, seed=0)
    assert torch.allclose(there.cpu(), here, atol=1e-6)


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
