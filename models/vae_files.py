"""The files of a VAE in diffusers' format, in a folder or on the model hub: which they are, fetching those alone, and the network made of them.

A repository may hold a whole pipeline, every file in several precisions and formats. A VAE is a config.json and one set of weights.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import VAEError, VAENotFoundError, one_line
from .weight_keys import explain_weights

EMBEDDED_VAE = "revq-tiny-f8c8"
_LOCAL_HINT = "pass --vae a local folder in diffusers' format, FILE.py:FACTORY, or the embedded " + EMBEDDED_VAE
_CONFIG = "config.json"
_PIPELINE = "model_index.json"
_PLACES = ("", "vae/")
_WEIGHTS = "diffusion_pytorch_model"
_VARIANTS = (None, "fp16", "bf16")  # full precision where it is: a half is not the same VAE
_PICKLED = (".bin", ".ckpt", ".pt", ".pth")
# What files that were made of a training checkpoint may hold besides the network.
_OF_TRAINING = ("loss.", "discriminator.", "model_ema.")


@dataclass(frozen=True, kw_only=True)
class VAEFiles:
    """A folder or repository as seen from its top."""

    title: str
    """What it is, for messages."""
    names: frozenset[str]
    """Paths of its files, with "/"."""
    get: Callable[[str], Path]
    """Path on this machine of the file of that name, fetched where it is not here yet."""
    revision: str | None = None
    """Commit of the repository; None for a folder."""


def open_folder(folder: Path) -> VAEFiles:
    """The files of a local folder."""
    names = frozenset(place + path.name for place in _PLACES if (folder / place).is_dir() for path in (folder / place).iterdir())
    return VAEFiles(title=str(folder), names=names, get=lambda name: folder / name)


def open_repository(repo_id: str, revision: str | None) -> VAEFiles:
    """The files of a model hub repository; of what is cached here where the hub does not answer.

    Raises:
        VAEError: neither is to be had.
    """
    from huggingface_hub import HfApi, hf_hub_download

    try:
        info = HfApi().model_info(repo_id, revision=revision)
    except Exception as error:  # the hub client raises its own, its HTTP library's and the system's errors
        cached = _cached_repository(repo_id, revision)
        if cached is None:
            where = f"VAE {repo_id!r} is no local folder and cannot be had from the model hub"
            raise VAENotFoundError(f"{where} ({one_line(error)}); {_LOCAL_HINT}") from error
        return cached

    def get(name: str) -> Path:
        try:
            path = Path(hf_hub_download(repo_id, name, revision=revision))  # by the revision asked for, so that the cache knows it offline
        except Exception as error:  # as above
            raise VAEError(f"{name} of VAE {repo_id!r} cannot be had from the model hub ({one_line(error)})") from error
        if info.sha not in path.parts:
            raise VAEError(f"the repository {repo_id} changed while it was being read; give the same command again")
        return path

    names = frozenset(sibling.rfilename for sibling in info.siblings or [])
    return VAEFiles(title=f"the repository {repo_id}", names=names, get=get, revision=info.sha)


def _cached_repository(repo_id: str, revision: str | None) -> VAEFiles | None:
    from huggingface_hub import try_to_load_from_cache

    for place in _PLACES:
        try:
            config = try_to_load_from_cache(repo_id, place + _CONFIG, revision=revision)
        except ValueError:  # no name of a repository
            return None
        if isinstance(config, str):
            return _snapshot(Path(config).parents[place.count("/")], repo_id)
    return None


def _snapshot(folder: Path, repo_id: str) -> VAEFiles:
    names = frozenset(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return VAEFiles(title=f"the cached repository {repo_id}", names=names, get=lambda name: folder / name, revision=folder.name)


def load_network(files: VAEFiles) -> tuple[nn.Module, dict[str, Any]]:
    """The autoencoder with its weights in float32, and its config.json; nothing else is fetched than what these are made of.

    Raises:
        VAEError: there is no autoencoder, no weights but pickled ones, or weights that are not exactly those of the network.
    """
    place, config, network_class = _find_autoencoder(files)
    weights, variant = _find_weights(files, place, network_class.__name__)
    path = files.get(weights)
    shards = _read_index(path, files, place) if weights.endswith(".json") else {}
    folder = files.get(place + _CONFIG).parent
    for name in sorted(set(shards.values())):
        files.get(place + name)
    try:
        _check_shards(folder, shards)
        with _quiet():
            network, info = network_class.from_pretrained(
                folder,
                variant=variant,
                torch_dtype=torch.float32,
                use_safetensors=True,
                local_files_only=True,
                low_cpu_mem_usage=False,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are in the info, by name
            )
    except VAEError:
        raise
    except Exception as error:  # diffusers raises OSError, ValueError, RuntimeError and safetensors' own for a damaged folder
        raise VAEError(f"the VAE in {files.title} cannot be loaded: {one_line(error)}") from error
    unexpected = [name for name in info["unexpected_keys"] if not name.startswith(_OF_TRAINING)]
    _refuse(files.title, weights, explain_weights(missing=info["missing_keys"], unexpected=unexpected, mismatched=info["mismatched_keys"]))
    return network, config


def _find_autoencoder(files: VAEFiles) -> tuple[str, dict[str, Any], Any]:
    """Place, configuration and class: at the top or in vae/, that of a pipeline first; whichever names an autoencoder."""
    places = [place for place in _PLACES if place + _CONFIG in files.names]
    if _PIPELINE in files.names:
        places.reverse()
    if not places:
        found = ", ".join(sorted(files.names)[:5]) or "nothing"
        raise VAEError(f"{files.title} is no VAE in diffusers' format: it needs config.json or vae/config.json, and holds {found}")
    faults = []
    for place in places:
        try:
            return place, *_read_config(files, place)
        except VAEError as error:
            faults.append(error)
    raise faults[0]


def _read_config(files: VAEFiles, place: str) -> tuple[dict[str, Any], Any]:
    import diffusers

    where = f"{place}{_CONFIG} of {files.title}"
    path = files.get(place + _CONFIG)
    try:
        config = json.loads(path.read_text())
        class_name = str(config.get("_class_name", ""))
    except (OSError, ValueError, AttributeError) as error:
        raise VAEError(f"{files.title} is no VAE in diffusers' format: its {place}{_CONFIG} cannot be read ({one_line(error)})") from error
    network_class = getattr(diffusers, class_name, None) if class_name.isidentifier() else None
    if not _has(network_class, "from_pretrained"):
        raise VAEError(f"{where} names the class {class_name!r}, which diffusers {diffusers.__version__} does not have; upgrade diffusers")
    if not (_has(network_class, "encode") and _has(network_class, "decode")):
        raise VAEError(f"{where} names the class {class_name}, which has no encode and decode; --vae takes an autoencoder")
    return config, network_class


def _has(network_class: Any, name: str) -> bool:
    try:
        return callable(getattr(network_class, name, None))
    except ImportError:  # diffusers' stand-in for a class whose library is not installed
        return False


def _find_weights(files: VAEFiles, place: str, class_name: str) -> tuple[str, str | None]:
    """Name of the weights, or of the index of their shards, and which variant they are; as diffusers chooses where there are several."""
    for variant in _VARIANTS:
        infix = f".{variant}" if variant else ""
        for name in (f"{_WEIGHTS}.safetensors.index{infix}.json", f"{_WEIGHTS}{infix}.safetensors"):
            if place + name in files.names:
                return place + name, variant
    beside = sorted(name.removeprefix(place) for name in files.names if name.startswith(place) and "/" not in name.removeprefix(place))
    if pickled := [name for name in beside if name.endswith(_PICKLED)]:
        raise VAEError(
            f"the VAE in {files.title} has its weights only as {pickled[0]}: revq never unpickles weights, which can run any code. If you trust "
            f"them, convert once: diffusers.{class_name}.from_pretrained(FOLDER, use_safetensors=False).save_pretrained(NEW), and pass --vae NEW"
        )
    found = ", ".join(beside[:5])
    raise VAEError(f"the VAE in {files.title} has no weights: expected {place}{_WEIGHTS}.safetensors or its shards and their index, found {found}")


def _read_index(path: Path, files: VAEFiles, place: str) -> dict[str, str]:
    """The file of each tensor."""
    try:
        shards = {str(name): str(file) for name, file in json.loads(path.read_text())["weight_map"].items()}
    except (OSError, ValueError, LookupError, AttributeError, TypeError) as error:
        raise VAEError(f"{path.name} of {files.title} is no index of shards ({one_line(error)}); fetch it again") from error
    lacking = sorted({file for file in shards.values() if place + file not in files.names})
    if lacking or not shards:
        raise VAEError(f"{files.title} lacks {', '.join(lacking) or 'every shard'}, which {path.name} names; fetch the VAE again")
    return shards


def _check_shards(folder: Path, shards: dict[str, str]) -> None:
    """diffusers believes the index: what a shard lacks would get values made up."""
    from safetensors import safe_open

    found: set[tuple[str, str]] = set()
    for file in set(shards.values()):
        with safe_open(folder / file, framework="pt") as content:
            found |= {(name, file) for name in content.keys()}  # noqa: SIM118 (it is no mapping)
    named = set(shards.items())
    _refuse(
        str(folder),
        "its index of shards",
        explain_weights(missing=[name for name, _ in named - found], unexpected=[name for name, _ in found - named], mismatched=()),
    )


def _refuse(title: str, weights: str, faults: str) -> None:
    if faults:
        raise VAEError(f"the VAE in {title} is not all there, by {weights}: {faults}; fetch it again, or make config.json and weights of one version")


@contextmanager
def _quiet() -> Iterator[None]:
    """diffusers tells what is wrong with weights in many lines of its log; here it is told in one, as an error."""
    from diffusers.utils import logging as diffusers_logging

    logger, bars = logging.getLogger("diffusers.models.modeling_utils"), diffusers_logging.is_progress_bar_enabled()
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    diffusers_logging.disable_progress_bar()
    try:
        yield
    finally:
        logger.setLevel(level)
        if bars:
            diffusers_logging.enable_progress_bar()
