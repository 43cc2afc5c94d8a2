"""Errors that Python has a word for are found by that word too, and are told in one line."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from revq import LatentStore, ReVQTokenizer, errors, nearest_codes
from revq.cache.image_sources.file_sets import check_one_set
from revq.cache.image_sources.patterns import expand
from revq.cache.sources import open_source
from revq.errors import (
    CodebookError,
    ConfigError,
    HeldError,
    ImageError,
    MismatchError,
    RevqError,
    StoreError,
    TokenizerError,
    TrainingError,
    VAEError,
    one_line,
)
from revq.lock import hold_folder
from revq.models.codebooks import load_codebooks
from revq.models.vae import FrozenVAE
from revq.pipeline.config import load_plan
from revq.pipeline.info import info
from revq.stages.configs import EncodeLatentsConfig, EvaluateConfig
from revq.stages.evaluate import evaluate
from revq.stages.evaluation.weights import INCEPTION, find_weights
from revq.stages.training.checkpoints import resume


@dataclass(frozen=True)
class Wrong:
    name: str
    act: Callable[[Path], object]
    """What a user's script does, with a folder that has `here.tar`, `train-00000-of-00002.parquet` and `checkpoints/` in it, and no more."""
    ours: type[RevqError]
    pythons: type[Exception]
    begin: str


def hold_twice(folder: Path) -> None:
    with hold_folder(folder / "new", "first"), hold_folder(folder / "new", "second"):
        pass


def resume_damaged(folder: Path) -> None:
    for _ in resume(None, folder / "checkpoints", torch.device("cpu")):  # type: ignore[arg-type]  # no state is looked at
        pass


WRONG = [
    Wrong("store", lambda at: LatentStore.open(at / "none.zarr"), StoreError, FileNotFoundError, "latent store "),
    Wrong("codebooks", lambda at: load_codebooks(at / "none"), CodebookError, FileNotFoundError, "{at}/none holds no codebooks"),
    Wrong("tokenizer", lambda at: ReVQTokenizer.from_pretrained(at / "none"), TokenizerError, FileNotFoundError, "no tokenizer at {at}/none"),
    Wrong(
        "tokenizer to evaluate",
        lambda at: list(evaluate(EvaluateConfig(tokenizer=f"{at}/none", images=str(at), out=f"{at}/out"))),
        TokenizerError,
        FileNotFoundError,
        "there is no tokenizer at {at}/none",
    ),
    Wrong("VAE", lambda at: FrozenVAE.load(f"{at}/none"), VAEError, FileNotFoundError, "VAE '{at}/none' is no local folder"),
    Wrong("VAE plug-in", lambda at: FrozenVAE.load(f"{at}/none.py:make"), VAEError, FileNotFoundError, "VAE plug-in {at}/none.py does not exist"),
    Wrong("images", lambda at: open_source(at / "none"), ImageError, FileNotFoundError, "image folder {at}/none does not exist"),
    Wrong("pattern", lambda at: open_source(f"{at}/none-*.tar"), ImageError, FileNotFoundError, "no file matches {at}/none-*.tar"),
    Wrong("braces", lambda at: open_source(f"{at}/{{here,none}}.tar"), ImageError, FileNotFoundError, "1 of the 2 files of "),
    Wrong(
        "parts", lambda at: check_one_set(str(at), expand(f"{at}/*.parquet")), ImageError, FileNotFoundError, "1 of the 2 parts of {at} are not there"
    ),
    Wrong(
        "configuration",
        lambda at: load_plan(at / "none.toml"),
        ConfigError,
        FileNotFoundError,
        "configuration {at}/none.toml cannot be read (No such",
    ),
    Wrong(
        "weights", lambda at: find_weights(INCEPTION, path=f"{at}/none"), ConfigError, FileNotFoundError, "the Inception network of rFID: no weights"
    ),
    Wrong("anything", lambda at: list(info(str(at / "none"))), RevqError, FileNotFoundError, "{at}/none does not exist"),
    Wrong("setting", lambda at: EncodeLatentsConfig(images="a", store="b", batch_size=0), ConfigError, ValueError, "batch-size must be at least 1"),
    Wrong("shapes", lambda at: nearest_codes(torch.zeros(2, 5, 3), torch.zeros(2, 4, 2)), MismatchError, ValueError, "codebooks (2, 4, 2) need"),
    Wrong("writer", hold_twice, HeldError, BlockingIOError, "{at}/new is being written by another process"),
    Wrong("training", resume_damaged, TrainingError, RuntimeError, "no checkpoint in {at}/checkpoints can be read"),
]


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: wrong.name)
def test_what_python_has_a_word_for_is_found_by_that_word_too(wrong: Wrong, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    for name in ("here.tar", "train-00000-of-00002.parquet", "checkpoints/step-00000010.pt"):
        (tmp_path / name).write_bytes(b"no such thing")
    with pytest.raises(wrong.pythons) as caught:
        wrong.act(tmp_path)
    assert isinstance(caught.value, wrong.ours)
    assert str(caught.value).startswith(wrong.begin.format(at=tmp_path))
    assert "\n" not in str(caught.value)


EVERY = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, RevqError)]


@pytest.mark.parametrize("kind", EVERY, ids=lambda kind: kind.__name__)
def test_an_error_is_its_message_alone_and_keeps_it_from_process_to_process(kind: type[RevqError]) -> None:
    error = kind("expected a, found b; mend it")
    again = pickle.loads(pickle.dumps(error))
    for each in (error, again):
        assert type(each) is kind
        assert str(each) == "expected a, found b; mend it"


def test_an_error_is_told_in_one_line_without_addresses_of_memory() -> None:
    told = one_line(OSError("cannot identify\n  image file <_io.BytesIO object at 0x7f3a2b1c>"))
    assert told == "cannot identify image file <_io.BytesIO object>"
    assert one_line(KeyError()) == "KeyError"
    assert len(one_line(ValueError("x " * 500))) == 200
    assert len(one_line(ValueError("x " * 500), most=None)) == 999
