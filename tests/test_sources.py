"""Image sources: what is listed, in which order, with which labels, and what is refused."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from revq.cache.image_sources.folder import IMAGE_SUFFIXES
from revq.cache.image_sources.photographs import HELD_OUT_FILES, TRAIN_FILES, view_boxes
from revq.cache.images import load_pixels
from revq.cache.sources import FolderSource, open_source, order_sha256
from revq.errors import ImageError


def plant(root: Path, *names: str) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    return root


def test_a_flat_folder_of_images_is_read_in_name_order_without_labels(tmp_path: Path) -> None:
    source = open_source(plant(tmp_path, "b.png", "a.JPEG", "c.webp", ".hidden.png", "notes.txt"))
    assert [(item.key, item.label, item.class_name) for item in source.items] == [("a.JPEG", -1, ""), ("b.png", -1, ""), ("c.webp", -1, "")]
    assert source.read(0) == b"a.JPEG"


def test_class_folders_are_numbered_by_sorted_name_and_read_at_any_depth(tmp_path: Path) -> None:
    source = open_source(plant(tmp_path, "dog/2.jpg", "dog/1.jpg", "cat/deep/er/9.jpg", "cat/1.jpg", "cat/.trash/0.jpg", ".git/x.png", "README"))
    assert [(item.key, item.label) for item in source.items] == [("cat/1.jpg", 0), ("cat/deep/er/9.jpg", 0), ("dog/1.jpg", 1), ("dog/2.jpg", 1)]
    assert source.items[3].class_name == "dog"
    assert source.read(1) == b"cat/deep/er/9.jpg"


ASIDE = ["__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN", "System Volume Information", ".git", ".ipynb_checkpoints", "PaxHeaders.12", "lost+found"]
ASIDE += [
    "$Recycle.Bin",
    "RECYCLER",
    "FOUND.000",
    "@Recycle",
    "@Recently-Snapshot",
    "#snapshot",
    "~snapshot",
    "Network Trash Folder",
    "Temporary Items",
]


@pytest.mark.parametrize("remote", [False, True])
def test_folders_that_hold_no_image_and_those_that_systems_leave_are_no_classes_and_are_told(tmp_path: Path, remote: bool) -> None:
    plant(tmp_path, *(f"{name}/deep/1.jpg" for name in ASIDE), "b/1.jpg", "b/@eaDir/1.jpg/x.jpg", "b/.DS_Store", "texts/a.txt", "z/2.jpg")
    plant(tmp_path, "latents.zarr/zarr.json", "latents.zarr/train/zarr.json", "latents.zarr/train/latents/c/0.png", "README", "LICENSE")
    (tmp_path / "empty").mkdir()
    source = open_source(f"local://{tmp_path}" if remote else tmp_path)
    assert [(item.key, item.label, item.class_name) for item in source.items] == [("b/1.jpg", 0, "b"), ("z/2.jpg", 1, "z")]
    told = {"system folder": 17, "hidden": 3, "folder without an image": 2, "no suffix": 2, ".txt": 1, "Zarr store": 1}
    assert source.skipped.counts() == told
    assert source.notes == (source.notes[0],)
    assert source.notes[0].startswith(f"26 entries of {source.name} are passed over: 17 system folder (")
    for text in ("2 folder without an image (empty/, ...)", "1 .txt (texts/a.txt)", "1 Zarr store (latents.zarr)"):
        assert text in source.notes[0]


def test_every_suffix_that_the_decoder_reads_is_an_image_and_what_it_cannot_read_is_counted(tmp_path: Path) -> None:
    picture = Image.new("RGB", (9, 9), (200, 100, 50))
    formats = {"bmp": "BMP", "gif": "GIF", "png": "PNG", "apng": "PNG", "tif": "TIFF", "tiff": "TIFF", "webp": "WEBP", "mpo": "MPO"}
    formats |= dict.fromkeys(("jpg", "jpeg", "jpe", "jfif"), "JPEG") | dict.fromkeys(("ppm", "pgm", "pbm", "pnm"), "PPM")
    for suffix, name in formats.items():
        grey = {"pgm": "L", "pbm": "1"}.get(suffix, "RGB")
        picture.convert(grey).save(tmp_path / f"a.{suffix}", name)
        picture.convert(grey).save(tmp_path / f"B.{suffix.upper()}", name)
    plant(tmp_path, "a.heic", "a.svg", "a.xml", "b.xml", "noname")
    source = open_source(tmp_path)
    assert {f".{suffix}" for suffix in formats} == IMAGE_SUFFIXES
    assert len(source.items) == 2 * len(formats)
    assert {load_pixels(source.read(i), 8).array.shape for i in range(len(source.items))} == {(3, 8, 8)}
    assert source.skipped.counts() == {".xml": 2, ".heic": 1, ".svg": 1, "no suffix": 1}


REFUSED = [
    ("train and val", ["train/a/1.jpg", "train/b/1.jpg", "val/b/1.jpg"], "train", ["a/1.jpg", "b/1.jpg"]),
    ("flat ones", ["Test/1.jpg", "training/1.jpg"], "Test", ["1.jpg"]),
    ("one alone", ["train/a/1.jpg", "train/b/2.jpg", "info/a.txt"], "train", ["a/1.jpg", "b/2.jpg"]),
    ("COCO's", ["train2017/1.jpg", "val2017/1.jpg"], "train2017", ["1.jpg"]),
    ("COCO's and more", ["extra/1.jpg", "test2017/a/1.jpg", "train2017/a/1.jpg"], "test2017", ["a/1.jpg"]),
    ("DIV2K's", ["DIV2K_train_HR/1.png", "DIV2K_valid_HR/2.png"], "DIV2K_train_HR", ["1.png"]),
    ("a third beside them", ["extra/1.jpg", "test/b/1.jpg", "train/a/1.jpg"], "test", ["b/1.jpg"]),
]


@pytest.mark.parametrize(("names", "first", "keys"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED])
def test_splits_are_never_taken_for_classes_and_the_folder_that_the_message_names_is_read(
    tmp_path: Path, names: list[str], first: str, keys: list[str]
) -> None:
    plant(tmp_path, *names)
    with pytest.raises(ImageError, match=rf"holds the splits {first}/.* such as .*/{first}$") as caught:
        open_source(tmp_path)
    assert [item.key for item in open_source(str(caught.value).partition("such as ")[2]).items] == keys


@pytest.mark.parametrize(
    "names",
    [
        ["bus/1.jpg", "train/1.jpg", "train/red/2.jpg"],
        ["train/1.jpg"],
        ["bus/1.jpg", "test/1.jpg", "train/2.jpg"],
        ["trains/a/1.jpg", "val/b/2.jpg"],
        ["train station/1.jpg", "test tube/1.jpg"],
        ["test1/1.jpg", "test2/1.jpg"],
        ["retrain2017/1.jpg", "val2017/1.jpg"],
    ],
)
def test_a_class_may_be_called_train(tmp_path: Path, names: list[str]) -> None:
    source = open_source(plant(tmp_path, *names))
    assert sorted({item.class_name for item in source.items}) == sorted({name.partition("/")[0] for name in names})


def test_links_to_images_and_folders_are_followed_at_any_depth_as_imagefolder_does(tmp_path: Path) -> None:
    from torchvision.datasets import ImageFolder

    plant(tmp_path, "far/1.jpg", "far/deep/2.jpg", "root/ant/3.jpg", "root/ant/sub/4.jpg", "root/bee/5.jpg")
    for link, target in {"cow": "../far", "ant/far": "../../far/deep", "bee/6.jpg": "../../far/1.jpg", "bee/sub": "../ant/sub"}.items():
        (tmp_path / "root" / link).symlink_to(target)
    source = open_source(tmp_path / "root")
    expected = ImageFolder(str(tmp_path / "root")).samples
    assert sorted((str(tmp_path / "root" / item.key), item.label) for item in source.items) == sorted(expected)
    assert source.read(0) == b"root/ant/3.jpg"
    assert source.notes == ()


def test_links_that_lead_back_end_and_are_told(tmp_path: Path) -> None:
    plant(tmp_path, "root/ant/1.jpg", "root/bee/2.jpg")
    for link, target in {"ant/up": "..", "ant/self": ".", "bee/other": "../ant", "ant/other": "../bee", "bee/gone": "nowhere"}.items():
        (tmp_path / "root" / link).symlink_to(target)
    source = open_source(tmp_path / "root")
    assert [item.key for item in source.items] == ["ant/1.jpg", "ant/other/2.jpg", "bee/2.jpg", "bee/other/1.jpg"]
    assert source.skipped.counts() == {"link to a folder around it": 6, "broken link": 2}


UNLISTABLE = {
    "a class folder": "{root}/classes",
    "a folder in a class folder": "{root}/deep",
    "behind a URL": "local://{root}/classes",
    "behind a cache": "simplecache::{root}/classes",
    "a folder of a glob": "{root}/classes/*/x*.tar",
    "the folder itself": "{root}/classes/bee",
}
LISTER = """
import os, sys
import fsspec.implementations.cached, fsspec.implementations.local
from revq.cache.sources import open_source
if os.getuid() == 0:  # root may list every folder; who nobody is may not read the installation, so that all is imported before
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
for spec in sys.argv[1:]:
    try:
        print("listed", len(open_source(spec).items))
    except Exception as error:
        print(type(error).__name__, error)
"""


@pytest.fixture
def locked_folders() -> Iterator[Path]:
    """Class folders of which `classes/bee` and `deep/ant/in` may be listed by nobody. Not below `tmp_path`, which is its owner's alone."""
    with tempfile.TemporaryDirectory(prefix="revq-test-") as folder:
        root = plant(Path(folder), "classes/ant/1.jpg", "classes/bee/2.jpg", "classes/bee/x.tar", "deep/ant/1.jpg", "deep/ant/in/2.jpg")
        locked = [root / "classes" / "bee", root / "deep" / "ant" / "in"]
        root.chmod(0o755)
        for path in locked:
            path.chmod(0)
        yield root
        for path in locked:
            path.chmod(0o700)


def test_a_folder_that_cannot_be_listed_is_an_error_and_no_class_that_disappears(locked_folders: Path) -> None:
    specs = [spec.format(root=locked_folders) for spec in UNLISTABLE.values()]
    done = subprocess.run([sys.executable, "-c", LISTER, *specs], capture_output=True, text=True, cwd="/", check=True)
    for kind, line in zip(UNLISTABLE, done.stdout.splitlines(), strict=True):
        assert line.startswith("ImageError "), f"{kind}: {line}"
        assert re.search("cannot be (listed|reached) .*Permission denied", line), f"{kind}: {line}"
        assert "/bee" in line or "/ant/in" in line, f"{kind}: {line}"


def test_a_name_that_is_not_utf8_is_listed_with_escapes_and_can_be_read(tmp_path: Path) -> None:
    name = b"caf\xe9.png"
    with open(bytes(tmp_path) + b"/" + name, "wb") as file:
        file.write(b"bytes")
    source = open_source(tmp_path)
    assert source.items[0].key == r"caf\xe9.png"
    assert source.read(0) == b"bytes"


def test_the_name_of_a_folder_source_does_not_depend_on_how_its_path_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(tmp_path / "images", "a.png")
    monkeypatch.chdir(tmp_path)
    assert FolderSource("images/").name == FolderSource("./images").name == FolderSource(tmp_path / "images").name


def test_a_missing_folder_a_file_and_a_folder_without_images_are_each_told_apart(tmp_path: Path) -> None:
    plant(tmp_path, "texts/a.txt", "texts/b.txt", "texts/c.csv", "nested/x/y.md", "one.png")
    (tmp_path / "empty").mkdir()
    cases = {"missing": "does not exist", "one.png": "is a file", "empty": "holds no file", "nested": r"1 \.md \(x/y\.md\)"}
    cases["texts"] = r"found 2 \.txt \(a\.txt, \.\.\.\), 1 \.csv"
    for name, message in cases.items():
        with pytest.raises(ImageError, match=message):
            open_source(tmp_path / name)


def test_images_beside_class_folders_with_images_are_refused_as_labels_would_be_a_guess(tmp_path: Path) -> None:
    plant(tmp_path, "loose.png", "cat/1.png")
    with pytest.raises(ImageError, match=r"both directly \(loose.png\) and in class folders \(cat/\)"):
        open_source(tmp_path)


def test_the_order_hash_sees_names_labels_and_order() -> None:
    items = open_source("photographs:held-out").items
    assert order_sha256(items) == order_sha256(list(items))
    assert len({order_sha256(items), order_sha256(items[::-1]), order_sha256(items[1:])}) == 3


def test_no_photograph_is_in_both_parts_and_the_stereo_twin_is_in_neither() -> None:
    train, held_out = (open_source(f"photographs:{part}").items for part in ("train", "held-out"))
    assert not {item.class_name for item in train} & {item.class_name for item in held_out}
    assert not set(TRAIN_FILES) & set(HELD_OUT_FILES)
    assert "motorcycle_right" not in {item.class_name for item in [*train, *held_out]}
    assert 500 <= len(train) <= 1500
    assert 100 <= len(held_out) <= 250
    assert len({item.key for item in [*train, *held_out]}) == len(train) + len(held_out)


def test_photograph_views_are_squares_inside_the_photograph_that_reach_every_edge() -> None:
    boxes = view_boxes(451, 300)
    for left, top, right, bottom in boxes:
        assert right - left == bottom - top
        assert left >= 0
        assert top >= 0
    for side in {right - left for left, _, right, _ in boxes}:
        same = [box for box in boxes if box[2] - box[0] == side]
        assert (min(box[0] for box in same), max(box[2] for box in same)) == (0, 451)
        assert min(box[1] for box in same) == 0
        assert max(box[3] for box in same) == 300 or side == 256  # one row of 256 fits, and lies at the top


def test_an_unknown_part_of_the_photographs_names_the_two_there_are() -> None:
    with pytest.raises(ImageError, match='"train" and "held-out", not "val"'):
        open_source("photographs:val")
