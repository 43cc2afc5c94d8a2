"""How the rectifier is run: precision, and compilation that never ends a run."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from revq.models.device import bf16_is_fast
from revq.models.rectifier import Rectifier
from revq.stages.configs import TrainRectifierConfig
from revq.stages.events import Advance, run_quietly
from revq.stages.train_rectifier import train_rectifier
from revq.stages.training.network import open_network


class OneShapeCompiler:
    """In torch.compile's place: what it makes works for the first shape that it sees, as where a compiler is gone at the second."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, module: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
        shapes = set()

        def run(quantized: torch.Tensor) -> torch.Tensor:
            shapes.add(quantized.shape)
            self.calls += 1
            if len(shapes) > 1:
                raise RuntimeError("no C++ compiler any more")
            result: torch.Tensor = module(quantized)
            return result

        return run


def test_batches_of_another_shape_than_the_compiled_one_go_through_the_plain_rectifier(monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = OneShapeCompiler()
    monkeypatch.setattr(torch, "compile", compiler)
    rectifier = Rectifier(channels=8, width=32, depth=1)
    nn.init.normal_(rectifier.conv_out.weight, std=0.01)
    batch = torch.randn(8, 8, 4, 4)
    network, note = open_network(rectifier, batch, bf16=False, compiling="on")
    assert note == ""
    assert torch.equal(network(batch[:3]), rectifier(batch[:3]))
    assert torch.equal(network(batch), rectifier(batch))
    assert compiler.calls == 2  # the trial, and the batch of its shape
    assert all(one is other for one, other in zip(network._network.parameters(), rectifier.parameters(), strict=True))


def test_a_gpu_that_only_emulates_bf16_is_not_fast_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def supported(including_emulation: bool = True) -> bool:
        asked.append(including_emulation)
        return including_emulation  # as on a T4

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    assert not bf16_is_fast(torch.device("cuda"))
    assert asked == [False]


def test_a_run_keeps_the_precision_that_it_began_with(
    small_store: Path, small_codebooks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"steps": 6, "batch_size": 16, "width": 32, "depth": 1, "evaluations": 2, "codebook_lr": 0.0}

    def events(name: str, fast: bool) -> Any:
        monkeypatch.setattr("revq.stages.training.run.bf16_is_fast", lambda device: fast)
        return train_rectifier(TrainRectifierConfig(store=str(small_store), codebooks=str(small_codebooks), out=str(tmp_path / name), **settings))

    def made(name: str) -> bytes:
        return (tmp_path / name / "tokenizer" / "model.safetensors").read_bytes()

    run_quietly(events("bf16", True))
    run_quietly(events("fp32", False))
    stopped = events("moved", True)
    next(event for event in stopped if isinstance(event, Advance) and event.done == 3)
    stopped.close()
    run_quietly(events("moved", False))
    assert made("moved") == made("bf16") != made("fp32")
