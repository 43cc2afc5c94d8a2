"""A latent store in an object store: a real S3 server (moto) in a process of its own, on loopback."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import archives
import numpy as np
import pytest
from test_store import ENCODING, PLAN, contents, latents_of, write

from revq.cache.batches import ResidentLatents
from revq.cache.sources import open_source
from revq.cache.store import LatentStore
from revq.cache.store_folder import RemoteFolder, open_folder
from revq.cache.writer import SplitWriter
from revq.errors import OutputError, StoreError

pytest.importorskip("s3fs", reason="s3fs is not installed: pip install 's3fs' 'moto[server]'")
pytest.importorskip("moto", reason="moto is not installed: pip install 's3fs' 'moto[server]'")

Run = Callable[..., subprocess.CompletedProcess[str]]


def files_of(url: str) -> dict[str, bytes]:
    folder = open_folder(url)
    return {key: folder.read(key) or b"" for key in folder.sizes()}


def test_a_store_in_a_bucket_has_the_very_bytes_of_a_local_one(bucket: str, tmp_path: Path) -> None:
    write(tmp_path / "local")
    write(f"{bucket}/s")
    assert files_of(f"{bucket}/s") == contents(tmp_path / "local")
    split = LatentStore.open(f"{bucket}/s")["train"]
    np.testing.assert_array_equal(np.asarray(split.latents[:]), latents_of(PLAN))
    np.testing.assert_array_equal(split.labels, LatentStore.open(tmp_path / "local")["train"].labels)
    assert len(ResidentLatents(split)) == 42


def test_a_copy_of_it_on_disk_opens_and_the_other_way_round(bucket: str, tmp_path: Path) -> None:
    write(tmp_path / "local")
    folder = open_folder(f"{bucket}/copy")
    for key, data in contents(tmp_path / "local").items():
        folder.write(key, data)
    split = LatentStore.open(f"{bucket}/copy")["train"]
    np.testing.assert_array_equal(np.asarray(split.latents[:]), latents_of(PLAN))


def test_a_half_written_store_resumes_and_finds_what_was_damaged(bucket: str, tmp_path: Path) -> None:
    write(tmp_path / "local")
    write(f"{bucket}/s", shards=[0, 1, 3])
    with pytest.raises(StoreError, match="is not finished"):
        LatentStore.open(f"{bucket}/s")["train"]
    folder = open_folder(f"{bucket}/s")
    damaged = bytearray(folder.read("train/latents/c/1/0/0/0") or b"")
    damaged[len(damaged) // 2] ^= 1
    folder.write("train/latents/c/1/0/0/0", bytes(damaged))
    writer = SplitWriter(f"{bucket}/s", ENCODING, PLAN)
    assert [shard.index for shard in writer.damaged] == [1]
    assert [shard.index for shard in writer.todo] == [1, 2]
    write(f"{bucket}/s")
    assert files_of(f"{bucket}/s") == contents(tmp_path / "local")


def test_an_encoding_killed_half_way_is_finished_by_the_same_command_and_read_by_the_next_stage(
    bucket: str, revq_cli: Run, imagenet_sample: Path, taef2: str, tmp_path: Path
) -> None:
    settings = ["--vae", taef2, "--image-size", "64", "--limit", "40", "--shard-rows", "4", "--batch-size", "4", "--workers", "1", "--device", "cpu"]
    work = ["encode-latents", str(imagenet_sample / "val"), f"{bucket}/s", *settings]
    folder = open_folder(f"{bucket}/s")
    with subprocess.Popen([sys.executable, "-m", "revq", *work], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 120
        while sum(key.endswith(".json") for key in folder.children("progress/train")) < 2:
            assert process.poll() is None, "it ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    assert "resuming: " in revq_cli(*work).stdout
    revq_cli("encode-latents", imagenet_sample / "val", tmp_path / "local", *settings)
    assert files_of(f"{bucket}/s") == contents(tmp_path / "local")
    value = json.loads(revq_cli("info", f"{bucket}/s", "--verify", "--json").stdout)
    assert (value["verified"], value["splits"]["train"]["rows"]) == (True, 40)
    fitted = revq_cli("fit-codebooks", f"{bucket}/s", tmp_path / "codebooks", "--tokens", 512, "--codes", 8, "--transform", "standardize", "--json")
    assert json.loads(fitted.stdout)["latents"] == 40


@pytest.mark.parametrize("kind", ["folders", "train.tar", "shards/train-{0000..0002}.tar", "parquet"])
def test_images_are_read_from_a_bucket_as_from_disk(bucket: str, imagenet_sample: Path, tmp_path: Path, kind: str) -> None:
    folders = archives.class_folders(tmp_path / "folders", imagenet_sample)
    archives.train_tar(tmp_path / "train.tar", folders)
    archives.shards(tmp_path / "shards", folders)
    archives.parquet_files(tmp_path / "parquet", folders)
    place = open_folder(f"{bucket}/images")
    for path in (path for path in tmp_path.rglob("*") if path.is_file()):
        place.write(path.relative_to(tmp_path).as_posix(), path.read_bytes())
    there, here = open_source(f"{bucket}/images/{kind}"), open_source(tmp_path / kind)
    assert list(there.items) == list(here.items)
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(there.read, range(20))) == [here.read(index) for index in range(20)]


def test_a_bucket_that_is_not_there_and_a_protocol_that_nobody_knows_are_one_line_errors(bucket: str) -> None:
    with pytest.raises(OutputError, match=r"s3://nowhere/s cannot be reached .*credentials"):
        RemoteFolder("s3://nowhere/s").write("zarr.json", b"{}")
    with pytest.raises(StoreError, match="does not exist"):
        LatentStore.open("s3://latents/nothing")
    with pytest.raises(StoreError, match=r"nfs4://x/y cannot be opened"):
        LatentStore.open("nfs4://x/y")
