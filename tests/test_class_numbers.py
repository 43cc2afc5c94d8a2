"""Labels of a store's splits: names decide the numbers, whatever order the splits come in, and what differs is said."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import archives
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_encode_latents import stop_after
from test_store import PLAN, contents, write

from revq.cache.classes import Classes, classes_in, number_classes
from revq.cache.image_sources.items import ImageItem
from revq.cache.sources import open_source
from revq.cache.store import LatentStore
from revq.errors import ConfigError, MismatchError
from revq.stages.configs import EncodeLatentsConfig
from revq.stages.encode_latents import encode_latents
from revq.stages.events import Event, Note, run_quietly

Folder = Callable[..., Path]


@pytest.fixture
def folder(imagenet_sample: Path, tmp_path: Path) -> Folder:
    """Make class folders with real photographs in them, two in each."""
    photographs = sorted((imagenet_sample / "val").rglob("*.JPEG"))

    def make(name: str, classes: str) -> Path:
        for i, letter in enumerate(classes):
            place = tmp_path / name / letter
            place.mkdir(parents=True)
            for path in photographs[2 * i : 2 * i + 2]:
                shutil.copy(path, place)
        return tmp_path / name

    return make


@pytest.fixture
def config(taef2: str, tmp_path: Path) -> Callable[..., EncodeLatentsConfig]:
    def make(images: Path, split: str, **changes: Any) -> EncodeLatentsConfig:
        settings = {"image_size": 64, "shard_rows": 2, "batch_size": 2, "workers": 2, "device": "cpu", "store": str(tmp_path / "s")}
        return EncodeLatentsConfig(images=str(images), vae=taef2, split=split, **{**settings, **changes})

    return make


def notes_of(events: Sequence[Event], *, warning: bool = False) -> list[str]:
    return [event.text for event in events if isinstance(event, Note) and event.warning == warning]


def numbers_of(store: Path, split: str) -> dict[str, int]:
    """Number of each class, which the array, the manifest and the attributes agree on."""
    there = LatentStore.open(store)[split]
    manifest = there.manifest()
    np.testing.assert_array_equal(there.labels, manifest["label"].to_numpy())
    pairs = set(zip(manifest["class_name"].to_pylist(), manifest["label"].to_pylist(), strict=True))
    assert pairs == {(name, number) for name, number in there.attributes["classes"]}
    assert len(dict(pairs)) == len(pairs)
    return dict(pairs)


def test_a_split_with_fewer_classes_takes_the_numbers_of_the_store(folder: Folder, config: Any, tmp_path: Path) -> None:
    assert notes_of(list(encode_latents(config(folder("train", "abc"), "train")))) == []
    told = notes_of(list(encode_latents(config(folder("val", "bc"), "val"))))
    assert told == ['2 classes of split "val" get other numbers than in their source, the store\'s by name: b 0 -> 1, c 1 -> 2']
    assert LatentStore.open(tmp_path / "s")["val"].labels.tolist() == [1, 1, 2, 2]
    assert numbers_of(tmp_path / "s", "train") == {"a": 0, "b": 1, "c": 2}


def test_a_split_with_more_classes_appends_them_and_says_so(folder: Folder, config: Any, tmp_path: Path) -> None:
    run_quietly(encode_latents(config(folder("val", "bc"), "val")))
    told = notes_of(list(encode_latents(config(folder("train", "abc"), "train"))))
    assert told == [
        '3 classes of split "train" get other numbers than in their source, the store\'s by name: b 1 -> 0, c 2 -> 1, a 0 -> 2',
        '1 of the 3 classes of split "train" are new to the store and are appended: a = 2',
    ]
    assert numbers_of(tmp_path / "s", "train") == {"b": 0, "c": 1, "a": 2}
    assert LatentStore.open(tmp_path / "s")["train"].labels.tolist() == [2, 2, 0, 0, 1, 1]


def test_new_classes_are_refused_where_asked_before_anything_is_written(folder: Folder, config: Any, tmp_path: Path) -> None:
    run_quietly(encode_latents(config(folder("train", "abc"), "train", new_classes="refuse")))
    before = contents(tmp_path / "s")
    with pytest.raises(MismatchError, match=r'1 of the 2 classes of split "val" are in no other split .*\(d\).*--new-classes append'):
        run_quietly(encode_latents(config(folder("val", "bd"), "val", new_classes="refuse")))
    with pytest.raises(MismatchError):
        run_quietly(encode_latents(config(tmp_path / "val", "val", new_classes="refuse", dry_run=True)))
    assert contents(tmp_path / "s") == before
    run_quietly(encode_latents(config(tmp_path / "val", "val")))
    assert numbers_of(tmp_path / "s", "val") == {"b": 1, "d": 3}
    with pytest.raises(ConfigError, match="new_classes must be one of append, refuse, not 'yes'"):
        config(tmp_path / "val", "val", new_classes="yes")


def test_interrupted_splits_keep_the_numbers_that_they_began_with(folder: Folder, config: Any, tmp_path: Path) -> None:
    train, val = folder("train", "abcd"), folder("val", "bcx")
    stop_after(encode_latents(config(train, "train")), 2)  # a split in the making numbers the classes that it has not come to yet
    stop_after(encode_latents(config(val, "val")), 2)
    run_quietly(encode_latents(config(folder("more", "wxy"), "more")))
    run_quietly(encode_latents(config(val, "val")))
    run_quietly(encode_latents(config(train, "train")))
    assert numbers_of(tmp_path / "s", "train") == {"a": 0, "b": 1, "c": 2, "d": 3}
    assert numbers_of(tmp_path / "s", "val") == {"b": 1, "c": 2, "x": 4}
    assert numbers_of(tmp_path / "s", "more") == {"w": 5, "x": 4, "y": 6}


def test_a_split_that_is_encoded_anew_keeps_the_stores_numbers_and_one_alone_begins_anew(folder: Folder, config: Any, tmp_path: Path) -> None:
    train, val = folder("train", "abc"), folder("val", "cd")
    run_quietly(encode_latents(config(val, "val")))
    run_quietly(encode_latents(config(train, "train")))
    before = contents(tmp_path / "s")
    run_quietly(encode_latents(config(val, "val", overwrite=True, new_classes="refuse")))
    run_quietly(encode_latents(config(train, "train", overwrite=True, new_classes="refuse")))
    assert contents(tmp_path / "s") == before
    assert numbers_of(tmp_path / "s", "train") == {"c": 0, "a": 2, "b": 3}
    shutil.rmtree(tmp_path / "s" / "val")
    run_quietly(encode_latents(config(train, "train", overwrite=True)))
    assert numbers_of(tmp_path / "s", "train") == {"a": 0, "b": 1, "c": 2}


def test_ranks_number_as_one_process_does(torchrun: Any, folder: Folder, config: Any, taef2: str, tmp_path: Path) -> None:
    for store in ("s", "one"):
        run_quietly(encode_latents(config(folder(f"train-{store}", "abc"), "train", store=str(tmp_path / store))))
    val = folder("val", "bcd")
    settings = ("--image-size", 64, "--shard-rows", 2, "--batch-size", 2, "--workers", 2, "--device", "cpu", "--split", "val")
    done = torchrun(2, "encode-latents", val, tmp_path / "s", "--vae", taef2, *settings)
    assert done.stdout.count("b 0 -> 1, c 1 -> 2") == 1
    run_quietly(encode_latents(config(val, "val", store=str(tmp_path / "one"))))
    assert {k: v for k, v in contents(tmp_path / "s").items() if "val" in k} == {k: v for k, v in contents(tmp_path / "one").items() if "val" in k}
    assert numbers_of(tmp_path / "s", "val") == {"b": 1, "c": 2, "d": 3}


def test_numbers_without_names_stay_and_are_told_apart_from_names(folder: Folder, config: Any, tmp_path: Path) -> None:
    run_quietly(encode_latents(config(folder("train", "abc"), "train")))
    shards = archives.shards(tmp_path / "shards", folder("val", "bc"), count=1)
    told = notes_of(list(encode_latents(config(shards, "val"))), warning=True)
    assert told == [
        "labels of split val are numbers without names, and those of split train have names, so that they cannot be compared; "
        "see to it that they mean the same classes"
    ]
    assert LatentStore.open(tmp_path / "s")["val"].labels.tolist() == [0, 0, 1, 1]
    named = archives.shards(tmp_path / "named", tmp_path / "val", count=1, labels="label")
    run_quietly(encode_latents(config(named, "named")))
    assert numbers_of(tmp_path / "s", "named") == {"b": 1, "c": 2}


def test_classes_of_stores_of_earlier_versions_are_read_from_the_manifest(folder: Folder, config: Any, tmp_path: Path) -> None:
    run_quietly(encode_latents(config(folder("train", "abc"), "train")))
    forget_classes(tmp_path / "s" / "train" / "zarr.json")
    run_quietly(encode_latents(config(folder("val", "bc"), "val")))
    assert numbers_of(tmp_path / "s", "val") == {"b": 1, "c": 2}


def forget_classes(path: Path) -> None:
    """Make a split's attributes those of an earlier version."""
    from revq.files import read_json, seal, write_json

    group = read_json(path)
    assert group is not None
    attributes = {name: value for name, value in group["attributes"].items() if name not in {"classes", "unnamed_labels", "sha256"}}
    write_json(path, {**group, "attributes": seal(attributes)})


def test_a_plan_without_classes_is_written_as_before(tmp_path: Path) -> None:
    write(tmp_path / "s", replace(PLAN, classes=(("a", 0),)))
    assert LatentStore.open(tmp_path / "s")["train"].attributes["classes"] == [["a", 0]]


def classes(**numbers: int) -> Classes:
    return Classes.of(numbers.items())


names = st.text("abcdefgh", min_size=1, max_size=1)
folders = st.sets(names, min_size=1).map(lambda found: {name: i for i, name in enumerate(sorted(found))})


@given(st.lists(folders, min_size=1, max_size=5))
def test_any_splits_in_any_order_have_one_number_for_a_name_and_no_number_for_two(sources: list[dict[str, int]]) -> None:
    splits: dict[str, Classes] = {}
    for i, source in enumerate(sources):
        numbering = number_classes(str(i), Classes.of(source.items()), splits)
        labels = {name: numbering.label(ImageItem(key="k", label=number, class_name=name)) for name, number in source.items()}
        assert set(labels.items()) == set(numbering.classes)
        splits[str(i)] = Classes.of(labels.items())
    pairs = {pair for found in splits.values() for pair in found.pairs}
    assert len({name for name, _ in pairs}) == len({number for _, number in pairs}) == len(pairs)
    assert {number for _, number in pairs} == set(range(len(pairs)))


def test_a_name_with_several_numbers_keeps_them_and_is_refused_where_they_differ() -> None:
    cranes = Classes.of([("crane", 134), ("crane", 517), ("ant", 3)])
    assert number_classes("train", cranes, {}).changed == {}
    assert number_classes("val", Classes.of([("crane", 517)]), {"train": cranes}).classes == (("crane", 517),)
    with pytest.raises(MismatchError, match='class crane of split "val" has the number 9, and 134, 517 in the store'):
        number_classes("val", classes(crane=9), {"train": cranes})


def test_splits_of_earlier_versions_that_contradict_each_other_are_told() -> None:
    splits = {"train": classes(a=0, b=1), "val": classes(b=0)}
    told = number_classes("test", classes(a=0), splits).warnings
    assert told == ('splits "train" and "val" number 1 classes differently (b); encode one of them again with --overwrite',)


def test_the_classes_of_a_source_are_those_of_its_items(folder: Folder, imagenet_sample: Path, tmp_path: Path) -> None:
    for source in (open_source(imagenet_sample / "val"), open_source("photographs:train"), open_source(folder("x", "abc"))):
        for items in (source.items, source.items[:2], source.items[1:]):
            expected = Classes.of((item.class_name, item.label) for item in items)
            assert classes_in(items) == expected
            assert expected.pairs
    shards = open_source(archives.shards(tmp_path / "shards", tmp_path / "x"))
    assert classes_in(shards.items) == Classes(frozenset(), unnamed=True)
