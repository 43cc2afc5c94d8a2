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
from typing import Any

import numpy as np
import pytest
import torch
import torch_fidelity
from PIL import Image
from random_weights import save_random_alexnet, save_random_inception, save_random_vgg16
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure
from torchmetrics.image import LearnedPerceptualImagePatchSimilarity, PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure

from revq.errors import ConfigError
from revq.stages.evaluation.features import FeatureCache
from revq.stages.evaluation.frechet import InceptionScore, Moments, frechet_distance, split_of_images
from revq.stages.evaluation.inception import CLASSES, FEATURES, Inception
from revq.stages.evaluation.metrics import CodebookUsage, score_images, ssim, to_signed, to_uint8
from revq.stages.evaluation.networks import Lpips
from revq.stages.evaluation.weights import ALEXNET, INCEPTION, WeightFile, find_weights

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
    scores = score_images({"vae": images}, reference, {})["vae"]
    for i in range(4):
        pair = (images[i : i + 1] / 255, reference[i : i + 1] / 255)
        assert scores["psnr_db"][i].item() == pytest.approx(PeakSignalNoiseRatio(data_range=1.0)(*pair).item(), abs=1e-4)
        assert scores["ssim"][i].item() == pytest.approx(StructuralSimilarityIndexMeasure(data_range=1.0)(*pair).item(), abs=3e-5)
        by_hand = -10 * math.log10(float(((images[i].double() - reference[i].double()) / 255).square().mean()))
        assert scores["psnr_db"][i].item() == pytest.approx(by_hand, abs=1e-9)


@pytest.mark.parametrize("shape", [(11, 11), (16, 40), (64, 64)], ids=str)
def test_the_fast_ssim_equals_torchmetrics_convolution_up_to_the_border(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(3, 3, *shape, generator=generator).double()
    reference = (images + 0.2 * torch.randn(images.shape, generator=generator)).clamp(0, 1)
    images[:, :, : shape[0] // 2] *= 0.01  # a dark half, where variances cancel
    slow = structural_similarity_index_measure(images, reference, data_range=1.0, reduction="none")
    assert ssim(images, reference).tolist() == pytest.approx(slow.tolist(), abs=1e-10)


def test_equal_pictures_have_an_infinite_psnr_and_an_ssim_of_one(imagenet_sample: Path) -> None:
    pixels = real_pixels(imagenet_sample, 2, 64)
    scores = score_images({"original": pixels}, pixels, {})["original"]
    assert scores["psnr_db"].tolist() == [math.inf, math.inf]
    assert scores["ssim"].tolist() == pytest.approx([1, 1], abs=1e-6)
    assert scores["lpips_alex"].isnan().all()


def test_rfid_and_inception_score_equal_torch_fidelity_on_the_same_pngs(imagenet_sample: Path, inception_file: Path, tmp_path: Path) -> None:
    original = real_pixels(imagenet_sample, 12, 64)
    images = distorted(original, 40.0)
    inception, splits = Inception(inception_file, CPU), split_of_images(12)
    moments, score = {name: Moments(FEATURES, CPU) for name in ("original", "vae")}, InceptionScore(CLASSES)
    for part in (slice(0, 5), slice(5, 12)):
        moments["original"].add(inception.features(original[part]))
        features = inception.features(images[part])
        moments["vae"].add(features)
        score.add(inception.logits(features), splits[part])
    rfid = frechet_distance(moments["vae"].gaussian(), moments["original"].gaussian())

    folders = [str(save_pngs(tmp_path / name, pixels)) for name, pixels in (("ours", images), ("theirs", original))]
    settings = {"feature_extractor_weights_path": str(inception_file), "cuda": False, "cache": False, "save_cpu_ram": True, "verbose": False}
    fidelity = torch_fidelity.calculate_metrics(input1=folders[0], input2=folders[1], fid=True, isc=True, **settings)
    assert rfid > 1
    assert rfid == pytest.approx(fidelity["frechet_inception_distance"], rel=1e-4)
    assert score.compute() == pytest.approx(fidelity["inception_score_mean"], rel=1e-5)


def test_original_features_are_kept_by_their_content_and_never_taken_for_others(imagenet_sample: Path, inception_file: Path, tmp_path: Path) -> None:
    original = real_pixels(imagenet_sample, 4, 64)
    digests = [hashlib.sha256(picture.numpy().tobytes()).digest() for picture in original]
    inception, first, again = Inception(inception_file, CPU), FeatureCache(tmp_path / "cache", "w"), FeatureCache(tmp_path / "cache", "w")
    computed = first.features(inception, original, digests)
    assert torch.equal(again.features(inception, original, digests), computed)
    assert (first.reused, again.reused) == (0, 4)
    assert FeatureCache(tmp_path / "cache", "other weights").features(inception, original, digests).shape == (4, FEATURES)
    changed = original.flip(3)
    other = again.features(inception, changed, [hashlib.sha256(picture.numpy().tobytes()).digest() for picture in changed])
    assert not torch.equal(other, computed)
    assert again.reused == 4
    for path in (tmp_path / "cache").rglob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:100])
    assert torch.equal(FeatureCache(tmp_path / "cache", "w").features(inception, original, digests), computed)


def test_a_feature_cache_that_cannot_be_written_is_done_without(imagenet_sample: Path, inception_file: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    original = real_pixels(imagenet_sample, 2, 64)
    cache = FeatureCache(tmp_path / "file", "w")
    assert cache.features(Inception(inception_file, CPU), original, [b"a", b"b"]).shape == (2, FEATURES)
    assert not cache.writable


@pytest.mark.parametrize("trunk", ["alex", "vgg"])
def test_lpips_equals_torchmetrics_called_directly(trunk: Any, imagenet_sample: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    path = save_random_alexnet(tmp_path) if trunk == "alex" else save_random_vgg16(tmp_path)
    original = real_pixels(imagenet_sample, 17, 48)
    images = distorted(original, 40.0)
    name = f"lpips_{trunk}"
    rows = score_images({"original": original, "vae": images}, original, {name: Lpips(trunk, path, CPU)})
    direct = LearnedPerceptualImagePatchSimilarity(net_type=trunk)
    direct.update(to_signed(images), to_signed(original))
    assert rows["original"][name].abs().max() < 1e-7
    assert rows["vae"][name].min() > 1e-5
    assert rows["vae"][name].mean().item() == pytest.approx(direct.compute().item(), rel=1e-4)


def test_usage_and_perplexity_follow_the_counts_of_each_codebook() -> None:
    usage = CodebookUsage(3, 4, CPU)
    usage.update(torch.tensor([[0, 0, 0], [0, 1, 1]]))
    usage.update(torch.tensor([[0, 0, 2], [0, 0, 3]]))
    result = usage.compute()
    assert usage.each()["usage"] == [0.25, 0.5, 1.0]
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
        Inception(path, CPU)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_an_alexnet_of_other_weights_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    path = save_random_alexnet(tmp_path)
    torch.save({"weight": torch.zeros(3)}, path)
    with pytest.raises(ConfigError, match="does not fit torchvision's AlexNet"):
        Lpips("alex", path, CPU)


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
