"""The latent store: one Zarr v3 group, local or in an object store, a sub-group for each split, and how to read it.

    STORE/zarr.json               group; attributes: the encoding (VAE, image size, filter, crop, shape, dtype) and its fingerprint
    STORE/<split>/zarr.json       group; attributes: images, views, seed, source, classes, package versions, checksums, whether it is complete
    STORE/<split>/latents         (N,C,H,W) raw VAE latents, sharded, with crc32c; a failed image's rows hold zeros
    STORE/<split>/label, ok       (N,) int32, bool
    STORE/<split>/mean, variance  (C,H,W) float64 over the rows that are ok
    STORE/manifest/<split>.parquet   where each row comes from
    STORE/progress/<split>/       finished shards of a split in the making; gone once it is complete
    STORE/writer.lock             who writes, while somebody does

Row of view v of image i is i * views + v, whatever failed. Writing is in `writer.py`. No byte of it all is without a checksum: latents and
arrays have crc32c, attributes are sealed, and a split's attributes hold the SHA-256 of every other file.

Shapes: N rows = images * views; C,H,W latent channels, rows, columns.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import zarr
from numpy.typing import NDArray

from ..errors import StoreError, StoreNotFoundError, one_line
from ..files import is_sealed, parse_json, sha256_json
from ..lock import naming_writer
from .manifest import parse_manifest
from .store_folder import StoreFolder, open_folder

STORE_KIND = "revq-latents"
SPLIT_KIND = "revq-latent-split"
FORMAT_VERSION = 2
RESERVED_NAMES = frozenset({"manifest", "progress"})


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """How images became latents: what two splits of a store, and everything fitted on it, must have in common."""

    vae: Mapping[str, Any]
    """id, class_name, revision, config_sha256, weights_sha256 and fingerprint of the VAE."""
    image_size: int
    """Side of the encoded images in pixels."""
    latent_shape: tuple[int, int, int]
    """(C,H,W)."""
    dtype: str = "float16"
    """"float16" or "float32": how the latents are kept."""
    resize_filter: str = "bilinear-antialias"
    crop: str = "centre"

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits over all that shapes the values; not over the VAE's name or place, nor over the dtype."""
        return sha256_json([self.vae["fingerprint"], self.image_size, self.resize_filter, self.crop, list(self.latent_shape)])[:16]

    def attributes(self) -> dict[str, Any]:
        """JSON values, as the store keeps them."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {**values, "vae": dict(self.vae), "latent_shape": list(self.latent_shape)}

    @classmethod
    def from_attributes(cls, attributes: Mapping[str, Any]) -> Encoding:
        """The inverse of `attributes`; other keys are ignored. Raises KeyError where one is missing."""
        values = {field.name: attributes[field.name] for field in fields(cls)}
        return cls(**{**values, "latent_shape": tuple(values["latent_shape"])})

    def differences(self, other: Encoding) -> str:
        """What differs, as "image_size: 64 there, 128 asked" with self as there; empty where nothing does."""
        there, asked = self.attributes(), other.attributes()
        there |= {"vae": f"{self.vae['id']} ({self.vae['fingerprint']})", "latent_shape": self.latent_shape}
        asked |= {"vae": f"{other.vae['id']} ({other.vae['fingerprint']})", "latent_shape": other.latent_shape}
        if self.vae["fingerprint"] == other.vae["fingerprint"]:
            asked["vae"] = there["vae"]
        return "; ".join(f"{name}: {there[name]} there, {asked[name]} asked" for name in there if there[name] != asked[name])


class LatentSplit:
    """One complete split of a store, read lazily. Made by `LatentStore.open(path)[name]`."""

    def __init__(self, folder: StoreFolder, name: str, encoding: Encoding, attributes: Mapping[str, Any]) -> None:
        self.name = name
        self.encoding = encoding
        self.attributes = dict(attributes)
        self._folder = folder

    def __len__(self) -> int:
        """N: rows, those of failed images included."""
        return int(self.attributes["rows"])

    @property
    def images(self) -> int:
        return int(self.attributes["images"])

    @property
    def views(self) -> int:
        """Rows of each image."""
        return int(self.attributes["views"])

    @property
    def seed(self) -> int:
        return int(self.attributes["seed"])

    @property
    def failed(self) -> int:
        """Images that could not be read."""
        return int(self.attributes["failed"])

    @property
    def shard_rows(self) -> int:
        """Rows of one file of `latents`: the largest slice that is read at once without waste."""
        return int(self.attributes["shard_rows"])

    @cached_property
    def latents(self) -> zarr.Array:
        """(N,C,H,W) raw latents on disk; index it like an array: `latents[:4]` reads four."""
        return self._array("latents")

    @cached_property
    def labels(self) -> NDArray[np.int32]:
        """(N,) int32, -1 for images without a class."""
        return self._read_small("label")

    @cached_property
    def ok(self) -> NDArray[np.bool_]:
        """(N,) bool, False for rows of images that could not be read; their latents are zeros."""
        return self._read_small("ok")

    @cached_property
    def mean(self) -> NDArray[np.float64]:
        """(C,H,W) mean over the ok rows."""
        return self._read_small("mean")

    @cached_property
    def variance(self) -> NDArray[np.float64]:
        """(C,H,W) population variance over the ok rows."""
        return self._read_small("variance")

    @property
    def data_digest(self) -> str:
        """16 hexadecimal digits over the latents and how many are views of one image; the store's fingerprint is of the encoding alone."""
        return sha256_json([self.views, self.attributes["shard_sha256"]])[:16]

    @property
    def image_of_row(self) -> NDArray[np.int64]:
        """(N,) position in the source of the image that each row shows."""
        return np.arange(len(self), dtype=np.int64) // self.views

    def manifest(self) -> pa.Table:
        """One Arrow row for each row: see `revq.cache.manifest.SCHEMA`. Raises StoreError where it is damaged."""
        return parse_manifest(self.read_file(manifest_key(self.name)))

    def reading(self) -> AbstractContextManager[None]:
        """A StoreError in the block says who is writing the store, where somebody is."""
        return naming_writer(self._folder.name, self._folder.writer)

    def read_file(self, key: str) -> bytes:
        """A file of this split that its attributes hold the SHA-256 of, checked; `key` is its path in the store.

        Raises:
            StoreError: it is missing or damaged.
        """
        data = self._folder.read(key)
        if data is None or hashlib.sha256(data).hexdigest() != self.attributes["files_sha256"].get(key):
            state = "missing" if data is None else "not what was written"
            with self.reading():
                raise StoreError(f'split "{self.name}" of {self._folder.name} is damaged: {key} is {state}; encode it again with --overwrite')
        return data

    def _array(self, name: str) -> zarr.Array:
        self.read_file(f"{self.name}/{name}/zarr.json")
        return zarr.open_array(self._folder.zarr_store(f"{self.name}/{name}"), mode="r", zarr_format=3)

    def _read_small(self, name: str) -> NDArray[Any]:
        """An array of one chunk."""
        array = self._array(name)
        try:
            return np.asarray(array[...])
        except Exception as error:  # a failed checksum is a ValueError, a cut file a RuntimeError, and Zstd has its own
            reason = one_line(error)
            where = f'split "{self.name}" of {self._folder.name}'
            with self.reading():
                raise StoreError(f"{where} is damaged: its array {name} cannot be read ({reason}); encode it again with --overwrite") from error


class LatentStore:
    """A latent store opened for reading: `LatentStore.open("latents.zarr")["train"].latents[:4]`."""

    def __init__(self, folder: StoreFolder, encoding: Encoding) -> None:
        self.folder = folder
        self.encoding = encoding

    @classmethod
    def open(cls, path: str | Path) -> LatentStore:
        """Open the store at `path`, a folder or an fsspec URL such as s3://bucket/latents.zarr.

        Raises:
            StoreError: nothing is there (then it is a FileNotFoundError too), it is no latent store, or a newer revq wrote it.
            OutputError: the object store cannot be reached.
        """
        folder = open_folder(path)
        if not folder.exists():
            raise StoreNotFoundError(f"latent store {path} does not exist; make it with: revq encode-latents IMAGES {path}")
        with naming_writer(path, folder.writer):
            return cls(folder, Encoding.from_attributes(store_attributes(folder)))

    @property
    def path(self) -> str:
        """Path or URL."""
        return self.folder.name

    @property
    def fingerprint(self) -> str:
        """Of the encoding: 16 hexadecimal digits."""
        return self.encoding.fingerprint

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the complete splits, sorted."""
        return tuple(name for name, attributes in split_attributes(self.folder).items() if attributes["complete"])

    def __contains__(self, name: object) -> bool:
        return name in self.splits

    def __getitem__(self, name: str) -> LatentSplit:
        """The split of that name.

        Raises:
            StoreError: there is no such split, or its encoding has not finished.
        """
        with naming_writer(self.path, self.folder.writer):
            found = split_attributes(self.folder)
            if name not in found:
                there = ", ".join(name for name, each in found.items() if each["complete"]) or "no complete one"
                raise StoreError(f'latent store {self.path} has no split "{name}" (there: {there}); add it with encode-latents --split {name}')
            if not found[name]["complete"]:
                raise StoreError(f'split "{name}" of {self.path} is not finished; give the same encode-latents command again to finish it')
        return LatentSplit(self.folder, name, self.encoding, found[name])


def is_store(path: str | Path | StoreFolder) -> bool:
    """Whether a latent store is at `path`, of any version."""
    return (_parse_group(open_folder(path).read("zarr.json")) or {}).get("kind") == STORE_KIND


def store_attributes(folder: StoreFolder) -> dict[str, Any]:
    """The checked attributes of the store at `folder`.

    Raises:
        StoreError: it is no latent store, is damaged, or is one that this version cannot read.
    """
    attributes = _parse_group(folder.read("zarr.json"))
    if not attributes or attributes.get("kind") != STORE_KIND:
        raise StoreError(f"{folder.name} is no latent store (a Zarr group of kind {STORE_KIND}); give the STORE folder that encode-latents wrote")
    version = attributes.get("format_version")
    if version != FORMAT_VERSION:
        raise StoreError(f"latent store {folder.name} has format version {version}, this revq reads {FORMAT_VERSION}; upgrade revq, or encode again")
    if not is_sealed(attributes):
        raise StoreError(f"latent store {folder.name} is damaged: the attributes in its zarr.json do not fit their checksum; encode again")
    return attributes


def split_attributes(folder: StoreFolder, *, but: str | None = None) -> dict[str, dict[str, Any]]:
    """Attributes of every split of the store at `folder`, complete or not, by sorted name; `but` one that is to be replaced, damaged or not.

    Raises:
        StoreError: a split's attributes are damaged.
    """
    found = {}
    for name in folder.children():
        data = None if name in RESERVED_NAMES or name == but else folder.read(f"{name}/zarr.json")
        if data is None:
            continue
        attributes = _parse_group(data)
        if attributes is None or (not is_sealed(attributes) and ("sha256" in attributes or attributes.get("kind") == SPLIT_KIND)):
            mend = f"encode it again with --split {name} --overwrite"
            raise StoreError(f'split "{name}" of {folder.name} is damaged: {name}/zarr.json does not fit its checksum; {mend}')
        if attributes.get("kind") == SPLIT_KIND:
            found[name] = attributes
    return found


def manifest_key(split: str) -> str:
    """Where a split's manifest lies in the store."""
    return f"manifest/{split}.parquet"


def _parse_group(data: bytes | None) -> dict[str, Any] | None:
    """Attributes of the Zarr v3 group that a zarr.json describes; None where it describes none."""
    group = parse_json(data) or {}
    attributes = group.get("attributes")
    is_group = isinstance(attributes, dict) and group.get("node_type") == "group" and group.get("zarr_format") == 3
    return attributes if is_group else None
