"""The report in a real browser, where there is one: the script runs, the slider is there, charts can be read, nothing is wider than a phone."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from revq.pipeline.reporting.report import write_report
from revq.stages.configs import EvaluateConfig
from revq.stages.evaluate import evaluate
from revq.stages.events import run_quietly

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--hide-scrollbars", "--virtual-time-budget=2000"),
]
# Appended to a copy of the report: what a keyboard's user does, and what the page is then, written into its title.
PROBE = """<script>
const viewer = document.getElementById("viewer"), slider = viewer.querySelector("input");
slider.value = 80; slider.dispatchEvent(new Event("input"));
const third = document.querySelectorAll(".pictures")[2].querySelector('[data-row="vae"] img');
third.focus();
third.dispatchEvent(new KeyboardEvent("keydown", { key: "Enter", bubbles: true, cancelable: true }));
viewer.querySelector("[data-step='1']").click();
document.title = JSON.stringify([viewer.hidden, document.activeElement === slider, viewer.querySelector(".stage").style.getPropertyValue("--cut"),
  viewer.querySelector(".what").textContent, viewer.querySelector("[aria-pressed=true]").textContent,
  document.documentElement.scrollWidth <= window.innerWidth]);
</script></body>"""

# The page's background, then every colour of text, line and mark in a chart, as the browser has resolved them.
COLOURS = """<script>
const found = new Set([getComputedStyle(document.body).backgroundColor]);
for (const part of document.querySelectorAll(".chart text, .chart path, .chart use"))
  found.add(part.tagName == "text" ? getComputedStyle(part).fill : getComputedStyle(part).stroke);
document.title = JSON.stringify([...found]);
</script></body>"""


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory, small_run: Path, imagenet_sample: Path) -> Path:
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine")
    out = tmp_path_factory.mktemp("browser") / "out"
    settings = {"limit": 8, "tolerance_images": 2, "workers": 2, "download": False, "device": "cpu"}
    run_quietly(evaluate(EvaluateConfig(tokenizer=str(small_run), images=str(imagenet_sample / "val"), out=str(out), **settings)))
    return write_report(out)


def browse(tmp_path: Path, page: Path, *arguments: str) -> str:
    command = [str(CHROMIUM), *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", *arguments, page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def title_after(script: str, report: Path, tmp_path: Path, *arguments: str) -> str:
    """The title that a script gives the page, which `script` ends with."""
    probed = tmp_path / "report.html"
    probed.write_text(report.read_text().replace("</body>", script))
    return html.unescape(browse(tmp_path, probed, *arguments, "--dump-dom").split("<title>")[1].split("</title>")[0])


def luminance(colour: str) -> float:
    """Relative luminance of "rgb(R, G, B)" as WCAG 2 defines it."""
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in (int(n) / 255 for n in re.findall(r"\d+", colour))]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    darker, lighter = sorted((luminance(one), luminance(other)))
    return (lighter + 0.05) / (darker + 0.05)


def test_the_slider_works_by_keyboard_and_the_page_fits_a_phone(report: Path, tmp_path: Path) -> None:
    title = title_after(PROBE, report, tmp_path, "--window-size=500,900")
    keys = [row.split('"')[0] for row in report.read_text().split('<div class="pictures small" title="')[1:]]
    assert title == f'[false,true,"80%","{keys[3]}","vae",true]'


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_the_page_follows_the_systems_colours(dark: bool, report: Path, tmp_path: Path) -> None:
    picture = tmp_path / "picture.png"
    browse(tmp_path, report, f"--screenshot={picture}", "--window-size=500,700", f"--blink-settings=preferredColorScheme={0 if dark else 1}")
    corner = np.asarray(Image.open(picture).convert("L"))[:20, :20].mean()
    assert corner < 60 if dark else corner > 200


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_charts_stand_out_from_the_page(dark: bool, report: Path, tmp_path: Path) -> None:
    paper, *colours = json.loads(title_after(COLOURS, report, tmp_path, f"--blink-settings=preferredColorScheme={0 if dark else 1}"))
    assert (luminance(paper) < 0.1) == dark
    contrasts = sorted(contrast(paper, colour) for colour in colours if colour != "none")
    assert len(contrasts) == 5, "ink, soft ink, two lines, and the grid, which is faint"
    assert contrasts[0] > 1.1
    assert contrasts[1] > 3
