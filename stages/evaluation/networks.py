"""Running and reading trained networks that judge pictures: in full float32, a few pictures at once; and LPIPS.

Shapes: B batch, S image side in pixels. Images are uint8 (B,3,S,S) RGB.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from ...errors import ConfigError, one_line
from ...models.lpips import LPIPS, Trunk
from ...models.weight_keys import compare_weights

_LPIPS_AT_ONCE = 16  # VGG's first features of 64 images of 256 px would be gigabytes
_CPU_PIXELS_AT_ONCE = 8 * 128 * 128


def images_at_once(device: torch.device, side_px: int) -> int:
    """How many pictures of that side go through a network together: on a GPU all that there are, on a CPU 8 of 128 px.

    There more at once are no faster (they leave the caches), and their activations fill gigabytes: 64 channels of float32 at full size are 256 bytes
    a pixel, in several copies.
    """
    return max(1, _CPU_PIXELS_AT_ONCE // side_px**2) if device.type == "cpu" else 1 << 20


@contextmanager
def full_float32(device: torch.device) -> Iterator[None]:
    """Convolutions in full float32: cuDNN takes TF32 by default, so that the same pictures would score differently on another device."""
    if device.type != "cuda":
        yield
        return
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


def precision_flags() -> dict[str, Any]:
    """The switches of torch that change the last digits, as `full_float32` finds them."""
    return {
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "cudnn_allow_tf32": "switched off while measuring",
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
        "threads": torch.get_num_threads(),
    }


class Lpips:
    """LPIPS version 0.1 over a trained trunk; the reference's layers are computed once for all rows."""

    def __init__(self, trunk: Trunk, path: Path, device: torch.device) -> None:
        """Load the trunk "alex" or "vgg".

        Args:
            path: the trunk's weights, with or without the classifier behind it.

        Raises:
            ConfigError: the file cannot be read or holds another network's weights.
        """
        title, published = {"alex": ("AlexNet", "alexnet-owt-7be5be79.pth"), "vgg": ("VGG16", "vgg16-397923af.pth")}[trunk]
        state = {name: tensor for name, tensor in read_weights(path, title).items() if not name.startswith("classifier.")}
        network = LPIPS(trunk)
        require_weights(state, network.trunk_state(), f"{path} does not fit torchvision's {title}", f"the published {published}")
        network.load_trunk(state)
        self.device = device
        self.network = network.to(device)

    @torch.no_grad()
    def distances(self, rows: Sequence[Tensor], reference: Tensor) -> list[Tensor]:
        """Each row's distance (B,) from the reference; images uint8 (B,3,S,S)."""
        at_once = min(_LPIPS_AT_ONCE, images_at_once(self.device, reference.shape[-1]))
        found = [self._distances([row[i : i + at_once] for row in rows], reference[i : i + at_once]) for i in range(0, len(reference), at_once)]
        return [torch.cat(pieces) for pieces in zip(*found, strict=True)]

    def _distances(self, rows: Sequence[Tensor], reference: Tensor) -> list[Tensor]:
        with full_float32(self.device):
            theirs = self._layers(reference)
            return [self.network.distance(self._layers(row), theirs) for row in rows]

    def _layers(self, images: Tensor) -> list[Tensor]:
        return self.network.layers(images.float() / 127.5 - 1)


def read_weights(path: Path, title: str) -> Mapping[str, Tensor]:
    """The tensors of `path`, read without unpickling anything else.

    Raises:
        ConfigError: it cannot be read, or holds something else.
    """
    try:
        state: Any = load_file(path) if path.suffix == ".safetensors" else torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # on bytes of another kind torch's reader raises whatever it stumbles over, KeyError and IndexError too
        raise ConfigError(f"the {title} weights in {path} cannot be read ({one_line(error)}); delete the file, so that it is fetched anew") from error
    if not (isinstance(state, Mapping) and all(isinstance(value, Tensor) for value in state.values())):
        raise ConfigError(f"{path} holds no {title} weights but a {type(state).__name__}; give the published checkpoint")
    return state


def require_weights(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], fault: str, published: str) -> None:
    """Raise ConfigError, which begins with `fault` and names what is `published`, where `state` is not that of the `expected` network."""
    if faults := compare_weights(expected, state):
        raise ConfigError(f"{fault} ({faults}); it must be {published}")
