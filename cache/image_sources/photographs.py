"""The embedded photographs: colour photographs inside scikit-image's wheel, cut into square views by a fixed rule.

They let the whole pipeline run offline on real images. Whole photographs are held out, so that no pixel of a held-out view is seen
in training: a view's neighbours overlap it, but they are all of the same photograph. `motorcycle_right` shows the scene of
`motorcycle_left` from another angle, and is left out altogether. Drawings and test patterns in the wheel are no photographs.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from PIL import Image

from ...errors import ImageError
from .items import ImageItem
from .skipped import Skipped

TRAIN_FILES = ("astronaut.png", "hubble_deep_field.jpg", "ihc.png", "motorcycle_left.png", "retina.jpg", "rocket.jpg")
HELD_OUT_FILES = ("chelsea.png", "coffee.png")
_PREFIX = "photographs:"
VIEW_SIDES_PX = (128, 192, 256, 384)
_POSITIONS = 8  # at most, on each axis: big photographs of stars and of a retina would else outnumber the ordinary ones


class PhotographSource:
    """The square views of one part of the photographs; a label is the number of the photograph among all of them."""

    notes: tuple[str, ...] = ()

    def __init__(self, part: str) -> None:
        """List the views of `part`, "train" or "held-out".

        Raises:
            ImageError: there is no such part, or scikit-image does not hold the photographs.
        """
        files = {"train": TRAIN_FILES, "held-out": HELD_OUT_FILES}.get(part)
        if files is None:
            raise ImageError(f'the embedded photographs have the parts "train" and "held-out", not "{part}"')
        self.name = _PREFIX + part
        self.skipped = Skipped()
        self._paths: list[Path] = []
        self._items: list[ImageItem] = []
        names = sorted(TRAIN_FILES + HELD_OUT_FILES)
        for file in files:
            path = _photograph(file)
            with Image.open(path) as image:
                boxes = view_boxes(*image.size)
            self._paths += [path] * len(boxes)
            self._items += [ImageItem(_key(path.stem, box), names.index(file), path.stem, box) for box in boxes]

    @property
    def items(self) -> Sequence[ImageItem]:
        return self._items

    def read(self, index: int) -> bytes:
        return _file_bytes(self._paths[index])


def view_boxes(width: int, height: int) -> list[tuple[int, int, int, int]]:
    """The square views of a width x height photograph: (left, top, right, bottom) by side, then row, then column.

    Every side of `VIEW_SIDES_PX` that fits is taken on a grid that reaches from edge to edge, with steps of a quarter of the side or more.
    """
    boxes = []
    for side in VIEW_SIDES_PX:
        if side > min(width, height):
            continue
        for top in _positions(height, side):
            boxes += [(left, top, left + side, top + side) for left in _positions(width, side)]
    return boxes


def _positions(length: int, side: int) -> list[int]:
    room = length - side
    count = min(_POSITIONS, 1 + room // (side // 4))
    return [room * step // max(count - 1, 1) for step in range(count)]


def _key(photograph: str, box: tuple[int, int, int, int]) -> str:
    return f"{photograph}/{box[2] - box[0]:04d}-{box[0]:04d}-{box[1]:04d}"


def _photograph(file: str) -> Path:
    spec = importlib.util.find_spec("skimage")  # not imported: scikit-image takes a second to start, and only its files are wanted
    path = Path(spec.origin).parent / "data" / file if spec and spec.origin else None
    if path is None or not path.is_file():
        raise ImageError(f"photograph {file} is not in the installed scikit-image; reinstall it: pip install --force-reinstall scikit-image")
    return path


@lru_cache(maxsize=len(TRAIN_FILES) + len(HELD_OUT_FILES))
def _file_bytes(path: Path) -> bytes:
    """Read once, 3 MB in all: the many views of a photograph then share one object, by which `images` finds the decoded picture again."""
    return path.read_bytes()
