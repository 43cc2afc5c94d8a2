"""All that is in a folder of images, at any depth."""

from __future__ import annotations

import os
from collections.abc import Iterator

from ..filesystem import lists_at_once
from ..places import FILE, FOLDER, Place
from .skipped import LINK_AROUND, STORE, is_aside


def walk(root: Place) -> Iterator[tuple[str, str]]:
    """(path relative to `root`, kind) of each entry, with forward slashes; kinds are those of `Place.scan`, and STORE.

    Folders that never hold images are given and not looked into, nor are links to a folder around them (LINK_AROUND). Raises as `scan`.
    """
    if root.filesystem is None or not lists_at_once(root.filesystem):
        yield from _walk(root, "", (os.path.realpath(root.path),))
        return
    start = root.path.rstrip("/") + "/"
    with root.asking():
        found = [path.removeprefix(start) for path in root.filesystem.find(root.path)]
    stores = tuple(path.removesuffix("zarr.json") for path in found if path.endswith("/zarr.json"))
    folders = dict.fromkeys(path.partition("/")[0] for path in found if "/" in path)
    yield from ((folder, STORE if f"{folder}/" in stores else FOLDER) for folder in folders)
    yield from ((path, FILE) for path in found if not path.startswith(stores))


def _walk(root: Place, prefix: str, around: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """`around`: the real paths of the folders from the root to this one, by which a link that leads back is found."""
    folder = root.inside(prefix)
    entries = folder.scan()
    if prefix:
        store = ("zarr.json", FILE) in entries
        yield prefix, STORE if store else FOLDER
        if store:
            return
    for name, kind in entries:
        path = f"{prefix}/{name}" if prefix else name
        if kind != FOLDER or is_aside(os.fsencode(name)):
            yield path, kind
            continue
        real = os.path.realpath(folder.inside(name).path) if root.filesystem is None else path
        if real in around:
            yield path, LINK_AROUND
        else:
            yield from _walk(root, path, (*around, real))
