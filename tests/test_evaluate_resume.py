"""Long evaluations: stopped, killed, shared among ranks, repeated for another tokenizer: the numbers are those of one uninterrupted pass."""

from __future__ import annotations

import itertools
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from random_weights import save_random_alexnet
from test_evaluate import config_for, events_of, flat_folder

from revq.stages.evaluate import evaluate
from revq.stages.events import Advance, Begin, run_quietly

pytestmark = pytest.mark.usefixtures("empty_torch_home")


def numbers(metrics: dict[str, Any]) -> dict[str, Any]:
    """All that was measured of the images; not the time that it took, nor where it went."""
    return {name: value for name, value in metrics.items() if name not in {"throughput", "out", "report", "protocol", "sources"}}


def test_a_stopped_evaluation_goes_on_where_it_was_and_ends_with_the_same_numbers_to_the_last_bit(
    tokenizer_folder: Path, imagenet_sample: Path, tmp_path: Path, inception: Path
) -> None:
    images = flat_folder(tmp_path / "images", imagenet_sample, 7)
    (images / "02-broken.jpg").write_bytes(b"no picture")
    settings = {"inception_weights": str(inception), "batch_size": 2, "cache": "off"}
    whole = run_quietly(evaluate(config_for(tokenizer_folder, images, tmp_path / "whole", **settings)))
    stopped = evaluate(config_for(tokenizer_folder, images, tmp_path / "other", **settings))
    assert [event.done for event in itertools.islice((event for event in stopped if isinstance(event, Advance)), 2)] == [2, 4]
    with pytest.raises(KeyboardInterrupt):
        stopped.throw(KeyboardInterrupt)  # type: ignore[attr-defined]
    assert [path.name for path in (tmp_path / "other").glob("partial*")] == ["partial-0-of-1.pt"]
    assert not (tmp_path / "other" / "metrics.json").exists()
    events, resumed = events_of(config_for(tokenizer_folder, images, tmp_path / "other", **settings))
    begun = next(event for event in events if isinstance(event, Begin))
    assert (begun.done, begun.total) == (4, 8)
    assert numbers(resumed) == numbers(whole)
    assert resumed["rows"]["rectified"]["rfid"] > 0
    assert not list((tmp_path / "other").glob("partial*"))


KILLED = """
import sys
from revq.stages import evaluate as stage
from revq.stages.events import Advance
stage._SAVE_EVERY_S = 0.0  # after every batch, not every two minutes
tokenizer, images, out = sys.argv[1:]
settings = dict(download=False, device="cpu", tolerance=False, batch_size=1, workers=1, cache="off")
for event in stage.evaluate(stage.EvaluateConfig(tokenizer=tokenizer, images=images, out=out, **settings)):
    if isinstance(event, Advance):
        print(event.done, flush=True)
"""


def test_a_killed_evaluation_goes_on_from_its_last_save_and_ends_with_the_same_numbers(
    tokenizer_folder: Path, imagenet_sample: Path, tmp_path: Path
) -> None:
    images, settings = flat_folder(tmp_path / "images", imagenet_sample, 20), {"batch_size": 1, "workers": 1, "cache": "off"}
    whole = run_quietly(evaluate(config_for(tokenizer_folder, images, tmp_path / "whole", **settings)))
    command = [sys.executable, "-c", KILLED, str(tokenizer_folder), str(images), str(tmp_path / "killed")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        while int(process.stdout.readline()) < 4:
            pass
        process.kill()
    assert process.returncode == -signal.SIGKILL
    events, resumed = events_of(config_for(tokenizer_folder, images, tmp_path / "killed", **settings))
    begun = next(event for event in events if isinstance(event, Begin))
    assert 4 <= begun.done < 20
    assert numbers(resumed) == numbers(whole)
    assert not list((tmp_path / "killed").glob("*partial*"))


@pytest.mark.parametrize("damage", ["torn", "other batches"])
def test_what_a_stopped_evaluation_left_is_used_only_if_it_is_whole_and_fits(
    damage: str, tokenizer_folder: Path, imagenet_sample: Path, tmp_path: Path
) -> None:
    images, out = flat_folder(tmp_path / "images", imagenet_sample, 4), tmp_path / "out"
    stopped = evaluate(config_for(tokenizer_folder, images, out, batch_size=1))
    next(event for event in stopped if isinstance(event, Advance))
    stopped.close()  # type: ignore[attr-defined]
    partial = out / "partial-0-of-1.pt"
    if damage == "torn":
        partial.write_bytes(partial.read_bytes()[:1000])
    events, value = events_of(config_for(tokenizer_folder, images, out, batch_size=2 if damage == "other batches" else 1))
    assert next(event for event in events if isinstance(event, Begin)).done == 0
    assert value["images"] == 4


COLOURS = """
class Colours:
    def features(self, images):
        return images.float().mean((2, 3))

    def logits(self, features):
        return features

def make():
    return Colours()
"""


def test_two_ranks_write_the_numbers_of_one(
    torchrun: Callable[..., Any], tokenizer_folder: Path, imagenet_sample: Path, tmp_path: Path, empty_torch_home: Path, inception: Path
) -> None:
    images = flat_folder(tmp_path / "images", imagenet_sample, 11)
    (images / "03-broken.jpg").write_bytes(b"no picture")
    save_random_alexnet(empty_torch_home)
    (tmp_path / "judge.py").write_text(COLOURS)
    features = f"{tmp_path / 'judge.py'}:make"
    settings = {"inception_weights": str(inception), "features": features, "batch_size": 3, "tolerance_images": 3, "workers": 2}
    one = run_quietly(evaluate(config_for(tokenizer_folder, images, tmp_path / "one", tolerance=True, **settings)))
    options = [
        "--inception-weights",
        inception,
        "--features",
        features,
        "--batch-size",
        3,
        "--tolerance-images",
        3,
        "--workers",
        2,
        "--device",
        "cpu",
    ]
    torchrun(2, "evaluate", tokenizer_folder, images, tmp_path / "two", "--no-download", *options)
    two = json.loads((tmp_path / "two" / "metrics.json").read_text())
    assert (two["protocol"]["ranks"], one["protocol"]["ranks"]) == (2, 1)
    assert flat(numbers(two)) == pytest.approx(flat(numbers(one)), rel=1e-9, abs=1e-9)
    assert two["fingerprints"] == one["fingerprints"]
    assert two["notes"] == one["notes"]
    assert two["rows"]["rectified"]["rfid"] > 0
    assert two["rows"]["vae"]["kid_colours"] is not None
    assert not list((tmp_path / "two").glob("partial*"))
    assert (tmp_path / "two" / "report.html").is_file()


def flat(value: Any, name: str = "") -> dict[str, float]:
    """Every number inside a JSON value, by its path."""
    if isinstance(value, dict):
        return {path: number for key, part in value.items() for path, number in flat(part, f"{name}/{key}").items()}
    if isinstance(value, list):
        return {path: number for i, part in enumerate(value) for path, number in flat(part, f"{name}/{i}").items()}
    return {name: float(value)} if isinstance(value, int | float) else {}


def test_the_next_tokenizer_on_the_same_images_reuses_the_originals_features(
    tokenizer_folder: Path, imagenet_sample: Path, tmp_path: Path, inception: Path
) -> None:
    images, settings = flat_folder(tmp_path / "images", imagenet_sample, 4), {"inception_weights": str(inception), "batch_size": 2}
    first = run_quietly(evaluate(config_for(tokenizer_folder, images, tmp_path / "first", **settings)))
    again = run_quietly(evaluate(config_for(tokenizer_folder, images, tmp_path / "again", **settings)))
    assert (first["protocol"]["cached_features"], again["protocol"]["cached_features"]) == (0, 4)
    assert numbers(again) == numbers(first)
    shutil.copy(images / "03.jpg", images / "00.jpg")
    other = run_quietly(evaluate(config_for(tokenizer_folder, images, tmp_path / "other", **settings)))
    assert other["protocol"]["cached_features"] == 2
    assert other["fingerprints"]["images"] != first["fingerprints"]["images"]
