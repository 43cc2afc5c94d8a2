"""Stage one on real images through a real VAE: what it writes, what it survives, what it refuses."""

from __future__ import annotations

import io
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from revq.cache.sources import open_source
from revq.cache.store import LatentStore
from revq.errors import ConfigError, ImageError, MismatchError, OutputError, StoreError
from revq.models.vae import FrozenVAE
from revq.stages.configs import EncodeLatentsConfig
from revq.stages.encode_latents import encode_latents
from revq.stages.events import Advance, Begin, Event, Note, Result, run_quietly

SIZE = 64
Start = Callable[..., subprocess.Popen[str]]
Encode = Callable[..., EncodeLatentsConfig]


@pytest.fixture
def encode(imagenet_sample: Path, taef2: str, tmp_path: Path) -> Encode:
    """A small configuration: 12 images of val in shards of 4, unless told otherwise."""

    def make(**changes: Any) -> EncodeLatentsConfig:
        settings = {"images": str(imagenet_sample / "val"), "store": str(tmp_path / "s"), "vae": taef2, "image_size": SIZE, "device": "cpu"}
        return EncodeLatentsConfig(**{**settings, "limit": 12, "shard_rows": 4, "batch_size": 3, "workers": 2, **changes})

    return make


@pytest.fixture
def odd_folder(imagenet_sample: Path, tmp_path: Path) -> Path:
    """Nine real images and three files that are none, two of them beside each other."""
    folder = tmp_path / "odd"
    folder.mkdir()
    for number, path in enumerate(sorted((imagenet_sample / "val").rglob("*.JPEG"))[:9]):
        shutil.copy(path, folder / f"{number}.jpg")
    (folder / "2a.jpg").write_bytes(b"")
    (folder / "2b.jpg").write_text("not a picture")
    data = (folder / "8.jpg").read_bytes()
    (folder / "7a.jpg").write_bytes(data[: len(data) // 3])
    return folder


def contents(path: Path) -> dict[str, bytes]:
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def stop_after(events: Any, count: int) -> list[Event]:
    """The events up to the `count`-th Advance, then Ctrl-C's KeyboardInterrupt at that point."""
    seen: list[Event] = []
    for event in events:
        seen.append(event)
        if sum(isinstance(event, Advance) for event in seen) == count:
            with pytest.raises(KeyboardInterrupt):
                events.throw(KeyboardInterrupt())
            return seen
    raise AssertionError("it was done before it could be stopped")


def test_each_row_is_the_vaes_latent_of_its_image(encode: Encode, imagenet_sample: Path, taef2: str) -> None:
    config = encode(dtype="float32")
    run_quietly(encode_latents(config))
    split = LatentStore.open(config.store)["train"]
    source, vae = open_source(imagenet_sample / "val"), FrozenVAE.load(taef2)
    for row in (0, 5, 11):
        image = Image.open(io.BytesIO(source.read(row))).convert("RGB")
        scale = SIZE / min(image.size)
        resized = image.resize((max(SIZE, int(image.width * scale + 1e-6)), max(SIZE, int(image.height * scale + 1e-6))), Image.Resampling.BILINEAR)
        left, top = round((resized.width - SIZE) / 2), round((resized.height - SIZE) / 2)
        square = np.asarray(resized.crop((left, top, left + SIZE, top + SIZE)), np.float32)
        latent = vae.encode(torch.from_numpy(square / 127.5 - 1).permute(2, 0, 1)[None])[0]
        np.testing.assert_allclose(np.asarray(split.latents[row]), latent.numpy(), atol=1e-4)
    assert split.latents.shape == (12, 32, 8, 8)
    assert split.labels.tolist() == [item.label for item in source.items[:12]]
    assert split.manifest()["key"].to_pylist() == [item.key for item in source.items[:12]]


def test_the_events_are_a_beginning_an_advance_for_each_batch_and_a_result(encode: Encode) -> None:
    events = list(encode_latents(encode()))
    assert events[0] == Begin(task="encode train", total=12, unit="images", done=0)
    done = [event.done for event in events if isinstance(event, Advance)]
    assert done == [3, 4, 7, 8, 11, 12]
    assert isinstance(events[-1], Result)
    value = events[-1].value
    assert (value["rows"], value["images"], value["failed"], value["latent_shape"]) == (12, 12, 0, [32, 8, 8])
    assert value["already_complete"] is False
    assert value["bytes"] > 0


def test_the_same_command_gives_the_same_bytes_whatever_the_number_of_workers(encode: Encode, tmp_path: Path) -> None:
    stores = [tmp_path / f"workers-{workers}" for workers in (1, 5)]
    for store, workers in zip(stores, (1, 5), strict=True):
        run_quietly(encode_latents(encode(store=str(store), workers=workers, views=2, limit=6)))
    assert contents(stores[0]) == contents(stores[1])


def test_views_are_the_central_crop_then_random_ones_beside_it(encode: Encode, tmp_path: Path) -> None:
    run_quietly(encode_latents(encode(limit=5)))
    run_quietly(encode_latents(encode(split="more", limit=5, views=3, batch_size=15)))
    store = LatentStore.open(tmp_path / "s")
    views = np.asarray(store["more"].latents[:]).astype(np.float32)
    np.testing.assert_allclose(views[::3], np.asarray(store["train"].latents[:]).astype(np.float32), atol=1e-2)
    assert np.abs(views[0] - views[1]).mean() > 0.01
    assert np.abs(views[1] - views[2]).mean() > 0.01
    manifest = store["more"].manifest().to_pylist()
    assert [row["view"] for row in manifest] == [0, 1, 2] * 5
    assert {row["flipped"] for row in manifest} == {True, False}
    assert store["more"].labels.tolist() == sorted(store["train"].labels.tolist() * 3)


def test_images_that_cannot_be_read_are_recorded_and_shift_no_row(encode: Encode, odd_folder: Path, tmp_path: Path) -> None:
    events = list(encode_latents(encode(images=str(odd_folder), limit=None)))
    warnings = [event.text for event in events if isinstance(event, Note) and event.warning]
    assert [text.split()[1] for text in warnings] == ["2a.jpg", "2b.jpg", "7a.jpg"]
    split = LatentStore.open(tmp_path / "s")["train"]
    manifest = split.manifest().to_pylist()
    failed = [row["key"] for row in manifest if row["status"] == "failed"]
    assert failed == ["2a.jpg", "2b.jpg", "7a.jpg"]
    assert np.flatnonzero(~split.ok).tolist() == [3, 4, 10]
    assert all(row["reason"] for row in manifest if row["status"] == "failed")
    assert not np.asarray(split.latents[3:5]).any()
    good = np.asarray(split.latents[:])[split.ok]
    np.testing.assert_allclose(split.mean, good.astype(np.float64).mean(0), rtol=1e-12)
    for file in failed:
        (odd_folder / file).unlink()
    run_quietly(encode_latents(encode(images=str(odd_folder), limit=None, store=str(tmp_path / "clean"))))
    clean = np.asarray(LatentStore.open(tmp_path / "clean")["train"].latents[:])
    np.testing.assert_allclose(good.astype(np.float32), clean.astype(np.float32), atol=1e-2)
    assert run_quietly(encode_latents(encode(store=str(tmp_path / "clean"), images=str(odd_folder), limit=None)))["failed"] == 0


def test_after_five_warnings_only_a_count_follows(encode: Encode, odd_folder: Path) -> None:
    for number in range(8):
        (odd_folder / f"9{number}.png").write_bytes(b"x")
    notes = [event.text for event in encode_latents(encode(images=str(odd_folder), limit=None, max_failed=1.0)) if isinstance(event, Note)]
    assert len(notes) == 6
    assert notes[-1].startswith("11 images could not be read")


def test_strict_stops_at_the_first_unreadable_image_even_one_of_an_earlier_run(encode: Encode, odd_folder: Path) -> None:
    with pytest.raises(ImageError, match=r"2a.jpg .*the file is empty.*--strict"):
        run_quietly(encode_latents(encode(images=str(odd_folder), limit=None, strict=True)))
    run_quietly(encode_latents(encode(images=str(odd_folder), limit=None)))
    with pytest.raises(ImageError, match=r"2a.jpg .*earlier run.*--overwrite"):
        run_quietly(encode_latents(encode(images=str(odd_folder), limit=None, strict=True)))


def test_a_folder_of_unreadable_images_makes_no_split(encode: Encode, tmp_path: Path) -> None:
    (tmp_path / "bad").mkdir()
    for name in ("a.png", "b.png"):
        (tmp_path / "bad" / name).write_bytes(b"?")
    with pytest.raises(StoreError, match=r"none of the 2 images .*a.png"):
        run_quietly(encode_latents(encode(images=str(tmp_path / "bad"))))


def test_a_latent_too_large_for_float16_names_its_image_and_the_way_out(encode: Encode, tmp_path: Path) -> None:
    plugin = tmp_path / "loud.py"
    plugin.write_text(
        "import torch\n"
        "class Loud(torch.nn.Module):\n"
        "    def encode(self, images):\n"
        "        return torch.nn.functional.avg_pool2d(images + 1, 8) * 40000\n"
        "    def decode(self, latents):\n"
        "        return torch.nn.functional.interpolate(latents / 40000 - 1, scale_factor=8)\n"
        "def load():\n"
        "    return Loud()\n"
    )
    with pytest.raises(StoreError, match=r"image n.*JPEG .*not finite in float16; encode with --dtype float32 \(and --overwrite\)"):
        run_quietly(encode_latents(encode(vae=f"{plugin}:load")))
    assert run_quietly(encode_latents(encode(vae=f"{plugin}:load", dtype="float32", overwrite=True)))["rows"] == 12


def test_an_interrupted_run_resumes_to_the_bytes_of_an_uninterrupted_one(encode: Encode, tmp_path: Path) -> None:
    run_quietly(encode_latents(encode(store=str(tmp_path / "whole"))))
    for advances in (1, 3):
        stop_after(encode_latents(encode()), advances)
        with pytest.raises(StoreError, match="not finished"):
            LatentStore.open(tmp_path / "s")["train"]
    events = list(encode_latents(encode()))
    begin = next(event for event in events if isinstance(event, Begin))
    assert 0 < begin.done < 12
    assert [event.text for event in events if isinstance(event, Note)] == [f"resuming: {begin.done} of 12 rows are there"]
    assert contents(tmp_path / "whole") == contents(tmp_path / "s")


RUNNER = """
import sys
from revq.stages.configs import EncodeLatentsConfig
from revq.stages.encode_latents import encode_latents
images, store, vae = sys.argv[1:4]
settings = dict(image_size=64, device="cpu", limit=24, shard_rows=4, batch_size=3, workers=2)
print("ready", flush=True)
for event in encode_latents(EncodeLatentsConfig(images=images, store=store, vae=vae, **settings)):
    print(type(event).__name__, flush=True)
"""


@pytest.fixture
def start(imagenet_sample: Path, taef2: str) -> Start:
    """Start encoding 24 images to a store in a process of its own, which prints a line for each event."""

    def run(store: Path, **options: Any) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", RUNNER, str(imagenet_sample / "val"), str(store), taef2]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)

    return run


def finish(process: subprocess.Popen[str], code: int = 0) -> str:
    """Wait for its end; returns what it wrote to stderr."""
    _, errors = process.communicate(timeout=240)
    assert process.returncode == code, errors
    return errors


def test_killed_at_many_random_instants_it_resumes_to_the_bytes_of_an_uninterrupted_run(imagenet_sample: Path, taef2: str, tmp_path: Path) -> None:
    def run(store: str, kills: int, longest_s: float) -> list[str]:
        script = str(Path(__file__).with_name("killed_encoder.py"))
        command = [sys.executable, script, str(imagenet_sample / "val"), str(tmp_path / store), taef2, str(kills), str(longest_s)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    whole_s = float(run("whole", kills=0, longest_s=0)[0])
    lines = run("killed", kills=15, longest_s=whole_s / 3)
    assert sum(line.startswith("killed") for line in lines) >= 5
    assert contents(tmp_path / "whole") == contents(tmp_path / "killed")


def limit_file_size() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))


def test_a_full_disk_is_one_line_and_the_run_resumes_when_there_is_room(start: Start, tmp_path: Path) -> None:
    limited = start(tmp_path / "s", preexec_fn=limit_file_size, env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"})
    assert "revq.errors.OutputError: no room left to write" in finish(limited, code=1)
    finish(start(tmp_path / "s"))
    finish(start(tmp_path / "whole"))
    assert contents(tmp_path / "whole") == contents(tmp_path / "s")


def test_a_complete_split_is_left_alone_and_told_so(encode: Encode, tmp_path: Path) -> None:
    run_quietly(encode_latents(encode(limit=4)))
    before = contents(tmp_path / "s")
    events = list(encode_latents(encode(limit=4)))
    assert [type(event) for event in events] == [Note, Result]
    assert events[-1].value["already_complete"] is True  # type: ignore[union-attr]
    assert contents(tmp_path / "s") == before


def test_another_batch_size_may_finish_what_one_began(encode: Encode, tmp_path: Path) -> None:
    stop_after(encode_latents(encode(limit=8, shard_rows=None, batch_size=2)), 2)
    run_quietly(encode_latents(encode(limit=8, shard_rows=None, batch_size=5)))
    assert LatentStore.open(tmp_path / "s")["train"].shard_rows == 2


def test_a_dry_run_tells_the_size_and_writes_nothing(encode: Encode, tmp_path: Path) -> None:
    value = run_quietly(encode_latents(encode(dry_run=True, views=3)))
    assert (value["rows"], value["bytes"], value["dry_run"]) == (36, 36 * 32 * 8 * 8 * 2, True)
    assert not (tmp_path / "s").exists()


def test_other_settings_for_a_store_or_split_are_refused_before_anything_is_written(encode: Encode, tmp_path: Path) -> None:
    run_quietly(encode_latents(encode(limit=4)))
    before = contents(tmp_path / "s")
    cases: list[tuple[dict[str, Any], str]] = [
        ({"limit": 4, "image_size": 72, "split": "val"}, "image_size: 64 there, 72 asked"),
        ({"limit": 4, "seed": 1}, "seed: 0 there, 1 asked"),
        ({"limit": 5}, "images: 4 there, 5 asked"),
        ({"limit": 4, "views": 2}, "views: 1 there, 2 asked"),
        ({"limit": 4, "images": "photographs:train"}, "source: .*val there, photographs:train asked"),
    ]
    for changes, message in cases:
        with pytest.raises(MismatchError, match=message):
            run_quietly(encode_latents(encode(**changes)))
    assert contents(tmp_path / "s") == before


def test_a_store_path_that_holds_something_else_is_refused_before_the_vae_is_loaded(encode: Encode, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    with pytest.raises(OutputError, match="something else"):
        run_quietly(encode_latents(encode(store=str(tmp_path / "mine"), vae="no/such-vae", overwrite=True)))
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "years of work"


def test_the_embedded_photographs_are_encoded_like_any_folder(encode: Encode, tmp_path: Path) -> None:
    run_quietly(encode_latents(encode(images="photographs:held-out", split="held-out", limit=50)))
    split = LatentStore.open(tmp_path / "s")["held-out"]
    row = split.manifest().to_pylist()[49]
    assert row["key"] == "chelsea/0192-0051-0000"
    assert (row["left"], row["top"], row["right"], row["bottom"]) == (51, 0, 243, 192)
    assert row["class_name"] == "chelsea"


@pytest.mark.parametrize("wrong", [{"image_size": 0}, {"batch_size": 0}, {"workers": 0}, {"views": 0}, {"limit": 0}, {"dtype": "int8"}], ids=str)
def test_a_setting_out_of_range_is_refused_with_its_value(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong)).replace("_", "-")):
        EncodeLatentsConfig(images="i", store="s", **wrong)


def test_a_name_of_a_split_that_is_no_name_is_refused_before_anything_is_opened(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a/b"):
        run_quietly(encode_latents(EncodeLatentsConfig(images="nowhere", store=str(tmp_path / "s"), split="a/b")))
    assert not (tmp_path / "s").exists()
