"""Archives as sources: the same real photographs in every format, and the archives that must be refused."""

from __future__ import annotations

import contextlib
import io
import random
import subprocess
import tarfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import archives
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from revq.cache.image_sources import parquet as parquet_source
from revq.cache.image_sources.patterns import expand_braces
from revq.cache.image_sources.tar_index import TarWalk
from revq.cache.images import load_pixels
from revq.cache.places import Place
from revq.cache.sources import ImageSource, open_source, order_sha256
from revq.errors import ImageError


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, imagenet_sample: Path) -> Path:
    return archives.class_folders(tmp_path_factory.mktemp("photographs"), imagenet_sample)


@dataclass(frozen=True)
class Format:
    id: str
    make: Callable[[Path, Path], object]
    """(new folder, class folders) -> what open_source is given."""
    folder_keys: bool = False
    """The keys are those of the class folders."""


FORMATS = [
    Format("folders", lambda root, folders: folders, True),
    Format("folders-file-url", lambda root, folders: f"file://{folders}", True),
    Format("folders-memory", lambda root, folders: f"memory://{archives.to_memory(folders)}", True),
    Format("train-tar", lambda root, folders: archives.train_tar(root / "ILSVRC2012_img_train.tar", folders), True),
    Format("train-tar-memory", lambda root, folders: f"memory://{archives.to_memory(archives.train_tar(root / 't.tar', folders))}", True),
    Format("unpacked-train-tar", lambda root, folders: unpacked(root, folders), True),
    Format("tar-of-folders", lambda root, folders: archives.write_tar(root / "a.tar", archives.files_of(folders)), True),
    Format(
        "tar-of-one-folder", lambda root, folders: archives.write_tar(root / "a.tar", [("./p/" + n, d) for n, d in archives.files_of(folders)]), True
    ),
    Format("val-tar", lambda root, folders: archives.val_tar(root / "ILSVRC2012_img_val.tar", folders)),
    Format("shards", lambda root, folders: archives.shards(root, folders)),
    Format("one-shard", lambda root, folders: archives.shards(root, folders, count=1) / "train-0000.tar"),
    Format("shards-brace", lambda root, folders: f"{archives.shards(root, folders)}/train-{{0000..0002}}.tar"),
    Format("shards-json-glob", lambda root, folders: f"{archives.shards(root, folders, labels='label')}/train-*.tar"),
    Format("shards-memory-brace", lambda root, folders: f"memory://{archives.to_memory(archives.shards(root, folders))}/train-{{0000..0002}}.tar"),
    Format("parquet", lambda root, folders: archives.parquet_files(root, folders)),
    Format("parquet-glob", lambda root, folders: f"{archives.parquet_files(root, folders)}/train-*.parquet"),
    Format("parquet-one", lambda root, folders: archives.parquet_files(root, folders, count=1) / "train-00000-of-00001.parquet"),
    Format("parquet-memory", lambda root, folders: f"memory://{archives.to_memory(archives.parquet_files(root, folders))}"),
]


def unpacked(root: Path, folders: Path) -> Path:
    with tarfile.open(archives.train_tar(root / "outer" / "t.tar", folders)) as outer:
        outer.extractall(root / "inner", filter="data")
    return root / "inner"


def contents(source: ImageSource) -> list[bytes]:
    return [source.read(i) for i in range(len(source.items))]


@pytest.mark.parametrize("case", FORMATS, ids=lambda case: case.id)
def test_every_format_gives_the_same_labels_bytes_and_pixels_in_the_same_order(case: Format, folders: Path, tmp_path: Path) -> None:
    expected, source = open_source(folders), open_source(case.make(tmp_path, folders))  # type: ignore[arg-type]
    assert [item.label for item in source.items] == [item.label for item in expected.items]
    assert contents(source) == contents(expected)
    assert len({item.key for item in source.items}) == archives.CLASSES * archives.PER_CLASS
    if "shard" not in case.id or "json" in case.id:  # a .cls file has no name
        assert [item.class_name for item in source.items] == [item.class_name for item in expected.items]
    if case.folder_keys:
        assert order_sha256(source.items) == order_sha256(expected.items)
    assert source.notes == ()
    for index in (0, 13):
        np.testing.assert_array_equal(load_pixels(source.read(index), 64).array, load_pixels(expected.read(index), 64).array)


@pytest.mark.parametrize(
    "case", [case for case in FORMATS if case.id in {"train-tar", "shards", "parquet", "folders-memory"}], ids=lambda case: case.id
)
def test_eight_threads_in_any_order_read_what_one_reads(case: Format, folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet_source, "_BATCH_BYTES", 20_000)  # row groups of several batches, fewer of them kept than there are
    monkeypatch.setattr(parquet_source, "_KEPT_BATCHES", 2)
    source = open_source(case.make(tmp_path, folders))  # type: ignore[arg-type]
    expected = contents(open_source(folders))
    order = [*range(20), *random.Random(0).sample([*range(20)] * 10, 200)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(source.read, order)) == [expected[i] for i in order]


def test_items_are_a_sequence_whose_slices_share_the_columns(folders: Path) -> None:
    items = open_source(folders).items
    everything = list(items)
    assert [items[i] for i in range(-20, 20)] == everything * 2
    assert list(items[3:17:2][1:]) == everything[3:17:2][1:]
    assert list(items[::-1]) == everything[::-1]
    with pytest.raises(IndexError):
        items[20]


# tars


def test_the_header_walk_finds_what_tarfile_finds_in_every_dialect(tmp_path: Path) -> None:
    names = ["a.jpg", "d" * 90 + "/" + "e" * 90 + "/f.jpg", "g" * 300 + ".jpg", "caf\udce9.jpg", "häß/ü.jpg"]
    for tar_format in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        kept = [name for name in names if tar_format != tarfile.USTAR_FORMAT or len(name) < 256]
        path = archives.write_tar(
            tmp_path / f"{tar_format}.tar", [(name, name.encode("utf-8", "surrogateescape") * 99) for name in kept], tar_format=tar_format
        )
        with tarfile.open(path) as archive:
            expected = [(member.name.encode("utf-8", "surrogateescape"), member.offset_data, member.size) for member in archive]
        assert [member[:3] for member in TarWalk(Place(str(path)).open(), "x")] == expected


def test_a_member_past_8_gib_is_found_behind_a_binary_size(tmp_path: Path) -> None:
    path, size = tmp_path / "big.tar", 9 * 2**30
    info = tarfile.TarInfo("big.bin")
    info.size = size
    last = archives.tar_bytes([("a.jpg", b"bytes")])
    with open(path, "wb") as file:  # sparse on disk
        file.write(info.tobuf(tarfile.GNU_FORMAT))
        file.seek(512 + size)
        file.write(last)
    assert open_source(path).read(0) == b"bytes"


def test_a_tar_that_is_cut_anywhere_is_refused_and_never_taken_for_a_shorter_one(folders: Path, tmp_path: Path) -> None:
    whole = archives.train_tar(tmp_path / "whole.tar", folders).read_bytes()
    with tarfile.open(fileobj=io.BytesIO(whole)) as archive:
        members = archive.getmembers()
    end = members[-1].offset_data + -(-members[-1].size // 512) * 512
    cuts = [
        0,
        1,
        511,
        512,
        members[1].offset,
        members[1].offset + 100,
        members[1].offset_data,
        end - 600,
        end,
        *random.Random(1).sample(range(end), 20),
    ]
    for cut in cuts:
        path = tmp_path / "cut.tar"
        path.write_bytes(whole[:cut])
        with pytest.raises(ImageError, match=r"cut\.tar (is cut off|is no tar)"):
            open_source(path)


def test_tars_joined_by_cat_are_refused_and_by_tar_are_read_whole(tmp_path: Path) -> None:
    one, two = (archives.tar_bytes([(f"{name}/1.jpg", name.encode())]) for name in ("ant", "bee"))
    (tmp_path / "cat.tar").write_bytes(one + two)
    with pytest.raises(ImageError, match=rf"holds another tar behind its end mark, at byte {len(one)}, .* join tars with tar -Af"):
        open_source(tmp_path / "cat.tar")
    (tmp_path / "a.tar").write_bytes(one)
    (tmp_path / "b.tar").write_bytes(two)
    subprocess.run(["tar", "-Af", "a.tar", "b.tar"], cwd=tmp_path, check=True)
    assert [item.class_name for item in open_source(tmp_path / "a.tar").items] == ["ant", "bee"]
    (tmp_path / "z.tar").write_bytes(one + bytes(100_000) + b"no tar")
    assert len(open_source(tmp_path / "z.tar").items) == 1


def test_a_torn_class_tar_and_a_damaged_header_are_named(folders: Path, tmp_path: Path) -> None:
    inner = archives.tar_bytes([("a.JPEG", b"x" * 2000), ("b.JPEG", b"y" * 2000)])
    with pytest.raises(ImageError, match=r"n02\.tar in .*t\.tar is cut off inside its member b\.JPEG \(976 bytes are missing\)"):
        open_source(archives.write_tar(tmp_path / "t.tar", [("n01.tar", inner), ("n02.tar", inner[:4096])]))
    damaged = bytearray(archives.tar_bytes([("a.jpg", b"x" * 600), ("b.jpg", b"y")]))
    damaged[512 + 1024 + 3] ^= 1
    (tmp_path / "d.tar").write_bytes(damaged)
    with pytest.raises(ImageError, match=r"d\.tar is damaged: there is no tar header at byte 1536"):
        open_source(tmp_path / "d.tar")


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=3000), st.integers(0, 3000))
def test_no_bytes_make_the_header_walk_raise_anything_but_its_own_error(tmp_path_factory: pytest.TempPathFactory, noise: bytes, at: int) -> None:
    path = tmp_path_factory.mktemp("noise") / "n.tar"
    good = archives.tar_bytes([("a" * 120 + ".jpg", b"x" * 600), ("b.jpg", b"y")], tar_format=tarfile.PAX_FORMAT)
    path.write_bytes(good[:at] + noise + good[at + len(noise) :])
    with contextlib.suppress(ImageError):
        open_source(path)


@pytest.mark.parametrize("mode", ["gz", "bz2", "xz"])
def test_a_compressed_tar_is_refused_by_its_name_and_by_its_content(mode: str, tmp_path: Path) -> None:
    for name in (f"a.tar.{mode}", "a.tar"):
        with tarfile.open(tmp_path / name, f"w:{mode}") as archive:
            archive.addfile(tarfile.TarInfo("a.jpg"))
        with pytest.raises(ImageError, match=r"compressed.*unpack it to a plain \.tar"):
            open_source(tmp_path / name)


def test_a_later_member_replaces_an_earlier(tmp_path: Path) -> None:
    assert open_source(archives.write_tar(tmp_path / "twice.tar", [("a.jpg", b"old"), ("b.jpg", b"b"), ("./a.jpg", b"new")])).read(0) == b"new"


def test_a_tar_that_changes_after_it_was_listed_stops_the_run_instead_of_giving_garbage(folders: Path, tmp_path: Path) -> None:
    path = archives.write_tar(tmp_path / "a.tar", archives.files_of(folders))
    source = open_source(path)
    source.read(3)
    archives.write_tar(path, archives.files_of(folders)[1:])
    with pytest.raises(ImageError, match="has changed since it was listed"):
        source.read(3)


def test_names_that_are_not_utf8_are_read_from_tars(tmp_path: Path) -> None:
    source = open_source(archives.write_tar(tmp_path / "a.tar", [("caf\udce9/caf\udce9.png", b"1"), ("dog/x.png", b"2")]))
    assert [(item.key, item.label, item.class_name) for item in source.items] == [(r"caf\xe9/caf\xe9.png", 0, r"caf\xe9"), ("dog/x.png", 1, "dog")]
    assert source.read(0) == b"1"


def test_validation_images_without_the_devkit_have_no_labels_and_a_note_says_so(folders: Path, tmp_path: Path) -> None:
    source = open_source(archives.val_tar(tmp_path / "val.tar", folders, devkit=False))
    assert {item.label for item in source.items} == {-1}
    assert "ILSVRC2012_devkit_t12.tar.gz" in source.notes[0]
    (tmp_path / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(b"torn")
    with pytest.raises(ImageError, match=r"devkit_t12\.tar\.gz cannot be read"):
        open_source(tmp_path / "val.tar")


# shards


def test_the_same_key_in_two_shards_is_two_images_and_a_label_without_an_image_is_recorded(tmp_path: Path) -> None:
    archives.write_tar(tmp_path / "s-0.tar", [("000.jpg", b"a"), ("000.cls", b"3\n"), ("001.cls", b"4"), ("README.md", b"")])
    archives.write_tar(
        tmp_path / "s-1.tar", [("000.json", b'{"cls": 7, "class_name": "cat"}'), ("000.png", b"b"), ("000.seg.png", b"c"), ("002.jpg", b"d")]
    )
    source = open_source(tmp_path)
    found = [(item.key, item.label, item.class_name) for item in source.items]
    assert found == [("s-0.tar/000.jpg", 3, ""), ("s-0.tar/001", 4, ""), ("s-1.tar/000.png", 7, "cat"), ("s-1.tar/002.jpg", -1, "")]
    assert [source.read(i) for i in (0, 2, 3)] == [b"a", b"b", b"d"]
    with pytest.raises(OSError, match="has no image"):
        source.read(1)
    assert [note.partition(" of ")[0] for note in source.notes] == ["1", "1", "2 entries"]
    assert source.skipped.counts() == {".md": 1, ".seg.png": 1}


def test_a_label_that_is_no_number_is_named(tmp_path: Path) -> None:
    archives.write_tar(tmp_path / "a.tar", [("000.jpg", b"a"), ("000.cls", b"cat")])
    with pytest.raises(ImageError, match=r"000\.cls in .*a\.tar must hold the number of a class, not 'cat'"):
        open_source(tmp_path / "a.tar")


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("a-{008..011}.tar", ["a-008.tar", "a-009.tar", "a-010.tar", "a-011.tar"]),
        ("{3..1}", ["3", "2", "1"]),
        ("{0..9..4}{a,b}", ["0a", "0b", "4a", "4b", "8a", "8b"]),
        ("x{a}y{}", ["x{a}y{}"]),
        ("{a,b{1..2}}", ["{a,b1}", "{a,b2}"]),
    ],
)
def test_braces_expand_as_in_a_shell(pattern: str, names: list[str]) -> None:
    if pattern == "{a,b{1..2}}":
        names = ["a", "b1", "a", "b2"]  # nested: every choice, some of them twice
    assert expand_braces(pattern) == names


def test_patterns_that_match_nothing_or_only_in_part_name_what_is_missing(folders: Path, tmp_path: Path) -> None:
    archives.shards(tmp_path, folders)
    for pattern in ("none-*.tar", "none-{0..3}.tar"):
        with pytest.raises(ImageError, match="no file matches"):
            open_source(f"{tmp_path}/{pattern}")
    with pytest.raises(ImageError, match=r"2 of the 5 files .* the first is .*train-0003\.tar"):
        open_source(f"{tmp_path}/train-{{0000..0004}}.tar")


def test_folders_with_more_than_one_kind_or_set_of_files_are_refused(folders: Path, tmp_path: Path) -> None:
    archives.shards(tmp_path / "mixed", folders)
    archives.parquet_files(tmp_path / "mixed", folders)
    (tmp_path / "images").mkdir()
    archives.write_tar(tmp_path / "images" / "a.tar", [("a.jpg", b"a")])
    (tmp_path / "images" / "b.jpg").write_bytes(b"b")
    archives.shards(tmp_path / "sets", folders)
    (tmp_path / "sets" / "val-0000.tar").write_bytes((tmp_path / "sets" / "train-0000.tar").read_bytes())
    (archives.parquet_files(tmp_path / "gap", folders, count=3) / "train-00001-of-00003.parquet").unlink()
    cases = {"mixed": r"holds both .*\.tar", "images": r"both a\.tar and images \(b\.jpg\)", "sets": r"several sets of files \(train, val\)"}
    for name, message in {**cases, "gap": r"1 of the 3 parts .* train-00001-of-00003\.parquet"}.items():
        with pytest.raises(ImageError, match=message):
            open_source(tmp_path / name)


# Parquet


def test_a_row_group_is_decoded_once_for_threads_that_read_near_each_other(folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = archives.parquet_files(tmp_path, folders, count=1, row_group_size=5) / "train-00000-of-00001.parquet"
    source = open_source(path)
    begun: list[int] = []
    start = parquet_source.ParquetSource._start
    monkeypatch.setattr(parquet_source.ParquetSource, "_start", lambda self, part, group, rows: begun.append(group) or start(self, part, group, rows))
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(source.read, range(20))) == contents(open_source(folders))
    assert sorted(begun) == [0, 1, 2, 3]


def test_parquet_without_labels_or_bytes_says_so_and_other_files_are_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [{"bytes": b"1", "path": None}, {"bytes": None, "path": "x.jpg"}]}), tmp_path / "a.parquet")
    source = open_source(tmp_path / "a.parquet")
    assert [item.key for item in source.items] == ["a.parquet/0000000", "a.parquet/0000001/x.jpg"]
    assert "2 of the 2 images" in source.notes[0]
    with pytest.raises(OSError, match="no bytes"):
        source.read(1)
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "b.parquet")
    (tmp_path / "c.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-20])
    for name, message in {"b": "must have one column of images", "c": "no Parquet file, or is cut off"}.items():
        with pytest.raises(ImageError, match=message):
            open_source(tmp_path / f"{name}.parquet")


def test_a_flipped_byte_in_parquet_makes_its_images_unreadable_and_no_others(folders: Path, tmp_path: Path) -> None:
    path = archives.parquet_files(tmp_path, folders, count=1, row_group_size=5) / "train-00000-of-00001.parquet"
    table = pq.read_table(path)
    pq.write_table(table, path, row_group_size=5, write_page_checksum=True, compression="none", use_dictionary=False)
    data = bytearray(path.read_bytes())
    data[data.find(contents(open_source(folders))[7][100:200])] ^= 1
    path.write_bytes(data)
    source = open_source(path)
    with pytest.raises(OSError, match="is damaged there"):
        source.read(7)
    assert source.read(12) == contents(open_source(folders))[12]
