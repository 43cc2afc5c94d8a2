"""All stages from one file: what is made, what a second run skips, what changed settings do, and what `revq info` says of it all."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from revq.errors import RevqError
from revq.pipeline.config import load_plan
from revq.pipeline.info import describe, info
from revq.pipeline.run import run
from revq.stages.events import run_quietly

Cli = Callable[..., subprocess.CompletedProcess[str]]
CONFIG = """
out = "{out}"
[encode-latents]
train = "{images}/train"
val = "{images}/val"
vae = "{vae}"
image_size = 64
limit = 16
[fit-codebooks]
transform = "pca"
codes = 8
iterations = 2
[train-rectifier]
steps = 4
batch_size = 8
width = 32
depth = 1
[evaluate]
limit = 8
download = false
"""


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file under a folder, by its relative path."""
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, revq_cli: Cli, imagenet_sample: Path, taef2: str) -> tuple[Path, str]:
    """The folder of a whole small run, and what its command printed; not to be changed by a test."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "config.toml").write_text(CONFIG.format(out=folder / "out", images=imagenet_sample, vae=taef2))
    return folder, revq_cli("run", folder / "config.toml").stdout


def test_one_command_runs_all_stages_and_ends_with_the_table(whole: tuple[Path, str]):
    folder, text = whole
    headings = [line for line in text.splitlines() if line.startswith("[")]
    assert headings == ["[1/5] encode-latents train", "[2/5] encode-latents val", "[3/5] fit-codebooks", "[4/5] train-rectifier", "[5/5] evaluate"]
    assert text.splitlines()[-1] == f"report: {folder / 'out' / 'evaluation' / 'report.html'}"
    metrics = json.loads((folder / "out" / "evaluation" / "metrics.json").read_text())
    table = {line.split()[0]: line.split()[1:] for line in text.splitlines() if line.startswith(("original ", "vae ", "quantized ", "rectified "))}
    assert list(table) == ["original", "vae", "quantized", "rectified"]
    assert "∞" in table["original"]
    for row in ("vae", "quantized", "rectified"):
        assert f"{metrics['rows'][row]['psnr_db']:.2f}" in table[row]
    assert "rfid: " in text
    assert all((folder / "out" / "evaluation" / name).stat().st_size > 0 for name in ("report.html", "report.md", "reconstructions.png"))


def test_a_second_run_does_nothing_and_ends_with_the_same_table(whole: tuple[Path, str], revq_cli: Cli):
    folder, text = whole
    before = digests(folder / "out")
    again = revq_cli("run", folder / "config.toml").stdout
    after = digests(folder / "out")
    reports = {name for name in before if "report" in name}
    assert {name: after[name] for name in after if name not in reports} == {name: before[name] for name in before if name not in reports}
    assert again.splitlines()[-1] == text.splitlines()[-1]
    assert "k-means" not in again
    assert "train: " not in again


def test_changed_settings_stop_the_run_and_overwrite_redoes_what_depends_on_them(whole: tuple[Path, str], revq_cli: Cli, tmp_path: Path):
    folder, _ = whole
    shutil.copytree(folder / "out", tmp_path / "out")
    changed = (folder / "config.toml").read_text().replace("codes = 8", "codes = 4")
    (tmp_path / "config.toml").write_text(changed)
    before = digests(tmp_path / "out")
    done = revq_cli("run", tmp_path / "config.toml", "--out", tmp_path / "out", check=1)
    assert "codes: 8 there, 4 asked" in done.stderr
    assert digests(tmp_path / "out") == before
    text = revq_cli("run", tmp_path / "config.toml", "--out", tmp_path / "out", "--overwrite").stdout
    assert text.count("made with other settings before: done anew") == 3
    assert "encode train: " not in text
    metrics = json.loads((tmp_path / "out" / "evaluation" / "metrics.json").read_text())
    assert metrics["bits_per_image"] == 512 * 2
    after = digests(tmp_path / "out")
    assert {name: after[name] for name in after if name.startswith("latents.zarr")} == {
        name: before[name] for name in before if name.startswith("latents.zarr")
    }


def test_a_run_does_not_write_into_a_folder_that_holds_something_else(whole: tuple[Path, str], revq_cli: Cli, tmp_path: Path):
    (tmp_path / "thesis.tex").write_text("years of work")
    done = revq_cli("run", whole[0] / "config.toml", "--out", tmp_path, check=1)
    assert f"{tmp_path} holds something else than revq-run (thesis.tex); choose a new or empty folder" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("download = false", 'download = false\nimages = "{tmp}/nowhere"', "nowhere"),
        ("download = false", 'download = false\ninception_weights = "{tmp}/no.pth"', "no weights at"),
        ("download = false", 'download = false\ninception_weights = "{tmp}/config.toml"', "config.toml cannot be read"),
        ("download = false", 'download = false\nfeatures = "{tmp}/judge.py:make"', "judge.py does not exist; --features takes FILE.py:FACTORY"),
        ("download = false", 'download = false\ndevice = "cuda:99"', "device 'cuda:99' is not there"),
        ("depth = 1", 'depth = 1\ndevice = "gpu"', "device must be auto, cpu"),
        ("codes = 8", "codes = 8\ntokens = 500", "which 500 tokens do not divide"),
        ("image_size = 64", "image_size = 60", "choose --image-size 56 or 64"),
        ("limit = 16", 'limit = 16\nnew_classes = "refuse"', 'classes of split "val" are in no other split of the store'),
    ],
    ids=[
        "images of evaluate",
        "Inception weights",
        "damaged Inception weights",
        "feature network",
        "device of evaluate",
        "device of train-rectifier",
        "tokens",
        "image size",
        "classes",
    ],
)
def test_what_a_later_stage_would_miss_is_told_before_the_first_one_begins(
    imagenet_sample: Path, taef2: str, tmp_path: Path, old: str, new: str, message: str
):
    text = CONFIG.format(out=tmp_path / "out", images=imagenet_sample, vae=taef2)
    (tmp_path / "config.toml").write_text(text.replace(old, new.replace("{tmp}", str(tmp_path))))
    with pytest.raises(RevqError, match=re.escape(message)):
        run_quietly(run(load_plan(tmp_path / "config.toml")))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["config.json"]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("codes = 8", 'codes = 8\ntransform = "decoder"'),
        ("depth = 1", "depth = 1\ndecoder_steps = 1"),
        ("download = false", "download = false\nrefine = 1"),
    ],
    ids=["decoder's metric", "decoder phase", "refined tokens"],
)
def test_a_decoder_without_gradients_is_told_before_the_first_stage_where_one_takes_them(
    imagenet_sample: Path, taef2: str, tmp_path: Path, old: str, new: str
):
    source = Path(taef2.removesuffix(":load")).read_text()
    (tmp_path / "p.py").write_text(source + "\n\nTAEF2.decode = torch.no_grad()(TAEF2.decode)\n")
    text = CONFIG.format(out=tmp_path / "out", images=imagenet_sample, vae=f"{tmp_path / 'p.py'}:load")
    if "transform" in new:
        text = "\n".join(line for line in text.splitlines() if not line.startswith("transform"))
    (tmp_path / "config.toml").write_text(text.replace(old, new))
    with pytest.raises(RevqError, match="gives no gradients"):
        run_quietly(run(load_plan(tmp_path / "config.toml")))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["config.json"]


@pytest.mark.parametrize(
    ("part", "kind", "facts"),
    [
        ("", "revq-run", {"complete": True}),
        ("latents.zarr", "revq-latents", {"latent_shape": [32, 8, 8], "image_size": 64}),
        ("codebooks", "revq-codebooks", {"codes": 8, "complete": True}),
        ("rectifier", "revq-rectifier-run", {"steps": 4, "complete": True}),
        ("rectifier/tokenizer", "revq-tokenizer", {"tokens": 512, "bits_per_image": 1536.0}),
        ("evaluation", "revq-evaluation", {"images": 8, "complete": True}),
    ],
    ids=["run", "store", "codebooks", "training", "tokenizer", "evaluation"],
)
def test_info_knows_everything_that_revq_makes(whole: tuple[Path, str], revq_cli: Cli, part: str, kind: str, facts: dict[str, object]):
    value = json.loads(revq_cli("info", whole[0] / "out" / part, "--verify", "--json").stdout)
    assert (value["kind"], value["verified"]) == (kind, True)
    assert {name: value[name] for name in facts} == facts


def test_info_tells_people_what_a_store_holds(whole: tuple[Path, str], revq_cli: Cli):
    lines = revq_cli("info", whole[0] / "out" / "latents.zarr").stdout.splitlines()
    assert lines[0] == f"{whole[0] / 'out' / 'latents.zarr'}: revq-latents"
    table = [line.split() for line in lines]
    header = table.index(["split", "images", "views", "rows", "failed", "bytes", "compression", "state"])
    assert [row[:5] for row in table[header + 1 : header + 3]] == [["train", "16", "1", "16", "0"], ["val", "16", "1", "16", "0"]]
    assert all(row[-1] == "complete" for row in table[header + 1 : header + 3])


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_info_verify_finds_one_flipped_bit_in_the_latents(whole: tuple[Path, str], revq_cli: Cli, tmp_path: Path):
    store = tmp_path / "latents.zarr"
    shutil.copytree(whole[0] / "out" / "latents.zarr", store)
    flip_a_byte(next(path for path in sorted((store / "val" / "latents").rglob("*")) if path.is_file() and path.name != "zarr.json"))
    done = revq_cli("info", store, "--verify", check=1)
    assert 'revq: error: split "val" of ' in done.stderr
    assert "is damaged" in done.stderr


def test_info_verify_finds_a_cut_off_codebook_file(whole: tuple[Path, str], revq_cli: Cli, tmp_path: Path):
    folder = tmp_path / "codebooks"
    shutil.copytree(whole[0] / "out" / "codebooks", folder)
    file = folder / "codebooks.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    done = revq_cli("info", folder, "--verify", check=1)
    assert "codebooks.safetensors is damaged" in done.stderr
    assert done.stderr.count("\n") == 1


def test_info_verify_finds_an_evaluation_whose_figures_are_not_all_there(whole: tuple[Path, str], tmp_path: Path):
    shutil.copytree(whole[0] / "out" / "evaluation", tmp_path / "e")
    metrics = json.loads((tmp_path / "e" / "metrics.json").read_text())
    list(info(str(tmp_path / "e"), verify=True))
    for name in ("images", "rows", "fingerprints"):
        (tmp_path / "e" / "metrics.json").write_text(json.dumps({key: value for key, value in metrics.items() if key != name}))
        with pytest.raises(RevqError, match=rf"is damaged: its metrics\.json lacks {name}.*remove that file and evaluate again"):
            list(info(str(tmp_path / "e"), verify=True))
    (tmp_path / "e" / "metrics.json").write_text("{}")
    assert describe(tmp_path / "e")["complete"] is False
    with pytest.raises(RevqError, match="lacks images, protocol"):
        list(info(str(tmp_path / "e"), verify=True))
