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
from revq.pipeline.reporting.html import html_report
from revq.pipeline.reporting.markdown import markdown_report
from revq.pipeline.reporting.pictures import error_map, read_tiles
from revq.pipeline.reporting.report import write_report
from revq.pipeline.reporting.tables import headline_table, verdict
from revq.stages.evaluation.metrics import ROWS
from revq.stages.evaluation.pictures import draw_grid

VOID = {"meta", "img", "br", "link", "input"}
METRICS: dict[str, Any] = {
    "protocol": {
        "name": "revq",
        "image_size": 48,
        "resize": "shorter side",
        "crop": "centre",
        "antialias": True,
        "weights": {
            "rfid": {"file": None, "sha256": None, "published": False},
            "lpips_alex": {"file": "alexnet.pth", "sha256": "ab" * 32, "published": True},
        },
        "device": "cpu",
        "versions": {"torch": "2.6.0"},
    },
    "images": 3,
    "rfid_label": "rFID@3",
    "recovered": {"rfid": None, "psnr_db": 0.25, "ssim": 0.25, "lpips_alex": 0.4, "lpips_vgg": None},
    "throughput": {"encode_images_per_s": 41.0, "decode_images_per_s": 30.5, "images": 3, "batch_size": 64, "device": "cpu"},
    "round_trip": {"images": 3, "largest_difference": 0},
    "tolerance": {
        "images": 3,
        "levels": [0.1, 0.5],
        "isotropic": [{"noise": n, "rfid": None, "psnr_db": 25 - 20 * n, "ssim": 0.9 - n, "lpips_alex": 0.05 + n} for n in (0.0, 0.1, 0.5)],
        "decoder": [{"noise": n, "rfid": None, "psnr_db": 25 - 22 * n, "ssim": 0.9 - n, "lpips_alex": 0.05 + n} for n in (0.0, 0.1, 0.5)],
        "marks": {
            row: {"noise": {"isotropic": 0.4, "decoder": 0.2}, "rfid": None, "psnr_db": psnr, "ssim": 0.7, "lpips_alex": 0.1}
            for row, psnr in (("quantized", 21.0), ("rectified", 22.0))
        },
    },
    "training": {"step": [0, 50, 100], "val_mse_quantized": [0.3, 0.3, 0.3], "val_mse_rectified": [0.3, 0.28, 0.27], "train_loss": [None, 0.2, 0.1]},
    "codebooks": {"usage": [0.1, 0.5, 1.0], "perplexity": [3.0, 40.0, 500.0]},
    "classes": {
        "count": 2,
        "worst": [{"name": "<cat>", "images": 1, "psnr_db": 20.0, "ssim": 0.6, "lpips_alex": None, "lpips_vgg": None}],
        "best": [{"name": "dog", "images": 2, "psnr_db": 23.0, "ssim": 0.8, "lpips_alex": 0.05, "lpips_vgg": None}],
    },
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
    extremes, extremes_layout = draw_grid([list(row) for row in pictures[:2]], ROWS)
    metrics["extremes"] = {**extremes_layout, "kinds": ["worst", "best"], "keys": ["w.png", "z.png"], "psnr_db": METRICS["pictures"]["psnr_db"][:2]}
    (tmp_path / "reconstructions.png").write_bytes(grid)
    (tmp_path / "extremes.png").write_bytes(extremes)
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
        self.links += [
            value or "" for name, value in attributes if name in {"href", "src", "srcset", "action", "data"} and not (value or "").startswith("data:")
        ]
        if name := values.get("id"):
            assert name not in self.ids, f"two elements are called {name}"
            self.ids.add(name)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        assert tag in VOID or "svg" in self.open
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open and "script" not in self.open:
            self.text += data
        if self.open and self.open[-1] == "td":
            self.cells[-1][-1] += data


def test_the_html_report_is_well_formed_and_needs_no_network(evaluation: Path) -> None:
    html = write_report(evaluation).read_text()
    page = Page(html)
    assert all(link.startswith("#") and link[1:] in page.ids for link in page.links)
    assert {target[1:] for target in re.findall(r"url\(([^)]*)\)", html)} <= page.ids
    assert "@import" not in html
    assert not re.search(r"https?://", html.replace("http://www.w3.org/2000/svg", ""))
    assert not re.search(r"fetch\(|XMLHttpRequest|import\(|eval\(", html)


def test_the_html_report_holds_every_picture_at_its_own_size_pixel_for_pixel(evaluation: Path, pictures: torch.Tensor) -> None:
    page = Page(write_report(evaluation).read_text())
    shown = [image for image in page.images if (image.get("src") or "").startswith("data:")]
    assert len(shown) == 15 + 10
    plain = [image for image in shown[:15] if not (image["alt"] or "").startswith("error: ")]
    for attributes, picture in zip(plain, pictures.flatten(0, 1), strict=True):
        source = attributes["src"] or ""
        image = Image.open(io.BytesIO(base64.b64decode(source.removeprefix("data:image/png;base64,"))))
        assert np.array_equal(np.array(image), picture.permute(1, 2, 0).numpy())
    assert page.titles == ["a.png", 'b"<i>.png', "c.png", "w.png", "z.png"]
    assert [image["alt"] for image in shown][5:7] == ['original: b"<i>.png', 'vae: b"<i>.png']


def test_the_html_report_shows_the_table_the_verdict_and_the_notes(evaluation: Path) -> None:
    page = Page(write_report(evaluation).read_text())
    assert [cells for cells in page.cells if cells][:4] == [
        ["–", "–", "0.0000", "∞", "1.0000"],
        ["–", "–", "0.0500", "25.00", "0.9000"],
        ["–", "–", "0.1000", "21.00", "0.7000"],
        ["–", "–", "0.0800", "22.00", "0.7500"],
    ]
    for text in (
        "512 tokens of 512 codes",
        "rFID@3 ↓",
        "not comparable to published numbers",
        "Share of the loss recovered: LPIPS-Alex 40%, PSNR 25%, SSIM 25%.",
        "encode 41.0 and decode 30.5 images/s on cpu, 64 at once",
        "Worst and best images",
        "How much error the decoder forgives",
        "quantized (0.400 / 0.200)",
        "Validation error of the latents",
        "Every codebook, least used first",
        "<cat>",
        "the same pictures (3 images)",
        "Quantization costs 4.00 dB against the VAE alone; the rectifier recovers 1.00 dB of it (25%).",
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
    assert "| row | rFID@3 ↓ | KID × 1000 ↓ | LPIPS-Alex ↓ | PSNR (dB) ↑ | SSIM ↑ |" in lines
    assert "| original | – | – | 0.0000 | ∞ | 1.0000 |" in lines
    assert "rFID@3 is not comparable to published numbers." in lines
    assert "| decoder 0.5 | 14.00 | 0.4000 | 0.5500 |" in lines
    assert "![quality against noise on the latents](tolerance.png)" in lines
    assert "| rectified | – | – | 0.0800 | 22.00 | 0.7500 |" in lines
    assert "![original, vae, quantized, rectified](reconstructions.png)" in lines


def test_a_report_can_be_made_again_and_comes_out_the_same(evaluation: Path) -> None:
    first = write_report(evaluation).read_bytes()
    pngs = {path.name: path.read_bytes() for path in evaluation.glob("*.png")}
    assert write_report(evaluation).read_bytes() == first
    assert {path.name: path.read_bytes() for path in evaluation.glob("*.png")} == pngs
    names = ["codebooks.png", "extremes.png", "metrics.json", "reconstructions.png", "report.html", "report.md", "tolerance.png", "training.png"]
    assert sorted(path.name for path in evaluation.iterdir()) == names


@pytest.mark.parametrize("missing", ["metrics.json", "reconstructions.png"])
def test_a_folder_without_a_finished_evaluation_is_an_error(missing: str, evaluation: Path) -> None:
    (evaluation / missing).unlink()
    with pytest.raises(OutputError, match="holds no finished evaluation"):
        write_report(evaluation)
    assert not (evaluation / "report.html").exists()


def test_rfid_is_called_what_the_evaluation_says_and_only_a_real_one_goes_without_a_warning(evaluation: Path) -> None:
    assert headline_table({**METRICS, "rfid_label": "rFID"})[0][1] == "rFID ↓"
    assert headline_table(METRICS)[0][1] == "rFID@3 ↓"
    metrics = json.loads((evaluation / "metrics.json").read_text())
    (evaluation / "metrics.json").write_text(json.dumps({**metrics, "rfid_label": "rFID"}))
    assert "not comparable" not in write_report(evaluation).read_text()


def test_columns_that_were_not_measured_are_left_out_and_others_come_in() -> None:
    metrics = copy.deepcopy(METRICS)
    metrics["rows"]["vae"] |= {"lpips_vgg": 0.25, "inception_score": 12.5}
    table = headline_table(metrics)
    assert table[0][1:] == ["rFID@3 ↓", "KID × 1000 ↓", "LPIPS-Alex ↓", "LPIPS-VGG ↓", "PSNR (dB) ↑", "SSIM ↑", "Inception score ↑"]
    assert (table[2][4], table[2][7]) == ("0.2500", "12.50")
    assert (table[3][4], table[3][7]) == ("–", "–")


def test_a_kernel_distance_is_shown_in_thousandths_with_its_error_and_other_networks_by_their_name() -> None:
    metrics = copy.deepcopy(METRICS)
    for row in metrics["rows"].values():
        row |= {"kid": 0.00214, "kid_standard_error": 0.0005, "fd_clip": 1.0, "kid_clip": 0.5, "kid_clip_standard_error": 0.25, "agreement_clip": 0.5}
    table = headline_table(metrics)
    assert table[0][-3:] == ["Frechet distance (clip) ↓", "KID × 1000 (clip) ↓", "same class (clip) ↑"]
    assert table[1][2] == "2.14 ± 0.50"
    assert table[1][-3:] == ["1.00", "500.00 ± 250.00", "0.500"]


def test_the_error_map_is_black_where_pictures_agree_and_white_where_they_differ_most() -> None:
    first = np.zeros((4, 4, 3), dtype=np.uint8)
    second = first.copy()
    second[0, 0], second[1, 1] = 255, (30, 0, 0)
    colours = np.asarray(error_map(Image.fromarray(first), Image.fromarray(second)).convert("RGB")).astype(int)
    assert colours[3, 3].sum() < 10
    assert colours[0, 0].sum() > 600
    assert colours[3, 3].sum() < colours[1, 1].sum() < colours[0, 0].sum()


def test_an_evaluation_without_extras_still_has_a_report(evaluation: Path) -> None:
    metrics = json.loads((evaluation / "metrics.json").read_text())
    for name in ("tolerance", "training", "classes", "extremes", "codebooks", "throughput", "round_trip", "recovered"):
        metrics.pop(name)
    (evaluation / "metrics.json").write_text(json.dumps(metrics))
    page = Page(write_report(evaluation).read_text())
    assert "Quantization costs 4.00 dB" in page.text
    assert "How much error" not in page.text
    assert not any((evaluation / name).exists() for name in ("tolerance.png", "codebooks.png", "training.png"))
    assert not re.search("(tolerance|codebooks|training).png", (evaluation / "report.md").read_text())


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
    Outcome("recovers", (25.0, 21.0, 22.0), "Quantization costs 4.00 dB against the VAE alone; the rectifier recovers 1.00 dB of it (25%)."),
    Outcome("does harm", (25.0, 21.0, 20.5), "Quantization costs 4.00 dB against the VAE alone; the rectifier loses another 0.50 dB."),
    Outcome("no loss", (25.0, 25.5, 25.5), "Quantization costs nothing here: 0.50 dB above the VAE alone."),
    Outcome("lossless", (None, 21.0, 22.0), "Some rows equal the originals bit for bit, so there is no loss to compare."),
]


@pytest.mark.parametrize("case", OUTCOMES, ids=lambda case: case.id)
def test_the_verdict_says_honestly_what_the_rectifier_did(case: Outcome) -> None:
    metrics = copy.deepcopy(METRICS)
    for row, value in zip(ROWS[1:], case.psnr_db, strict=True):
        metrics["rows"][row]["psnr_db"] = value
    if None not in case.psnr_db:
        moved = "Quantization moves LPIPS-Alex from 0.0500 to 0.1000, and the rectifier takes it to 0.0800."
        assert verdict(metrics) == f"{moved} {case.expected}"
    for row in metrics["rows"].values():
        row["lpips_alex"] = None
    assert verdict(metrics) == case.expected


def test_a_report_without_notes_has_no_notes_section(evaluation: Path) -> None:
    metrics = {**json.loads((evaluation / "metrics.json").read_text()), "notes": {}}
    tiles = read_tiles(evaluation / "reconstructions.png", metrics["pictures"])
    assert not re.search(r'id="notes"', html_report(metrics, {}, tiles))
    assert "## Notes" not in markdown_report(metrics)
