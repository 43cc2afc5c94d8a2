"""Reading what autoencoders of every library return, and trying one out: what would fail in the last stage must fail in the first.

Shapes: B batch, C,H,W latent channels, rows, columns, S image side in pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import VAEError, one_line

_SIDE = 64
_GRAINS = (64, 56, 48)  # one latent of an image VAE stands for 64 px or for what divides that, for 7 or 14 (patches of a transformer), or 3, 6, 12
_OTHER_CHANNELS = (1, 2, 4, 6)
# In deviations of what is compared. A posterior's noise may be a thousandth; a GPU rounds otherwise for batches of other sizes.
_REPEATED, _BESIDE_ANOTHER = 1e-4, 0.05


class Probed(Protocol):
    """What is asked of a VAE to try it out: that of `FrozenVAE`."""

    id: str
    network: Any

    @property
    def device(self) -> torch.device: ...

    def encode(self, images: Tensor) -> Tensor: ...

    def decode(self, latents: Tensor) -> Tensor: ...


def read_latents(output: Any) -> Tensor:
    """What an `encode` returned -> latents: itself, or of a posterior its mode, or one of the two inside.

    Raises:
        VAEError: it could be read in no way, or in several.
    """
    found = _unwrap(output, ("latent_dist", "latent", "latents"))
    if not isinstance(found, Tensor) and callable(getattr(found, "mode", None)):
        found = found.mode()
    if not isinstance(found, Tensor):
        raise VAEError(
            f"encode returns {_describe(output)}; revq reads a tensor, a posterior with mode(), or one of these in a tuple of one "
            "or under latent_dist, latent or latents"
        )
    return found


def read_pictures(output: Any) -> Tensor:
    """What a `decode` returned -> pictures.

    Raises:
        VAEError: it could be read in no way, or in several.
    """
    found = _unwrap(output, ("sample",))
    if not isinstance(found, Tensor):
        raise VAEError(f"decode returns {_describe(output)}; revq reads a tensor, or one in a tuple of one or under sample")
    return found


def round_trip_shape(vae: Probed, image_size: int) -> tuple[int, int, int]:
    """(C,H,W) of the latent of one image of that side, which must come back whole.

    Raises:
        VAEError: it does not, for a reason that is named; with the nearest sides that do where the side is the reason.
    """
    try:
        shape = _round_trip(vae, 3, image_size)
    except VAEError as error:
        fault = error
    else:
        _refuse_moods(vae, image_size)
        return shape
    if sides := _sides_that_do(vae, image_size):
        raise VAEError(f"VAE {vae.id} does not take {image_size} px: {fault}; choose --image-size {' or '.join(map(str, sides))}") from fault
    if str(fault).startswith("its encode fails") and (other := _other_input(vae)):
        raise VAEError(f"VAE {vae.id} {other}; revq needs one of RGB images, (B,3,S,S) -> (B,C,H,W)") from fault
    raise VAEError(f"VAE {vae.id} cannot be used: {fault}") from fault


def _round_trip(vae: Probed, channels: int, side: int) -> tuple[int, int, int]:
    """(C,H,W) after encoding and decoding one grey image; raises VAEError with the fault alone."""
    grey = torch.zeros(1, channels, side, side, device=vae.device)
    latent = _call("encode", vae.encode, grey)
    if latent.ndim != 4 or len(latent) != 1:
        time = ", with a time axis: it is a VAE of videos" if latent.ndim == 5 else ""
        raise VAEError(f"it encodes an image to latents of shape {tuple(latent.shape)}{time}; revq needs (B,C,H,W)")
    if not bool(latent.isfinite().all()):
        raise VAEError("it encodes a grey image to values that are not finite; its weights are damaged")
    with torch.no_grad():
        pictures = _call("decode", lambda latents: read_pictures(vae.network.decode(latents)), latent)
    expected = (1, channels, side, side)
    if tuple(pictures.shape) != expected:
        raise VAEError(f"an image of shape {expected} comes back as {tuple(pictures.shape)}")
    if not bool(pictures.isfinite().all()):
        raise VAEError("it decodes a grey image to values that are not finite; its weights are damaged")
    return tuple(latent.shape[1:])  # type: ignore[return-value]


def _refuse_moods(vae: Probed, side: int) -> None:
    """Raises VAEError unless encode and decode give the same each time, and for an image beside another one what they give for it alone."""
    ramp = torch.linspace(-1, 1, side, device=vae.device).expand(3, side, side)
    values = torch.stack([ramp, ramp.mT])
    with torch.no_grad():
        for name, function in (("encode", vae.encode), ("decode", vae.decode)):
            try:
                one, again, two = (_call(name, function, batch) for batch in (values[:1], values[:1], values))
                if two.shape != (2, *one.shape[1:]):
                    raise VAEError(f"its {name} makes {tuple(two.shape)} of a batch of two, and {tuple(one.shape)} of one")
                unit = one.std().clamp_min(1e-12)
                if float((again - one).abs().max() / unit) > _REPEATED:
                    raise VAEError(f"its {name} gives something else each time; a VAE that samples its latents must give their mean or mode")
                if float((two[:1] - one).abs().max() / unit) > _BESIDE_ANOTHER:
                    raise VAEError(f"its {name} gives something else for an image beside another one than for it alone")
            except VAEError as fault:
                raise VAEError(f"VAE {vae.id} cannot be used: {fault}") from fault
            values = two


def _call(name: str, function: Any, value: Tensor) -> Tensor:
    try:
        result: Tensor = function(value)
    except VAEError:
        raise
    except Exception as error:  # a network of any library, or the user's own
        raise VAEError(f"its {name} fails on a tensor of shape {tuple(value.shape)} ({type(error).__name__}: {one_line(error)})") from error
    return result


def _sides_that_do(vae: Probed, image_size: int) -> list[int]:
    """The nearest sides below and above that come back whole; none where no usual side does, so that the side is not what is wrong."""
    usual = [side for grain in _GRAINS for side in (image_size - image_size % grain, image_size - image_size % grain + grain)]
    for side in usual:
        if height := _latent_height(vae, side):
            factor = max(1, side // height)
            lower = image_size - image_size % factor
            return [near for near in (lower, lower + factor) if near != image_size and _latent_height(vae, near)] or [side]
    return []


def _latent_height(vae: Probed, side: int) -> int:
    """H at that side; 0 where an image of it does not come back whole."""
    try:
        return _round_trip(vae, 3, side)[1] if side else 0
    except VAEError:
        return 0


def _other_input(vae: Probed) -> str:
    """What the encoder takes in place of an RGB image; "" where that is not found."""
    try:
        vae.encode(torch.zeros(1, 3, 1, _SIDE, _SIDE, device=vae.device))
        return "takes videos, tensors with a time axis (B,3,T,S,S)"
    except Exception:  # whatever it raises, it does not take that
        pass
    for channels in _OTHER_CHANNELS:
        try:
            vae.encode(torch.zeros(1, channels, _SIDE, _SIDE, device=vae.device))
            return f"takes images of {channels} channel{'s' * (channels > 1)}"
        except Exception:  # as above
            continue
    return ""


def _unwrap(output: Any, names: tuple[str, ...]) -> Any:
    """What stands under the only one of `names` that an object or mapping has, or in a tuple of one; else `output` itself."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        found = [output[name] for name in names if output.get(name) is not None]
    else:
        found = [getattr(output, name) for name in names if getattr(output, name, None) is not None]
    if not found and isinstance(output, tuple | list):
        found = list(output)
    return _unwrap(found[0], names) if len(found) == 1 and found[0] is not output else output


def _describe(output: Any) -> str:
    if isinstance(output, Mapping):
        return f"a {type(output).__name__} with {', '.join(map(str, output)) or 'nothing'}"
    if isinstance(output, tuple | list):
        return f"a {type(output).__name__} of {len(output)} ({', '.join(type(part).__name__ for part in output)})"
    return f"a {type(output).__name__}"
