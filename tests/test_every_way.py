"""The same 40 photographs in every way that people keep and name them: the same labels and the same bytes, whoever reads beside."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import archives
import pytest

from revq.cache import LatentStore
from revq.cache.images import read_ahead
from revq.cache.sources import ImageSource, open_source
from revq.errors import ImageError
from revq.stages.configs import EncodeLatentsConfig
from revq.stages.encode_latents import encode_latents
from revq.stages.events import run_quietly

REPEATS = 4
Way = Callable[[Path, Path], object]
"""(new folder, class folders) -> what open_source is given."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, imagenet_sample: Path) -> Path:
    return archives.class_folders(tmp_path_factory.mktemp("photographs"), imagenet_sample, classes=8, per_class=5)


@pytest.fixture(scope="module")
def truth(folders: Path) -> list[tuple[int, str]]:
    """(label, SHA-256) of each photograph, from the files themselves."""
    classes = sorted(path.name for path in folders.iterdir())
    return [(classes.index(name.partition("/")[0]), hashlib.sha256(data).hexdigest()) for name, data in archives.files_of(folders)]


def tarred(root: Path, folders: Path, *, mode: str = "w", name: str = "x.tar") -> Path:
    root.mkdir(parents=True, exist_ok=True)
    with tarfile.open(root / name, mode) as archive:
        archive.add(folders, ".")
    return root / name


def zipped(root: Path, folder: Path) -> Path:
    return Path(shutil.make_archive(str(root / "x"), "zip", folder))


def unpacked_by_the_advice(root: Path, folders: Path) -> Path:
    """What the refusal of x.tar.gz says to do."""
    path = tarred(root, folders, mode="w:gz", name="x.tar.gz")
    with pytest.raises(ImageError, match=r"compressed \(gzip\).*unpack it to a plain \.tar first: ") as caught:
        open_source(path)
    subprocess.run(["sh", "-c", str(caught.value).partition("first: ")[2]], check=True)
    return root / "x.tar"


WAYS: dict[str, Way] = {
    "folders": lambda root, folders: folders,
    "tar": tarred,
    "tar.gz, unpacked as advised": unpacked_by_the_advice,
    "tar of class tars": lambda root, folders: archives.train_tar(root / "train.tar", folders),
    "WebDataset": lambda root, folders: archives.shards(root, folders, count=4),
    "Parquet": lambda root, folders: archives.parquet_files(root, folders, count=3, row_group_size=4),
    "tar://": lambda root, folders: f"tar://::{tarred(root, folders)}",
    "tar:// of .tar.gz": lambda root, folders: f"tar://::{tarred(root, folders, mode='w:gz', name='x.tar.gz')}",
    "tar:// of class tars": lambda root, folders: f"tar://::{archives.train_tar(root / 'train.tar', folders)}",
    "zip://": lambda root, folders: f"zip://::{zipped(root, folders)}",
    "zip:// of Parquet": lambda root, folders: f"zip://::{zipped(root, archives.parquet_files(root / 'p', folders))}",
    "zip:// of WebDataset": lambda root, folders: f"zip://train-{{0000..0002}}.tar::{zipped(root, archives.shards(root / 's', folders))}",
    "zip:// of a tar": lambda root, folders: f"zip://x.tar::{zipped(root, tarred(root / 't', folders).parent)}",
    "tar:// in memory": lambda root, folders: f"tar://::memory://{archives.to_memory(tarred(root, folders))}",
    "simplecache:: of folders": lambda root, folders: f"simplecache::file://{folders}",
    "simplecache:: of a tar": lambda root, folders: f"simplecache::file://{tarred(root, folders)}",
    "simplecache:: of Parquet": lambda root, folders: f"simplecache::file://{archives.parquet_files(root, folders)}",
    "zip:// through simplecache::": lambda root, folders: f"zip://::simplecache::file://{zipped(root, folders)}",
    "tar:// through simplecache::": lambda root, folders: f"tar://::simplecache::file://{tarred(root, folders)}",
}


@pytest.fixture
def eager_threads() -> Iterator[None]:
    """Threads take turns after microseconds, so that one that shares a seek position with another is caught in between."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def rows(source: ImageSource, workers: int) -> list[tuple[int, str]]:
    hashes = read_ahead(lambda i: hashlib.sha256(source.read(i)).hexdigest(), range(len(source.items)), workers=workers, ahead=2 * workers)
    return list(zip([item.label for item in source.items], hashes, strict=True))


@pytest.mark.usefixtures("eager_threads")
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_every_way_gives_the_same_labels_and_bytes_at_1_2_and_8_workers(
    way: Way, folders: Path, truth: list[tuple[int, str]], tmp_path: Path
) -> None:
    source = open_source(way(tmp_path, folders))  # type: ignore[arg-type]
    assert source.notes == ()
    for workers in [1, 2, 8] * REPEATS:
        assert rows(source, workers) == truth


@pytest.mark.parametrize("way", ["tar:// of .tar.gz", "Parquet"])
def test_a_store_records_the_same_rows_labels_and_bytes_at_8_workers(
    way: str, folders: Path, truth: list[tuple[int, str]], taef2: str, tmp_path: Path
) -> None:
    settings = {"image_size": 64, "batch_size": 20, "device": "cpu", "workers": 8}
    run_quietly(encode_latents(EncodeLatentsConfig(images=str(WAYS[way](tmp_path, folders)), store=str(tmp_path / "s"), vae=taef2, **settings)))
    split = LatentStore.open(tmp_path / "s")["train"]
    table = split.manifest()
    assert list(zip(table["label"].to_pylist(), table["sha256"].to_pylist(), strict=True)) == truth
    assert split.labels.tolist() == [label for label, _ in truth]
    assert split.ok.all()


def test_one_damaged_image_of_a_zip_is_one_image_and_not_the_end_of_the_run(folders: Path, truth: list[tuple[int, str]], tmp_path: Path) -> None:
    path = zipped(tmp_path, folders)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    source = open_source(f"zip://::{path}")
    failed = []
    for number, (_, digest) in enumerate(truth):
        try:
            assert hashlib.sha256(source.read(number)).hexdigest() == digest
        except OSError as error:
            failed.append(str(error))
    (reason,) = failed
    assert reason.startswith("damaged in its archive (")


def test_names_that_windows_wrote_into_a_zip_are_refused_where_their_classes_would_be_lost(folders: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for name, data in archives.files_of(folders):
            info = zipfile.ZipInfo("x")
            info.filename = name.replace("/", "\\")
            archive.writestr(info, data)
    with pytest.raises(ImageError, match=r"parts its names by backslashes .*; unpack it"):
        open_source(f"zip://::{tmp_path / 'x.zip'}")


def test_a_zip_of_absolute_names_is_refused_with_advice_that_works(folders: Path, truth: list[tuple[int, str]], tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for name, data in archives.files_of(folders):
            archive.writestr(f"/data/{name}", data)
    for inside in ("", "data", "/data"):
        with pytest.raises(
            ImageError, match=r"x\.zip holds absolute names \(/data/.*unpack it, as unzip does without the leading /, and give the folder"
        ):
            open_source(f"zip://{inside}::{tmp_path}/x.zip")
    with zipfile.ZipFile(tmp_path / "x.zip") as archive:
        archive.extractall(tmp_path / "out")
    assert rows(open_source(tmp_path / "out" / "data"), 1) == truth


def test_an_encrypted_zip_is_refused_as_that_before_any_image_is_read(folders: Path, tmp_path: Path) -> None:
    path = zipped(tmp_path, folders)
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        member = next(info for info in archive.infolist() if not info.is_dir())
    entry = data.rindex(member.filename.encode()) - 46  # of the central directory, which is what readers believe
    assert data[entry : entry + 4] == b"PK\1\2"
    data[entry + 8] |= 1
    path.write_bytes(data)
    with pytest.raises(ImageError, match=r"x\.zip is encrypted \(.*unpack it with its password, and give the folder"):
        open_source(f"zip://::{path}")
