"""What train-rectifier holds in memory: tokens of frozen codebooks, latents resident or streamed, and how a resumed run keeps to either."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from training_runs import config, prepared, stop_at, weights

from revq import LatentStore
from revq.cache import batches
from revq.cache.batches import ResidentLatents, StreamingLatents, reader_that_fits
from revq.errors import MismatchError
from revq.models.codebooks import load_codebooks
from revq.stages import ranks
from revq.stages.events import Advance, Begin, run_quietly
from revq.stages.train_rectifier import train_rectifier
from revq.stages.training import frozen_tokens as frozen_table
from revq.stages.training.data import open_inputs
from revq.stages.training.frozen_tokens import quantize_once, table_bytes

PLENTY_BYTES = 1 << 40


@pytest.mark.parametrize("held", [True, False], ids=["quantized latents", "tokens alone"])
def test_frozen_codebooks_get_no_gradient_and_no_optimizer_state(
    small_store: Path, small_codebooks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held: bool
) -> None:
    monkeypatch.setattr(frozen_table, "_QUANTIZED_BYTES", 1 << 30 if held else 0)
    ready = prepared(small_store, small_codebooks, tmp_path, codebook_lr=0.0, steps=2, decoder_steps=2, decoder_batch_size=4)
    assert (ready.run.train.quantized is not None) == held
    for _ in range(4):
        ready.step()
        assert ready.state.quantizer.codebooks.grad is None
    assert ready.state.quantizer.codebooks not in ready.state.optimizer.state
    assert len(ready.state.optimizer.state) == len(list(ready.state.rectifier.parameters()))


def test_tokens_alone_train_the_same_weights_as_quantized_latents(
    small_store: Path, small_codebooks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, limit in (("quantized", 1 << 30), ("tokens", 0)):
        monkeypatch.setattr(frozen_table, "_QUANTIZED_BYTES", limit)
        run_quietly(train_rectifier(config(small_store, small_codebooks, tmp_path / name, codebook_lr=0.0)))
    assert weights(tmp_path / "quantized") == weights(tmp_path / "tokens")


def test_frozen_tokens_are_counted_batch_by_batch_and_told_of(
    small_store: Path, small_codebooks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frozen_table, "_BATCH", 50)
    counted, count = [], frozen_table.code_counts
    monkeypatch.setattr(frozen_table, "code_counts", lambda indices, codes: counted.append(len(indices)) or count(indices, codes))
    ready = prepared(small_store, small_codebooks, tmp_path, codebook_lr=0.0)
    events, table = [], None
    passing = quantize_once(ready.inputs.train, "train", ready.inputs.transform, ready.state.quantizer)
    while table is None:
        try:
            events.append(next(passing))
        except StopIteration as stop:
            table = stop.value
    assert counted[-3:] == [50, 50, 20]
    assert events == [Begin(task="quantize train", total=120, unit="latents"), *(Advance(done=done) for done in (50, 100, 120))]
    everything = ready.state.quantizer.encode(ready.inputs.transform(ready.inputs.train.batch(torch.arange(120))))
    assert torch.equal(table.tokens.long(), everything)
    assert torch.equal(table.counts, count(everything, 32))


@pytest.mark.parametrize("codes", [32, 32768, 32769, 262144])
def test_tokens_are_held_in_the_smallest_type_that_has_room_for_every_code(codes: int) -> None:
    kind = frozen_table._token_type(codes)
    assert torch.iinfo(kind).max >= codes - 1
    assert kind.itemsize == (2 if codes <= 32768 else 4)
    rows, shape = 1_281_167, (32, 8, 8)  # ImageNet: too many for quantized latents as well
    assert table_bytes(rows, shape, 512, codes) == rows * 512 * kind.itemsize
    assert table_bytes(1000, shape, 512, codes) == 1000 * 512 * kind.itemsize + 1000 * math.prod(shape) * 4


def test_latents_are_resident_where_half_of_what_is_free_holds_them_and_what_lies_beside(small_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    split = LatentStore.open(small_store)["train"]
    size = split.latents.nbytes
    monkeypatch.setattr(batches, "_free_host_bytes", lambda: 2 * size)
    assert reader_that_fits(split) == "resident"
    assert reader_that_fits(split, beside_bytes=1) == "stream"
    monkeypatch.setattr(batches, "_free_host_bytes", lambda: 2 * size - 1)
    assert reader_that_fits(split) == "stream"


def test_tokens_of_frozen_codebooks_count_as_memory(small_store: Path, small_codebooks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = LatentStore.open(small_store)["train"].latents.nbytes
    monkeypatch.setattr(batches, "_free_host_bytes", lambda: 2 * size)
    kinds = []
    for codebook_lr in (0.0, 0.01):
        settings = config(small_store, small_codebooks, Path("unused"), codebook_lr=codebook_lr)
        kinds.append(type(open_inputs(settings, LatentStore.open(small_store), load_codebooks(small_codebooks)).train))
    assert kinds == [StreamingLatents, ResidentLatents]


@pytest.mark.parametrize(("begun_with", "resumed_with"), [(PLENTY_BYTES, 0), (0, PLENTY_BYTES)], ids=["resident", "streamed"])
def test_a_run_resumed_with_another_amount_of_memory_reads_as_it_began(
    small_store: Path, small_codebooks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, begun_with: int, resumed_with: int
) -> None:
    monkeypatch.setattr(batches, "_free_host_bytes", lambda: begun_with)
    run_quietly(train_rectifier(config(small_store, small_codebooks, tmp_path / "whole", steps=20)))
    stop_at(10, train_rectifier(config(small_store, small_codebooks, tmp_path / "run", steps=20)))
    monkeypatch.setattr(batches, "_free_host_bytes", lambda: resumed_with)
    run_quietly(train_rectifier(config(small_store, small_codebooks, tmp_path / "run", steps=20)))
    assert weights(tmp_path / "whole") == weights(tmp_path / "run")


def test_the_other_way_of_reading_is_refused_and_the_way_out_that_it_names_works(small_store: Path, small_codebooks: Path, tmp_path: Path) -> None:
    stop_at(6, train_rectifier(config(small_store, small_codebooks, tmp_path / "run")))
    with pytest.raises(MismatchError, match="go on with --latents resident"):
        run_quietly(train_rectifier(config(small_store, small_codebooks, tmp_path / "run", latents="stream")))
    run_quietly(train_rectifier(config(small_store, small_codebooks, tmp_path / "run", latents="resident")))
    run_quietly(train_rectifier(config(small_store, small_codebooks, tmp_path / "whole")))
    assert weights(tmp_path / "whole") == weights(tmp_path / "run")


def test_a_run_written_over_reads_as_a_new_one(small_store: Path, small_codebooks: Path, tmp_path: Path) -> None:
    run_quietly(train_rectifier(config(small_store, small_codebooks, tmp_path / "run", latents="stream")))
    run_quietly(train_rectifier(config(small_store, small_codebooks, tmp_path / "run", overwrite=True)))
    run_quietly(train_rectifier(config(small_store, small_codebooks, tmp_path / "new")))
    assert weights(tmp_path / "run") == weights(tmp_path / "new")


def test_where_one_rank_must_stream_all_do(small_store: Path, small_codebooks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "gather", lambda value: [value, "stream"])
    inputs = open_inputs(config(small_store, small_codebooks, Path("unused")), LatentStore.open(small_store), load_codebooks(small_codebooks))
    assert isinstance(inputs.train, StreamingLatents)
