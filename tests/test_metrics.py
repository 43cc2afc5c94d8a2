"""The metrics against torchmetrics and torch-fidelity called directly, and finding the weights they need."""

from __future__ import annotations

import functools
import hashlib
import http.server
import math
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import torch_fidelity
from PIL import Image
from random_weights import save_random_alexnet, save_random_inception
from torch import Tensor
from torchmetrics.image import LearnedPerceptualImagePatchSimilarity, PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure
from torchmetrics.image.fid import FrechetInceptionDistance

from revq.errors import ConfigError
from revq.stages.metrics import CodebookUsage, RowMetrics, image_scores, load_inception, load_lpips, to_signed, to_uint8
from revq.stages.weights import ALEXNET, INCEPTION, WeightFile, find_weights

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_inception(tmp_path_factory.mktemp("inception") / "random.pth")


def real_pixels(imagenet_sample: Path, count: int, size: int) -> Tensor:
    """(count,3,size,size) uint8 of real photographs."""
    paths = sorted((imagenet_sample / "val").rglob("*.JPEG"))[:count]
    images = [np.asarray(Image.open(path).convert("RGB").resize((size, size))) for path in paths]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()


def distorted(pixels: Tensor, strength: float) -> Tensor:
    noise = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(1)) * strength
    return (pixels + noise).round().clamp(0, 255).to(torch.uint8)


def save_pngs(folder: Path, pixels: Tensor) -> Path:
    folder.mkdir()
    for i, image in enumerate(pixels):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{i:03d}.png")
    return folder


def test_rounding_to_uint8_and_back_keeps_every_level() -> None:
    levels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    assert torch.equal(to_uint8(to_signed(levels)), levels)
    assert to_uint8(torch.tensor([-1.2, 0.0, 1.2])).tolist() == [0, 128, 255]


def test_psnr_and_ssim_equal_torchmetrics_on_each_rgb_image(imagenet_sample: Path) -> None:
    reference = real_pixels(imagenet_sample, 4, 64)
    images = torch.stack([distorted(picture, 4.0 * (i + 1)) for i, picture in enumerate(reference)])
    scores = image_scores(images, reference, None)
    for i in range(4):
        pair = (images[i : i + 1] / 255, reference[i : i + 1] / 255)
        assert scores["psnr_db"][i].item() == pytest.approx(PeakSignalNoiseRatio(data_range=1.0)(*pair).item(), abs=1e-4)
        assert scores["ssim"][i].item() == pytest.approx(StructuralSimilarityIndexMeasure(data_range=1.0)(*pair).item(), abs=1e-5)
        by_hand = -10 * math.log10(float(((images[i].double() - reference[i].double()) / 255).square().mean()))
        assert scores["psnr_db"][i].item() == pytest.approx(by_hand, abs=1e-4)


def test_rfid_equals_torchmetrics_and_torch_fidelity_called_directly(imagenet_sample: Path, inception_file: Path, tmp_path: Path) -> None:
    original = real_pixels(imagenet_sample, 10, 64)
    images = distorted(original, 40.0)
    metrics = RowMetrics(inception=load_inception(inception_file, CPU), lpips=None, device=CPU, rows=("original", "vae"))
    for part in (slice(0, 3), slice(3, 10)):
        metrics.update({"original": original[part], "vae": images[part]})
    rfid = metrics.compute()["vae"]["rfid"]

    direct = FrechetInceptionDistance(feature=2048, feature_extractor_weights_path=str(inception_file), antialias=False)
    direct.update(original, real=True)
    direct.update(images, real=False)
    folders = [str(save_pngs(tmp_path / name, pixels)) for name, pixels in (("ours", images), ("theirs", original))]
    fidelity = torch_fidelity.calculate_metrics(
        input1=folders[0], input2=folders[1], fid=True, feature_extractor_weights_path=str(inception_file), cuda=False, cache=False, save_cpu_ram=True
    )
    assert rfid is not None
    assert rfid > 1
    assert rfid == pytest.approx(direct.compute().item(), rel=1e-4)
    assert rfid == pytest.approx(fidelity["frechet_inception_distance"], rel=1e-4)


def test_rfid_of_images_against_themselves_is_zero_whatever_the_batches(imagenet_sample: Path, inception_file: Path) -> None:
    original = real_pixels(imagenet_sample, 5, 64)
    metrics = RowMetrics(inception=load_inception(inception_file, CPU), lpips=None, device=CPU, rows=("original",))
    for part in (slice(0, 1), slice(1, 5)):
        metrics.update({"original": original[part]})
    row = metrics.compute()["original"]
    assert row["rfid"] == pytest.approx(0, abs=1e-3)
    assert row == {"rfid": row["rfid"], "psnr_db": None, "ssim": pytest.approx(1, abs=1e-6), "lpips_alex": None}


def test_rfid_of_a_single_image_is_none(imagenet_sample: Path, inception_file: Path) -> None:
    original = real_pixels(imagenet_sample, 1, 64)
    metrics = RowMetrics(inception=load_inception(inception_file, CPU), lpips=None, device=CPU, rows=("original",))
    metrics.update({"original": original})
    assert metrics.compute()["original"]["rfid"] is None


def test_lpips_equals_torchmetrics_called_directly(imagenet_sample: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    path = save_random_alexnet(tmp_path)
    original = real_pixels(imagenet_sample, 4, 64)
    images = distorted(original, 40.0)
    metrics = RowMetrics(inception=None, lpips=load_lpips(path, CPU), device=CPU, rows=("original", "vae"))
    for part in (slice(0, 1), slice(1, 4)):
        metrics.update({"original": original[part], "vae": images[part]})
    direct = LearnedPerceptualImagePatchSimilarity(net_type="alex")
    direct.update(to_signed(images), to_signed(original))
    rows = metrics.compute()
    assert rows["original"]["lpips_alex"] == pytest.approx(0, abs=1e-7)
    assert rows["vae"]["lpips_alex"] is not None
    assert rows["vae"]["lpips_alex"] > 1e-4
    assert rows["vae"]["lpips_alex"] == pytest.approx(direct.compute().item(), rel=1e-4)


def test_usage_and_perplexity_follow_the_counts_of_each_codebook() -> None:
    usage = CodebookUsage(3, 4, CPU)
    usage.update(torch.tensor([[0, 0, 0], [0, 1, 1]]))
    usage.update(torch.tensor([[0, 0, 2], [0, 0, 3]]))
    result = usage.compute()
    assert result["usage"] == {"min": 0.25, "median": 0.5, "max": 1.0}
    assert result["perplexity"] == pytest.approx({"min": 1.0, "median": 0.75**-0.75 * 0.25**-0.25, "max": 4.0})


@dataclass(frozen=True)
class BadFile:
    """A file that is no Inception checkpoint, and what the error must say."""

    id: str
    content: str
    message: str


BAD_FILES = [
    BadFile("text", "text", "cannot be read"),
    BadFile("cut short", "cut", "cannot be read"),
    BadFile("another network", "other", "does not fit torch-fidelity's Inception"),
    BadFile("no state dict", "list", "holds no Inception weights but a list"),
]


@pytest.mark.parametrize("case", BAD_FILES, ids=lambda case: case.id)
def test_a_damaged_or_foreign_checkpoint_is_an_error_and_never_a_random_network(case: BadFile, inception_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "bad.pth"
    if case.content == "text":
        path.write_text("not a checkpoint")
    elif case.content == "cut":
        path.write_bytes(inception_file.read_bytes()[:100_000])
    else:
        torch.save([1] if case.content == "list" else {"weight": torch.zeros(3)}, path)
    with pytest.raises(ConfigError, match=case.message) as caught:
        load_inception(path, CPU)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_an_alexnet_of_other_weights_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    path = save_random_alexnet(tmp_path)
    torch.save({"weight": torch.zeros(3)}, path)
    with pytest.raises(ConfigError, match="does not fit torchvision's AlexNet"):
        load_lpips(path, CPU)


def test_weights_that_are_named_but_missing_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no weights at .*nowhere\.pth; give the path of weights-inception-2015-12-05-6726825d\.pth"):
        find_weights(INCEPTION, path=str(tmp_path / "nowhere.pth"))


def test_weights_in_the_torch_hub_cache_are_found_and_other_content_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    path = save_random_alexnet(tmp_path)
    found = find_weights(ALEXNET, download=False)
    assert found.path == path
    assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert not found.published
    assert found.reason is None


def test_missing_weights_give_the_command_that_mends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    found = find_weights(INCEPTION, download=False)
    assert found.path is None
    assert found.reason is not None
    assert f"curl -L --create-dirs -o {tmp_path}/hub/checkpoints/{INCEPTION.file_name} {INCEPTION.url}" in found.reason
    assert "--inception-weights PATH" in found.reason


class SilentHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        return None


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A real HTTP server: its address, and the folder it serves."""
    folder = tmp_path / "served"
    folder.mkdir()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(SilentHandler, directory=str(folder))) as running:
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{running.server_address[1]}", folder
        running.shutdown()
        thread.join()


def test_a_download_lands_in_the_cache_with_its_hash_checked(server: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    address, folder = server
    content = b"weights" * 500_000
    name = f"net-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    (folder / name).write_bytes(content)
    found = find_weights(WeightFile(title="a network", url=f"{address}/{name}"))
    assert found.path == tmp_path / "home" / "hub" / "checkpoints" / name
    assert found.path.read_bytes() == content
    assert found.published


@dataclass(frozen=True)
class BadDownload:
    """What the server holds under the right name, and the reason that is told."""

    id: str
    content: bytes | None
    message: str


BAD_DOWNLOADS = [
    BadDownload("nothing there", None, "404"),
    BadDownload("another file", b"an error page", "the server sent another file"),
]


@pytest.mark.parametrize("case", BAD_DOWNLOADS, ids=lambda case: case.id)
def test_a_failed_download_leaves_nothing_behind(
    case: BadDownload, server: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    address, folder = server
    if case.content is not None:
        (folder / "net-0123abcd.pth").write_bytes(case.content)
    found = find_weights(WeightFile(title="a network", url=f"{address}/net-0123abcd.pth"))
    assert found.path is None
    assert found.reason is not None
    assert case.message in found.reason
    assert list((tmp_path / "home" / "hub" / "checkpoints").iterdir()) == []
