"""Image sources: what is listed, in which order, with which labels, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from revq.cache.photographs import HELD_OUT_FILES, TRAIN_FILES, view_boxes
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


def test_a_class_folder_without_images_keeps_its_number(tmp_path: Path) -> None:
    source = open_source(plant(tmp_path, "a/readme.txt", "b/1.jpg"))
    assert [item.label for item in source.items] == [1]


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
    cases = {"missing": "does not exist", "one.png": "is a file", "empty": "holds no file", "nested": r"1 x \.md"}
    cases["texts"] = r"found 2 x \.txt, 1 x \.csv"
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
