"""Stage three on real photographs, a real VAE and a small tokenizer made of its latents."""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from random_weights import save_random_alexnet
from torch import Tensor
from torchmetrics.image import PeakSignalNoiseRatio
from torchmetrics.image.fid import FrechetInceptionDistance

from revq.cache.images import load_pixels
from revq.cache.sources import open_source
from revq.errors import ConfigError, ImageError, MismatchError, OutputError, RevqError, TokenizerError
from revq.models.tokenizer import TOKENIZER_KIND, ReVQTokenizer
from revq.models.transform import LatentTransform
from revq.models.vae import FrozenVAE
from revq.stages.configs import EvaluateConfig
from revq.stages.evaluate import evaluate
from revq.stages.evaluation.metrics import METRICS, ROWS, to_signed, to_uint8
from revq.stages.evaluation.pictures import draw_grid
from revq.stages.events import Advance, Begin, Event, Note, Result, run_quietly

SIZE = 64
TOKENS, CODES = 512, 24


def load_images(folder: Path, count: int, step: int = 1) -> Tensor:
    """(count,3,SIZE,SIZE) uint8 crops by the protocol, in the source's order."""
    source = open_source(folder)
    return torch.from_numpy(np.stack([load_pixels(source.read(i * step), SIZE).array for i in range(count)]))


def make_tokenizer(vae: FrozenVAE, images: Tensor, folder: Path) -> Path:
    """A tokenizer whose codes are the standardised latents of CODES real images, with a rectifier of small random weights."""
    latents = vae.encode(to_signed(images))
    mean, std = latents.mean(0), latents.std(0).clamp_min(0.05)
    config: dict[str, Any] = {
        "kind": TOKENIZER_KIND,
        "format_version": 1,
        "tokens": TOKENS,
        "codes": CODES,
        "transform": "standardize",
        "latent_shape": list(latents.shape[1:]),
        "image_size": SIZE,
        "rectifier": {"channels": latents.shape[1], "width": 32, "depth": 1, "block": "conv"},
        "vae": vae.identity(),
    }
    tokenizer = ReVQTokenizer(config)
    tokenizer.transform = LatentTransform(mean=mean, std=std, tokens=TOKENS)
    tokenizer.quantizer.codebooks.data = tokenizer.transform(latents[:CODES]).transpose(0, 1).contiguous()
    assert tokenizer.rectifier is not None
    with torch.random.fork_rng():
        torch.manual_seed(0)
        torch.nn.init.normal_(tokenizer.rectifier.conv_out.weight, std=0.002)
    tokenizer.save_pretrained(folder)
    return folder


pytestmark = pytest.mark.usefixtures("empty_torch_home")


def flat_folder(folder: Path, imagenet_sample: Path, count: int) -> Path:
    folder.mkdir()
    for i, path in enumerate(sorted((imagenet_sample / "val").rglob("*.JPEG"))[:count]):
        shutil.copy(path, folder / f"{i:02d}.jpg")
    return folder


def config_for(tokenizer: Path, images: Path | str, out: Path, **settings: Any) -> EvaluateConfig:
    return EvaluateConfig(
        **{"tokenizer": str(tokenizer), "images": str(images), "out": str(out), "download": False, "device": "cpu", "tolerance": False, **settings}
    )


def events_of(config: EvaluateConfig) -> tuple[list[Event], dict[str, Any]]:
    events = list(evaluate(config))
    assert isinstance(events[-1], Result)
    return events, dict(events[-1].value)


def test_the_four_rows_equal_the_metrics_of_the_tokenizers_own_output(tokenizer_folder: Path, imagenet_sample: Path, tmp_path: Path) -> None:
    images = flat_folder(tmp_path / "images", imagenet_sample, 7)
    value = run_quietly(evaluate(config_for(tokenizer_folder, images, tmp_path / "out", batch_size=3)))
    original = load_images(images, 7)
    tokenizer = ReVQTokenizer.from_pretrained(tokenizer_folder)
    indices = tokenizer.encode(to_signed(original))
    direct = {
        "vae": tokenizer.vae.decode(tokenizer.vae.encode(to_signed(original))),
        "quantized": tokenizer.decode(indices, rectify=False),
        "rectified": tokenizer.reconstruct(to_signed(original)),
    }
    for row, decoded in direct.items():
        pairs = zip(to_uint8(decoded) / 255, original / 255, strict=True)
        psnr = [PeakSignalNoiseRatio(data_range=1.0)(ours, theirs).item() for ours, theirs in pairs]
        assert value["rows"][row]["psnr_db"] == pytest.approx(sum(psnr) / 7, abs=1e-3)
        assert 0 < value["rows"][row]["ssim"] < 1
    assert value["rows"]["vae"]["psnr_db"] > value["rows"]["quantized"]["psnr_db"] + 3
    assert value["rows"]["quantized"] != value["rows"]["rectified"]
    used = torch.stack([torch.bincount(codes, minlength=CODES) > 0 for codes in indices.T]).double().mean(1)
    spread = {"min": used.min().item(), "median": used.quantile(0.5).item(), "max": used.max().item()}
    assert value["codebook_usage"]["usage"] == pytest.approx(spread)
    assert value["codebook_usage"]["images"] == 7


def test_metrics_json_has_the_contracts_fields_and_no_infinity(tokenizer_folder: Path, imagenet_sample: Path, tmp_path: Path) -> None:
    images = flat_folder(tmp_path / "images", imagenet_sample, 2)
    events, value = events_of(config_for(tokenizer_folder, images, tmp_path / "out"))
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert value == {**metrics, "out": str(tmp_path / "out"), "report": str(tmp_path / "out" / "report.html")}
    assert tuple(metrics["rows"]) == ROWS
    assert all(tuple(row) == METRICS for row in metrics["rows"].values())
    assert metrics["rows"]["original"]["psnr_db"] is None
    assert metrics["rows"]["original"]["ssim"] == pytest.approx(1, abs=1e-5)
    assert metrics["notes"]["psnr_db"] == "original: identical images: PSNR is infinite"
    assert metrics["images"] == 2
    assert metrics["protocol"]["name"] == "revq"
    assert metrics["tokens_per_image"] == TOKENS
    assert metrics["bits_per_image"] == pytest.approx(TOKENS * np.log2(CODES))
    assert metrics["bits_per_pixel"] == pytest.approx(TOKENS * np.log2(CODES) / SIZE**2)
    assert all(len(fingerprint) == 16 for fingerprint in metrics["fingerprints"].values())
    assert set(metrics["fingerprints"]) == {"tokenizer", "vae", "images"}
    assert metrics["notes"]["codebook_usage"].startswith("2 images can use at most 2 of the 24 codes")
    assert [type(event) for event in events if not isinstance(event, Note)] == [Begin, Advance, Result]


def test_metrics_without_weights_are_null_with_the_reason_and_the_command(tokenizer_folder: Path, imagenet_sample: Path, tmp_path: Path) -> None:
    images = flat_folder(tmp_path / "images", imagenet_sample, 2)
    events, value = events_of(config_for(tokenizer_folder, images, tmp_path / "out"))
    warned = " ".join(event.text for event in events if isinstance(event, Note) and event.warning)
    files = {"rfid": "weights-inception-2015-12-05-6726825d.pth", "lpips_alex": "alexnet-owt-7be5be79.pth", "lpips_vgg": "vgg16-397923af.pth"}
    for metric, file in files.items():
        assert all(row[metric] is None for row in value["rows"].values())
        assert f"curl -L --create-dirs -o {tmp_path}/torch-home/hub/checkpoints/{file} https://" in value["notes"][metric]
        assert value["notes"][metric] in warned


def test_rfid_and_lpips_come_once_their_weights_are_there(
    tokenizer_folder: Path, imagenet_sample: Path, tmp_path: Path, empty_torch_home: Path, inception: Path
) -> None:
    images = flat_folder(tmp_path / "images", imagenet_sample, 4)
    first = run_quietly(evaluate(config_for(tokenizer_folder, images, tmp_path / "out")))
    save_random_alexnet(empty_torch_home)
    config = config_for(tokenizer_folder, images, tmp_path / "out", inception_weights=str(inception), batch_size=3)
    value = run_quietly(evaluate(config))

    original = load_images(images, 4)
    direct = FrechetInceptionDistance(feature=2048, feature_extractor_weights_path=str(inception), antialias=False)
    direct.update(original, real=True)
    direct.update(to_uint8(ReVQTokenizer.from_pretrained(tokenizer_folder).reconstruct(to_signed(original))), real=False)
    assert value["rows"]["rectified"]["rfid"] == pytest.approx(direct.compute().item(), rel=1e-3)
    assert value["rows"]["original"]["rfid"] == pytest.approx(0, abs=1e-3)
    assert value["rows"]["rectified"]["lpips_alex"] > value["rows"]["vae"]["lpips_alex"] > value["rows"]["original"]["lpips_alex"] == 0
    assert {row: values["psnr_db"] for row, values in value["rows"].items()} == pytest.approx(
        {row: values["psnr_db"] for row, values in first["rows"].items()}, abs=1e-4
    )
    assert "over 4 images" in value["notes"]["rfid"]
    assert "other weights than the published ones" in value["notes"]["rfid"]
    assert len(value["protocol"]["weights"]["rfid"]["sha256"]) == 64

    assert any("nothing to do" in event.text for event in evaluate(config) if isinstance(event, Note))
    torch.save(torch.load(inception), tmp_path / "again.pth", _use_new_zipfile_serialization=False)
    with pytest.raises(OutputError, match="other weights for rfid"):
        run_quietly(evaluate(config_for(tokenizer_folder, images, tmp_path / "out", inception_weights=str(tmp_path / "again.pth"))))


def test_the_numbers_do_not_depend_on_batch_size_or_workers(tokenizer_folder: Path, imagenet_sample: Path, tmp_path: Path) -> None:
    images = flat_folder(tmp_path / "images", imagenet_sample, 5)
    one = run_quietly(evaluate(config_for(tokenizer_folder, images, tmp_path / "one", batch_size=1, workers=1)))
    all_at_once = run_quietly(evaluate(config_for(tokenizer_folder, images, tmp_path / "all", batch_size=64, workers=4)))
    assert one["fingerprints"] == all_at_once["fingerprints"]
    assert one["codebook_usage"] == all_at_once["codebook_usage"]
    for row in ROWS[1:]:
        assert one["rows"][row]["psnr_db"] == pytest.approx(all_at_once["rows"][row]["psnr_db"], abs=1e-3)


def test_the_same_evaluation_again_does_no_work_and_another_is_refused(tokenizer_folder: Path, imagenet_sample: Path, tmp_path: Path) -> None:
    images, out = flat_folder(tmp_path / "images", imagenet_sample, 3), tmp_path / "out"
    first = run_quietly(evaluate(config_for(tokenizer_folder, images, out)))
    before = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in out.iterdir()}
    events, again = events_of(config_for(tokenizer_folder, images, out, batch_size=2))
    assert again == first
    assert not any(isinstance(event, Begin) for event in events)
    with pytest.raises(OutputError, match="count: 3 there, 2 asked"):
        run_quietly(evaluate(config_for(tokenizer_folder, images, out, limit=2)))
    assert {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in out.iterdir()} == before
    assert run_quietly(evaluate(config_for(tokenizer_folder, images, out, limit=2, overwrite=True)))["images"] == 2


def test_a_stopped_evaluation_keeps_the_older_one_and_can_be_given_again(tokenizer_folder: Path, imagenet_sample: Path, tmp_path: Path) -> None:
    images, out = flat_folder(tmp_path / "images", imagenet_sample, 3), tmp_path / "out"
    run_quietly(evaluate(config_for(tokenizer_folder, images, out)))
    before = (out / "metrics.json").read_bytes()
    stopped = evaluate(config_for(tokenizer_folder, images, out, limit=2, overwrite=True, batch_size=1))
    assert any(isinstance(event, Advance) for event in stopped)
    with pytest.raises(KeyboardInterrupt):
        stopped.throw(KeyboardInterrupt)  # type: ignore[attr-defined]
    assert (out / "metrics.json").read_bytes() == before
    assert not list(out.glob(".*"))
    assert run_quietly(evaluate(config_for(tokenizer_folder, images, out, limit=2, overwrite=True)))["images"] == 2


def test_unreadable_images_are_left_out_counted_and_named(tokenizer_folder: Path, imagenet_sample: Path, tmp_path: Path) -> None:
    images = flat_folder(tmp_path / "images", imagenet_sample, 4)
    clean = run_quietly(evaluate(config_for(tokenizer_folder, images, tmp_path / "clean")))
    (images / "01-broken.jpg").write_bytes((images / "01.jpg").read_bytes()[:500])
    (images / "02-empty.png").write_bytes(b"")
    for name in ("03.heic", "04.HEIC", "labels.txt"):
        (images / name).write_bytes(b"x")
    events, value = events_of(config_for(tokenizer_folder, images, tmp_path / "out", batch_size=2))
    assert value["images"] == 4
    assert [entry["key"] for entry in value["notes"]["failed"]] == ["01-broken.jpg", "02-empty.png"]
    assert all(entry["reason"] for entry in value["notes"]["failed"])
    assert value["dataset"]["skipped"] == {".heic": 2, ".txt": 1}
    assert value["notes"]["skipped"] == "3 entries of the source are passed over: 2 .heic (03.heic, ...), 1 .txt (labels.txt)"
    assert value["fingerprints"] == clean["fingerprints"]
    assert value["rows"]["rectified"]["psnr_db"] == pytest.approx(clean["rows"]["rectified"]["psnr_db"], abs=1e-3)
    assert any("2 of 6 images cannot be read" in event.text for event in events if isinstance(event, Note))


def test_a_folder_of_unreadable_images_is_an_error(tokenizer_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.jpg").write_bytes(b"no picture")
    with pytest.raises(ImageError, match=r"none of the 1 images in .* can be read; the first, a\.jpg: "):
        run_quietly(evaluate(config_for(tokenizer_folder, tmp_path / "images", tmp_path / "out")))
    assert not (tmp_path / "out" / "metrics.json").exists()


def test_a_run_folder_of_train_rectifier_stands_for_the_tokenizer_in_it(tokenizer_folder: Path, imagenet_sample: Path, tmp_path: Path) -> None:
    images = flat_folder(tmp_path / "images", imagenet_sample, 2)
    value = run_quietly(evaluate(config_for(tokenizer_folder.parent, images, tmp_path / "out")))
    assert value["fingerprints"]["tokenizer"] == ReVQTokenizer.from_pretrained(tokenizer_folder).fingerprint


@dataclass(frozen=True)
class WrongInput:
    """A setting that makes the evaluation impossible, and what the error must be."""

    id: str
    settings: dict[str, Any]
    error: type[RevqError]
    message: str


WRONG_INPUTS = [
    WrongInput("no tokenizer there", {"tokenizer": "{tmp}/nowhere"}, TokenizerError, "nowhere"),
    WrongInput("no tokenizer under a relative path", {"tokenizer": "runs/nowhere"}, TokenizerError, "runs/nowhere"),
    WrongInput("a folder that is no tokenizer", {"tokenizer": "{tmp}/images"}, TokenizerError, "no revq tokenizer"),
    WrongInput("no image folder", {"images": "{tmp}/nowhere"}, ImageError, "does not exist"),
    WrongInput("an empty image folder", {"images": "{tmp}/empty"}, ImageError, "holds no"),
    WrongInput("another VAE", {"vae": "{tmp}/other_vae.py:load"}, MismatchError, "fingerprint"),
    WrongInput("missing Inception weights", {"inception_weights": "{tmp}/no.pth"}, ConfigError, "no weights at"),
    WrongInput("foreign Inception weights", {"inception_weights": "{tmp}/foreign.pth"}, ConfigError, "does not fit"),
    WrongInput("an output that holds something else", {"out": "{tmp}/images"}, OutputError, "holds something else"),
    WrongInput("an output that is a file", {"out": "{tmp}/foreign.pth"}, OutputError, "is a file"),
]


@pytest.mark.parametrize("case", WRONG_INPUTS, ids=lambda case: case.id)
def test_wrong_input_is_a_one_line_error_before_any_image_is_decoded(
    case: WrongInput, tokenizer_folder: Path, imagenet_sample: Path, tmp_path: Path
) -> None:
    flat_folder(tmp_path / "images", imagenet_sample, 2)
    (tmp_path / "empty").mkdir()
    (tmp_path / "other_vae.py").write_text(
        "import torch\nclass Other(torch.nn.Conv2d):\n    encode = decode = torch.nn.Conv2d.forward\ndef load():\n    return Other(3, 3, 1)\n"
    )
    torch.save({"weight": torch.zeros(3)}, tmp_path / "foreign.pth")
    before = sorted(tmp_path.rglob("*"))
    settings = {name: value.format(tmp=tmp_path) for name, value in case.settings.items()}
    config = config_for(tokenizer_folder, tmp_path / "images", tmp_path / "out")
    events: list[Event] = []
    with pytest.raises(case.error, match=case.message) as caught:
        events.extend(evaluate(EvaluateConfig(**{**vars(config), **settings})))
    assert "\n" not in str(caught.value)
    assert not any(isinstance(event, Begin) for event in events)
    made = set(tmp_path.rglob("*")) - set(before) - {tmp_path / "out", tmp_path / "out" / "config.json"}
    assert {path for path in made if "__pycache__" not in path.parts} == set()


@dataclass(frozen=True)
class WrongSetting:
    """A setting outside its range, and what the error must say."""

    id: str
    settings: dict[str, Any]
    message: str


WRONG_SETTINGS = [
    WrongSetting("protocol", {"protocol": "clean"}, "protocol must be one of revq, adm, not 'clean'"),
    WrongSetting("precision", {"precision": "fp16"}, "precision must be one of fp32, bf16, not 'fp16'"),
    WrongSetting("tolerance", {"tolerance_images": -1}, "tolerance-images must be at least 1"),
    WrongSetting("batch size", {"batch_size": 0}, "batch-size must be at least 1, not 0"),
    WrongSetting("workers", {"workers": 0}, "workers must be at least 1, not 0"),
    WrongSetting("limit", {"limit": 0}, "limit must be at least 1"),
]


@pytest.mark.parametrize("case", WRONG_SETTINGS, ids=lambda case: case.id)
def test_a_setting_outside_its_range_is_refused(case: WrongSetting) -> None:
    with pytest.raises(ConfigError, match=case.message):
        EvaluateConfig(tokenizer="t", images="i", out="o", **case.settings)


def test_the_grid_shows_every_pixel_of_every_picture_where_the_layout_says(imagenet_sample: Path) -> None:
    pictures = load_images(imagenet_sample / "val", 6)
    data, layout = draw_grid([list(pictures[:3]), list(pictures[3:])], ("original", "vae", "rectified"))
    sheet = torch.from_numpy(np.array(Image.open(io.BytesIO(data)))).permute(2, 0, 1)
    assert layout["tile_px"] == 128
    assert layout["scale"] == 2
    for i, picture in enumerate(pictures):
        left, top = layout["left"][i % 3], layout["top"][i // 3]
        assert torch.equal(sheet[:, top : top + 128 : 2, left : left + 128 : 2], picture)


def test_the_pictures_are_spread_over_the_whole_set(tokenizer_folder: Path, imagenet_sample: Path, tmp_path: Path) -> None:
    images = flat_folder(tmp_path / "images", imagenet_sample, 15)
    (images / "00.jpg").write_bytes(b"no picture")
    pictures = run_quietly(evaluate(config_for(tokenizer_folder, images, tmp_path / "out", batch_size=4)))["pictures"]
    assert pictures["keys"] == ["01.jpg", "03.jpg", "05.jpg", "07.jpg", "08.jpg", "10.jpg", "12.jpg", "14.jpg"]
    assert len(pictures["top"]) == len(pictures["psnr_db"]) == 8


def test_what_a_user_asks_is_recorded(small_run: Path, imagenet_sample: Path, tmp_path: Path) -> None:
    value = run_quietly(evaluate(config_for(small_run, imagenet_sample / "val", tmp_path / "out", limit=10, batch_size=4)))
    rows = value["rows"]
    lost = rows["vae"]["psnr_db"] - rows["quantized"]["psnr_db"]
    assert value["recovered"]["psnr_db"] == pytest.approx((rows["rectified"]["psnr_db"] - rows["quantized"]["psnr_db"]) / lost)
    assert value["round_trip"] == {"images": 4, "largest_difference": 0}
    assert value["throughput"]["encode_images_per_s"] > 0
    assert value["throughput"]["images"] == 6
    assert len(value["codebooks"]["usage"]) == len(value["codebooks"]["perplexity"]) == value["tokens_per_image"]
    assert max(value["codebooks"]["perplexity"]) == pytest.approx(value["codebook_usage"]["perplexity"]["max"], abs=1e-6)
    assert value["training"]["step"][-1] == 6
    assert value["rfid_label"] == "rFID@10"
    assert value["dataset"] == {"imagenet_val": False, "listed": 10, "unreadable": 0, "enlarged": 0, "skipped": {}}
    assert value["notes"]["tolerance"] if value["tolerance"] else "tolerance" not in value["notes"]

    table = pq.read_table(tmp_path / "out" / "images.parquet").to_pydict()
    assert table["status"] == ["ok"] * 10
    assert sum(table["rectified.psnr_db"]) / 10 == pytest.approx(rows["rectified"]["psnr_db"])
    assert table["original.psnr_db"] == [float("inf")] * 10
    ranking = sorted(zip(table["rectified.psnr_db"], table["key"], strict=True))
    assert value["extremes"]["keys"] == [key for _, key in ranking[:4]] + [key for _, key in ranking[::-1][:4]]
    classes = {entry["name"]: entry["psnr_db"] for entry in value["classes"]["worst"] + value["classes"]["best"]}
    assert value["classes"]["count"] == len(set(table["class_name"]))
    for name, psnr in classes.items():
        members = [p for p, own in zip(table["rectified.psnr_db"], table["class_name"], strict=True) if own == name]
        assert psnr == pytest.approx(sum(members) / len(members))


def test_the_adm_protocol_crops_otherwise_and_says_that_the_tokenizer_knows_other_crops(
    small_run: Path, imagenet_sample: Path, tmp_path: Path
) -> None:
    images = flat_folder(tmp_path / "images", imagenet_sample, 4)
    ours = run_quietly(evaluate(config_for(small_run, images, tmp_path / "revq")))
    adm = run_quietly(evaluate(config_for(small_run, images, tmp_path / "adm", protocol="adm")))
    assert "crops" not in ours["notes"]
    assert "trained on other crops (bilinear-antialias, centre) than those of protocol adm" in adm["notes"]["crops"]
    assert adm["fingerprints"]["images"] != ours["fingerprints"]["images"]
    assert adm["rows"]["vae"]["psnr_db"] != pytest.approx(ours["rows"]["vae"]["psnr_db"], abs=0.05)


def test_bf16_decoding_keeps_the_tokens_and_nearly_the_pictures(tokenizer_folder: Path, imagenet_sample: Path, tmp_path: Path) -> None:
    images = flat_folder(tmp_path / "images", imagenet_sample, 3)
    full = run_quietly(evaluate(config_for(tokenizer_folder, images, tmp_path / "full")))
    half = run_quietly(evaluate(config_for(tokenizer_folder, images, tmp_path / "half", precision="bf16")))
    assert half["codebooks"] == full["codebooks"]
    assert half["latent_error"] == full["latent_error"]
    assert half["rows"]["vae"]["psnr_db"] != full["rows"]["vae"]["psnr_db"]
    assert half["rows"]["vae"]["psnr_db"] == pytest.approx(full["rows"]["vae"]["psnr_db"], abs=0.2)
    assert half["protocol"]["vae_precision"] == "encoder fp32, decoder bf16"


def test_images_smaller_than_the_crop_are_counted(tokenizer_folder: Path, imagenet_sample: Path, tmp_path: Path) -> None:
    images = flat_folder(tmp_path / "images", imagenet_sample, 2)
    with Image.open(images / "00.jpg") as image:
        image.resize((40, 50)).save(images / "00.jpg")
    value = run_quietly(evaluate(config_for(tokenizer_folder, images, tmp_path / "out")))
    assert value["dataset"]["enlarged"] == 1
    assert value["notes"]["enlarged"] == "1 of 2 images are smaller than 64 px and were enlarged by the crop"
