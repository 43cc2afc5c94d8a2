"""The same real photographs in every format that a source reads: made from a folder of class folders, with the original bytes."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from scipy.io import savemat

CLASSES, PER_CLASS = 5, 4


def class_folders(root: Path, imagenet_sample: Path, *, classes: int = CLASSES, per_class: int = PER_CLASS) -> Path:
    """`root` with photographs in class folders, from the smallest files of the sample."""
    smallest = sorted((imagenet_sample / "val").rglob("*.JPEG"), key=lambda path: (path.stat().st_size, path.name))[: classes * per_class]
    for i, path in enumerate(sorted(smallest)):
        folder = root / sorted(smallest)[i // per_class * per_class].parent.name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / path.name).write_bytes(path.read_bytes())
    return root


def files_of(folders: Path) -> list[tuple[str, bytes]]:
    """(CLASS/NAME, bytes) of all photographs, by name."""
    return [(path.relative_to(folders).as_posix(), path.read_bytes()) for path in sorted(folders.rglob("*.JPEG"))]


def to_memory(path: Path) -> Path:
    """A file, or everything in a folder, copied to the same path in memory://."""
    filesystem = fsspec.filesystem("memory")
    for file in [path] if path.is_file() else path.rglob("*"):
        if file.is_file():
            filesystem.pipe_file(str(file), file.read_bytes())
    return path


def write_tar(path: Path, members: Iterable[tuple[str, bytes]], *, tar_format: int = tarfile.GNU_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(tar_bytes(members, tar_format=tar_format))
    return path


def tar_bytes(members: Iterable[tuple[str, bytes]], *, tar_format: int = tarfile.GNU_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tar_format) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def train_tar(path: Path, folders: Path) -> Path:
    """As ILSVRC2012_img_train.tar: one tar for each class, in an order that is not that of the names."""
    classes = sorted(folder.name for folder in folders.iterdir())
    inner = [
        (f"{name}.tar", tar_bytes((file.partition("/")[2], data) for file, data in files_of(folders) if file.startswith(name))) for name in classes
    ]
    return write_tar(path, inner[::-1])


def val_tar(path: Path, folders: Path, *, devkit: bool = True) -> Path:
    """As ILSVRC2012_img_val.tar, with the devkit beside it: images numbered from 1 in the order of their names."""
    files = files_of(folders)
    write_tar(path, [(f"ILSVRC2012_val_{i + 1:08d}.JPEG", data) for i, (_, data) in enumerate(files)])
    if devkit:
        write_devkit(path.with_name("ILSVRC2012_devkit_t12.tar.gz"), [name.partition("/")[0] for name, _ in files])
    return path


def write_devkit(path: Path, wnid_of_image: Sequence[str]) -> Path:
    """Class ids run against the order of the WordNet ids, and a group of classes (with children) stands among them, as in the real file."""
    wnids = sorted(set(wnid_of_image), reverse=True)
    kinds = [("ILSVRC2012_ID", float), ("WNID", object), ("words", object), ("gloss", object), ("num_children", float)]
    synsets = np.array([(i + 1, wnid, "words", "gloss", 0) for i, wnid in enumerate(wnids)] + [(1001, "n00000001", "group", "gloss", 3)], kinds)
    meta = io.BytesIO()
    savemat(meta, {"synsets": synsets})
    truth = "".join(f"{wnids.index(wnid) + 1}\n" for wnid in wnid_of_image)
    with tarfile.open(path, "w:gz") as archive:
        members = {"meta.mat": meta.getvalue(), "ILSVRC2012_validation_ground_truth.txt": truth.encode()}
        for name, data in members.items():
            info = tarfile.TarInfo(f"ILSVRC2012_devkit_t12/data/{name}")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def shards(root: Path, folders: Path, *, count: int = 3, labels: str = "cls") -> Path:
    """`root` with `train-0000.tar` and so on; keys are `CLASS_NAME`, and each photograph has its label beside it, before or after."""
    classes = sorted(folder.name for folder in folders.iterdir())
    files = files_of(folders)
    per_shard = -(-len(files) // count)
    for number in range(count):
        members = []
        for name, data in files[number * per_shard : (number + 1) * per_shard]:
            key, label = name.replace("/", "-").removesuffix(".JPEG"), classes.index(name.partition("/")[0])
            members.append((f"{key}.jpeg", data))
            if labels == "cls":
                members.insert(-1, (f"{key}.cls", str(label).encode()))
            else:
                members.append((f"{key}.json", json.dumps({labels: label, "class_name": classes[label]}).encode()))
        write_tar(root / f"train-{number:04d}.tar", members)
    return root


def parquet_files(root: Path, folders: Path, *, count: int = 2, row_group_size: int = 3) -> Path:
    """`root` with `train-00000-of-00002.parquet` and so on, columns and metadata as the hub has them."""
    root.mkdir(parents=True, exist_ok=True)
    classes = sorted(folder.name for folder in folders.iterdir())
    features = {"image": {"_type": "Image"}, "label": {"names": classes, "_type": "ClassLabel"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    schema = pa.schema([("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])), ("label", pa.int64())], metadata)
    files = files_of(folders)
    per_file = -(-len(files) // count)
    for number in range(count):
        part = files[number * per_file : (number + 1) * per_file]
        images = [{"bytes": data, "path": name.partition("/")[2]} for name, data in part]
        table = pa.table({"image": images, "label": [classes.index(name.partition("/")[0]) for name, _ in part]}, schema=schema)
        pq.write_table(table, root / f"train-{number:05d}-of-{count:05d}.parquet", row_group_size=row_group_size)
    return root
