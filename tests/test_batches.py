"""Latents from disk to the device: the right rows, in float32, once, in bounded memory, and never a value that is not a number."""

from __future__ import annotations

import math
import threading
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from revq.cache.batches import (
    ResidentLatents,
    StreamingLatents,
    open_latents,
)
from revq.cache.manifest import FAILED, OK, ManifestRow
from revq.cache.rows import epoch_permutation, rank_rows, split_rows, spread_images, spread_rows
from revq.cache.store import Encoding, LatentSplit, LatentStore
from revq.cache.writer import SplitPlan, SplitWriter
from revq.errors import ConfigError, StoreError

SHAPE = (2, 3, 4)
BAD_IMAGE = 4
BUFFER = 2 * 24 * 2 * math.prod(SHAPE)  # two halves of two shards of 12 rows
Open = Callable[..., ResidentLatents | StreamingLatents]
READERS: list[Open] = [ResidentLatents, lambda split, rows=None: StreamingLatents(split, rows, buffer_bytes=BUFFER)]
both_readers = pytest.mark.parametrize("open_reader", READERS, ids=["resident", "streaming"])


def make_split(
    path: Path,
    images: int = 20,
    views: int = 2,
    dtype: str = "float16",
    *,
    shape: tuple[int, int, int] = SHAPE,
    chunk_rows: int | None = None,
    shard_rows: int | None = None,
    bad_image: int = BAD_IMAGE,
) -> LatentSplit:
    vae = {"id": "a", "class_name": "A", "revision": None, "config_sha256": "c", "weights_sha256": "w", "fingerprint": "f"}
    layout = {"chunk_rows": chunk_rows or 2 * views, "shard_rows": shard_rows or 6 * views}
    plan = SplitPlan(name="train", images=images, views=views, seed=0, source="s", order_sha256="o", **layout)
    writer = SplitWriter(path, Encoding(vae=vae, image_size=8, latent_shape=shape, dtype=dtype), plan)
    latents = values(images * views, dtype, shape)
    for shard in writer.todo:
        rows = range(shard.start, shard.stop)
        status = [FAILED if row // views == bad_image else OK for row in rows]
        common = {"source": "s", "label": 0, "class_name": ""}
        manifest = [ManifestRow(row=row, key=str(row), view=row % views, status=s, **common) for row, s in zip(rows, status, strict=True)]
        writer.write_shard(shard, latents[shard.start : shard.stop], manifest)
    writer.finish()
    return LatentStore.open(path)["train"]


def values(rows: int, dtype: str = "float16", shape: tuple[int, int, int] = SHAPE) -> np.ndarray:
    return np.random.default_rng(1).normal(size=(rows, *shape)).astype(dtype)


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> LatentSplit:
    """20 images in 2 views, one unreadable. Not to be written to."""
    return make_split(tmp_path_factory.mktemp("split") / "s")


@pytest.fixture(scope="module")
def long_split(tmp_path_factory: pytest.TempPathFactory) -> LatentSplit:
    """240 images in 2 views, one unreadable, in 40 shards. Not to be written to."""
    return make_split(tmp_path_factory.mktemp("long") / "s", images=240)


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
    array = zarr.open_array(f"{store.path}/train/latents", mode="r+")
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


@both_readers
@given(batch_size=st.integers(1, 50), seed=st.integers(0, 2**40), epoch=st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_an_epoch_is_whole_batches_of_different_rows_with_their_own_latents(
    split: LatentSplit, open_reader: Open, batch_size: int, seed: int, epoch: int
) -> None:
    latents = open_reader(split)
    batches = list(latents.epoch(batch_size=batch_size, seed=seed, epoch=epoch))
    size = min(batch_size, 38)
    assert [tuple(batch.shape) for _, batch in batches] == [(size, *SHAPE)] * (38 // size)
    seen = torch.cat([positions for positions, _ in batches])
    assert len(set(seen.tolist())) == len(seen) == 38 - 38 % size
    for positions, batch in batches:
        assert batch.dtype == torch.float32
        np.testing.assert_array_equal(batch.numpy(), values(40)[latents.rows[positions.numpy()]].astype(np.float32))


@both_readers
def test_epochs_and_seeds_give_other_orders_and_the_same_ones_the_same(tmp_path: Path, open_reader: Open) -> None:
    split = make_split(tmp_path / "s")
    latents = open_reader(split)
    orders = {key: epoch_order(latents, *key) for key in [(seed, epoch) for seed in range(3) for epoch in range(3)]}
    assert len(set(map(tuple, orders.values()))) == 9
    assert all(orders[key] == epoch_order(open_reader(split), *key) for key in [(0, 0), (2, 1)])


@both_readers
@pytest.mark.parametrize("first", [0, 1, 4, 8, 9, 12])
def test_an_epoch_taken_up_inside_goes_on_as_if_it_had_never_stopped(tmp_path: Path, open_reader: Open, first: int) -> None:
    latents = open_reader(make_split(tmp_path / "s"))
    whole = list(latents.epoch(batch_size=4, seed=5, epoch=2))
    rest = list(latents.epoch(batch_size=4, seed=5, epoch=2, first_batch=first))
    assert len(rest) == max(0, 9 - first)
    for (expected, _), (positions, batch) in zip(whole[first:], rest, strict=True):
        assert torch.equal(positions, expected)
        np.testing.assert_array_equal(batch.numpy(), values(40)[latents.rows[positions.numpy()]].astype(np.float32))


@both_readers
@pytest.mark.parametrize("batch_size", [1, 7, 38, 100])
def test_a_sequential_pass_has_every_row_once_in_order(tmp_path: Path, open_reader: Open, batch_size: int) -> None:
    latents = open_reader(make_split(tmp_path / "s"))
    passed = list(latents.sequential(batch_size))
    assert torch.cat([positions for positions, _ in passed]).tolist() == list(range(38))
    np.testing.assert_array_equal(torch.cat([batch for _, batch in passed]).numpy(), values(40)[latents.rows].astype(np.float32))


@both_readers
def test_chosen_rows_alone_are_seen(tmp_path: Path, open_reader: Open) -> None:
    rows = np.random.default_rng(3).permutation(40)[:25]
    latents = open_reader(make_split(tmp_path / "s"), rows)
    kept = rows[~np.isin(rows, [8, 9])]
    assert sorted(latents.rows.tolist()) == sorted(kept.tolist())
    assert sorted(epoch_order(latents, 0, 0, batch_size=1)) == list(range(len(kept)))


@both_readers
def test_a_batch_of_no_rows_is_refused(tmp_path: Path, open_reader: Open) -> None:
    with pytest.raises(ConfigError, match="at least 1, not 0"):
        list(open_reader(make_split(tmp_path / "s")).sequential(0))


def test_a_streams_order_does_not_depend_on_its_threads(tmp_path: Path) -> None:
    split = make_split(tmp_path / "s")
    orders = [epoch_order(StreamingLatents(split, buffer_bytes=BUFFER, readers=readers), 3, 1) for readers in (1, 2, 5)]
    assert orders[0] == orders[1] == orders[2]


def test_a_stream_mixes_the_rows_of_several_shards(long_split: LatentSplit) -> None:
    latents = StreamingLatents(long_split, buffer_bytes=BUFFER)
    shards = latents.rows[epoch_order(latents, 0, 0, batch_size=1)] // 12
    assert all(len(set(shards[start : start + 24].tolist())) >= 2 for start in range(0, len(shards) - 24, 24))
    assert shards.tolist() != sorted(shards.tolist())


def test_a_stream_taken_up_late_does_not_read_what_came_before(tmp_path: Path) -> None:
    split = make_split(tmp_path / "s", images=240)
    latents = StreamingLatents(split, buffer_bytes=BUFFER)
    tail = list(latents.epoch(batch_size=2, seed=0, epoch=0, first_batch=225))
    needed = set((latents.rows[torch.cat([positions for positions, _ in tail]).numpy()] // 12).tolist())
    for shard in set(range(40)) - needed:
        (tmp_path / f"s/train/latents/c/{shard}/0/0/0").write_bytes(b"damaged")
    again = list(latents.epoch(batch_size=2, seed=0, epoch=0, first_batch=225))
    assert all(torch.equal(one, other) for (_, one), (_, other) in zip(tail, again, strict=True))
    with pytest.raises(StoreError, match="cannot be read"):
        list(latents.epoch(batch_size=2, seed=0, epoch=0))


def test_a_stream_holds_no_more_than_its_buffer(tmp_path: Path) -> None:
    shape, rows = (8, 32, 32), 2048  # 16 KiB a row, 32 MiB in all, shards of 1 MiB
    split = make_split(tmp_path / "s", images=rows, views=1, shape=shape, chunk_rows=16, shard_rows=64, bad_image=-1)
    latents = StreamingLatents(split, buffer_bytes=6 << 20, readers=2)
    tracemalloc.start()
    seen = sum(len(positions) for positions, _ in latents.epoch(batch_size=32, seed=0, epoch=0))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert seen == rows
    assert 5 << 20 < peak < (6 << 20) + 4 * (2 * 16 << 14)


def test_a_buffer_that_does_not_hold_two_shards_is_refused_with_the_least_that_does(tmp_path: Path) -> None:
    split = make_split(tmp_path / "s")
    with pytest.raises(ConfigError, match="give at least 1152 bytes"):
        StreamingLatents(split, buffer_bytes=1151)
    assert len(epoch_order(StreamingLatents(split, buffer_bytes=1152), 0, 0)) == 36


def test_damage_found_in_the_background_is_raised_with_its_rows_and_stops_the_threads(tmp_path: Path) -> None:
    split = make_split(tmp_path / "s", images=240)
    flip(tmp_path / "s/train/latents/c/7/0/0/0", 40)
    with pytest.raises(StoreError, match=r"rows 84 to 95 .*cannot be read"):
        list(StreamingLatents(split, buffer_bytes=BUFFER).epoch(batch_size=4, seed=0, epoch=0))
    assert reading_threads() == []


def test_an_iterator_closed_early_leaves_no_thread(long_split: LatentSplit) -> None:
    latents = StreamingLatents(long_split, buffer_bytes=BUFFER)
    batches = latents.epoch(batch_size=4, seed=0, epoch=0)
    next(batches)
    assert reading_threads() != []
    batches.close()  # type: ignore[attr-defined]
    assert reading_threads() == []


@given(rows=st.lists(st.integers(0, 10**6), unique=True, max_size=200), world_size=st.integers(1, 9))
def test_ranks_part_the_rows_evenly_into_runs(rows: list[int], world_size: int) -> None:
    parts = [rank_rows(np.array(sorted(rows), np.int64), rank, world_size) for rank in range(world_size)]
    assert np.concatenate(parts).tolist() == sorted(rows)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_latents_are_resident_where_they_fit_and_stream_where_they_do_not(long_split: LatentSplit) -> None:
    size = 480 * 2 * math.prod(SHAPE)
    assert isinstance(open_latents(long_split), ResidentLatents)
    assert isinstance(open_latents(long_split, budget_bytes=size), ResidentLatents)
    streaming = open_latents(long_split, budget_bytes=size - 1)
    assert isinstance(streaming, StreamingLatents)
    assert len(streaming) == 478
    part = open_latents(long_split, np.arange(12, 36), budget_bytes=size // 20)
    assert isinstance(part, ResidentLatents)
    assert part.rows.tolist() == list(range(12, 36))


@pytest.mark.gpu
def test_on_a_gpu_every_reader_gives_what_it_gives_on_the_processor(tmp_path: Path) -> None:
    split = make_split(tmp_path / "s")
    pairs = [
        (ResidentLatents(split), ResidentLatents(split, device="cuda")),
        (ResidentLatents(split), ResidentLatents(split, device="cuda", pinned=True)),
        (StreamingLatents(split, buffer_bytes=BUFFER), StreamingLatents(split, device="cuda", buffer_bytes=BUFFER)),
    ]
    for here, there in pairs:
        for (expected, latents), (positions, batch) in zip(
            here.epoch(batch_size=4, seed=0, epoch=0), there.epoch(batch_size=4, seed=0, epoch=0), strict=True
        ):
            assert torch.equal(positions, expected)
            assert batch.is_cuda
            assert torch.equal(batch.cpu(), latents)


def epoch_order(latents: ResidentLatents | StreamingLatents, seed: int, epoch: int, batch_size: int = 4) -> list[int]:
    return torch.cat([positions for positions, _ in latents.epoch(batch_size=batch_size, seed=seed, epoch=epoch)]).tolist()


def reading_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("revq-latents")]


def flip(file: Path, offset: int) -> None:
    data = bytearray(file.read_bytes())
    data[offset] ^= 4
    file.write_bytes(data)
