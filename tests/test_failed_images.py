"""Images that cannot be read: how many may be, and that a run which had too many becomes whole once they are mended."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_encode_latents import stop_after
from test_store import contents

from revq.cache.store import LatentStore
from revq.errors import ConfigError, ImageError, StoreError
from revq.stages.configs import EncodeLatentsConfig
from revq.stages.encode_latents import encode_latents
from revq.stages.events import Note, run_quietly

Encode = Callable[..., EncodeLatentsConfig]
BAD = range(9, 30, 2)  # eleven of them, the last in the last shard


@pytest.fixture
def images(imagenet_sample: Path, tmp_path: Path) -> Path:
    """30 photographs, and under `good` those that `spoil` takes away."""
    for number, path in enumerate(sorted((imagenet_sample / "val").rglob("*.JPEG"))[:30]):
        for name in ("images", "good"):
            (tmp_path / name).mkdir(exist_ok=True)
            shutil.copy(path, tmp_path / name / f"{number:02}.jpg")
    return tmp_path / "images"


@pytest.fixture
def encode(images: Path, taef2: str, tmp_path: Path) -> Encode:
    def make(**changes: Any) -> EncodeLatentsConfig:
        settings = {"image_size": 64, "shard_rows": 4, "batch_size": 2, "workers": 2, "device": "cpu", "store": str(tmp_path / "s")}
        return EncodeLatentsConfig(images=str(images), vae=taef2, **{**settings, **changes})

    return make


def spoil(images: Path, numbers: Any = BAD) -> None:
    for number in numbers:
        (images / f"{number:02}.jpg").write_bytes(b"")


def mend(images: Path, numbers: Any = BAD) -> None:
    for number in numbers:
        shutil.copy(images.parent / "good" / f"{number:02}.jpg", images)


def test_too_many_failed_images_end_the_run_and_mended_ones_give_the_bytes_of_an_undisturbed_run(
    encode: Encode, images: Path, tmp_path: Path
) -> None:
    run_quietly(encode_latents(encode(store=str(tmp_path / "whole"))))
    spoil(images)
    message = r"11 images of .*/images cannot be read; the last is 29.jpg \(the file is empty\), more than the 10 of 30 that --max-failed 0.01 allows"
    for _ in range(2):
        with pytest.raises(ImageError, match=message):
            run_quietly(encode_latents(encode()))
        with pytest.raises(StoreError, match="is not finished"):
            LatentStore.open(tmp_path / "s")["train"]
    mend(images)
    told = [event.text for event in encode_latents(encode()) if isinstance(event, Note)]
    assert told == ["10 images that could not be read have changed; their shards are encoded again", "resuming: 8 of 30 rows are there"]
    assert contents(tmp_path / "s") == contents(tmp_path / "whole")


def test_a_larger_max_failed_lets_them_through_and_keeps_what_was_done(encode: Encode, images: Path, tmp_path: Path) -> None:
    spoil(images)
    run_quietly(encode_latents(encode(store=str(tmp_path / "whole"), max_failed=0.5)))
    with pytest.raises(ImageError, match="11 images"):
        run_quietly(encode_latents(encode()))
    events = list(encode_latents(encode(max_failed=0.5)))
    assert "resuming: 28 of 30 rows are there" in [event.text for event in events if isinstance(event, Note)]
    assert events[-1].value["failed"] == 11  # type: ignore[union-attr]
    assert contents(tmp_path / "s") == contents(tmp_path / "whole")
    again = list(encode_latents(encode()))
    assert again[0].text.endswith("is complete already but for 11 images that could not be read; --overwrite encodes it again")  # type: ignore[union-attr]


def test_ten_may_fail_in_a_small_folder_and_none_where_none_may(encode: Encode, images: Path, tmp_path: Path) -> None:
    spoil(images, BAD[:10])
    with pytest.raises(ImageError, match=r"1 images .* 09\.jpg .* more than the 0 of 30 that --max-failed 0 allows"):
        run_quietly(encode_latents(encode(max_failed=0)))
    assert run_quietly(encode_latents(encode()))["failed"] == 10
    for wrong in (-0.1, 1.5):
        with pytest.raises(ConfigError, match=f"max-failed must be from 0 to 1, not {wrong}"):
            encode(max_failed=wrong)


def test_failed_images_of_an_interrupted_run_are_tried_anew(encode: Encode, images: Path, tmp_path: Path) -> None:
    run_quietly(encode_latents(encode(store=str(tmp_path / "whole"))))
    spoil(images, [1, 5])
    stop_after(encode_latents(encode()), 10)
    mend(images, [5])
    told = [event.text for event in encode_latents(encode()) if isinstance(event, Note)]
    assert told[0] == "1 images that could not be read have changed; their shards are encoded again"
    assert told[1].startswith("resuming: ")
    assert LatentStore.open(tmp_path / "s")["train"].failed == 1
    mend(images, [1])
    run_quietly(encode_latents(encode(overwrite=True)))
    assert contents(tmp_path / "s") == contents(tmp_path / "whole")


def test_failures_of_all_ranks_are_counted_together(
    torchrun: Callable[..., subprocess.CompletedProcess[str]], encode: Encode, images: Path, taef2: str, tmp_path: Path
) -> None:
    run_quietly(encode_latents(encode(store=str(tmp_path / "whole"))))
    spoil(images)
    work = ["encode-latents", images, tmp_path / "s", "--vae", taef2, "--image-size", 64, "--shard-rows", 4, "--batch-size", 2, "--device", "cpu"]
    done = torchrun(2, *work, check=1)
    assert re.search(r"revq: error on rank 0: 11 images of .* cannot be read, more than the 10 of 30", done.stderr), done.stderr
    mend(images)
    assert "11 images that could not be read have changed" in torchrun(2, *work).stdout
    assert contents(tmp_path / "s") == contents(tmp_path / "whole")
