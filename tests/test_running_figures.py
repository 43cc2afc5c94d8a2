"""What the progress line says of a stage is what its summary will say, over what was seen so far; anything else has a name of its own."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
from test_evaluate import config_for, flat_folder
from training_runs import config, metrics_of

from revq.models.codebooks import load_codebooks
from revq.pipeline.progress import show
from revq.pipeline.summaries import finish
from revq.stages.configs import EncodeLatentsConfig, FitCodebooksConfig
from revq.stages.encode_latents import encode_latents
from revq.stages.evaluate import evaluate
from revq.stages.events import Advance, Begin, Event
from revq.stages.fit_codebooks import fit_codebooks
from revq.stages.fitting import codebook_blocks
from revq.stages.train_rectifier import train_rectifier

pytestmark = pytest.mark.usefixtures("empty_torch_home")
OWN_NAMES = {"loss", "codebook_loss", "codebook_usage", "images/s", "weights_of_step"}
"""What train-rectifier shows of its last steps, and of the tokenizer it would make; the last is in its summary too."""


def watched(events: Iterator[Event]) -> tuple[dict[str, dict[str, float]], str, Mapping[str, Any]]:
    """The figures of every task at its end, the lines that are shown, and the stage's result."""
    figures: dict[str, dict[str, float]] = {}

    def seen() -> Iterator[Event]:
        for event in events:
            if isinstance(event, Begin):
                figures[event.task] = {}
            elif isinstance(event, Advance):
                list(figures.values())[-1].update(event.values)
            yield event

    out = io.StringIO()
    with redirect_stdout(out):
        value = show(seen(), as_json=False)
    return figures, out.getvalue(), value


def summary(command: str, value: Mapping[str, Any]) -> str:
    out = io.StringIO()
    with redirect_stdout(out):
        finish(command, value, as_json=False)
    return out.getvalue()


def test_the_rate_at_the_end_of_encoding_is_that_of_the_summary(imagenet_sample: Path, taef2: str, tmp_path: Path) -> None:
    settings = {"vae": taef2, "split": "val", "image_size": 64, "limit": 20, "workers": 2, "batch_size": 4, "shard_rows": 8}
    images, store = str(imagenet_sample / "val"), str(tmp_path / "latents.zarr")
    _, lines, value = watched(encode_latents(EncodeLatentsConfig(images=images, store=store, **settings)))
    shown = re.findall(r"^encode val: 20/20 images \(100 %\), (\S+) images/s, took \d:\d\d$", lines, re.MULTILINE)
    summed_up = re.findall(r"images per s +(\S+)", summary("encode-latents", value))
    assert [float(rate) for rate in shown] == [pytest.approx(value["images_per_s"], rel=0.02)]
    assert [float(rate) for rate in summed_up] == [pytest.approx(value["images_per_s"], rel=0.02)]


def test_encoding_is_finished_where_the_last_images_cannot_be_read(imagenet_sample: Path, taef2: str, tmp_path: Path) -> None:
    images = flat_folder(tmp_path / "images", imagenet_sample, 4)
    for name in ("04.jpg", "05.jpg"):
        (images / name).write_bytes(b"no picture")
    settings = {"vae": taef2, "image_size": 64, "workers": 2, "batch_size": 4, "shard_rows": 6}
    _, lines, value = watched(encode_latents(EncodeLatentsConfig(images=str(images), store=str(tmp_path / "latents.zarr"), **settings)))
    assert value["failed"] == 2
    assert "encode train: 6/6 images (100 %), " in lines


def fit(small_store: Path, out: Path) -> Iterator[Event]:
    """64 codebooks."""
    return fit_codebooks(FitCodebooksConfig(store=str(small_store), out=str(out), tokens=64, codes=8, transform="pca", iterations=2))


@pytest.mark.parametrize("resumed", [False, True], ids=["at once", "resumed"])
def test_the_error_at_the_end_of_k_means_is_that_of_the_summary(
    small_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resumed: bool
) -> None:
    monkeypatch.setattr(codebook_blocks, "_BLOCK_BYTES", 3 * 120 * 32 * 4)  # blocks of two and of three of the 64 codebooks
    if resumed:
        events = fit(small_store, tmp_path / "out")
        assert next(event.done for event in events if isinstance(event, Advance) and event.values and event.done > 30) == 32
        events.close()  # type: ignore[attr-defined]
    figures, lines, value = watched(fit(small_store, tmp_path / "out"))
    assert ("k-means (torch): 64 codebooks, 32 done before" in lines) == resumed
    assert figures["k-means (torch)"] == {"coordinate_mse": pytest.approx(value["coordinate_mse"], rel=1e-6)}
    assert load_codebooks(tmp_path / "out").codebooks.shape[0] == 64


TRAININGS: dict[str, dict[str, Any]] = {
    "plain": {"steps": 30},
    "frozen codebooks": {"steps": 30, "codebook_lr": 0.0},
    "the best and not the last": {"steps": 40, "evaluations": 20, "lr": 0.5, "codebook_lr": 0.0, "patience": 2},
    "a decoder phase": {"steps": 4, "decoder_steps": 4, "decoder_batch_size": 4},
    "a decoder phase that does harm": {"steps": 4, "decoder_steps": 8, "decoder_batch_size": 4, "lr": 0.1},
}


@pytest.mark.parametrize("case", TRAININGS)
def test_the_errors_at_the_end_of_training_are_those_of_the_summary(case: str, small_store: Path, small_codebooks: Path, tmp_path: Path) -> None:
    settings = config(small_store, small_codebooks, tmp_path / "run", **TRAININGS[case])
    figures, _, value = watched(train_rectifier(settings))
    shown = [figures[task] for task in figures if task.startswith("train")][-1]
    own = {name: figure for name, figure in shown.items() if name in value}
    assert {"val_mse_quantized", "val_mse_rectified"} <= set(own)
    assert {name: value[name] for name in own} == own
    assert set(shown) - set(own) <= OWN_NAMES
    assert set(value) & OWN_NAMES == {"weights_of_step"}
    newest = metrics_of(tmp_path / "run")["step"][-1]
    assert shown.get("weights_of_step", newest) == value["weights_of_step"]
    assert (value["weights_of_step"] != newest) == (case in {"the best and not the last", "a decoder phase that does harm"})


def test_the_psnr_at_every_point_of_an_evaluation_is_the_mean_of_what_was_seen(tokenizer_folder: Path, imagenet_sample: Path, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    images = flat_folder(tmp_path / "images", imagenet_sample, 7)
    (images / "03-broken.jpg").write_bytes(b"no picture")
    events = list(evaluate(config_for(tokenizer_folder, images, tmp_path / "out", batch_size=3, tolerance=True, tolerance_images=2)))
    begun = [event.task for event in events if isinstance(event, Begin)]
    assert begun == ["evaluate", "tolerance"]
    advances = [event for event in events if isinstance(event, Advance)]
    shown = [(event.done, event.values["rectified_psnr_db"]) for event in advances if event.values]
    table = pq.read_table(tmp_path / "out" / "images.parquet").to_pydict()
    psnr = [value for value, status in zip(table["rectified.psnr_db"], table["status"], strict=True) if status == "ok"]
    wanted = [(3, sum(psnr[:3]) / 3), (6, sum(psnr[:5]) / 5), (8, sum(psnr) / 7)]
    assert [done for done, _ in shown] == [done for done, _ in wanted]
    assert [value for _, value in shown] == pytest.approx([value for _, value in wanted])
    assert shown[-1][1] == pytest.approx(events[-1].value["rows"]["rectified"]["psnr_db"], abs=1e-9)
    assert all(set(event.values) <= {"rectified_psnr_db"} for event in advances)


def test_the_psnr_on_the_terminal_is_that_of_the_table(
    tokenizer_folder: Path, imagenet_sample: Path, tmp_path: Path, revq_cli: Callable[..., Any]
) -> None:
    images = flat_folder(tmp_path / "images", imagenet_sample, 6)
    options = ["--batch-size", 4, "--no-download", "--no-tolerance", "--device", "cpu"]
    lines = revq_cli("evaluate", tokenizer_folder, images, tmp_path / "out", *options).stdout.splitlines()
    progress = next(line for line in lines if line.startswith("evaluate: 6/6 images"))
    table = json.loads((tmp_path / "out" / "metrics.json").read_text())
    rectified = next(line for line in lines if line.startswith("rectified"))
    assert progress.endswith(f"rectified psnr {(psnr := table['rows']['rectified']['psnr_db']):.2f} dB")
    assert f"{psnr:.2f}" in rectified.split()


def test_a_rank_says_that_its_figures_are_of_its_own_share(
    tokenizer_folder: Path, imagenet_sample: Path, tmp_path: Path, torchrun: Callable[..., Any]
) -> None:
    images = flat_folder(tmp_path / "images", imagenet_sample, 5)
    options = ["--batch-size", 2, "--no-download", "--no-tolerance", "--device", "cpu"]
    done = torchrun(2, "evaluate", tokenizer_folder, images, tmp_path / "out", *options)
    assert "evaluate (rank 0 of 2): 3 images" in done.stdout
    assert re.search(r"evaluate \(rank 0 of 2\): 3/3 images .*rectified psnr [0-9.]+ dB", done.stdout)
