"""Which files of a folder or glob are one set, and that what a refusal advises takes exactly one."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import archives
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from revq.cache.sources import ImageSource, open_source
from revq.errors import ImageError

HASHES = [f"566cc9b19d7203f{digit}" for digit in "0123456789abcdef"]
A, B = "0d3c6b5e-7c3f-4f6a-9d56-3b8c5a0e4d11", "b7a0f3c2-19e4-4c8d-8a34-f21f6f0d9e20"


def write(folder: Path, names: Sequence[str]) -> Path:
    """`folder` with archives of these names, each with one image that is called as it is."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if name.lower().endswith(".parquet"):
            pq.write_table(pa.table({"image": [{"bytes": name.encode(), "path": name}], "label": [0]}), folder / name)
        elif name.lower().endswith(".tar"):
            archives.write_tar(folder / name, [(f"{name.partition('.')[0]}.jpg", name.encode())])
        else:
            (folder / name).write_bytes(name.encode())
    return folder


def files_read(source: ImageSource) -> list[str]:
    return [source.read(i).decode() for i in range(len(source.items))]


def pasted(message: str, after: str = "such as ") -> str:
    """What a shell hands to revq where the user pastes the advice."""
    advice = message.rpartition(after)[2]
    (word,) = subprocess.run(["sh", "-c", f"printf '%s\\n' {advice}"], capture_output=True, text=True, check=True).stdout.splitlines()
    return word


ONE_SET = {
    "hub": [f"train-{i:05d}-of-00003-{HASHES[i]}.parquet" for i in range(3)],
    "hub, one hash": [f"train-{i:05d}-of-00002-{HASHES[0]}.parquet" for i in range(2)],
    "hub, split of words": [f"my-train_set-{i:05d}-of-00002-{HASHES[i]}.parquet" for i in range(2)],
    "hub without hash": [f"train-{i:05d}-of-00002.parquet" for i in range(2)],
    "hub's conversion": [f"{i:04d}.parquet" for i in range(3)],
    "Spark": [f"part-{i:05d}-{A}-c000.snappy.parquet" for i in (0, 1, 5)],
    "Spark without -c": [f"part-{i:05d}-{A}.snappy.parquet" for i in range(2)],
    "Spark, several files of a task": [f"part-0000{i}-{A}-c00{c}.zstd.parquet" for i in range(2) for c in range(2)],
    "Spark, buckets": [f"part-00000-{A}_0000{i}.c000.snappy.parquet" for i in range(2)],
    "Delta": [f"part-00000-{A}-c000.snappy.parquet", f"part-00001-{B}-c000.snappy.parquet"],
    "Databricks": [f"part-{i:05d}-tid-7216-{A}-{i + 5}-1-c000.snappy.parquet" for i in range(3)],
    "Hive": [f"{i:06d}_0.parquet" for i in range(3)],
    "old Spark": [f"part-r-{i:05d}-{A}.gz.parquet" for i in range(2)],
    "_of_": [f"train_{i:04d}_of_0002.parquet" for i in range(2)],
    "_of_ from 1": [f"train_{i}_of_2.tar" for i in (1, 2)],
    "tars, hashes": [f"train-{i:05d}-of-00002-{HASHES[i]}.tar" for i in range(2)],
    "tars, _of_": [f"train_{i:04d}_of_0002.tar" for i in range(2)],
    "tars of two numbers": [f"train-512-{i:06d}.tar" for i in range(3)],
    "upper case": [f"TRAIN-{i:05d}-OF-00002.PARQUET" for i in range(2)],
    "dask": [f"part.{i}.parquet" for i in range(3)],
}


@pytest.mark.parametrize("names", ONE_SET.values(), ids=ONE_SET)
def test_parts_of_one_set_are_read_whole_from_their_folder_and_by_a_glob(tmp_path: Path, names: list[str]) -> None:
    write(tmp_path, names)
    assert files_read(open_source(tmp_path)) == names
    assert files_read(open_source(f"{tmp_path}/*{Path(names[0]).suffix}")) == names


COUNTED = ["hub", "hub, one hash", "hub without hash", "_of_", "tars, hashes", "tars, _of_", "upper case"]


@pytest.mark.parametrize("names", [ONE_SET[name] for name in COUNTED])
def test_a_part_that_is_missing_by_the_count_in_the_names_is_named_and_braces_take_the_others(tmp_path: Path, names: list[str]) -> None:
    write(tmp_path, names[:-1])
    with pytest.raises(ImageError, match=rf"1 of the {len(names)} parts .* are not there, the first is (\S+); .* braces") as caught:
        open_source(tmp_path)
    named = str(caught.value).partition("the first is ")[2].partition(";")[0]
    assert Path(names[-1]).match(named)
    assert files_read(open_source(f"{tmp_path}/{{{','.join(names[:-1])},{names[0]}}}")) == names[:-1]


@dataclass(frozen=True)
class Mixed:
    id: str
    message: str
    first: list[str]
    """The set that is advised."""
    others: list[str]
    folder: str = "data"
    remote: bool = False


HUB = ONE_SET["hub"]
SEVERAL = [
    Mixed("train and validation of the hub", r"\(train-of-00003, validation-of-00001-\w+\)", HUB, [f"validation-00000-of-00001-{HASHES[7]}.parquet"]),
    Mixed("tars", r"\(train, val\)", ["train-0000.tar", "train-0001.tar"], ["val-0000.tar", "val-0001.tar"]),
    Mixed("a name that begins another", r"\(train, train-extra\)", ["train-0000.tar", "train-0001.tar"], ["train-extra-0000.tar"]),
    Mixed("of other widths", r"\(t, t-x\)", ["t-1.tar", "t-10.tar"], ["t-x-1.tar", "t-x-2.tar"]),
    Mixed("numbers alone", r"\(0000\.tar, val\)", ["0000.tar", "0001.tar"], ["val-0000.tar"]),
    Mixed(
        "two uploads of other counts", r"\(train-of-00002, train-of-00003\)", [f"train-0000{i}-of-00002-{HASHES[i + 8]}.parquet" for i in (0, 1)], HUB
    ),
    Mixed(
        "two uploads of one count",
        rf"\(train-of-00002-{HASHES[0]}, train-of-00002-{HASHES[1]}\)",
        [f"train-0000{i}-of-00002-{HASHES[0]}.parquet" for i in (0, 1)],
        [f"train-0000{i}-of-00002-{HASHES[1]}.parquet" for i in (0, 1)],
    ),
    Mixed("with and without hashes", rf"\(train-of-00002, train-of-00002-{HASHES[0]}\)", ONE_SET["hub without hash"], ONE_SET["hub, one hash"]),
    Mixed("hashes of their own", r"\(train-of-00003\)", [f"train-0000{i}-of-00003.parquet" for i in range(3)], HUB),
    Mixed("one file each", r"several", [f"train-00000-of-00001-{HASHES[0]}.parquet"], [f"train-00000-of-00001-{HASHES[1]}.parquet"]),
    Mixed("two jobs of Spark", rf"\(part-{A}, part-{B}\)", ONE_SET["Spark"], [f"part-0000{i}-{B}-c000.snappy.parquet" for i in range(4)]),
    Mixed("a file of an older job", rf"\(part-{A}, part-{B}\)", ONE_SET["Spark without -c"], [f"part-00002-{B}.snappy.parquet"]),
    Mixed("a whole and its parts", r"\(train, train\.parquet\)", ["train-0.parquet", "train-1.parquet"], ["train.parquet"]),
    Mixed("no numbers", r"\(cats\.parquet, dogs\.parquet\)", ["cats.parquet"], ["dogs.parquet"]),
    Mixed("upper case", r"\(A, b\)", ["A-0.TAR", "A-1.TAR"], ["b-0.tar"]),
    Mixed("a folder to be quoted", r"\(train, val\)", ["train-0.tar", "train-1.tar"], ["val-0.tar", "val-1.tar"], folder="it's [1] set*"),
    Mixed("a folder with braces", r"\(train, val\)", ["train-0.tar"], ["val-0.tar", "val-1.tar"], folder="{a,b}"),
    Mixed("in memory", r"\(train, val\)", ["train-0.tar", "train-1.tar"], ["val-0.tar", "val-1.tar"], remote=True),
    Mixed("both kinds", r"holds both train-0\.parquet and train-0\.tar", ["train-0.parquet", "train-1.parquet"], ["train-0.tar", "train-1.tar"]),
    Mixed("both kinds, sets of one", r"\(train, val\)", ["train-0.parquet", "train-1.parquet"], ["z-0.tar", "val-0.parquet"]),
    Mixed("beside images", r"holds both train-0\.tar and images \(a\.jpg\)", ["train-0.tar", "train-1.tar"], ["a.jpg"]),
    Mixed("beside images, several sets", r"\(train, val\)", ["train-0.tar", "train-1.tar"], ["val-0.tar", "a.jpg"]),
]


@pytest.mark.parametrize("case", SEVERAL, ids=lambda case: case.id)
def test_several_sets_are_refused_and_what_the_message_proposes_takes_exactly_one(tmp_path: Path, case: Mixed) -> None:
    folder = write(tmp_path / case.folder, case.first + case.others)
    with pytest.raises(ImageError, match=case.message) as caught:
        open_source(f"memory://{archives.to_memory(folder)}" if case.remote else folder)
    assert files_read(open_source(pasted(str(caught.value)))) == case.first


@pytest.mark.parametrize("count", [3, 9])
def test_files_whose_names_say_nothing_can_be_named_together_as_the_message_proposes(tmp_path: Path, count: int) -> None:
    names = [f"{number}-{A[:-1]}{number}-0.parquet" for number in range(count)]
    write(tmp_path, names)
    with pytest.raises(ImageError, match=r"several sets .*; where together they are one set, name each in braces") as caught:
        open_source(tmp_path)
    told = str(caught.value).rpartition("; give one")[0]
    spec = pasted(told, "in braces: ") if count == 3 else f"{tmp_path}/{{{','.join(names)}}}"
    assert files_read(open_source(spec)) == names


def test_a_part_that_is_there_twice_is_refused_where_no_pattern_tells_old_from_new(tmp_path: Path) -> None:
    uploads = [[f"train-0000{i}-of-00002-{HASHES[2 * upload + i]}.parquet" for i in range(2)] for upload in range(2)]
    write(tmp_path, uploads[0] + uploads[1])
    with pytest.raises(ImageError, match=rf"holds part 00000 twice \({uploads[0][0]}, {uploads[1][0]}\); keep the files of one upload"):
        open_source(tmp_path)
    for name in uploads[0]:
        (tmp_path / name).unlink()
    assert files_read(open_source(tmp_path)) == uploads[1]


def test_a_glob_over_folders_checks_each_of_them(tmp_path: Path) -> None:
    names = [f"{folder}/train-0000{i}-of-00002.parquet" for folder in ("en", "fr") for i in range(2)]
    write(tmp_path, names)
    assert files_read(open_source(f"{tmp_path}/*/*.parquet")) == names
    (tmp_path / names[3]).unlink()
    with pytest.raises(ImageError, match=r"1 of the 2 parts .* the first is train-00001-of-00002\.parquet"):
        open_source(f"{tmp_path}/*/*.parquet")


def test_a_folder_around_a_folder_of_archives_is_told_which_to_give(tmp_path: Path) -> None:
    names = [f"data/{name}" for name in ONE_SET["hub"]]
    write(tmp_path, [*names, "README.md"])
    with pytest.raises(ImageError, match=r"holds no image: .* found 3 \.parquet \(.*1 \.md") as caught:
        open_source(tmp_path)
    assert files_read(open_source(pasted(str(caught.value), "archives, "))) == names


def test_folders_of_archives_are_all_told_and_not_the_first_alone(tmp_path: Path) -> None:
    names = [f"label={name}/part-0.parquet" for name in ("ant", "bee", "cat")]
    root = write(tmp_path / "it's [1]", names)
    with pytest.raises(ImageError, match=r"holds no image: .* found 3 \.parquet .* for the 2 in other folders too") as caught:
        open_source(root)
    told = str(caught.value).partition(" for the 2")[0]
    assert files_read(open_source(pasted(told, ", or "))) == names


@pytest.mark.parametrize("folder", ["plain", "it's odd"])
def test_folders_and_urls_that_a_message_names_can_be_pasted_and_are_right(tmp_path: Path, folder: str) -> None:
    """A zip, splits in a folder and in a tar, and one folder around the classes."""
    names = ["ant/1.jpg", "bee/2.jpg"]
    root = write(tmp_path / folder, [f"train/{name}" for name in names] + ["val/ant/3.jpg"])
    zipped = shutil.make_archive(str(tmp_path / f"{folder} zip"), "zip", root / "train")
    tarred = archives.write_tar(tmp_path / f"{folder}.tar", [(f"{split}/{name}", name.encode()) for split in ("train", "val") for name in names])
    for spec, after in ((zipped, "is a zip; give "), (str(root), "such as "), (str(tarred), "such as ")):
        with pytest.raises(ImageError) as caught:
            open_source(spec)
        source = open_source(pasted(str(caught.value), after))
        assert [(item.key, item.label) for item in source.items] == [(names[0], 0), (names[1], 1)]
    around = write(tmp_path / f"{folder} around", [f"all/{name}" for name in names])
    note = open_source(around).notes[0]
    assert [(item.key, item.label) for item in open_source(pasted(note, "class folders, give ")).items] == [(names[0], 0), (names[1], 1)]


def test_linked_archives_are_read_and_what_is_no_file_is_counted(tmp_path: Path) -> None:
    names = write(tmp_path / "far", ["t-0.tar", "t-1.tar", "p-0.parquet", "p-1.parquet"])
    for kind in ("tar", "parquet"):
        folder = tmp_path / kind
        folder.mkdir()
        for path in names.glob(f"*.{kind}"):
            (folder / path.name).symlink_to(path)
        os.mkfifo(folder / f"pipe.{kind}")
        pipe = os.open(folder / f"pipe.{kind}", os.O_RDWR)  # so that whoever opens it does not wait for ever
        source = open_source(folder)
        os.close(pipe)
        assert files_read(source) == [f"{kind[0]}-0.{kind}", f"{kind[0]}-1.{kind}"]
        assert source.skipped.counts() == {"no regular file": 1}
