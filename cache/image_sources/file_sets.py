"""Whether files are the numbered parts of one set, by their names: folders of shards often hold train and validation side by side.

Read as the parts of one set, whatever separates the pieces (`-`, `_`, `.`): `train-00000-of-00002.parquet`, `train_0000_of_0002.tar`, `0000.tar`;
with a tag, as the hub has it for each file (`train-00000-of-00002-566cc9b19d7203f8.parquet`) and Spark for each job
(`part-00000-UUID-c000.snappy.parquet`, on Databricks `part-00000-tid-NUMBER-UUID-1-1-c000.snappy.parquet`); and Hive's `000000_0.parquet`.

Of other names nobody knows whether they are parts of one set: each is then a set of one file, and the message says how to name them all.
"""

from __future__ import annotations

import glob
import os
import re
import shlex
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ...errors import ImageError, ImageNotFoundError
from ..places import Place
from .patterns import expand

_UUID = r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"
_PART = re.compile(
    rf"(?P<head>(?P<set>.*?)[-_.]?)(?P<number>\d+)(?P<of>[-_.]?of[-_.]?(?P<count>\d+))?"
    rf"(?P<tag>[-_.](?:(?:tid-\d+-)?{_UUID}|[0-9a-f]{{16,64}}))?(?P<piece>(?:_\d{{5}}|-\d+-\d+)?[-_.]c\d{{3,}}|(?<=^\d{{6}})_\d+)?"
    r"(?P<end>(?:\.(?:snappy|gz|gzip|zstd|lz4|lz4raw|lz4_raw|br|brotli|lzo|none|uncompressed))?\.(?:tar|parquet))",
    re.IGNORECASE,
)
_SHOWN = 4
_BRACED = 8  # files that are named one by one in an advice


@dataclass(frozen=True)
class _Part:
    place: Place
    head: str
    """Of the name, up to the number."""
    set: str
    number: str = ""
    of: str = ""
    """ "-of-00002"."""
    count: int | None = None
    tag: str = ""
    """ "-566cc9b19d7203f8"."""
    piece: str = ""
    """ "-c000", of what one task of Spark wrote; "_0", an attempt of Hive's."""
    end: str = ""
    """ ".snappy.parquet"."""


def check_one_set(name: str, places: Sequence[Place]) -> None:
    """Files of a folder or glob must be the numbered parts of one set.

    Raises:
        ImageError: there are several sets, or one that was written twice; or the names say how many parts there are, and one is missing.
    """
    groups: dict[tuple[str, ...], list[_Part]] = defaultdict(list)
    for part in map(_parse, places):
        groups[part.set, os.path.dirname(part.place.path), part.of, "numbered" * bool(part.number)].append(part)
    sets = [parts for group in groups.values() for parts in _by_tag(group)]
    if len({parts[0].set for parts in sets}) > 1 or len({os.path.dirname(parts[0].place.path) for parts in sets}) < len(sets):
        told = sorted({_describe(parts) for parts in sets})
        shown = ", ".join(told[:_SHOWN]) + (", ..." if len(told) > _SHOWN else "")
        whole = glob_for(places) if all(len(parts) == 1 for parts in sets) else ""
        together = "" if whole == "" else f"; where together they are one set, name each in braces{whole and f': {whole}'}"
        raise ImageError(f"{name} holds several sets of files ({shown}){together}; {_advise(min(sets, key=_describe))}")
    for parts in sets:
        _check_numbers(name, parts)


def glob_for(places: Sequence[Place], *globs: str) -> str | None:
    """A pattern, quoted for a shell, that takes exactly these files of one folder: their own path, the first of `globs` that does, or braces."""
    if len(places) == 1:
        return shlex.quote(str(places[0]))
    folder = os.path.dirname(places[0].path)
    escaped = glob.escape(folder) if places[0].filesystem is None else folder
    braces = ["{" + ",".join(place.base for place in places) + "}"] if len(places) <= _BRACED else []
    for pattern in (*globs, *braces):
        spec = str(places[0].at(os.path.join(escaped, pattern)))
        try:
            if [place.path for place in expand(spec)] == sorted(place.path for place in places):
                return shlex.quote(spec)
        except (ImageError, OSError):
            continue
    return None


def _parse(place: Place) -> _Part:
    match = _PART.fullmatch(place.base)
    if match is None:
        stem, end = os.path.splitext(place.base)
        return _Part(place, stem, stem, end=end)
    fields = {field: match[field] or "" for field in ("head", "set", "number", "of", "tag", "piece", "end")}
    return _Part(place, count=int(match["count"]) if match["count"] else None, **fields)


def _by_tag(parts: Sequence[_Part]) -> Iterator[list[_Part]]:
    """One tag is of one job, as Spark has it, or there is another for every file, as the hub has it."""
    uses = Counter(part.tag for part in parts)
    groups: dict[str | None, list[_Part]] = defaultdict(list)
    for part in parts:
        groups[part.tag if uses[part.tag] > 1 or not part.tag else None].append(part)
    own = groups.pop(None, [])
    yield from groups.values()
    if len({part.number for part in own}) == 1:  # train-00000-of-00001-HASH twice: each is a whole set
        yield from ([part] for part in own)
    elif own:
        yield own


def _describe(parts: Sequence[_Part]) -> str:
    """ "train", "train-of-00002", "part-UUID"."""
    told = parts[0].set + parts[0].of + _shared_tag(parts) if parts[0].number else ""
    return told or parts[0].place.base


def _shared_tag(parts: Sequence[_Part]) -> str:
    return parts[0].tag if len({part.tag for part in parts}) == 1 else ""


def _advise(parts: Sequence[_Part]) -> str:
    first, tag = parts[0], _shared_tag(parts)
    digits = "?" * len(first.number)
    rests = [f"{first.of}{tag}*{first.end}", f"{first.of}{tag}{first.end}"]
    found = glob_for([part.place for part in parts], *(first.head + number + rest for number in ("*", "[0-9]*", digits) for rest in rests))
    return f"give one of them, such as {found}" if found else "move one of them to a folder of its own"


def _check_numbers(name: str, parts: Sequence[_Part]) -> None:
    """Raises ImageError where a part is there twice, or is missing."""
    there: dict[tuple[int, str], _Part] = {}
    for part in parts:
        if not part.number:
            continue
        same = there.setdefault((int(part.number), part.piece), part)
        if same is not part:
            raise ImageError(f"{name} holds part {part.number} twice ({same.place.base}, {part.place.base}); keep the files of one upload")
    first, count = parts[0], parts[0].count
    if count is None:
        return
    numbers = {number for number, _ in there}
    start = 1 if count in numbers and 0 not in numbers else 0
    missing = [number for number in range(start, start + count) if number not in numbers]
    if missing:
        lost = f"{first.head}{missing[0]:0{len(first.number)}d}{first.of}{first.tag and first.tag[0] + '*'}{first.end}"
        raise ImageNotFoundError(
            f"{len(missing)} of the {count} parts of {name} are not there, the first is {lost}; fetch them, or name in braces those that you want"
        )
