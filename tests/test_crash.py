"""Crash safety of the latent store: killed at any instant, damaged in any file, it is made whole or said to be broken, and never read as data."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from test_store import ENCODING, PLAN, latents_of, manifest_of, write

from revq.cache.store import LatentStore
from revq.cache.store_folder import LocalFolder
from revq.cache.writer import Shard, SplitWriter
from revq.errors import StoreError
from revq.pipeline.store_info import verify_store


@pytest.fixture
def fast_folder() -> Iterator[Path]:
    """A temporary folder, in memory where there is such a file system: thousands of flushes to a disk would take minutes."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(prefix="revq-test-", dir=memory if os.access(memory, os.W_OK) else None) as folder:
        yield Path(folder)


@pytest.mark.parametrize("scenario", ["new", "overwrite"])
def test_killed_before_any_single_file_operation_a_store_resumes_to_the_same_bytes(fast_folder: Path, scenario: str) -> None:
    script = Path(__file__).with_name("killed_writer.py")
    done = subprocess.run([sys.executable, str(script), str(fast_folder), scenario], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 80


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete store of two splits. Not to be written to."""
    store = tmp_path_factory.mktemp("whole") / "s"
    write(store)
    write(store, replace(PLAN, name="val", images=12, seed=3))
    return store


def read_everything(store: Path) -> list[np.ndarray]:
    """All that a program can read of the split train."""
    split = LatentStore.open(store)["train"]
    manifest = [np.array(split.manifest()[name].to_pylist()) for name in ("key", "label", "status", "sha256")]
    return [np.asarray(split.latents[:]), split.labels, split.ok, split.mean, split.variance, *manifest]


def verify(store: Path) -> None:
    for _ in verify_store(LocalFolder(store)):
        pass


@pytest.mark.parametrize("where", [0.02, 0.31, 0.5, 0.77, 0.99])
def test_a_flipped_bit_in_any_file_is_reported_and_never_read_as_data(whole: Path, tmp_path: Path, where: float) -> None:
    expected = read_everything(whole)
    files = [file.relative_to(whole) for file in sorted(whole.rglob("*")) if file.is_file()]
    assert len(files) == 29
    for number, name in enumerate(files):
        store = tmp_path / str(number)
        shutil.copytree(whole, store)
        data = bytearray((store / name).read_bytes())
        data[int(where * len(data))] ^= 4
        (store / name).write_bytes(data)
        with pytest.raises(StoreError, match=r"is damaged|is no latent store|format version"):
            verify(store)
        try:
            read = read_everything(store)
        except Exception:  # any refusal will do here: zarr's own where latents are read by zarr alone
            continue
        assert "val" in name.as_posix(), f"{name} was read with a flipped bit"
        for there, was in zip(read, expected, strict=True):
            np.testing.assert_array_equal(there, was)


@pytest.mark.parametrize("change", ["cut", "emptied", "removed"])
def test_a_torn_or_lost_file_is_reported_by_name(whole: Path, tmp_path: Path, change: str) -> None:
    files = [file.relative_to(whole) for file in sorted(whole.rglob("*")) if file.is_file() and file.name != "zarr.json"]
    for number, name in enumerate(files):
        store = tmp_path / str(number)
        shutil.copytree(whole, store)
        data = (store / name).read_bytes()
        (store / name).unlink() if change == "removed" else (store / name).write_bytes(data[: len(data) // 2] if change == "cut" else b"")
        with pytest.raises(StoreError, match=rf"is damaged: {name} is .*--overwrite"):
            verify(store)


def test_a_damaged_split_can_be_encoded_again_whatever_is_broken(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "s")
    (tmp_path / "s" / "train" / "zarr.json").write_text("{")
    with pytest.raises(StoreError, match=r"train/zarr.json does not fit its checksum; encode it again with --split train --overwrite"):
        LatentStore.open(tmp_path / "s")["train"]
    write(tmp_path / "s", overwrite=True)
    np.testing.assert_array_equal(read_everything(tmp_path / "s")[0], latents_of(PLAN))
    verify(tmp_path / "s")


class FaultyWriter(SplitWriter):
    """Stores other values than those that it makes its sums of; all its checksums fit."""

    def _encode_shard(self, shard: Shard, latents: NDArray[Any]) -> bytes:
        return super()._encode_shard(shard, np.where(latents == 0, latents, latents + 1))


def test_verify_finds_values_that_are_not_those_of_the_statistics(tmp_path: Path) -> None:
    writer = FaultyWriter(tmp_path / "s", ENCODING, PLAN)
    for shard in writer.todo:
        writer.write_shard(shard, latents_of(PLAN)[shard.start : shard.stop], manifest_of(PLAN)[shard.start : shard.stop])
    writer.finish()
    with pytest.raises(StoreError, match="its mean is not that of its rows"):
        verify(tmp_path / "s")
