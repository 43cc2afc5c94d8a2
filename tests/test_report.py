"""The report of an evaluation: what it shows, and that it needs nothing but itself."""

from __future__ import annotations

import base64
import copy
import io
import json
import re
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from revq.errors import OutputError
from revq.pipeline.report import cut_tiles, headline_table, html_report, markdown_report, verdict, write_report
from revq.stages.evaluate import draw_grid
from revq.stages.metrics import ROWS

VOID = {"meta", "img", "br", "link"}
METRICS: dict[str, Any] = {
    "protocol": {
        "name": "revq",
        "image_size": 48,
        "resize": "shorter side",
        "crop": "centre",
        "reference": "the same crops",
        "rounding": "uint8",
        "rfid": {"network": "inception", "weights": "inception.pth", "weights_sha256": None},
        "psnr_db": "RGB",
        "ssim": "RGB",
        "lpips_alex": {"input": "RGB", "weights": "alexnet.pth", "weights_sha256": "ab" * 32},
        "device": "cpu",
        "versions": {"torch": "2.6.0"},
    },
    "images": 3,
    "rows": {
        "original": {"rfid": None, "psnr_db": None, "ssim": 1.0, "lpips_alex": 0.0},
        "vae": {"rfid": None, "psnr_db": 25.0, "ssim": 0.9, "lpips_alex": 0.05},
        "quantized": {"rfid": None, "psnr_db": 21.0, "ssim": 0.7, "lpips_alex": 0.1},
        "rectified": {"rfid": None, "psnr_db": 22.0, "ssim": 0.75, "lpips_alex": 0.08},
    },
    "tokens_per_image": 512,
    "bits_per_image": 4608.0,
    "bits_per_pixel": 2.0,
    "codebook_usage": {
        "usage": {"min": 0.1, "median": 0.5, "max": 1.0},
        "perplexity": {"min": 3.0, "median": 40.0, "max": 500.0},
        "codes": 512,
        "images": 3,
    },
    "fingerprints": {"tokenizer": "0" * 16, "vae": "1" * 16, "images": "2" * 16},
    "sources": {"tokenizer": "runs/<b>&mine", "vae": "revq-tiny-f8c8", "images": "photos"},
    "pictures": {"keys": ["a.png", 'b"<i>.png', "c.png"], "psnr_db": [{"vae": 25.0, "quantized": 21.0, "rectified": 22.0}] * 3},
    "notes": {
        "lpips_alex": "measured with other weights",
        "rfid": "the weights are not there; mend it with: curl -o FILE URL, or pass the file by --inception-weights PATH",
        "psnr_db": "original: identical images: PSNR is infinite",
        "failed": [{"key": f"broken-{i}.jpg", "reason": "the file is empty"} for i in range(25)],
    },
}


@pytest.fixture
def pictures() -> torch.Tensor:
    """(3,4,3,48,48) uint8: three images, four rows."""
    return torch.randint(0, 256, (3, 4, 3, 48, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def evaluation(tmp_path: Path, pictures: torch.Tensor) -> Path:
    """A finished evaluation folder, as the stage leaves it."""
    grid, layout = draw_grid([list(row) for row in pictures], ROWS)
    metrics = copy.deepcopy(METRICS)
    metrics["pictures"].update(layout)
    (tmp_path / "reconstructions.png").write_bytes(grid)
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    return tmp_path


class Page(HTMLParser):
    """Reads a page, fails on tags that do not pair up, and keeps what the tests ask for."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.links: list[str] = []
        self.titles: list[str | None] = []
        self.ids: set[str] = set()
        self.cells: list[list[str]] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = dict(attributes)
        if tag not in VOID:
            self.open.append(tag)
        self.titles += [values["title"]] if "title" in values else []
        if tag == "img":
            self.images.append(values)
        if tag == "tr":
            self.cells.append([])
        if tag == "td":
            self.cells[-1].append("")
        self.links += [value or "" for name, value in attributes if name in {"href", "src"} and not (value or "").startswith("data:")]
        self.ids.add(values.get("id") or "")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data
        if self.open and self.open[-1] == "td":
            self.cells[-1][-1] += data


def test_the_html_report_is_well_formed_and_needs_no_network(evaluation: Path) -> None:
    html = write_report(evaluation).read_text()
    page = Page(html)
    assert all(link.startswith("#") and link[1:] in page.ids for link in page.links)
    assert "url(" not in html
    assert "@import" not in html
    assert "<script" not in html


def test_the_html_report_holds_every_picture_at_its_own_size_pixel_for_pixel(evaluation: Path, pictures: torch.Tensor) -> None:
    page = Page(write_report(evaluation).read_text())
    assert len(page.images) == 12
    for attributes, picture in zip(page.images, pictures.flatten(0, 1), strict=True):
        source = attributes["src"] or ""
        image = Image.open(io.BytesIO(base64.b64decode(source.removeprefix("data:image/png;base64,"))))
        assert np.array_equal(np.array(image), picture.permute(1, 2, 0).numpy())
    assert page.titles == ["a.png", 'b"<i>.png', "c.png"]
    assert [image["alt"] for image in page.images][4:6] == ['original: b"<i>.png', 'vae: b"<i>.png']


def test_the_html_report_shows_the_table_the_verdict_and_the_notes(evaluation: Path) -> None:
    page = Page(write_report(evaluation).read_text())
    assert [cells for cells in page.cells if cells] == [
        ["–", "∞", "1.0000", "0.0000"],
        ["–", "25.00", "0.9000", "0.0500"],
        ["–", "21.00", "0.7000", "0.1000"],
        ["–", "22.00", "0.7500", "0.0800"],
    ]
    for text in (
        "512 tokens of 512 codes",
        "rFID@3 ↓",
        "Quantization costs 4.00 dB against the VAE alone; the rectifier wins back 1.00 dB of it (25%).",
        "curl -o FILE URL",
        "or pass the file by --inception-weights PATH",
        "runs/<b>&mine (fingerprint 0000000000000000)",
        "25 images are left out. broken-0.jpg: the file is empty",
        "and 5 more in metrics.json",
        "min 10.0%",
    ):
        assert text in page.text
    assert "broken-20.jpg" not in page.text


def test_the_markdown_report_has_the_same_table(evaluation: Path) -> None:
    write_report(evaluation)
    lines = (evaluation / "report.md").read_text().splitlines()
    assert "| row | rFID@3 ↓ | PSNR (dB) ↑ | SSIM ↑ | LPIPS-Alex ↓ |" in lines
    assert "| original | – | ∞ | 1.0000 | 0.0000 |" in lines
    assert "| rectified | – | 22.00 | 0.7500 | 0.0800 |" in lines
    assert "![original, vae, quantized, rectified](reconstructions.png)" in lines


def test_a_report_can_be_made_again_and_comes_out_the_same(evaluation: Path) -> None:
    first = write_report(evaluation).read_bytes()
    assert write_report(evaluation).read_bytes() == first
    assert sorted(path.name for path in evaluation.iterdir()) == ["metrics.json", "reconstructions.png", "report.html", "report.md"]


@pytest.mark.parametrize("missing", ["metrics.json", "reconstructions.png"])
def test_a_folder_without_a_finished_evaluation_is_an_error(missing: str, evaluation: Path) -> None:
    (evaluation / missing).unlink()
    with pytest.raises(OutputError, match="holds no finished evaluation"):
        write_report(evaluation)
    assert not (evaluation / "report.html").exists()


def test_rfid_is_called_rfid_only_on_fifty_thousand_images() -> None:
    assert headline_table({**METRICS, "images": 50_000})[0][1] == "rFID ↓"
    assert headline_table(METRICS)[0][1] == "rFID@3 ↓"


def test_a_value_a_hair_below_zero_is_shown_without_a_minus() -> None:
    metrics = copy.deepcopy(METRICS)
    metrics["rows"]["original"]["rfid"] = -1.6e-5
    assert headline_table(metrics)[1][1] == "0.00"


@dataclass(frozen=True)
class Outcome:
    """PSNR of the three decoded rows, and what the verdict must say."""

    id: str
    psnr_db: tuple[float | None, float | None, float | None]
    expected: str


OUTCOMES = [
    Outcome("wins back", (25.0, 21.0, 22.0), "Quantization costs 4.00 dB against the VAE alone; the rectifier wins back 1.00 dB of it (25%)."),
    Outcome("does harm", (25.0, 21.0, 20.5), "Quantization costs 4.00 dB against the VAE alone; the rectifier loses another 0.50 dB."),
    Outcome("no loss", (25.0, 25.5, 25.5), "Quantization costs nothing here: 0.50 dB above the VAE alone."),
    Outcome("lossless", (None, 21.0, 22.0), "Some rows equal the originals bit for bit, so there is no loss to compare."),
]


@pytest.mark.parametrize("case", OUTCOMES, ids=lambda case: case.id)
def test_the_verdict_says_honestly_what_the_rectifier_did(case: Outcome) -> None:
    metrics = copy.deepcopy(METRICS)
    for row, value in zip(ROWS[1:], case.psnr_db, strict=True):
        metrics["rows"][row]["psnr_db"] = value
    assert verdict(metrics) == case.expected


def test_a_report_without_notes_has_no_notes_section(evaluation: Path) -> None:
    metrics = {**json.loads((evaluation / "metrics.json").read_text()), "notes": {}}
    with Image.open(evaluation / "reconstructions.png") as grid:
        tiles = cut_tiles(grid, metrics["pictures"])
    assert not re.search(r'id="notes"', html_report(metrics, tiles))
    assert "## Notes" not in markdown_report(metrics)
