"""Labels of ImageNet's validation images, which lie in a tar without classes, from `ILSVRC2012_devkit_t12.tar.gz`.

The devkit numbers its classes in its own way; a label here is the position of the class's WordNet id among the 1000 sorted ones, which is
what class folders give, and torchvision's `ImageNet`.
"""

from __future__ import annotations

import io
import re
import tarfile
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from ...errors import ImageError
from ..places import Place

DEVKIT_NAME = "ILSVRC2012_devkit_t12.tar.gz"
_VAL_NAME = re.compile(rb"ILSVRC2012_val_(\d{8})\.JPEG")


def is_val_name(name: bytes) -> bool:
    """Whether `name` is that of an image of ImageNet's validation tar."""
    return _VAL_NAME.fullmatch(name) is not None


def val_labels(devkit: Place, names: Iterable[bytes]) -> tuple[NDArray[np.int32], list[str]]:
    """Labels (N) of validation images by their names, and the WordNet ids in the order of the labels.

    Raises:
        ImageError: the devkit is damaged, or has no truth for one of the images.
    """
    try:
        truth, wnid_of = _read_devkit(devkit.read())
    except Exception as error:  # scipy's reader of .mat raises nearly anything on damaged files
        if isinstance(error, ImageError):
            raise
        raise ImageError(f"{devkit} cannot be read ({type(error).__name__}: {error}); fetch it again, or move it away to have no labels") from error
    wnids = sorted(wnid_of.values())
    label_of_id = {number: wnids.index(wnid) for number, wnid in wnid_of.items()}
    numbers = [int(match[1]) for name in names if (match := _VAL_NAME.fullmatch(name))]
    if max(numbers) > len(truth) or min(numbers) < 1:
        raise ImageError(f"{devkit} knows the classes of {len(truth)} validation images, and the tar holds number {max(numbers)}; fetch both again")
    return np.array([label_of_id[truth[number - 1]] for number in numbers], np.int32), wnids


def _read_devkit(data: bytes) -> tuple[list[int], dict[int, str]]:
    """The class id of each validation image, and the WordNet id of each class id."""
    from scipy.io import loadmat  # slow to import, and seldom needed

    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        files = {name.rpartition("/")[2]: name for name in archive.getnames()}
        truth_file = archive.extractfile(files["ILSVRC2012_validation_ground_truth.txt"])
        meta_file = archive.extractfile(files["meta.mat"])
        assert truth_file is not None
        assert meta_file is not None
        truth = [int(line) for line in truth_file.read().split()]
        synsets = loadmat(io.BytesIO(meta_file.read()), squeeze_me=True)["synsets"]
    leaves = [synset for synset in np.atleast_1d(synsets) if synset["num_children"] == 0]  # the others are groups of classes
    return truth, {int(synset["ILSVRC2012_ID"]): str(synset["WNID"]) for synset in leaves}
