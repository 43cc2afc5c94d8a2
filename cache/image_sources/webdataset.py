"""WebDataset shards: tars in which `KEY.jpg`, `KEY.cls` and `KEY.json` are one sample, KEY reaching to the first dot of the file name.

Shards come in the order of their paths, samples within a shard in the order of their keys; an item's key is `SHARD/MEMBER`. The image is the
member KEY.SUFFIX whose suffix is an image's (the first by name, where there are several). The label is the number in KEY.cls, or "label" or
"cls" in KEY.json, which may also hold a "class_name". A sample that has a label and no image is listed and recorded as unreadable; other
members are passed over and counted.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ...errors import ImageError, one_line
from ..places import Place, relative_names
from .folder import IMAGE_SUFFIXES
from .items import NO_LABEL, ItemColumns, printable
from .skipped import Skipped
from .tar_index import Member, TarWalk
from .tar_members import NO_IMAGE, TarSource, members_of, open_archive, sample_key, table_of, threads_for

_LABEL_BYTES = 1 << 24  # of a .json at most: it is held in memory


@dataclass(slots=True)
class _Sample:
    image: Member | None = None
    label: int = NO_LABEL
    class_name: str = ""
    labelled: bool = False
    """There is a .cls or a .json, with or without a label in it."""


@dataclass(frozen=True)
class _Shard:
    members: pa.Table
    labels: NDArray[np.int32]
    class_names: list[str]
    skipped: Skipped


def open_shards(name: str, places: Sequence[Place]) -> TarSource:
    """The samples of all shards, in the order given.

    Raises:
        ImageError: a shard cannot be read by offset (see `tar_index`), holds tars, has a label that is no number; or there is no image.
    """
    prefixes = relative_names(places)
    files = [open_archive(places[0])]

    def list_shard(number: int) -> _Shard:
        place = places[number]
        return _list_shard(TarWalk(open_archive(place), str(place)), number, os.fsencode(prefixes[number]))

    with ThreadPoolExecutor(threads_for(files[0])) as pool:
        shards = list(pool.map(list_shard, range(len(places))))
    members = pa.concat_tables([shard.members for shard in shards]).combine_chunks()
    offsets = members["offset"].to_numpy()
    if not (offsets >= 0).any():
        raise ImageError(f"{name} holds no image: expected members KEY.SUFFIX with one of {' '.join(sorted(IMAGE_SUFFIXES))}")
    labels = np.concatenate([shard.labels for shard in shards])
    numbers, names = _number([name for shard in shards for name in shard.class_names])
    items = ItemColumns(members["name"].combine_chunks(), labels, names, numbers)
    skipped = Skipped()
    for shard in shards:
        skipped.update(shard.skipped)
    return TarSource(
        name, places, members, items, skipped, _notes(name, len(labels), int((labels == NO_LABEL).sum()), int((offsets == NO_IMAGE).sum()))
    )


def _list_shard(walk: TarWalk, number: int, prefix: bytes) -> _Shard:
    samples: dict[bytes, _Sample] = {}
    skipped = Skipped()
    for member in members_of(walk, skipped):
        if member.kind == "folder":
            continue
        if member.name.endswith(b".tar"):
            raise ImageError(f"{walk.where} holds the tar {printable(member.name)}, so it is no WebDataset shard; give it alone, as one .tar")
        key = sample_key(member.name)
        kind = "." + member.name.rpartition(b"/")[2].partition(b".")[2].lower().decode("ascii", "replace")
        if kind in IMAGE_SUFFIXES:
            sample = samples.setdefault(key, _Sample())
            if sample.image is not None and sample.image.name != member.name:
                skipped.add("second image of its sample", max(sample.image.name, member.name))
            if sample.image is None or member.name <= sample.image.name:
                sample.image = member
        elif kind in {".cls", ".json"}:
            _read_label(samples.setdefault(key, _Sample()), kind, walk, member)
        else:
            skipped.add(kind if kind != "." else "no suffix", member.name)
    rows, order = [], sorted(samples)
    for key in order:
        image = samples[key].image or Member(key, NO_IMAGE, 0, 0, "file")
        rows.append((prefix + b"/" + image.name, number, image.offset, image.size, image.header_crc))
    labels = np.array([samples[key].label for key in order], np.int32)
    return _Shard(table_of(rows), labels, [samples[key].class_name for key in order], skipped)


def _read_label(sample: _Sample, kind: str, walk: TarWalk, member: Member) -> None:
    """Raises ImageError where the label cannot be understood."""
    where = f"{printable(member.name)} in {walk.where}"
    if member.size > _LABEL_BYTES:
        raise ImageError(f"{where} has {member.size} bytes, which is too long for a label")
    data = walk.read(member.offset, member.size)
    if kind == ".cls":
        try:
            sample.label = _checked(int(data))
        except (ValueError, OverflowError) as error:
            raise ImageError(f"{where} must hold the number of a class, not {printable(data[:40].strip())!r}; mend it, or leave .cls out") from error
        return
    try:
        fields = json.loads(data)
        fields = fields if isinstance(fields, dict) else {}
        label = next((fields[name] for name in ("label", "cls") if isinstance(fields.get(name), int)), None)
        if label is not None and sample.label == NO_LABEL:
            sample.label = _checked(label)
    except (ValueError, OverflowError, RecursionError) as error:
        raise ImageError(f"{where} cannot be understood ({type(error).__name__}: {one_line(error)}); mend it") from error
    if isinstance(fields.get("class_name"), str):
        sample.class_name = fields["class_name"]


def _checked(label: int) -> int:
    if not NO_LABEL <= label < 2**31:
        raise OverflowError(f"label {label} is outside -1 .. 2147483647")
    return label


def _number(class_names: Sequence[str]) -> tuple[NDArray[np.int32], list[str]]:
    """Positions (N) in the list of distinct names; -1 for an empty one."""
    distinct = sorted({*class_names} - {""})
    position = {name: i for i, name in enumerate(distinct)} | {"": -1}
    return np.array([position[name] for name in class_names], np.int32), distinct


def _notes(name: str, samples: int, unlabelled: int, missing: int) -> tuple[str, ...]:
    notes = []
    if unlabelled:
        notes.append(f"{unlabelled} of the {samples} samples of {name} have no label (KEY.cls, or label or cls in KEY.json)")
    if missing:
        notes.append(f"{missing} of the {samples} samples of {name} have a label and no image; they are recorded as unreadable")
    return tuple(notes)
