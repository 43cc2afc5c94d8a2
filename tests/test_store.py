"""The latent store: what is written, what is read back, what a crash or damage leaves, and what is refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from revq.cache.manifest import FAILED, OK, ManifestRow
from revq.cache.store import Encoding, LatentStore, is_store
from revq.cache.writer import SplitPlan, SplitWriter, check_split_name, shard_layout, target_state
from revq.errors import ConfigError, MismatchError, OutputError, StoreError
from revq.files import read_json, write_json

SHAPE = (4, 3, 2)
VAE = {"id": "a", "class_name": "A", "revision": None, "config_sha256": "c", "weights_sha256": "w", "fingerprint": "0123456789abcdef"}
ENCODING = Encoding(vae=VAE, image_size=64, latent_shape=SHAPE)
PLAN = SplitPlan(name="train", images=23, views=2, seed=0, source="folder", order_sha256="f00", chunk_rows=4, shard_rows=12)
BAD_IMAGES = (3, 11)


def latents_of(plan: SplitPlan) -> NDArray[np.float16]:
    values = np.random.default_rng(plan.seed).normal(2, 3, (plan.rows, *SHAPE)).astype(np.float16)
    values[[image * plan.views + view for image in BAD_IMAGES for view in range(plan.views)]] = 0
    return values


def manifest_of(plan: SplitPlan) -> list[ManifestRow]:
    rows = []
    for row in range(plan.rows):
        image, view = divmod(row, plan.views)
        status, reason = (FAILED, "truncated") if image in BAD_IMAGES else (OK, "")
        common = {"source": plan.source, "key": f"{image}.png", "label": image % 5, "class_name": ""}
        rows.append(ManifestRow(row=row, view=view, status=status, reason=reason, **common))
    return rows


def write(
    path: Path | str, plan: SplitPlan = PLAN, shards: Sequence[int] | None = None, encoding: Encoding = ENCODING, overwrite: bool = False
) -> SplitWriter:
    """Write the shards of these numbers; None means all that are to do, and finish."""
    writer = SplitWriter(path, encoding, plan, overwrite=overwrite)
    latents, rows = latents_of(plan), manifest_of(plan)
    for shard in writer.todo:
        if shards is None or shard.index in shards:
            writer.write_shard(shard, latents[shard.start : shard.stop].astype(encoding.dtype), rows[shard.start : shard.stop])
    if shards is None:
        writer.finish()
    return writer


def contents(path: Path) -> dict[str, bytes]:
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def test_a_split_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    write(tmp_path / "s")
    store = LatentStore.open(tmp_path / "s")
    split = store["train"]
    expected = latents_of(PLAN)
    assert (store.splits, store.fingerprint, store.encoding) == (("train",), ENCODING.fingerprint, ENCODING)
    assert (len(split), split.images, split.views, split.seed, split.failed) == (46, 23, 2, 0, 2)
    np.testing.assert_array_equal(np.asarray(split.latents[:4]), expected[:4])
    np.testing.assert_array_equal(np.asarray(split.latents[:]), expected)
    assert split.latents.shards == (12, *SHAPE)
    assert split.latents.chunks == (4, *SHAPE)
    assert split.labels.dtype == np.int32
    np.testing.assert_array_equal(split.labels, [row // 2 % 5 for row in range(46)])
    np.testing.assert_array_equal(split.image_of_row, np.repeat(np.arange(23), 2))
    assert set(split.image_of_row[~split.ok]) == set(BAD_IMAGES)


def test_mean_and_variance_are_those_of_the_readable_rows(tmp_path: Path) -> None:
    write(tmp_path / "s")
    split = LatentStore.open(tmp_path / "s")["train"]
    good = latents_of(PLAN)[split.ok].astype(np.float64)
    np.testing.assert_allclose(split.mean, good.mean(0), rtol=1e-13)
    np.testing.assert_allclose(split.variance, good.var(0), rtol=1e-12)
    assert split.mean.dtype == split.variance.dtype == np.float64


def test_the_manifest_has_a_row_for_each_row_in_order(tmp_path: Path) -> None:
    write(tmp_path / "s")
    table = LatentStore.open(tmp_path / "s")["train"].manifest()
    assert table["row"].to_pylist() == list(range(46))
    assert table["key"].to_pylist()[6:8] == ["3.png", "3.png"]
    assert table["status"].to_pylist()[5:9] == [OK, FAILED, FAILED, OK]
    assert table["reason"].to_pylist()[6] == "truncated"


def test_shards_written_in_any_order_over_several_runs_give_the_same_bytes(tmp_path: Path) -> None:
    write(tmp_path / "whole")
    write(tmp_path / "parts", shards=[3, 1])
    again = write(tmp_path / "parts", shards=[0])
    assert [shard.index for shard in again.todo] == [0, 2]
    assert again.rows_done == 46 - 24
    write(tmp_path / "parts")
    assert contents(tmp_path / "whole") == contents(tmp_path / "parts")


def test_a_finished_split_leaves_no_progress_and_no_temporary_file(tmp_path: Path) -> None:
    write(tmp_path / "s")
    names = set(contents(tmp_path / "s"))
    assert {name.split("/")[0] for name in names} == {"zarr.json", "train", "manifest"}
    assert not [name for name in names if name.endswith((".tmp", ".partial"))]


def damage_shard(store: Path) -> None:
    file = store / "train/latents/c/1/0/0/0"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def tear_shard(store: Path) -> None:
    file = store / "train/latents/c/1/0/0/0"
    file.write_bytes(file.read_bytes()[:100])


def lose_shard(store: Path) -> None:
    (store / "train/latents/c/1/0/0/0").unlink()


def tear_marker(store: Path) -> None:
    file = store / "progress/train/shard-00001.json"
    file.write_bytes(file.read_bytes()[:20])


def tear_manifest_part(store: Path) -> None:
    file = store / "progress/train/shard-00001.parquet"
    file.write_bytes(file.read_bytes()[:50])


def damage_sums(store: Path) -> None:
    file = store / "progress/train/shard-00001.npy"
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("damage", [damage_shard, tear_shard, lose_shard, tear_marker, tear_manifest_part, damage_sums], ids=lambda f: f.__name__)
def test_damage_planted_between_two_runs_is_found_and_the_shard_redone(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    write(tmp_path / "whole")
    write(tmp_path / "s", shards=[0, 1])
    damage(tmp_path / "s")
    writer = SplitWriter(tmp_path / "s", ENCODING, PLAN)
    assert [shard.index for shard in writer.damaged] == [1]
    assert [shard.index for shard in writer.todo] == [1, 2, 3]
    write(tmp_path / "s")
    assert contents(tmp_path / "whole") == contents(tmp_path / "s")


def test_a_flipped_bit_in_a_complete_split_is_an_error_on_read_and_never_data(tmp_path: Path) -> None:
    write(tmp_path / "s")
    damage_shard(tmp_path / "s")
    split = LatentStore.open(tmp_path / "s")["train"]
    with pytest.raises(Exception, match=r"checksum|crc32c|corrupt|Error"):
        split.latents[12:24]


def test_files_that_a_killed_process_left_half_written_are_swept_away(tmp_path: Path) -> None:
    write(tmp_path / "whole")
    write(tmp_path / "s", shards=[0])
    for name in ("train/latents/c/1/0/0/0.0f3a.partial", "train/.zarr.json.77.tmp", "manifest/.train.parquet.7.tmp", ".zarr.json.3.tmp"):
        (tmp_path / "s" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "s" / name).write_bytes(b"half")
    write(tmp_path / "s")
    assert contents(tmp_path / "whole") == contents(tmp_path / "s")


@pytest.mark.parametrize("lost", ["zarr.json", "train/zarr.json", "train/latents/zarr.json"])
def test_a_process_killed_while_creating_the_store_can_start_over(tmp_path: Path, lost: str) -> None:
    write(tmp_path / "whole")
    write(tmp_path / "s", shards=[])
    order = ["zarr.json", "train/zarr.json", "train/latents/zarr.json"]
    for name in order[order.index(lost) :]:
        (tmp_path / "s" / name).unlink()
    for folder in ("train/latents", "train", "progress/train", "progress"):
        if (tmp_path / "s" / folder).is_dir() and not any((tmp_path / "s" / folder).iterdir()):
            (tmp_path / "s" / folder).rmdir()
    write(tmp_path / "s")
    assert contents(tmp_path / "whole") == contents(tmp_path / "s")


def test_a_second_split_is_added_without_touching_the_first(tmp_path: Path) -> None:
    write(tmp_path / "s")
    before = contents(tmp_path / "s")
    write(tmp_path / "s", replace(PLAN, name="val", images=12, seed=5))
    after = contents(tmp_path / "s")
    assert {name: after[name] for name in before} == before
    assert LatentStore.open(tmp_path / "s").splits == ("train", "val")


def test_another_encoding_is_refused_with_both_fingerprints_and_what_differs(tmp_path: Path) -> None:
    write(tmp_path / "s")
    other = replace(ENCODING, image_size=128)
    before = contents(tmp_path / "s")
    with pytest.raises(MismatchError, match=rf"{ENCODING.fingerprint}.*{other.fingerprint}.*image_size: 64 there, 128 asked"):
        write(tmp_path / "s", replace(PLAN, name="val"), encoding=other)
    with pytest.raises(MismatchError, match=r"vae: a \(0123456789abcdef\) there, b \(ffff\) asked"):
        write(tmp_path / "s", replace(PLAN, name="val"), encoding=replace(ENCODING, vae={**VAE, "id": "b", "fingerprint": "ffff"}))
    with pytest.raises(MismatchError, match="dtype: float16 there, float32 asked"):
        write(tmp_path / "s", replace(PLAN, name="val"), encoding=replace(ENCODING, dtype="float32"))
    assert contents(tmp_path / "s") == before


def test_the_same_vae_under_another_name_may_add_a_split(tmp_path: Path) -> None:
    write(tmp_path / "s")
    write(tmp_path / "s", replace(PLAN, name="val"), encoding=replace(ENCODING, vae={**VAE, "id": "elsewhere"}))
    assert LatentStore.open(tmp_path / "s").encoding.vae["id"] == "a"


OTHER_RUNS: list[dict[str, Any]] = [{"seed": 1}, {"views": 1}, {"source": "other"}, {"order_sha256": "bad"}, {"images": 22}]


@pytest.mark.parametrize("field", OTHER_RUNS, ids=lambda field: next(iter(field)))
@pytest.mark.parametrize("shards", [[0], None], ids=["incomplete", "complete"])
def test_another_run_into_the_same_split_is_refused_with_what_differs(tmp_path: Path, field: dict[str, Any], shards: list[int] | None) -> None:
    write(tmp_path / "s", shards=shards)
    before = contents(tmp_path / "s")
    with pytest.raises(MismatchError, match=rf'split "train" .*{next(iter(field))}: .* there, .* asked.*--overwrite'):
        write(tmp_path / "s", replace(PLAN, **field))
    assert contents(tmp_path / "s") == before


def test_overwrite_redoes_that_split_alone(tmp_path: Path) -> None:
    write(tmp_path / "s")
    write(tmp_path / "s", replace(PLAN, name="val"))
    before = contents(tmp_path / "s")
    write(tmp_path / "s", replace(PLAN, name="val", seed=9), overwrite=True)
    after = contents(tmp_path / "s")
    assert {name for name in before if before[name] != after.get(name)} <= {name for name in before if name.startswith(("val/", "manifest/val"))}
    assert LatentStore.open(tmp_path / "s")["val"].seed == 9


def test_overwriting_the_only_split_may_change_the_encoding(tmp_path: Path) -> None:
    write(tmp_path / "s")
    write(tmp_path / "s", encoding=replace(ENCODING, dtype="float32"), overwrite=True)
    store = LatentStore.open(tmp_path / "s")
    assert store.encoding.dtype == "float32"
    assert store["train"].latents.dtype == np.float32


def test_a_run_goes_on_with_the_cut_it_began_with(tmp_path: Path) -> None:
    write(tmp_path / "s", shards=[0])
    writer = write(tmp_path / "s", replace(PLAN, chunk_rows=8, shard_rows=24))
    assert writer.plan.shard_rows == 12


def test_a_complete_split_is_known_as_such_and_a_new_one_as_new(tmp_path: Path) -> None:
    assert target_state(tmp_path / "s", ENCODING, PLAN) == "new"
    write(tmp_path / "s", shards=[0])
    assert target_state(tmp_path / "s", ENCODING, PLAN) == "resume"
    write(tmp_path / "s")
    assert target_state(tmp_path / "s", ENCODING, PLAN) == "complete"
    assert target_state(tmp_path / "s", ENCODING, PLAN, overwrite=True) == "new"


def test_a_file_or_a_folder_of_something_else_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.tex").write_text("mine")
    zarr.create_array(str(tmp_path / "other.zarr"), shape=(3,), dtype="int8")
    before = contents(tmp_path)
    for name, message in {"file": "is a file", "folder": r"something else .*thesis.tex", "other.zarr": "something else"}.items():
        for overwrite in (False, True):
            with pytest.raises(OutputError, match=message):
                SplitWriter(tmp_path / name, ENCODING, PLAN, overwrite=overwrite)
    assert contents(tmp_path) == before


def test_a_split_none_of_whose_images_can_be_read_is_no_split(tmp_path: Path) -> None:
    plan = replace(PLAN, images=2)
    writer = SplitWriter(tmp_path / "s", ENCODING, plan)
    bad = [replace(row, status=FAILED, reason="no") for row in manifest_of(plan)]
    writer.write_shard(writer.shards[0], np.zeros((4, *SHAPE), np.float16), bad)
    with pytest.raises(StoreError, match=r"none of the 2 images of folder can be read; the first is 0.png \(no\)"):
        writer.finish()
    assert LatentStore.open(tmp_path / "s").splits == ()


def test_what_cannot_be_opened_is_told_apart(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="does not exist"):
        LatentStore.open(tmp_path / "none")
    with pytest.raises(StoreError, match="is no latent store"):
        LatentStore.open(tmp_path)
    write(tmp_path / "s", shards=[0])
    store = LatentStore.open(tmp_path / "s")
    assert store.splits == ()
    assert "train" not in store
    with pytest.raises(StoreError, match="same encode-latents command again"):
        store["train"]
    write(tmp_path / "s")
    with pytest.raises(StoreError, match=r'no split "val" \(there: train\)'):
        store["val"]
    group = read_json(tmp_path / "s" / "zarr.json") or {}
    group["attributes"]["format_version"] = 3
    write_json(tmp_path / "s" / "zarr.json", group)
    with pytest.raises(StoreError, match="format version 3, this revq reads 2"):
        LatentStore.open(tmp_path / "s")
    assert is_store(tmp_path / "s")


def test_a_store_copied_elsewhere_opens_and_plain_zarr_reads_it(tmp_path: Path) -> None:
    write(tmp_path / "s")
    shutil.copytree(tmp_path / "s", tmp_path / "copy")
    shutil.rmtree(tmp_path / "s")
    split = LatentStore.open(tmp_path / "copy")["train"]
    np.testing.assert_array_equal(np.asarray(split.latents[:]), latents_of(PLAN))
    group = zarr.open_group(str(tmp_path / "copy"), mode="r")
    assert group.attrs["image_size"] == 64
    assert group["train/latents"].shape == (46, *SHAPE)


def test_the_fingerprint_sees_what_shapes_values_and_not_names_or_dtype() -> None:
    same = [replace(ENCODING, dtype="float32"), replace(ENCODING, vae={**VAE, "id": "x"})]
    other = [
        replace(ENCODING, image_size=65),
        replace(ENCODING, crop="random"),
        replace(ENCODING, latent_shape=(4, 2, 3)),
        replace(ENCODING, vae={**VAE, "fingerprint": "1"}),
    ]
    assert {encoding.fingerprint for encoding in same} == {ENCODING.fingerprint}
    assert len({ENCODING.fingerprint, *(encoding.fingerprint for encoding in other)}) == 5


@given(st.integers(1, 10**7), st.integers(1, 16), st.integers(2, 1 << 22), st.integers(1, 512), st.none() | st.integers(1, 10**5))
def test_shards_are_whole_chunks_of_whole_images(rows: int, views: int, row_bytes: int, batch_size: int, shard_rows: int | None) -> None:
    chunk, shard = shard_layout(rows, views, row_bytes, batch_size=batch_size, shard_rows=shard_rows)
    assert shard % chunk == 0
    assert chunk % views == 0
    assert shard >= 1
    if shard_rows is None:
        assert shard * row_bytes <= (32 << 20) + chunk * row_bytes


def test_imagenet_at_the_papers_shape_gets_32_mib_shards_of_2_mib_chunks() -> None:
    assert shard_layout(1_281_167, 1, 32 * 8 * 8 * 2, batch_size=64) == (512, 8192)


@pytest.mark.parametrize("name", ["", "manifest", "progress", "../x", ".hidden", "a b", "a/b"])
def test_a_split_name_that_would_clash_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="split"):
        check_split_name(name)


def test_a_lost_shard_reads_as_nan_and_a_shard_of_failed_images_as_zeros(tmp_path: Path) -> None:
    plan = replace(PLAN, images=12, views=1, chunk_rows=2, shard_rows=2)
    writer = SplitWriter(tmp_path / "s", ENCODING, plan)
    latents, rows = latents_of(plan), manifest_of(plan)
    latents[2:4] = 0
    rows[2:4] = [replace(row, status=FAILED, reason="no") for row in rows[2:4]]
    for shard in writer.todo:
        writer.write_shard(shard, latents[shard.start : shard.stop], rows[shard.start : shard.stop])
    writer.finish()
    (tmp_path / "s/train/latents/c/2/0/0/0").unlink()
    read = np.asarray(LatentStore.open(tmp_path / "s")["train"].latents[:])
    assert np.isnan(read[4:6]).all()
    np.testing.assert_array_equal(np.delete(read, [4, 5], 0), np.delete(latents, [4, 5], 0))
