"""Latents from disk to the device: the right rows, in float32, once, and never a value that is not a number."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from hypothesis import given
from hypothesis import strategies as st

from revq.cache.batches import ResidentLatents, epoch_permutation, split_rows, spread_images, spread_rows
from revq.cache.manifest import FAILED, OK, ManifestRow
from revq.cache.store import Encoding, LatentSplit, LatentStore
from revq.cache.writer import SplitPlan, SplitWriter
from revq.errors import StoreError

SHAPE = (2, 3, 4)
BAD_IMAGE = 4


def make_split(path: Path, images: int = 20, views: int = 2, dtype: str = "float16") -> LatentSplit:
    vae = {"id": "a", "class_name": "A", "revision": None, "config_sha256": "c", "weights_sha256": "w", "fingerprint": "f"}
    plan = SplitPlan(name="train", images=images, views=views, seed=0, source="s", order_sha256="o", chunk_rows=2 * views, shard_rows=6 * views)
    writer = SplitWriter(path, Encoding(vae=vae, image_size=8, latent_shape=SHAPE, dtype=dtype), plan)
    for shard in writer.todo:
        rows = range(shard.start, shard.stop)
        status = [FAILED if row // views == BAD_IMAGE else OK for row in rows]
        common = {"source": "s", "label": 0, "class_name": ""}
        manifest = [ManifestRow(row=row, key=str(row), view=row % views, status=s, **common) for row, s in zip(rows, status, strict=True)]
        writer.write_shard(shard, values(images * views, dtype)[shard.start : shard.stop], manifest)
    writer.finish()
    return LatentStore.open(path)["train"]


def values(rows: int, dtype: str = "float16") -> np.ndarray:
    return np.random.default_rng(1).normal(size=(rows, *SHAPE)).astype(dtype)


def test_all_readable_rows_are_resident_in_order_and_come_as_float32(tmp_path: Path) -> None:
    resident = ResidentLatents(make_split(tmp_path / "s"))
    expected = np.delete(values(40), [8, 9], 0)
    assert len(resident) == 38
    assert resident.latents.dtype == torch.float16
    np.testing.assert_array_equal(resident.latents.numpy(), expected)
    batch = resident.batch(torch.tensor([37, 0, 5]))
    assert batch.dtype == torch.float32
    np.testing.assert_array_equal(batch.numpy(), expected[[37, 0, 5]].astype(np.float32))


def test_chosen_rows_keep_their_order_across_shards(tmp_path: Path) -> None:
    rows = np.random.default_rng(3).permutation(40)[:25]
    resident = ResidentLatents(make_split(tmp_path / "s"), rows)
    kept = rows[~np.isin(rows, [8, 9])]
    np.testing.assert_array_equal(resident.rows, kept)
    np.testing.assert_array_equal(resident.latents.numpy(), values(40)[kept])


def test_float32_latents_stay_float32_unless_another_dtype_is_asked(tmp_path: Path) -> None:
    split = make_split(tmp_path / "s", dtype="float32")
    assert ResidentLatents(split).latents.dtype == torch.float32
    assert ResidentLatents(split, dtype=torch.bfloat16).latents.dtype == torch.bfloat16


def test_a_value_that_does_not_fit_the_dtype_names_its_row(tmp_path: Path) -> None:
    split = make_split(tmp_path / "s", dtype="float32")
    latents = values(40, "float32")
    latents[33, 1, 2, 3] = 1e6
    store = LatentStore.open(tmp_path / "s")
    array = zarr.open_array(str(store.path / "train" / "latents"), mode="r+")
    array[24:36] = latents[24:36]
    assert len(ResidentLatents(split)) == 38
    with pytest.raises(StoreError, match=r"row 33 .*not finite in torch.float16"):
        ResidentLatents(split, dtype=torch.float16)


def test_a_lost_or_damaged_file_of_latents_is_an_error_that_names_the_rows(tmp_path: Path) -> None:
    split = make_split(tmp_path / "s")
    file = tmp_path / "s/train/latents/c/1/0/0/0"
    data = bytearray(file.read_bytes())
    data[40] ^= 4
    file.write_bytes(data)
    with pytest.raises(StoreError, match=r"rows 12 to 23 .*cannot be read"):
        ResidentLatents(split)
    file.unlink()
    with pytest.raises(StoreError, match=r"row 12 .*not finite"):
        ResidentLatents(split)


def test_no_readable_row_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no readable row among the 2"):
        ResidentLatents(make_split(tmp_path / "s"), np.array([8, 9]))


@pytest.mark.parametrize("fraction", [0.0, 0.02, 0.3, 0.999])
def test_the_held_out_part_is_whole_images_from_the_end_and_nothing_is_lost_or_shared(tmp_path: Path, fraction: float) -> None:
    split = make_split(tmp_path / "s")
    train, held_out = split_rows(split, fraction, "train"), split_rows(split, fraction, "holdout")
    np.testing.assert_array_equal(np.concatenate([train, held_out]), np.flatnonzero(split.ok))
    assert not set(split.image_of_row[train]) & set(split.image_of_row[held_out])
    assert len(train) > 0
    assert (len(held_out) > 0) == (fraction > 0)


def test_a_single_image_cannot_be_parted(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="single image"):
        split_rows(make_split(tmp_path / "s", images=1), 0.02, "train")


@given(st.integers(0, 500), st.integers(0, 2**63), st.integers(0, 10**6))
def test_an_epochs_order_is_a_permutation_and_a_pure_function(n: int, seed: int, epoch: int) -> None:
    order = epoch_permutation(n, seed, epoch)
    assert sorted(order.tolist()) == list(range(n))
    assert torch.equal(order, epoch_permutation(n, seed, epoch))


def test_epochs_and_seeds_differ() -> None:
    orders = {tuple(epoch_permutation(50, seed, epoch).tolist()) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25


@given(images=st.integers(0, 200), share=st.floats(0, 0.99))
def test_any_share_of_the_images_is_spread_so_that_every_stretch_has_its_part(images: int, share: float) -> None:
    second = spread_images(images, share)
    assert second.shape == (images,)
    assert np.all(np.abs(np.cumsum(second) - share * np.arange(1, images + 1)) <= 1)


def test_the_second_part_of_a_split_is_spread_over_its_order_and_leaves_out_failed_images(tmp_path: Path) -> None:
    split = make_split(tmp_path / "s")
    assert (spread_rows(split, 0.25, "second") // 2).tolist() == [3, 3, 7, 7, 11, 11, 15, 15, 19, 19]
    assert BAD_IMAGE not in (spread_rows(split, 0.25, "first") // 2).tolist()
    assert len(spread_rows(split, 0.0, "second")) == 0
    both = np.concatenate([spread_rows(split, 0.3, "first"), spread_rows(split, 0.3, "second")])
    assert np.array_equal(np.sort(both), np.flatnonzero(split.ok))
