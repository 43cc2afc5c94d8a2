"""Tars of class folders, made in every way that people make them: always the labels of the folders themselves."""

from __future__ import annotations

import gzip
import io
import os
import shutil
import subprocess
import tarfile
from pathlib import Path

import archives
import pytest

from revq.cache.image_sources.folder import IMAGE_SUFFIXES
from revq.cache.sources import open_source, order_sha256
from revq.errors import ImageError

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "GNU": tarfile.GNU_FORMAT, "PAX": tarfile.PAX_FORMAT}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory, imagenet_sample: Path) -> Path:
    """home/data/photos/CLASS/NAME, so that there are folders around it."""
    return archives.class_folders(tmp_path_factory.mktemp("home") / "data" / "photos", imagenet_sample)


COMMANDS = {
    "the folder's inside, .": "tar -C data/photos -cf $TAR .",
    "the folder's inside, ./*": "cd data/photos && tar -cf $TAR ./*",
    "the folder's inside, *": "cd data/photos && tar -cf $TAR *",
    "the folder": "tar -C data -cf $TAR photos",
    "the folder, ./": "tar -C data -cf $TAR ./photos/",
    "one folder around, .": "tar -C data -cf $TAR .",
    "two folders around": "tar -cf $TAR data/photos",
    "two folders around, .": "tar -cf $TAR .",
    "two folders around, files alone": "find data -type f | tar -cf $TAR -T -",
    "absolute": 'tar -P -cf $TAR "$PWD/data/photos"',
    "absolute, each class": 'tar -P -cf $TAR "$PWD"/data/photos/*',
    "files alone, ./": "cd data/photos && find . -type f | tar -cf $TAR -T -",
    "files alone, in disorder": "cd data/photos && find * -type f | sort -r | tar -cf $TAR -T -",
    "through ..": "cd data/photos/$(ls data/photos | head -n 1) && tar -P -cf $TAR ../*",
    "appended": "cd data/photos && for class in *; do tar -rf $TAR ./$class; done",
    "twice": "cd data/photos && tar -cf $TAR * && tar -rf $TAR ./*",
}


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_a_tar_by_any_command_has_the_rows_of_the_folders(command: str, photos: Path, tmp_path: Path) -> None:
    subprocess.run(["sh", "-ec", command], cwd=photos.parents[1], env={"PATH": "/usr/bin:/bin", "TAR": str(tmp_path / "x.tar")}, check=True)
    assert_the_same(tmp_path / "x.tar", photos)


def assert_the_same(spec: Path | str, photos: Path) -> None:
    """Keys, labels, class names and bytes; and nothing that was passed over."""
    source, expected = open_source(spec), open_source(photos)
    assert order_sha256(source.items) == order_sha256(expected.items)
    assert [item.class_name for item in source.items] == [item.class_name for item in expected.items]
    assert [source.read(i) for i in range(len(source.items))] == [expected.read(i) for i in range(len(expected.items))]
    assert source.notes == ()


def pack(path: Path, photos: Path, root: str, *, tar_format: int = tarfile.GNU_FORMAT, folders: bool = True) -> Path:
    """As `tar` does, with `root` before every name, just as it is given."""
    with tarfile.open(path, "w", format=tar_format) as archive:
        for file in [photos, *sorted(photos.rglob("*"))]:
            info = archive.gettarinfo(file)
            info.name = f"{root}/{file.relative_to(photos).as_posix()}" if file != photos else f"{root}/"
            if file.is_file():
                archive.addfile(info, io.BytesIO(file.read_bytes()))
            elif folders:
                archive.addfile(info)
    return path


ROOTS = [".", "./", "./photos", "photos", "a/b/photos", "/srv/photos", ".//a/./photos"]


@pytest.mark.parametrize("root", ROOTS)
@pytest.mark.parametrize("tar_format", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("folders", [True, False], ids=["entries for folders", "none"])
def test_every_dialect_root_and_kind_of_entries_gives_the_labels_of_the_folders(
    root: str, tar_format: int, folders: bool, photos: Path, tmp_path: Path
) -> None:
    assert_the_same(pack(tmp_path / "x.tar", photos, root, tar_format=tar_format, folders=folders), photos)


@pytest.mark.parametrize("tar_format", FORMATS.values(), ids=FORMATS)
def test_names_too_long_for_a_header_keep_their_class(tar_format: int, photos: Path, tmp_path: Path) -> None:
    length = 90 if tar_format == tarfile.USTAR_FORMAT else 180  # ustar has 100 bytes for a name and 155 for its folders
    root = tmp_path / "long"
    for i, folder in enumerate(sorted(photos.iterdir())):
        (root / f"{'c' * length}{i}").mkdir(parents=True)
        for file in folder.iterdir():
            (root / f"{'c' * length}{i}" / f"{'n' * length}{file.name[-7:]}").write_bytes(file.read_bytes())
    assert_the_same(pack(tmp_path / "x.tar", root, "photos", tar_format=tar_format), root)


@pytest.mark.parametrize("root", [".", "photos"])
def test_what_macos_packs_beside_every_file_is_no_image_and_no_class(root: str, photos: Path, tmp_path: Path) -> None:
    members = [(f"{root}/._.", b"\0\5\x16\7"), (f"{root}/.DS_Store", b"x"), (f"{root}/__MACOSX/._a.jpg", b"x")]
    members += [(f"{root}/._{folder.name}", b"\0\5\x16\7") for folder in photos.iterdir()]
    for name, data in archives.files_of(photos):
        folder, _, file = name.partition("/")
        members += [(f"{root}/{folder}/._{file}", b"\0\5\x16\7"), (f"{root}/{name}", data)]
    source = open_source(archives.write_tar(tmp_path / "x.tar", members))
    assert order_sha256(source.items) == order_sha256(open_source(photos).items)
    count = archives.CLASSES * archives.PER_CLASS
    assert source.skipped.counts() == {"hidden": count + archives.CLASSES + 2, "system folder": 1}
    assert f"{count + archives.CLASSES + 3} entries of {source.name} are passed over: " in source.notes[0]


@pytest.mark.parametrize("members", [1, 4])
def test_a_packed_tar_is_read_through_a_url_and_as_its_refusal_advises(members: int, photos: Path, tmp_path: Path) -> None:
    data = pack(tmp_path / "x.tar", photos, ".").read_bytes()
    step = -(-len(data) // members)
    (tmp_path / "x.tar").unlink()
    path = tmp_path / "it's x.tar.gz"  # gzip may be in several members, as parallel packers write it
    path.write_bytes(b"".join(gzip.compress(data[at : at + step]) for at in range(0, len(data), step)))
    assert_the_same(f"tar://::{path}", photos)
    with pytest.raises(ImageError, match=r"compressed \(gzip\)") as caught:
        open_source(path)
    subprocess.run(["sh", "-c", str(caught.value).partition("first: ")[2]], check=True)
    assert_the_same(tmp_path / "it's x.tar", photos)


def test_a_lone_class_is_one_where_the_root_has_an_entry_and_images_alone_have_none(photos: Path, tmp_path: Path) -> None:
    one = tmp_path / "one"
    (one / "ant").mkdir(parents=True)
    (one / "ant" / "1.jpg").write_bytes(archives.files_of(photos)[0][1])
    alone = open_source(pack(tmp_path / "a.tar", one, "."))
    assert [(item.key, item.label, item.class_name) for item in alone.items] == [("ant/1.jpg", 0, "ant")]
    flat = open_source(pack(tmp_path / "b.tar", one / "ant", "photos", folders=False))
    assert [(item.key, item.label, item.class_name) for item in flat.items] == [("1.jpg", -1, "")]
    assert "photos/" in flat.notes[0]


@pytest.mark.parametrize("root", [".", "", "data", "./data"])
def test_splits_in_a_tar_are_no_classes_and_the_url_that_the_message_names_holds_one(root: str, photos: Path, tmp_path: Path) -> None:
    members = [(f"{root}/{split}/{name}".lstrip("/" * (not root)), data) for split in ("train", "val") for name, data in archives.files_of(photos)]
    path = archives.write_tar(tmp_path / "x.tar", members)
    with pytest.raises(ImageError, match=r"holds the splits train/, val/, which would be taken for classes") as caught:
        open_source(path)
    assert_the_same(str(caught.value).partition("such as ")[2], photos)


def test_of_names_that_a_url_does_not_find_the_plain_tar_is_advised(photos: Path, tmp_path: Path) -> None:
    path = pack(tmp_path / "x.tar", photos, "/srv/photos")
    with pytest.raises(ImageError, match=r"holds no image.*of names that begin with / or hold \.\. tar:// finds none: give the plain \.tar itself"):
        open_source(f"tar://::{path}")
    assert_the_same(path, photos)
    splits = [(f"/srv/{split}/{name}", data) for split in ("train", "val") for name, data in archives.files_of(photos)]
    with pytest.raises(ImageError, match=r"would be taken for classes; unpack it and give one of them$"):
        open_source(archives.write_tar(tmp_path / "y.tar", splits))


def test_links_in_a_tar_are_the_images_that_they_name_as_in_folders(photos: Path, tmp_path: Path) -> None:
    root = shutil.copytree(photos, tmp_path / "photos")
    classes = sorted(root.iterdir())
    (root / "zoo").mkdir()
    for i, folder in enumerate(classes):
        first = min(folder.iterdir()).name
        (root / "zoo" / f"{i}.JPG").symlink_to(f"../{folder.name}/{first}")
        (root / "zoo" / f"{i}-hard.jpg").hardlink_to(folder / first)
        (root / "zoo" / f"{i}-twice.jpg").symlink_to(f"{i}.JPG")
    subprocess.run(["tar", "-C", str(root), "-cf", str(tmp_path / "x.tar"), "."], check=True)
    assert_the_same(tmp_path / "x.tar", root)
    (root / "zoo" / "all").symlink_to(f"../{classes[0].name}")
    (root / "zoo" / "gone.txt").symlink_to("nowhere")
    (root / "zoo" / "gone.jpg").symlink_to("nowhere")
    os.mkfifo(root / "zoo" / "pipe.jpg")
    subprocess.run(["tar", "-C", str(root), "-cf", str(tmp_path / "x.tar"), "."], check=True)
    source = open_source(tmp_path / "x.tar")
    assert source.skipped.counts() == {"broken link": 1, "link to a folder": 1, "no regular file": 1}
    (gone,) = [i for i, item in enumerate(source.items) if item.key == "zoo/gone.jpg"]
    with pytest.raises(OSError, match="a link to nothing in the archive"):
        source.read(gone)
    assert open_source(root).skipped.counts() == {"broken link": 1, "no regular file": 1}


def test_every_suffix_of_an_image_in_either_case_is_read_from_tars_of_every_kind(tmp_path: Path) -> None:
    names = [f"{i:02d}{suffix.upper() if i % 2 else suffix}" for i, suffix in enumerate(sorted(IMAGE_SUFFIXES))]
    odd = [("x.heic", b"x"), ("y.AVIF", b"y")]
    plain = archives.write_tar(tmp_path / "plain.tar", [*((f"ant/{name}", name.encode()) for name in names), *((f"ant/{n}", d) for n, d in odd)])
    shard = archives.write_tar(tmp_path / "shard.tar", [*((name, name.encode()) for name in names), ("00.cls", b"0"), *odd])
    inner = archives.tar_bytes([*((name, name.encode()) for name in names), *odd])
    of_tars = archives.write_tar(tmp_path / "tars.tar", [("ant.tar", inner), ("bee.tar", inner)])
    for path, times in ((plain, 1), (shard, 1), (of_tars, 2)):
        source = open_source(path)
        assert [source.read(i).decode() for i in range(len(source.items))] == names * times
        assert source.skipped.counts() == {".avif": times, ".heic": times}
