"""How train-rectifier computes: bf16 with float32 weights, channels-last, a fused optimizer, and a compiled network."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from training_runs import config, metrics_of, prepared, stop_at, weights

from revq import ReVQTokenizer
from revq.models.device import bf16_is_fast
from revq.models.rectifier import Rectifier
from revq.stages.events import run_quietly
from revq.stages.train_rectifier import train_rectifier
from revq.stages.training.network import _compiled


@pytest.mark.skipif(not bf16_is_fast(torch.device("cpu")), reason="this processor has no bf16 instructions")
def test_in_bf16_the_loss_falls_the_weights_stay_float32_and_a_stopped_run_ends_the_same(
    small_store: Path, small_codebooks: Path, tmp_path: Path
) -> None:
    settings = {"steps": 80, "lr": 2e-3, "codebook_lr": 0.0, "width": 64, "ema": 0.9, "precision": "bf16"}
    run_quietly(train_rectifier(config(small_store, small_codebooks, tmp_path / "whole", **settings)))
    stop_at(40, train_rectifier(config(small_store, small_codebooks, tmp_path / "stopped", **settings)))
    result = run_quietly(train_rectifier(config(small_store, small_codebooks, tmp_path / "stopped", **settings)))
    assert weights(tmp_path / "whole") == weights(tmp_path / "stopped")
    run_quietly(train_rectifier(config(small_store, small_codebooks, tmp_path / "fp32", **{**settings, "precision": "fp32"})))
    assert weights(tmp_path / "whole") != weights(tmp_path / "fp32")
    losses = metrics_of(tmp_path / "whole")["train_loss"]
    assert losses[-1] < 0.99 * losses[1]
    assert result["val_mse_rectified"] < 0.99 * result["val_mse_quantized"]
    assert {tensor.dtype for tensor in ReVQTokenizer.from_pretrained(tmp_path / "whole" / "tokenizer").parameters()} == {torch.float32}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_weights_gradients_and_moments_are_float32_and_channels_last_and_the_optimizer_is_fused(
    small_store: Path, small_codebooks: Path, tmp_path: Path, precision: str
) -> None:
    ready = prepared(small_store, small_codebooks, tmp_path, precision=precision, codebook_lr=0.01)
    assert ready.run.network.bf16 == (precision == "bf16")
    ready.step()
    optimizer = ready.state.optimizer
    assert isinstance(optimizer, torch.optim.AdamW)
    assert all(group["fused"] for group in optimizer.param_groups)
    kernels = 0
    for parameter in ready.state.rectifier.parameters():
        tensors = (parameter, parameter.grad, optimizer.state[parameter]["exp_avg"], optimizer.state[parameter]["exp_avg_sq"])
        assert {tensor.dtype for tensor in tensors} == {torch.float32}
        if parameter.dim() == 4:
            kernels += 1
            assert all(tensor.is_contiguous(memory_format=torch.channels_last) for tensor in tensors)
    assert kernels == 4  # enter, two in the block, leave
    assert ready.state.ema.conv_in.weight.is_contiguous(memory_format=torch.channels_last)


def test_a_compiled_network_equals_the_plain_one_forward_and_backward() -> None:
    torch.manual_seed(0)
    plain = Rectifier(channels=4, width=32, depth=1)
    torch.nn.init.normal_(plain.conv_out.weight, std=0.05)
    twin = copy.deepcopy(plain)
    latents, target = torch.randn(4, 4, 8, 8), torch.randn(4, 4, 8, 8)
    compiled, reason = _compiled(twin, latents, bf16=False)
    if "ompiler" in reason.removeprefix("torch.compile"):
        pytest.skip(f"no C++ compiler is here: {reason}")
    assert reason == ""
    assert compiled is not twin
    for network in (plain, compiled):
        (network(latents) - target).square().mean().backward()
    torch.testing.assert_close(compiled(latents), plain(latents), rtol=1e-4, atol=1e-6)
    for theirs, ours in zip(plain.parameters(), twin.parameters(), strict=True):
        assert ours.grad.abs().max() > 0
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)
