"""Paths as people write them: `~` means the same for what is read and what is written, and a path that cannot be is told in one line."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from revq import FrozenVAE, LatentStore, ReVQTokenizer
from revq.errors import OutputError, RevqError
from revq.files import local_path
from revq.models.codebooks import load_codebooks
from revq.pipeline.compare import compare
from revq.pipeline.config import load_plan
from revq.pipeline.info import info
from revq.pipeline.run import run
from revq.stages.configs import EncodeLatentsConfig, EvaluateConfig, FitCodebooksConfig, TrainRectifierConfig
from revq.stages.encode_latents import encode_latents
from revq.stages.evaluate import evaluate
from revq.stages.events import Event, run_quietly
from revq.stages.fit_codebooks import fit_codebooks
from revq.stages.train_rectifier import train_rectifier

UNKNOWN, LONG = "~nosuchuser/x", "a" * 300
PHOTOGRAPHS = "photographs:held-out"


def encode(**given: str) -> Iterator[Event]:
    return encode_latents(
        EncodeLatentsConfig(**{"images": PHOTOGRAPHS, "store": "s.zarr", "vae": "revq-tiny-f8c8", **given}, image_size=64, limit=2)  # type: ignore[arg-type]
    )


# What each path of each command is given; the other paths are good ones, or are looked at later.
USES: dict[str, Callable[[str, Path, Path, Path], Iterator[Event]]] = {
    "encode-latents IMAGES": lambda odd, *_: encode(images=odd),
    "encode-latents STORE": lambda odd, *_: encode(store=odd),
    "encode-latents --vae": lambda odd, *_: encode(vae=odd),
    "encode-latents --vae FILE.py:FACTORY": lambda odd, *_: encode(vae=f"{odd}.py:load"),
    "fit-codebooks STORE": lambda odd, *_: fit_codebooks(FitCodebooksConfig(store=odd, out="c")),
    "fit-codebooks OUT": lambda odd, store, *_: fit_codebooks(FitCodebooksConfig(store=str(store), out=odd, codes=4)),
    "fit-codebooks --vae": lambda odd, store, *_: fit_codebooks(FitCodebooksConfig(store=str(store), out="c", codes=4, vae=odd)),
    "train-rectifier STORE": lambda odd, _, codebooks, __: train_rectifier(TrainRectifierConfig(store=odd, codebooks=str(codebooks), out="r")),
    "train-rectifier CODEBOOKS": lambda odd, store, *_: train_rectifier(TrainRectifierConfig(store=str(store), codebooks=odd, out="r")),
    "train-rectifier OUT": lambda odd, store, codebooks, _: train_rectifier(
        TrainRectifierConfig(store=str(store), codebooks=str(codebooks), out=odd, steps=1)
    ),
    "train-rectifier --vae": lambda odd, store, codebooks, _: train_rectifier(
        TrainRectifierConfig(store=str(store), codebooks=str(codebooks), out="r", steps=1, decoder_steps=1, vae=odd)
    ),
    "evaluate TOKENIZER": lambda odd, *_: evaluate(EvaluateConfig(tokenizer=odd, images=PHOTOGRAPHS, out="e")),
    "evaluate IMAGES": lambda odd, _, __, trained: evaluate(EvaluateConfig(tokenizer=str(trained), images=odd, out="e")),
    "evaluate OUT": lambda odd, _, __, trained: evaluate(EvaluateConfig(tokenizer=str(trained), images=PHOTOGRAPHS, out=odd)),
    "evaluate --vae": lambda odd, _, __, trained: evaluate(EvaluateConfig(tokenizer=str(trained), images=PHOTOGRAPHS, out="e", vae=odd)),
    "info PATH": lambda odd, *_: info(odd),
    "compare EVALUATION": lambda odd, *_: compare([odd, "other"]),
    "run CONFIG": lambda odd, *_: run(load_plan(odd)),
    "run --images": lambda odd, *_: run(load_plan(preset="demo", out="o", images=odd)),
    "run --val-images": lambda odd, *_: run(load_plan(preset="demo", out="o", val_images=odd)),
    "run --out": lambda odd, *_: run(load_plan(preset="demo", out=odd)),
    "run --vae": lambda odd, *_: run(load_plan(preset="demo", out="o", vae=odd)),
    "LatentStore.open": lambda odd, *_: iter([LatentStore.open(odd)]),  # type: ignore[list-item]
    "load_codebooks": lambda odd, *_: iter([load_codebooks(odd)]),  # type: ignore[list-item]
    "FrozenVAE.load": lambda odd, *_: iter([FrozenVAE.load(odd)]),  # type: ignore[list-item]
    "ReVQTokenizer.from_pretrained": lambda odd, *_: iter([ReVQTokenizer.from_pretrained(odd)]),  # type: ignore[list-item]
}


@pytest.mark.parametrize("odd", [UNKNOWN, LONG], ids=["the home of no user", "a name too long for the file system"])
@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_a_path_that_cannot_be_is_an_error_of_one_line_that_names_it(
    use: Callable[[str, Path, Path, Path], Iterator[Event]],
    odd: str,
    small_store: Path,
    small_codebooks: Path,
    small_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RevqError) as raised:
        list(use(odd, small_store, small_codebooks, small_run))
    assert odd[:60] in str(raised.value)
    assert "\n" not in str(raised.value)
    assert set(os.listdir(tmp_path)) <= {"o"}  # `run` claims its folder first


def test_an_output_below_a_tilde_lies_where_the_inputs_of_the_next_stage_are_looked_for(
    small_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "home").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "here")
    settings = {"tokens": 64, "codes": 4, "transform": "standardize", "iterations": 1}
    run_quietly(fit_codebooks(FitCodebooksConfig(store=str(small_store), out="~/c", **settings)))  # type: ignore[arg-type]
    run_quietly(train_rectifier(TrainRectifierConfig(store=str(small_store), codebooks="~/c", out="~/r", steps=1, width=0, evaluations=1)))
    assert os.listdir(tmp_path / "here") == []
    assert sorted(os.listdir(tmp_path / "home")) == ["c", "r"]
    found = ReVQTokenizer.from_pretrained("~/r/tokenizer")
    assert torch.isfinite(found.quantizer.codebooks).all()
    plan = load_plan(preset="demo", out="~/run")
    assert (plan.out, plan.encode_train.store) == (tmp_path / "home" / "run", str(tmp_path / "home" / "run" / "latents.zarr"))


def test_a_folder_whose_name_begins_with_a_tilde_can_be_written_once_it_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OutputError, match=r"there is no user 'nosuchuser'.*~nosuchuser/x.*choose another path"):
        list(run(load_plan(preset="demo", out=UNKNOWN)))
    assert local_path(UNKNOWN) == Path(UNKNOWN)
