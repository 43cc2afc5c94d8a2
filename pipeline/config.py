"""One TOML file for all stages. Every stage has a table with the names of its options; `out` at the top says where everything goes.

    out = "runs/first"

    [encode-latents]
    train = "imagenet/train"
    val = "imagenet/val"        # optional
    image_size = 256

    [fit-codebooks]
    tokens = 512

What a file does not say is the stage's own default. Paths are relative to the folder where revq is started, as on the command line.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from ..errors import ConfigError, ConfigNotFoundError
from ..files import local_path
from ..stages.configs import EncodeLatentsConfig, EvaluateConfig, FitCodebooksConfig, StageConfig, TrainRectifierConfig, describe

TABLES: dict[str, type[StageConfig]] = {
    "encode-latents": EncodeLatentsConfig,
    "fit-codebooks": FitCodebooksConfig,
    "train-rectifier": TrainRectifierConfig,
    "evaluate": EvaluateConfig,
}
# These follow from `out`, or would make a run start anew each time.
_SET_BY_RUN = {"store", "codebooks", "out", "tokenizer", "split", "val_split", "overwrite", "dry_run"}
_FOLDERS = ("train", "val")
_TYPE_NAMES = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The configs of all stages of one run, checked, before anything is done."""

    out: Path
    """Folder of the whole run."""
    encode_train: EncodeLatentsConfig
    encode_val: EncodeLatentsConfig | None
    """None: no validation images, so train-rectifier holds out some of the training images."""
    fit: FitCodebooksConfig
    train: TrainRectifierConfig
    evaluate: EvaluateConfig


def load_plan(
    config: str | Path | None = None,
    *,
    preset: str | None = None,
    images: str | None = None,
    val_images: str | None = None,
    out: str | None = None,
    vae: str | None = None,
) -> Plan:
    """Read a TOML file or a preset, put what the command line says over it, and check it all.

    Raises:
        ConfigError: not exactly one of `config` and `preset`; no such file or preset; no TOML; an unknown key; a value of the wrong type
            or out of range; no images or no `out`.
    """
    if (config is None) == (preset is None):
        raise ConfigError("give either a CONFIG.toml or --preset " + "|".join(preset_names()) + ", and not both")
    text, origin = _read_preset(preset) if preset is not None else _read_file(local_path(str(config)))
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{origin} is not valid TOML: {error}") from error
    tables = _check(document, origin)
    encode = {**tables["encode-latents"], **_given(train=images, val=val_images, vae=vae)}
    return _plan(out or document.get("out"), {**tables, "encode-latents": encode}, origin)


def preset_names() -> list[str]:
    """The presets that come with revq."""
    return sorted(entry.name.removesuffix(".toml") for entry in files(__package__).joinpath("presets").iterdir() if entry.name.endswith(".toml"))


def _read_preset(name: str) -> tuple[str, str]:
    if name not in preset_names():
        raise ConfigError(f"there is no preset {name!r}; there are {', '.join(preset_names())}")
    return files(__package__).joinpath("presets", f"{name}.toml").read_text(encoding="utf-8"), f"preset {name}"


def _read_file(path: Path) -> tuple[str, str]:
    try:
        return path.read_text(encoding="utf-8"), str(path)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text in UTF-8"
        kind = ConfigNotFoundError if isinstance(error, FileNotFoundError) else ConfigError
        raise kind(f"configuration {path} cannot be read ({reason}); give the path of a TOML file") from error


def _given(**values: str | None) -> dict[str, str]:
    return {name: value for name, value in values.items() if value is not None}


def _check(document: Mapping[str, Any], origin: str) -> dict[str, dict[str, Any]]:
    """Every table's settings by field name, keys and types checked; a table that is not there is empty."""
    for key, value in document.items():
        if key == "out":
            _check_type(key, value, str, origin)
        elif key not in TABLES:
            _unknown(key, [*TABLES, "out"], origin)
        elif not isinstance(value, dict):
            raise ConfigError(f"{origin}: {key} must be a table: write [{key}]")
    return {name: _check_table(name, document.get(name, {}), origin) for name in TABLES}


def _check_table(name: str, table: Mapping[str, Any], origin: str) -> dict[str, Any]:
    described = {one.name: one for one in describe(TABLES[name])}
    known = {name: one.kind for name, one in described.items() if name not in _SET_BY_RUN}
    if name == "encode-latents":
        del known["images"]
        known = {**dict.fromkeys(_FOLDERS, str), **known}
    where = f"{origin}, table [{name}]"
    settings: dict[str, Any] = {}
    for key, value in table.items():
        field = key.replace("-", "_")
        if field not in known:
            _unknown(key, known, where)
        if field in settings:
            raise ConfigError(f"{where}: {field} is given twice, with - and with _")
        settings[field] = _check_type(key, value, known[field], where)
    for one in described.values():
        if one.setting and one.name in settings and one.setting.excludes in settings:
            raise ConfigError(f"{where}: {one.setting.excludes} and {one.name} exclude each other; give one of the two")
    return settings


def _check_type(key: str, value: Any, kind: type, where: str) -> Any:
    """`value`, a whole number made a float where a float is due."""
    if type(value) is kind:
        return value
    if type(value) is int and kind is float:
        return float(value)
    raise ConfigError(f"{where}: {key} must be {_TYPE_NAMES[kind]}, not {value!r}")


def _unknown(key: str, known: Mapping[str, Any] | list[str], where: str) -> None:
    nearest = difflib.get_close_matches(key.replace("-", "_"), [name.replace("-", "_") for name in known], n=1, cutoff=0.4)
    by_field = {name.replace("-", "_"): name for name in known}
    hint = f"did you mean {by_field[nearest[0]]}?" if nearest else f"it knows {', '.join(known)}"
    if key.replace("-", "_") in _SET_BY_RUN:
        hint = "a run sets it by itself"
    raise ConfigError(f"{where}: unknown key {key!r}; {hint}")


def _plan(out: str | None, tables: Mapping[str, Mapping[str, Any]], origin: str) -> Plan:
    encode = dict(tables["encode-latents"])
    train_images, val_images = encode.pop("train", None), encode.pop("val", None)
    evaluate = {**({"images": val_images} if val_images else {}), **tables["evaluate"]}
    if not out:
        raise ConfigError(f'{origin} does not say where to write: set out = "runs/mine" or pass --out')
    if not train_images:
        raise ConfigError(f"{origin} names no training images: set train in [encode-latents] or pass --images")
    if not evaluate.get("images"):
        raise ConfigError(f"{origin} names no images to evaluate on: set val in [encode-latents], images in [evaluate], or pass --val-images")
    root = local_path(out)
    store, codebooks, run = str(root / "latents.zarr"), str(root / "codebooks"), str(root / "rectifier")
    return Plan(
        out=root,
        encode_train=EncodeLatentsConfig(images=train_images, store=store, split="train", **encode),
        encode_val=EncodeLatentsConfig(images=val_images, store=store, split="val", **{**encode, "views": 1}) if val_images else None,
        fit=FitCodebooksConfig(store=store, out=codebooks, **tables["fit-codebooks"]),
        train=TrainRectifierConfig(store=store, codebooks=codebooks, out=run, **tables["train-rectifier"]),
        evaluate=EvaluateConfig(tokenizer=run, out=str(root / "evaluation"), **evaluate),
    )
