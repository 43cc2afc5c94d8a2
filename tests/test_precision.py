"""Latents that a dtype cannot tell apart are refused before they are written, and found in stores that have them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from revq.cache.manifest import OK, ManifestRow
from revq.cache.precision import RoundingSums
from revq.cache.store import Encoding, LatentStore
from revq.cache.writer import SplitPlan, SplitWriter
from revq.errors import StoreError
from revq.pipeline.info import info
from revq.stages.configs import EncodeLatentsConfig
from revq.stages.encode_latents import encode_latents
from revq.stages.events import Note, run_quietly

SHAPE = (2, 4, 4)


@pytest.fixture
def config(imagenet_sample: Path, taef2: str, tmp_path: Path) -> Callable[..., EncodeLatentsConfig]:
    def make(factory: str = "load", **changes: Any) -> EncodeLatentsConfig:
        settings = {"images": str(imagenet_sample / "val"), "store": str(tmp_path / "s"), "vae": taef2.replace(":load", f":{factory}")}
        sizes = {"image_size": 64, "device": "cpu", "limit": 24, "shard_rows": 8, "batch_size": 4, "workers": 2}
        return EncodeLatentsConfig(**{**settings, **sizes, **changes})

    return make


def truth(rows: int = 500, *, offset: float = 0.0, deviation: float = 1.0, pattern: float = 0.0, seed: int = 0) -> NDArray[np.float64]:
    """Latents (rows,2,4,4) in float64: channel 0 around 0, channel 1 around `offset`, with a mean for each position that spreads by `pattern`."""
    generator = np.random.default_rng(seed)
    latents = deviation * generator.standard_normal((rows, *SHAPE))
    latents[:, 1] += offset + pattern * generator.standard_normal(SHAPE[1:])
    return latents


def share_of(latents: NDArray[np.float64], kept: NDArray[Any]) -> float:
    """Root mean square error of channel 1 over the deviation of its positions, from the truth in float64."""
    errors = np.square(kept.astype(np.float64) - latents)[:, 1].mean()
    return float(np.sqrt(errors / latents[:, 1].var(0, ddof=1).mean()))


def sums(latents: NDArray[Any], kept: NDArray[Any] | None = None, batch: int = 64) -> RoundingSums:
    made = RoundingSums(latents.shape[1:])
    for start in range(0, len(latents), batch):
        made.add(latents[start : start + batch], None if kept is None else kept[start : start + batch])
    return made


def measured(latents: NDArray[Any], kept: NDArray[Any] | None = None, batch: int = 64) -> float:
    loss = sums(latents, kept, batch).worst()
    assert loss is not None
    return loss.share


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("deviation", [1e-6, 1e-3, 1.0, 100.0])
@pytest.mark.parametrize("ratio", [0.0, 10.0, 100.0, 1000.0, 10_000.0])
def test_what_float16_takes_is_the_error_against_the_truth(ratio: float, deviation: float, seed: int) -> None:
    latents = truth(offset=min(ratio * deviation, 6e4), deviation=deviation, seed=seed)
    computed = latents.astype(np.float32)
    kept = computed.astype(np.float16)
    assert measured(computed, kept) == pytest.approx(max(share_of(latents, kept), share_of_channel_0(latents, kept)), rel=0.05)


def share_of_channel_0(latents: NDArray[np.float64], kept: NDArray[Any]) -> float:
    return share_of(latents[:, ::-1], kept[:, ::-1])


@pytest.mark.parametrize("ratio", [1e5, 3e5, 1e6])
def test_what_float32_took_before_is_told_from_its_last_place(ratio: float) -> None:
    latents = truth(offset=ratio)
    computed = latents.astype(np.float32)
    assert measured(computed, computed) == pytest.approx(share_of(latents, computed), rel=0.05)


@pytest.mark.parametrize("ratio", [30.0, 100.0, 1000.0])
def test_a_store_alone_tells_what_float16_took_of_it(ratio: float) -> None:
    latents = truth(offset=ratio)
    kept = latents.astype(np.float16)
    assert measured(kept) == pytest.approx(share_of(latents, kept), rel=0.1)


@pytest.mark.parametrize("batch", [1, 7, 500])
def test_the_batches_in_which_rows_come_do_not_matter(batch: int) -> None:
    latents = truth(offset=1000.0).astype(np.float32)
    assert measured(latents, latents.astype(np.float16), batch) == pytest.approx(measured(latents, latents.astype(np.float16)), rel=1e-9)


def test_positions_that_lie_far_apart_do_not_hide_that_each_hardly_varies() -> None:
    latents = truth(pattern=1000.0).astype(np.float32)
    assert measured(latents, latents.astype(np.float16)) > 0.1


def test_ordinary_latents_lose_nothing_that_matters() -> None:
    latents = truth(offset=5.0).astype(np.float32)
    assert measured(latents, latents.astype(np.float16)) < 0.002


def test_whole_numbers_that_float16_has_are_no_loss() -> None:
    latents = (1000 + np.random.default_rng(0).integers(0, 2, (500, *SHAPE))).astype(np.float32)
    assert measured(latents, latents.astype(np.float16)) < 1e-3


def test_a_channel_that_never_varies_has_nothing_to_lose() -> None:
    latents = truth().astype(np.float32)
    latents[:, 1] = 1000.1
    sums(latents, latents.astype(np.float16)).check("float16")
    latents[:, 1] += 1e-7 * np.random.default_rng(0).standard_normal((500, 4, 4)).astype(np.float32)  # another batch, other last bits
    sums(latents, latents.astype(np.float16)).check("float16")
    sums(np.repeat(latents[:1], 5, 0), np.repeat(latents[:1], 5, 0).astype(np.float16)).check("float16")


def test_one_row_says_nothing() -> None:
    latents = truth(1, offset=1000.0).astype(np.float32)
    assert sums(latents, latents.astype(np.float16)).worst() is None
    assert sums(latents.astype(np.float16)).one_valued() == []


# encode-latents


@pytest.mark.parametrize(
    ("factory", "channel"), [("load_at_1000", r"\d+"), ("load_with_one_channel_at_1000", "5"), ("load_tiny", r"\d+")], ids=["all", "one", "tiny"]
)
def test_latents_that_float16_cannot_tell_apart_are_refused_before_one_is_written(
    factory: str, channel: str, config: Callable[..., EncodeLatentsConfig], tmp_path: Path
) -> None:
    with pytest.raises(
        StoreError, match=rf"^float16 does not resolve channel {channel} of the latents, .*more than 0.01; encode with --dtype float32"
    ):
        run_quietly(encode_latents(config(factory)))
    assert list((tmp_path / "s").glob("train/latents/c/*")) == []


def test_the_advice_holds_and_float32_gives_the_same_latents_as_without_the_offset(
    config: Callable[..., EncodeLatentsConfig], tmp_path: Path
) -> None:
    with pytest.raises(StoreError, match=r"--dtype float32 \(and --overwrite\)"):
        run_quietly(encode_latents(config("load_at_1000")))
    run_quietly(encode_latents(config("load_at_1000", dtype="float32", overwrite=True)))
    run_quietly(encode_latents(config(store=str(tmp_path / "plain"), dtype="float32")))
    shifted, plain = (np.asarray(LatentStore.open(tmp_path / name)["train"].latents[:]) for name in ("s", "plain"))
    assert float(np.abs(shifted - 1000 - plain).max()) < 1e-3
    assert warnings_of(info(str(tmp_path / "s"), verify=True)) == []


def test_what_even_float32_cannot_tell_apart_is_not_sent_to_float32(config: Callable[..., EncodeLatentsConfig]) -> None:
    with pytest.raises(StoreError, match=r"^float32 itself does not resolve channel \d+ of the latents, 3e\+05 .*without that offset") as caught:
        run_quietly(encode_latents(config("load_at_300000", dtype="float32")))
    assert "--dtype" not in str(caught.value)


@pytest.mark.parametrize("factory", ["load", "load_large_and_far"])
def test_latents_of_any_size_that_float16_does_tell_apart_are_taken(factory: str, config: Callable[..., EncodeLatentsConfig], tmp_path: Path) -> None:
    run_quietly(encode_latents(config(factory)))
    assert warnings_of(info(str(tmp_path / "s"), verify=True)) == []


def test_a_shard_of_one_row_waits_for_the_next(config: Callable[..., EncodeLatentsConfig], tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="float16 does not resolve"):
        run_quietly(encode_latents(config("load_at_1000", shard_rows=1, batch_size=1)))
    assert not LatentStore.open(tmp_path / "s").splits


def test_a_folder_of_one_image_over_and_over_is_taken(imagenet_sample: Path, config: Callable[..., EncodeLatentsConfig], tmp_path: Path) -> None:
    image = next((imagenet_sample / "val").rglob("*.JPEG"))
    (tmp_path / "same").mkdir()
    for number in range(11):
        (tmp_path / "same" / f"{number}.jpg").write_bytes(image.read_bytes())
    run_quietly(encode_latents(config(images=str(tmp_path / "same"))))


# revq info --verify, for stores that are there already


def warnings_of(events: Iterator[object]) -> list[str]:
    return [event.text for event in events if isinstance(event, Note) and event.warning]


def store_of(latents: NDArray[Any], path: Path) -> Path:
    """A complete store with these latents, as an earlier revq would have written it."""
    encoding = Encoding(vae={"id": "v", "fingerprint": "f"}, image_size=32, latent_shape=latents.shape[1:], dtype=str(latents.dtype))
    plan = SplitPlan(name="train", images=len(latents), views=1, seed=0, source="made", order_sha256="", chunk_rows=50, shard_rows=100)
    writer = SplitWriter(path, encoding, plan)
    for shard in writer.todo:
        rows = [
            ManifestRow(row=row, view=0, status=OK, source="made", key=str(row), label=0, class_name="", sha256="")
            for row in range(shard.start, shard.stop)
        ]
        writer.write_shard(shard, latents[shard.start : shard.stop], rows)
    writer.finish()
    return path


def test_verify_names_what_float16_took_and_verifies_all_the_same(tmp_path: Path) -> None:
    events = list(info(str(store_of(truth(300, offset=1000.0, deviation=0.5).astype(np.float16), tmp_path / "s")), verify=True))
    (warning,) = warnings_of(iter(events))
    assert re.search(
        r'split "train" of .*: float16 does not resolve channel 1 of the latents, 1000 .*--split train --overwrite --dtype float32', warning
    )
    assert events[-1].value["verified"] is True


def test_verify_names_a_channel_that_collapsed_altogether(tmp_path: Path) -> None:
    (warning,) = warnings_of(info(str(store_of(truth(300, offset=1000.0, deviation=0.001).astype(np.float16), tmp_path / "s")), verify=True))
    assert re.search(r"every row is the same in channel 1: .*float16 has rounded it off", warning)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_verify_finds_nothing_to_say_of_an_ordinary_store(dtype: str, tmp_path: Path) -> None:
    latents = truth(300, offset=3.0).astype(dtype)
    latents[:, 0, 0, 0] = 0
    assert warnings_of(info(str(store_of(latents, tmp_path / "s")), verify=True)) == []
