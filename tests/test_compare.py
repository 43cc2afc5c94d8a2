"""Several evaluations side by side: what the table says, and what it warns of."""

from __future__ import annotations

import copy
import json
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from revq.errors import ConfigError, OutputError
from revq.pipeline.compare import compare, comparison_table, short_names, unlike
from revq.stages.events import Note, Result, run_quietly

Cli = Callable[..., subprocess.CompletedProcess[str]]
METRICS: dict[str, Any] = {
    "protocol": {
        "name": "revq",
        "image_size": 64,
        "precision": "fp32",
        "weights": {name: {"sha256": None} for name in ("rfid", "lpips_alex", "lpips_vgg")},
    },
    "images": 100,
    "rfid_label": "rFID@100",
    "rows": {
        row: {"rfid": None, "psnr_db": psnr, "ssim": 0.5, "lpips_alex": None, "lpips_vgg": None, "inception_score": None}
        for row, psnr in (("original", None), ("vae", 27.0), ("quantized", 24.0), ("rectified", 24.6))
    },
    "recovered": {"psnr_db": 0.2},
    "tokens_per_image": 512,
    "bits_per_image": 4608.0,
    "bits_per_pixel": 1.125,
    "codebook_usage": {"usage": {"min": 0.1, "median": 0.18, "max": 0.2}, "codes": 512},
    "fingerprints": {"images": "a" * 16},
}


def changed(**changes: Any) -> dict[str, Any]:
    """METRICS with other values; "protocol.name" reaches inside."""
    metrics = copy.deepcopy(METRICS)
    for path, value in changes.items():
        part = metrics
        *way, last = path.split(".")
        for name in way:
            part = part[name]
        part[last] = value
    return metrics


def save(folder: Path, metrics: dict[str, Any]) -> str:
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text(json.dumps(metrics))
    return str(folder)


def test_a_line_has_the_sizes_the_rectified_row_and_its_ceiling() -> None:
    table = comparison_table([METRICS, changed(**{"rows.rectified.psnr_db": 26.0})], ["a", "b"])
    assert table[0] == ["tokenizer", "tokens", "codes", "bits", "bits/px", "PSNR (dB) ↑", "SSIM ↑", "VAE PSNR", "recovered", "used codes"]
    assert table[1] == ["a", "512", "512", "4,608", "1.125", "24.60", "0.5000", "27.00", "20%", "18%"]
    assert table[2][5] == "26.00"


def test_distances_over_other_numbers_of_images_carry_their_own_label() -> None:
    first = changed(**{"rows.rectified.rfid": 3.0})
    assert comparison_table([first, first], ["a", "b"])[0][5] == "rFID@100 ↓"
    table = comparison_table([first, changed(**{"rows.rectified.rfid": 1.0, "rfid_label": "rFID"})], ["a", "b"])
    assert (table[0][5], table[1][5], table[2][5]) == ("rFID@n ↓", "3.00 (rFID@100)", "1.00 (rFID)")


@dataclass(frozen=True)
class Unlike:
    """What differs between two evaluations, and what is told."""

    id: str
    changes: dict[str, Any]
    told: str


UNLIKE = [
    Unlike("protocol", {"protocol.name": "adm"}, "not comparable: protocol differ (a: revq, b: adm)"),
    Unlike("size", {"protocol.image_size": 128}, "not comparable: image size differ (a: 64, b: 128)"),
    Unlike("images", {"fingerprints.images": "b" * 16}, f"not comparable: images differ (a: {'a' * 16}, b: {'b' * 16})"),
    Unlike("weights", {"protocol.weights.rfid.sha256": "c" * 64}, f"not comparable: weights of rfid differ (a: none, b: {'c' * 16})"),
    Unlike("precision", {"protocol.precision": "bf16"}, "not comparable: decoder precision differ (a: fp32, b: bf16)"),
    Unlike(
        "refinement",
        {"protocol.refine_steps": 8},
        "tokens were refined for unlike numbers of steps (a: 0, b: 8), which cost time when encoding",
    ),
]


@pytest.mark.parametrize("case", UNLIKE, ids=lambda case: case.id)
def test_what_keeps_numbers_from_comparing_is_told(case: Unlike) -> None:
    assert unlike([METRICS, METRICS], ["a", "b"]) == []
    assert unlike([METRICS, changed(**case.changes)], ["a", "b"]) == [case.told]


@dataclass(frozen=True)
class Paths:
    """Folders, and the names that are left of them."""

    id: str
    paths: list[str]
    names: list[str]


PATHS = [
    Paths("differ in the middle", ["runs/a/evaluation", "runs/b/evaluation"], ["a", "b"]),
    Paths("differ at the end", ["x/a", "x/b"], ["a", "b"]),
    Paths("one inside the other", ["x", "x/b"], ["x", "x/b"]),
    Paths("of other depth", ["a/eval", "b/c/eval"], ["a", "b/c"]),
]


@pytest.mark.parametrize("case", PATHS, ids=lambda case: case.id)
def test_names_are_as_short_as_they_can_be(case: Paths) -> None:
    assert short_names(case.paths) == case.names


def test_the_command_prints_the_table_warns_and_writes_both_files(revq_cli: Cli, tmp_path: Path) -> None:
    first = save(tmp_path / "a" / "evaluation", METRICS)
    second = save(tmp_path / "b" / "evaluation", changed(**{"protocol.name": "adm"}))
    done = revq_cli("compare", first, second, "--out", tmp_path / "out").stdout.splitlines()
    assert done[0] == "warning: not comparable: protocol differ (a: revq, b: adm)"
    assert done[2].split() == ["a", "512", "512", "4,608", "1.125", "24.60", "0.5000", "27.00", "20%", "18%"]
    assert done[-1] == f"report: {tmp_path / 'out' / 'compare.html'}"
    assert "| a | 512 | 512 | 4,608 | 1.125 | 24.60 | 0.5000 | 27.00 | 20% | 18% |" in (tmp_path / "out" / "compare.md").read_text()
    html = (tmp_path / "out" / "compare.html").read_text()
    assert "2 tokenizers" in html
    assert "not comparable: protocol differ" in html


def test_comparing_again_writes_over_the_older_comparison_and_nothing_else(tmp_path: Path) -> None:
    names = [save(tmp_path / name, METRICS) for name in ("a", "b")]
    for _ in range(2):
        events = list(compare(names, out=str(tmp_path / "out")))
        assert isinstance(events[-1], Result)
        assert not any(isinstance(event, Note) for event in events)
    with pytest.raises(OutputError, match="holds something else"):
        run_quietly(compare(names, out=names[0]))


def test_too_few_or_unfinished_evaluations_are_an_error(tmp_path: Path) -> None:
    first = save(tmp_path / "a", METRICS)
    with pytest.raises(ConfigError, match="at least two evaluations, and there is 1;"):
        run_quietly(compare([first]))
    with pytest.raises(OutputError, match="holds no finished evaluation"):
        run_quietly(compare([first, str(tmp_path / "nowhere")]))


def test_one_evaluation_named_twice_is_told_as_that_and_beside_another_counts_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "a", METRICS)
    save(tmp_path / "b", METRICS)
    monkeypatch.chdir(tmp_path)
    for again in ("a", "a/", str(tmp_path / "a"), "b/../a"):
        with pytest.raises(ConfigError, match="at least two evaluations, and a alone is named, 2 times;"):
            run_quietly(compare(["a", again]))
        assert list(run_quietly(compare(["a", "b", again]))["evaluations"]) == ["a", "b"]
