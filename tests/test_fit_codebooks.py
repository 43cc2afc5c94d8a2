"""Stage two, first half, on a real store."""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from revq import LatentStore
from revq.cache.batches import ResidentLatents
from revq.errors import CodebookError, MismatchError
from revq.models.codebooks import CODEBOOKS_NAME, Codebooks, load_codebooks
from revq.models.quantizer import MultiGroupQuantizer, code_counts, dead_codes, perplexity, usage
from revq.models.transform import LatentTransform
from revq.pipeline.info import describe
from revq.stages import ranks
from revq.stages.code_usage import count_codes
from revq.stages.configs import EncodeLatentsConfig, FitCodebooksConfig
from revq.stages.encode_latents import encode_latents
from revq.stages.events import Advance, Begin, Event, Note, run_quietly
from revq.stages.fit_codebooks import fit_codebooks
from revq.stages.fitting.codebook_blocks import fit_blocks

SMALL = {"tokens": 512, "codes": 32, "iterations": 4, "calibration_samples": 32}


def config(store: Path, out: Path, **changes: object) -> FitCodebooksConfig:
    return FitCodebooksConfig(**{"store": str(store), "out": str(out), "transform": "standardize", **SMALL, **changes})  # type: ignore[arg-type]


def stop_after_first_block(settings: FitCodebooksConfig) -> None:
    stopped = fit_codebooks(settings)
    for event in stopped:
        if isinstance(event, Advance) and "coordinate_mse" in event.values:
            stopped.close()  # type: ignore[attr-defined]
            return
    raise AssertionError("no block was fitted")


def latent_error(store: Path, fitted: Codebooks, split: str, weigh: Codebooks | None = None) -> float:
    """Mean squared error of standardised latents, by `weigh`'s scale where given."""
    latents = ResidentLatents(LatentStore.open(store)[split])
    standardised = fitted.transform.standardize(latents.batch(torch.arange(len(latents))))
    quantizer = MultiGroupQuantizer(fitted.codebooks)
    quantized = fitted.transform.from_coordinates(quantizer.decode(quantizer.encode(fitted.transform.to_coordinates(standardised))))
    return float(((quantized - standardised).detach() * (weigh.transform.scale if weigh else 1)).square().mean())


def test_codebooks_are_written_with_their_transform_and_usage(small_store: Path, tmp_path: Path) -> None:
    result = run_quietly(fit_codebooks(config(small_store, tmp_path / "out")))
    fitted = load_codebooks(tmp_path / "out")
    assert fitted.codebooks.shape == (512, 32, 4)
    assert fitted.counts.sum(1).tolist() == [120] * 512
    assert result["latents"] == 120
    assert result["bits_per_image"] == 512 * 5
    assert result["coordinate_mse"] == pytest.approx(latent_error(small_store, fitted, "train"), rel=0.01)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["codebooks.safetensors", "config.json", "usage.parquet"]


def test_the_same_command_twice_fits_once_and_another_folder_gets_the_same_bytes(small_store: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        run_quietly(fit_codebooks(config(small_store, tmp_path / name, transform="pca")))
    first, second = ((tmp_path / name / "codebooks.safetensors").read_bytes() for name in ("a", "b"))
    assert hashlib.sha256(first).digest() == hashlib.sha256(second).digest()
    events = list(fit_codebooks(config(small_store, tmp_path / "a", transform="pca")))
    assert isinstance(events[0], Note)
    assert "complete already" in events[0].text
    assert len(events) == 2


def test_stopped_after_any_block_and_given_again_it_ends_with_the_same_bytes(small_store: Path, tmp_path: Path) -> None:
    run_quietly(fit_codebooks(config(small_store, tmp_path / "whole")))
    stopped = fit_codebooks(config(small_store, tmp_path / "stopped"))
    for event in stopped:
        if isinstance(event, Advance) and event.done >= 96:
            stopped.close()  # type: ignore[attr-defined]
            break
    assert len(list((tmp_path / "stopped" / "partial").iterdir())) >= 3
    with pytest.raises(CodebookError, match="not finished"):
        load_codebooks(tmp_path / "stopped")
    run_quietly(fit_codebooks(config(small_store, tmp_path / "stopped")))
    whole, resumed = ((tmp_path / name / "codebooks.safetensors").read_bytes() for name in ("whole", "stopped"))
    assert whole == resumed


def test_finished_blocks_are_taken_as_they_are_and_counted_in_the_progress(small_store: Path, tmp_path: Path) -> None:
    stopped = fit_codebooks(config(small_store, tmp_path / "out"))
    for event in stopped:
        if isinstance(event, Advance) and event.done >= 64:
            stopped.close()  # type: ignore[attr-defined]
            break
    block = tmp_path / "out" / "partial" / "tokens-00000-00032.safetensors"
    tensors = load_file(block)
    save_file({**tensors, "codebooks": torch.full_like(tensors["codebooks"], 7.0)}, block)
    begun = [event for event in fit_codebooks(config(small_store, tmp_path / "out")) if isinstance(event, Begin)]
    assert begun[-1].done == 64
    assert bool((load_codebooks(tmp_path / "out").codebooks[:32] == 7.0).all())


def test_pca_loses_less_than_plain_coordinates_on_unseen_latents(imagenet_sample: Path, taef2: str, tmp_path: Path) -> None:
    store = tmp_path / "latents.zarr"
    for split, limit in (("train", 200), ("val", 40)):
        settings = {"images": str(imagenet_sample / split), "split": split, "limit": limit, "image_size": 64, "workers": 2}
        run_quietly(encode_latents(EncodeLatentsConfig(store=str(store), vae=taef2, **settings)))  # type: ignore[arg-type]
    errors = {}
    for transform in ("standardize", "pca"):
        run_quietly(fit_codebooks(config(store, tmp_path / transform, transform=transform, codes=16)))
        errors[transform] = latent_error(store, load_codebooks(tmp_path / transform), "val")
    assert errors["pca"] < 0.9 * errors["standardize"]


def test_the_decoder_transform_measures_how_much_each_position_moves_the_picture(small_store: Path, tmp_path: Path) -> None:
    result = run_quietly(fit_codebooks(config(small_store, tmp_path / "out", transform="decoder")))
    fitted = load_codebooks(tmp_path / "out")
    assert fitted.sensitivity is not None
    assert fitted.sensitivity.shape == (32, 8, 8)
    assert float(fitted.sensitivity.min()) > 0
    assert len(result["sensitivity_per_channel"]) == 32
    assert float(fitted.transform.scale.std()) > 0.1
    latents = ResidentLatents(LatentStore.open(small_store)["val"]).batch(torch.arange(6))
    assert torch.allclose(fitted.transform.inverse(fitted.transform(latents)), latents, atol=1e-3)


def test_sensitivity_agrees_with_moving_one_latent_value_by_hand(small_store: Path, tmp_path: Path, taef2: str) -> None:
    from revq import FrozenVAE

    run_quietly(fit_codebooks(config(small_store, tmp_path / "out", transform="decoder", calibration_samples=512)))
    fitted = load_codebooks(tmp_path / "out")
    assert fitted.sensitivity is not None
    vae, latents = FrozenVAE.load(taef2), ResidentLatents(LatentStore.open(small_store)["train"]).batch(torch.arange(100))
    by_hand, by_gradient = [], []
    for position in [(0, 3, 3), (5, 4, 4), (17, 0, 7), (31, 5, 2)]:
        moved = latents.clone()
        step = 0.02 * fitted.transform.std[position]
        moved[(slice(None), *position)] += step
        with torch.no_grad():
            change = (vae.decode(moved) - vae.decode(latents)) / 0.02
        by_hand.append(float(change.square().flatten(1).sum(1).mean()))
        by_gradient.append(float(fitted.sensitivity[position]))
    assert by_gradient == pytest.approx(by_hand, rel=0.35)


def test_images_kept_for_the_rectifier_are_not_fitted_on(small_store: Path, tmp_path: Path) -> None:
    result = run_quietly(fit_codebooks(config(small_store, tmp_path / "out", rectifier_share=0.25)))
    assert result["latents"] == 90


def test_max_samples_draws_by_the_seed(small_store: Path, tmp_path: Path) -> None:
    results = [run_quietly(fit_codebooks(config(small_store, tmp_path / str(seed), max_samples=50, seed=seed))) for seed in (0, 1)]
    assert [result["latents"] for result in results] == [50, 50]
    assert results[0]["coordinate_mse"] != results[1]["coordinate_mse"]


def test_tokens_that_do_not_divide_and_too_many_codes_are_refused_before_anything_is_written(small_store: Path, tmp_path: Path) -> None:
    with pytest.raises(CodebookError, match="500 tokens do not divide"):
        run_quietly(fit_codebooks(config(small_store, tmp_path / "out", tokens=500)))
    with pytest.raises(CodebookError, match="use --codes 120 or fewer"):
        run_quietly(fit_codebooks(config(small_store, tmp_path / "out", codes=121)))
    assert not (tmp_path / "out").exists()


@dataclass(frozen=True)
class Few:
    """Settings that leave fewer latents than there are codes, and what the error advises."""

    changes: dict[str, float]
    advice: str


FEW = [
    Few({}, "120 latents cannot fill 200 codes; use --codes 120 or fewer, or encode more images or --views"),
    Few({"max_samples": 50}, "use --codes 50 or fewer, or raise --max-samples, or encode more images or --views"),
    Few({"rectifier_share": 0.5}, "use --codes 60 or fewer, or lower --rectifier-share, or encode more images or --views"),
    Few({"max_samples": 50, "rectifier_share": 0.5}, "or raise --max-samples, or lower --rectifier-share, or encode"),
    Few({"max_samples": 1000}, "use --codes 120 or fewer, or encode more images"),
]


@pytest.mark.parametrize("case", FEW, ids=lambda case: str(case.changes))
def test_too_few_latents_are_told_with_the_settings_that_leave_some_out(case: Few, small_store: Path, tmp_path: Path) -> None:
    with pytest.raises(CodebookError, match=re.escape(case.advice)):
        run_quietly(fit_codebooks(config(small_store, tmp_path / "out", codes=200, **case.changes)))


def test_few_latents_for_a_code_are_noted_with_the_settings_that_leave_some_out(small_store: Path, tmp_path: Path) -> None:
    settings = config(small_store, tmp_path / "out", max_samples=50, rectifier_share=0.5)
    note = next(event.text for event in fit_codebooks(settings) if isinstance(event, Note))
    assert "less well: raise --max-samples, or lower --rectifier-share, or encode more images or --views, or take --codes 2 or fewer" in note


def test_faiss_that_cannot_use_the_device_says_so(small_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("revq.stages.fit_codebooks.faiss_uses", lambda device: False)
    notes = [event.text for event in fit_codebooks(config(small_store, tmp_path / "out", backend="faiss")) if isinstance(event, Note)]
    assert "this FAISS fits on the CPU, not on cpu: install revq[gpu] (faiss-gpu), or pass --backend torch" in notes


def test_another_vae_for_the_decoder_transform_is_refused(small_store: Path, tmp_path: Path) -> None:
    with pytest.raises(MismatchError, match="fingerprint"):
        run_quietly(fit_codebooks(config(small_store, tmp_path / "out", transform="decoder", vae="revq-tiny-f8c8")))
    assert not (tmp_path / "out").exists()


def test_two_ranks_share_the_work_and_give_the_same_bytes_as_one_process(
    small_store: Path, tmp_path: Path, torchrun: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    settings = {"transform": "decoder", "codes": 16, "iterations": 2, "max_samples": 100}
    run_quietly(fit_codebooks(config(small_store, tmp_path / "one", **settings)))
    options = ["--transform", "decoder", "--codes", 16, "--iterations", 2, "--calibration-samples", 32, "--max-samples", 100]
    done = torchrun(2, "fit-codebooks", small_store, tmp_path / "two", *options)
    assert "k-means (torch, rank 0 of 2): 256 codebooks" in done.stdout
    for name in ("codebooks.safetensors", "sensitivity.md", "usage.parquet", "config.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name
    assert not (tmp_path / "two" / "partial").exists()


@pytest.mark.parametrize(("tokens", "world_size"), [(512, 2), (512, 3), (512, 20), (16, 2), (16, 5), (2, 3)])
def test_each_rank_fits_its_own_codebooks_and_all_of_them_together_each_one_once(
    tokens: int, world_size: int, small_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    split = LatentStore.open(small_store)["train"]
    latents = ResidentLatents(split)
    transform = LatentTransform(mean=torch.from_numpy(split.mean).float(), std=torch.from_numpy(split.variance).float().sqrt(), tokens=tokens)
    fitted: list[list[int]] = [[] for _ in range(world_size)]
    for rank in range(world_size):
        monkeypatch.setattr(ranks, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(ranks, "world_size", lambda: world_size)

        def record(points: torch.Tensor, codes: int, *, seeds: list[int], rank: int = rank, **options: object) -> torch.Tensor:
            fitted[rank] += seeds
            return points[:, :codes]

        monkeypatch.setattr("revq.stages.fitting.codebook_blocks.kmeans", record)
        events = list(fit_blocks(config(small_store, tmp_path, tokens=tokens), latents, transform, "torch", tmp_path))
        assert isinstance(events[0], Begin)
        assert events[0].total == len(fitted[rank])
        assert f"rank {rank} of {world_size}" in events[0].task
    assert sorted(token for part in fitted for token in part) == list(range(tokens))
    assert sum(bool(part) for part in fitted) == min(tokens, world_size)


def table_of(folder: Path) -> dict[str, list[float]]:
    return pq.read_table(folder / "usage.parquet").to_pydict()  # type: ignore[no-any-return]


@pytest.mark.parametrize("changes", [{}, {"max_samples": 50}, {"rectifier_share": 0.5}], ids=["all", "max-samples", "rectifier-share"])
def test_usage_is_told_for_each_codebook_over_the_whole_split(changes: dict[str, float], small_store: Path, tmp_path: Path) -> None:
    result = run_quietly(fit_codebooks(config(small_store, tmp_path / "out", **changes)))
    fitted, table = load_codebooks(tmp_path / "out"), table_of(tmp_path / "out")
    latents = ResidentLatents(LatentStore.open(small_store)["train"]).batch(torch.arange(120))
    quantizer, coordinates = MultiGroupQuantizer(fitted.codebooks), fitted.transform(latents)
    indices = quantizer.encode(coordinates)
    counts = code_counts(indices, 32)
    assert table["token"] == list(range(512))
    assert table["usage"] == usage(counts).tolist()
    assert table["perplexity"] == perplexity(counts).tolist()
    assert table["dead_codes"] == dead_codes(counts).tolist()
    errors = (quantizer.decode(indices) - coordinates).detach().square().mean((0, 2))
    assert table["mse"] == pytest.approx(errors.tolist(), rel=1e-4)
    assert result["usage"]["min"] == pytest.approx(min(table["usage"]))
    assert result["dead_codes"] == sum(table["dead_codes"])
    assert int(fitted.counts.sum()) == 512 * result["latents"]


def test_info_tells_the_usage_of_codebooks_and_which_tokens_use_theirs_least(small_codebooks: Path) -> None:
    told, table = describe(small_codebooks), table_of(small_codebooks)
    lowest = sorted(range(512), key=lambda token: table["perplexity"][token])[:3]
    assert list(told["worst_tokens"]) == [str(token) for token in lowest]
    assert told["worst_tokens"][str(lowest[0])] == {name: table[name][lowest[0]] for name in ("usage", "perplexity", "dead_codes", "mse")}
    assert told["dead_codes"] == sum(table["dead_codes"])
    assert told["perplexity"]["min"] == pytest.approx(min(table["perplexity"]))
    assert told["usage"]["max"] == pytest.approx(max(table["usage"]))


def test_a_damaged_table_of_usage_is_named_and_a_missing_one_is_no_fault(small_codebooks: Path, tmp_path: Path) -> None:
    shutil.copytree(small_codebooks, tmp_path / "torn")
    path = tmp_path / "torn" / "usage.parquet"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(CodebookError, match=r"usage\.parquet is damaged .* fit the codebooks again"):
        describe(tmp_path / "torn")
    path.unlink()
    assert "usage" not in describe(tmp_path / "torn")


def returned(events: Generator[Event, None, tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """What a part of a stage returns at its end."""
    while True:
        try:
            next(events)
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]


def test_usage_over_several_batches_is_the_same_bytes_however_many_ranks_count(
    small_store: Path, small_codebooks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("revq.stages.code_usage._BATCH", 7)
    split, fitted = LatentStore.open(small_store)["train"], load_codebooks(small_codebooks)

    def count(rank: int, world_size: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
        shared: list[list[torch.Tensor]] = []
        monkeypatch.setattr(ranks, "rank", lambda: rank)
        monkeypatch.setattr(ranks, "world_size", lambda: world_size)
        monkeypatch.setattr(ranks, "gather", lambda value: shared.append(value) or [value])
        counts, _ = returned(count_codes(split, fitted.transform, fitted.codebooks))
        return counts, shared[0]

    whole, parts = count(0, 1), [count(rank, 3) for rank in range(3)]
    assert torch.equal(whole[0], sum(counts for counts, _ in parts))
    assert all(torch.equal(*pair) for pair in zip(whole[1], [batch for _, sums in parts for batch in sums], strict=True))


def test_on_several_ranks_a_folder_of_other_settings_is_an_error_and_no_endless_wait(
    small_store: Path, small_codebooks: Path, torchrun: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    done = torchrun(2, "fit-codebooks", small_store, small_codebooks, "--transform", "standardize", "--codes", 8, check=1)
    assert "made with other settings" in done.stderr


def test_a_calibration_once_made_is_not_made_again(small_store: Path, tmp_path: Path) -> None:
    settings = config(small_store, tmp_path / "out", transform="decoder")
    stop_after_first_block(settings)
    tasks = [event.task for event in fit_codebooks(settings) if isinstance(event, Begin)]
    assert tasks == ["k-means (torch)"]
    run_quietly(fit_codebooks(config(small_store, tmp_path / "whole", transform="decoder")))
    assert (tmp_path / "out" / CODEBOOKS_NAME).read_bytes() == (tmp_path / "whole" / CODEBOOKS_NAME).read_bytes()


def test_the_sensitivity_is_told_channel_by_channel(small_store: Path, tmp_path: Path) -> None:
    result = run_quietly(fit_codebooks(config(small_store, tmp_path / "out", transform="decoder")))
    lines = (tmp_path / "out" / "sensitivity.md").read_text().splitlines()
    assert len(lines) == 2 + 32
    shares = [float(line.split("|")[4].strip(" %")) for line in lines[2:]]
    assert sum(shares) == pytest.approx(100, abs=2)
    assert shares.index(max(shares)) == int(torch.tensor(result["sensitivity_per_channel"]).argmax())


def test_larger_latents_are_cut_into_spatial_blocks_all_the_way_to_a_tokenizer(
    small_store: Path, tmp_path: Path, taef2: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from revq import ReVQTokenizer
    from revq.stages.configs import TrainRectifierConfig
    from revq.stages.train_rectifier import train_rectifier

    monkeypatch.setattr("revq.models.transform.MAX_DENSE_POSITIONS", 1024)
    run_quietly(fit_codebooks(config(small_store, tmp_path / "blocks", transform="decoder", codes=16)))
    fitted = load_codebooks(tmp_path / "blocks")
    assert fitted.transform.axes is not None
    assert fitted.transform.axes.shape == (2, 1024, 1024)
    run = TrainRectifierConfig(store=str(small_store), codebooks=str(tmp_path / "blocks"), out=str(tmp_path / "run"), width=0, steps=0)
    run_quietly(train_rectifier(run))
    tokenizer = ReVQTokenizer.from_pretrained(tmp_path / "run" / "tokenizer")
    latents = ResidentLatents(LatentStore.open(small_store)["val"]).batch(torch.arange(6))
    assert torch.allclose(fitted.transform.inverse(fitted.transform(latents)), latents, atol=1e-3)
    quantizer = MultiGroupQuantizer(fitted.codebooks)
    assert torch.equal(tokenizer.encode_latents(latents), quantizer.encode(fitted.transform(latents)))
    run_quietly(fit_codebooks(config(small_store, tmp_path / "plain", codes=16)))
    plain = load_codebooks(tmp_path / "plain")
    assert latent_error(small_store, fitted, "val", weigh=fitted) < latent_error(small_store, plain, "val", weigh=fitted)
