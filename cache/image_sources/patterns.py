"""Patterns that name many files: `*`, `?`, `[...]`, and braces as a shell expands them, `train-{0000..1023}.tar`."""

from __future__ import annotations

import glob
import itertools
import os
import re
from concurrent.futures import ThreadPoolExecutor

from ...errors import ImageNotFoundError
from ..filesystem import is_url
from ..places import REMOTE_THREADS, Place, place_of

_GLOB = re.compile(r"[*?\[]")
_RANGE = re.compile(r"(-?\d+)\.\.(-?\d+)(?:\.\.([1-9]\d*))?")


def is_pattern(spec: str) -> bool:
    """Whether `spec` is a glob or has braces. A local path that exists is never a pattern."""
    if not is_url(spec) and os.path.lexists(os.path.expanduser(spec)):
        return False
    return has_glob(spec) or expand_braces(spec) != [spec]


def has_glob(spec: str) -> bool:
    """Whether there is `*`, `?` or `[` in it; in a web address these mean something else."""
    return bool(_GLOB.search(spec)) and not spec.startswith(("http://", "https://"))


def expand(pattern: str) -> list[Place]:
    """Sorted places of a glob, or of braces.

    Raises:
        ImageError: nothing matches, or one of the brace's names is not there.
    """
    names = expand_braces(pattern)
    with ThreadPoolExecutor(REMOTE_THREADS if is_url(pattern) else 1) as pool:
        found = dict(zip(names, pool.map(_matches, names), strict=True))
    missing = [name for name in names if not found[name]]
    if len(missing) == len(names):
        raise ImageNotFoundError(f"no file matches {pattern}; give the path of one that is there, or a glob or brace that matches")
    if missing:
        found_out = f"{len(missing)} of the {len(names)} files of {pattern} are not there, the first is {missing[0]}"
        raise ImageNotFoundError(f"{found_out}; find them or give fewer")
    return sorted({place for places in found.values() for place in places}, key=lambda place: place.path)


def expand_braces(pattern: str) -> list[str]:
    """Every name that a shell would make of `{a,b}` and `{0000..1023}`; a pattern without them is its own only name."""
    for match in re.finditer(r"\{([^{}]*)\}", pattern):
        numbers, before, after = _RANGE.fullmatch(match[1]), pattern[: match.start()], pattern[match.end() :]
        if numbers:
            choices = _count(numbers[1], numbers[2], int(numbers[3] or 1))
        elif "," in match[1]:
            choices = match[1].split(",")
        else:
            continue
        return list(itertools.chain.from_iterable(expand_braces(before + choice + after) for choice in choices))
    return [pattern]


def _count(first: str, last: str, step: int) -> list[str]:
    padded = any(len(text.lstrip("-")) > 1 and text.lstrip("-").startswith("0") for text in (first, last))
    width = max(len(first), len(last)) if padded else 0
    start, stop = int(first), int(last)
    numbers = range(start, stop + 1, step) if start <= stop else range(start, stop - 1, -step)
    return [f"{number:0{width}d}" for number in numbers]


def _matches(name: str) -> list[Place]:
    place = place_of(name)
    if not has_glob(name):
        return [place] if place.kind() else []
    if place.filesystem is None:
        _check_listable(place.path)
        return [Place(path) for path in glob.glob(place.path)]
    with place.asking():
        return [place.at(path) for path in place.filesystem.glob(place.path)]


def _check_listable(pattern: str) -> None:
    """Raises OSError where a folder that `pattern` looks into cannot be listed, which `glob` takes for an empty one."""
    folder = os.path.dirname(pattern) or "."
    if has_glob(folder):
        _check_listable(folder)
    for path in glob.glob(folder) if has_glob(folder) else [folder]:
        if os.path.isdir(path):
            os.scandir(path).close()
