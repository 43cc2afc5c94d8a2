"""Whose fit a codebooks folder holds, and what of it is refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_fit_codebooks import config, stop_after_first_block

from revq import LatentStore
from revq.errors import CodebookError, OutputError
from revq.models.codebooks import CODEBOOKS_NAME, load_codebooks
from revq.stages.configs import EncodeLatentsConfig
from revq.stages.encode_latents import encode_latents
from revq.stages.events import run_quietly
from revq.stages.fit_codebooks import fit_codebooks


def test_codebooks_of_other_settings_are_kept_unless_overwritten(small_store: Path, tmp_path: Path) -> None:
    run_quietly(fit_codebooks(config(small_store, tmp_path / "out")))
    before = (tmp_path / "out" / "codebooks.safetensors").read_bytes()
    with pytest.raises(OutputError, match="codes: 32 there, 16 asked"):
        run_quietly(fit_codebooks(config(small_store, tmp_path / "out", codes=16)))
    assert (tmp_path / "out" / "codebooks.safetensors").read_bytes() == before
    run_quietly(fit_codebooks(config(small_store, tmp_path / "out", codes=16, overwrite=True)))
    assert load_codebooks(tmp_path / "out").codebooks.shape == (512, 16, 4)


@pytest.fixture(scope="module")
def other_images(tmp_path_factory: pytest.TempPathFactory, imagenet_sample: Path, taef2: str) -> Path:
    """A store with the fingerprint of `small_store`: the same VAE and size, other images."""
    store = tmp_path_factory.mktemp("other") / "latents.zarr"
    settings = {"images": str(imagenet_sample / "val"), "image_size": 64, "limit": 60, "views": 2, "workers": 2}
    run_quietly(encode_latents(EncodeLatentsConfig(store=str(store), vae=taef2, **settings)))  # type: ignore[arg-type]
    return store


def test_codebooks_of_other_images_are_not_taken_for_finished(small_store: Path, other_images: Path, tmp_path: Path) -> None:
    assert LatentStore.open(small_store).fingerprint == LatentStore.open(other_images).fingerprint
    run_quietly(fit_codebooks(config(small_store, tmp_path / "out")))
    before = (tmp_path / "out" / CODEBOOKS_NAME).read_bytes()
    with pytest.raises(OutputError, match=r"made with other settings \(data_digest: .* there, .* asked\)"):
        run_quietly(fit_codebooks(config(other_images, tmp_path / "out")))
    assert (tmp_path / "out" / CODEBOOKS_NAME).read_bytes() == before
    run_quietly(fit_codebooks(config(other_images, tmp_path / "out", overwrite=True)))
    assert (tmp_path / "out" / CODEBOOKS_NAME).read_bytes() != before


def test_a_stopped_fit_does_not_go_on_with_other_images_or_another_backend(small_store: Path, other_images: Path, tmp_path: Path) -> None:
    stop_after_first_block(config(small_store, tmp_path / "out", backend="torch"))
    with pytest.raises(OutputError, match="data_digest"):
        run_quietly(fit_codebooks(config(other_images, tmp_path / "out", backend="torch")))
    with pytest.raises(OutputError, match="backend: torch there, faiss asked"):
        run_quietly(fit_codebooks(config(small_store, tmp_path / "out", backend="faiss")))
    run_quietly(fit_codebooks(config(small_store, tmp_path / "out", backend="torch")))


def test_a_rectifier_may_train_on_other_images_than_the_codebooks(other_images: Path, small_codebooks: Path, tmp_path: Path) -> None:
    from revq.stages.configs import TrainRectifierConfig
    from revq.stages.train_rectifier import train_rectifier

    run = TrainRectifierConfig(store=str(other_images), codebooks=str(small_codebooks), out=str(tmp_path / "run"), width=0, steps=0)
    run_quietly(train_rectifier(run))


def test_a_codebook_file_of_another_fit_beside_a_good_config_is_refused(small_store: Path, small_codebooks: Path, tmp_path: Path) -> None:
    shutil.copytree(small_codebooks, tmp_path / "swapped")
    run_quietly(fit_codebooks(config(small_store, tmp_path / "other", seed=1)))
    shutil.copy(tmp_path / "other" / CODEBOOKS_NAME, tmp_path / "swapped" / CODEBOOKS_NAME)
    with pytest.raises(CodebookError, match=r"codebooks\.safetensors is of the fit [0-9a-f]{8}, the config\.json beside it of the fit"):
        load_codebooks(tmp_path / "swapped")


def rewrite(folder: Path, changes: dict[str, torch.Tensor], *, keep_metadata: bool = True) -> None:
    """Change tensors of a codebook file."""
    path = folder / CODEBOOKS_NAME
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    save_file({**load_file(path), **changes}, path, metadata if keep_metadata else None)


def test_a_codebook_file_that_does_not_say_whose_fit_it_is_is_refused(small_codebooks: Path, tmp_path: Path) -> None:
    shutil.copytree(small_codebooks, tmp_path / "old")
    rewrite(tmp_path / "old", {}, keep_metadata=False)
    with pytest.raises(CodebookError, match=r"of an older revq.*; remove the folder and fit the codebooks again"):
        load_codebooks(tmp_path / "old")


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
def test_codes_that_are_not_finite_are_refused(value: float, small_codebooks: Path, tmp_path: Path) -> None:
    shutil.copytree(small_codebooks, tmp_path / "bad")
    codes = load_codebooks(small_codebooks).codebooks.clone()
    codes[300, 7, 1] = value
    rewrite(tmp_path / "bad", {"codebooks": codes})
    with pytest.raises(CodebookError, match=r"codebook 300 has codes that are not finite; .* fit the codebooks again"):
        load_codebooks(tmp_path / "bad")


def test_a_damaged_codebook_file_is_named(small_store: Path, tmp_path: Path) -> None:
    run_quietly(fit_codebooks(config(small_store, tmp_path / "out")))
    path = tmp_path / "out" / "codebooks.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(CodebookError, match=r"codebooks\.safetensors is damaged"):
        load_codebooks(tmp_path / "out")


def test_codebooks_whose_transform_another_version_wrote_are_refused(small_codebooks: Path, tmp_path: Path) -> None:
    shutil.copytree(small_codebooks, tmp_path / "old")
    rewrite(tmp_path / "old", {"transform.rotation": torch.eye(4)})
    with pytest.raises(CodebookError, match=r"1 tensor is unexpected: transform\.rotation"):
        load_codebooks(tmp_path / "old")
