"""Labels in Parquet files: every type that users have, and files whose classes are named or numbered differently."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import archives
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from revq.cache.sources import ImageSource, open_source
from revq.errors import ImageError


def write(path: Path, labels: Any, names: Sequence[str] | None = None) -> Path:
    """A Parquet file as the hub has it; `names` are its ClassLabel's."""
    features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})} if names is not None else None
    images = [{"bytes": f"{path.stem}{i}".encode(), "path": f"{i}.jpg"} for i in range(len(labels))]
    table = pa.table({"image": pa.array(images, pa.struct([("bytes", pa.binary()), ("path", pa.string())])), "label": labels})
    pq.write_table(table.replace_schema_metadata(metadata), path)
    return path


def told(source: ImageSource) -> list[tuple[int, str]]:
    return [(item.label, item.class_name) for item in source.items]


INTEGERS = [pa.int8(), pa.int16(), pa.int32(), pa.int64(), pa.uint8(), pa.uint16(), pa.uint32(), pa.uint64()]


@pytest.mark.parametrize("kind", [*INTEGERS, pa.dictionary(pa.int8(), pa.uint16())], ids=str)
def test_whole_numbers_of_every_type_are_labels_and_null_is_none(tmp_path: Path, kind: pa.DataType) -> None:
    values = pa.array([1, None, 0, 127], kind.value_type if pa.types.is_dictionary(kind) else kind)
    source = open_source(write(tmp_path / "a.parquet", values.dictionary_encode() if pa.types.is_dictionary(kind) else values))
    assert told(source) == [(1, ""), (-1, ""), (0, ""), (127, "")]
    assert source.notes == (f"1 of the 4 images of {source.name} have no label",)


@pytest.mark.parametrize(
    ("label", "kind"),
    [(2**31, pa.int64()), (2**31, pa.uint32()), (2**64 - 1, pa.uint64()), (-2, pa.int8()), (-(2**63), pa.int64())],
    ids=str,
)
def test_a_label_beyond_int32_is_refused_with_what_is_accepted(tmp_path: Path, label: int, kind: pa.DataType) -> None:
    with pytest.raises(
        ImageError, match=rf"a\.parquet has the label {label}; expected numbers of classes from 0 to 2147483647, and -1 or null for none"
    ):
        open_source(write(tmp_path / "a.parquet", pa.array([0, label], kind)))
    assert told(open_source(write(tmp_path / "a.parquet", pa.array([2**31 - 1, None], kind if kind != pa.int8() else pa.int64())))) == [
        (2**31 - 1, ""),
        (-1, ""),
    ]


def test_text_true_and_false_and_empty_columns_are_labels(tmp_path: Path) -> None:
    text = pa.array(["dog", None, "cat", "dog", ""])
    kinds = [
        text,
        text.cast(pa.large_string()),
        text.cast(pa.string_view()),
        text.dictionary_encode(),
        text.cast(pa.large_string()).dictionary_encode(),
    ]
    for column in kinds:
        assert told(open_source(write(tmp_path / "a.parquet", column))) == [(1, "dog"), (-1, ""), (0, "cat"), (1, "dog"), (-1, "")]
    assert told(open_source(write(tmp_path / "a.parquet", pa.array([True, False, None])))) == [(1, ""), (0, ""), (-1, "")]
    assert told(open_source(write(tmp_path / "a.parquet", pa.nulls(2)))) == [(-1, ""), (-1, "")]


def test_categories_are_names_and_one_that_no_image_has_is_no_class(tmp_path: Path) -> None:
    column = pa.DictionaryArray.from_arrays(pa.array([0, 1, None], pa.int8()), ["b", "a", "0 unused"])
    assert told(open_source(write(tmp_path / "a.parquet", column))) == [(1, "b"), (0, "a"), (-1, "")]


@pytest.mark.parametrize("column", [pa.array([1.0]), pa.array([[1]]), pa.array([{"a": 1}])], ids=["float", "list", "struct"])
def test_labels_of_another_type_are_refused_with_what_is_accepted(tmp_path: Path, column: pa.Array) -> None:
    with pytest.raises(ImageError, match=r"has labels of type (double|list|struct).*; expected whole numbers, true and false, or text"):
        open_source(write(tmp_path / "a.parquet", column))


def test_files_with_other_class_names_are_merged_by_name(tmp_path: Path) -> None:
    write(tmp_path / "t-0.parquet", [0, 1, 2, -1], ["ant", "bee", "cow"])
    write(tmp_path / "t-1.parquet", [0, 1, 1], ["bee", "cow"])
    write(tmp_path / "t-2.parquet", [2, 1, 0, None], ["dog", "ant", "cow"])
    write(tmp_path / "t-3.parquet", pa.array(["bee", "ape", "cow"]))
    for spec in (tmp_path, f"{tmp_path}/t-*.parquet", f"{tmp_path}/t-{{0..3}}.parquet"):
        source = open_source(spec)
        expected = "0 ant,1 bee,2 cow,-1 ,1 bee,2 cow,2 cow,2 cow,0 ant,3 dog,-1 ,1 bee,4 ape,2 cow"
        assert ",".join(f"{label} {name}" for label, name in told(source)) == expected
        assert "merged by name into 5 classes" in source.notes[0]


def test_files_with_the_same_names_keep_their_numbers_and_nothing_is_said(tmp_path: Path) -> None:
    for i in range(2):
        write(tmp_path / f"t-{i}.parquet", [2, 0], ["zebra", "crane", "crane"])
    source = open_source(tmp_path)
    assert told(source) == [(2, "crane"), (0, "zebra")] * 2
    assert source.notes == ()


def test_text_in_several_files_is_numbered_by_sorted_name_as_class_folders_are(tmp_path: Path) -> None:
    write(tmp_path / "t-0.parquet", pa.array(["b", "d"]))
    write(tmp_path / "t-1.parquet", pa.array(["c", "a"]).dictionary_encode())
    assert told(open_source(tmp_path)) == [(1, "b"), (3, "d"), (2, "c"), (0, "a")]


def test_names_that_decide_nothing_and_numbers_without_names_are_refused(tmp_path: Path) -> None:
    (tmp_path / "twice").mkdir()
    write(tmp_path / "twice" / "t-0.parquet", [0], ["ant"])
    write(tmp_path / "twice" / "t-1.parquet", [2], ["ant", "crane", "crane"])
    (tmp_path / "bare").mkdir()
    write(tmp_path / "bare" / "t-0.parquet", [0], ["ant"])
    write(tmp_path / "bare" / "t-1.parquet", [0])
    (tmp_path / "beyond").mkdir()
    write(tmp_path / "beyond" / "t-0.parquet", [1], ["ant"])
    (tmp_path / "column").mkdir()
    write(tmp_path / "column" / "t-0.parquet", [0])
    pq.write_table(pq.read_table(write(tmp_path / "column" / "t-1.parquet", [0])).drop(["label"]), tmp_path / "column" / "t-1.parquet")
    cases = {
        "twice": r"t-1\.parquet names two classes crane, .* cannot be merged by name; give every class a name of its own",
        "bare": r"t-1\.parquet has labels without names and .*t-0\.parquet has named classes, .*; write the names \(ClassLabel\) into both",
        "beyond": r"t-0\.parquet has the label 1, and names of 1 classes; expected a ClassLabel that names all of them",
        "column": r"t-1\.parquet has the columns image\.bytes and no labels, .*t-0\.parquet has image\.bytes and label; give files of one data set",
    }
    for folder, message in cases.items():
        with pytest.raises(ImageError, match=message):
            open_source(tmp_path / folder)


def test_files_without_any_label_may_stand_beside_named_and_numbered_ones(tmp_path: Path) -> None:
    write(tmp_path / "t-0.parquet", pa.nulls(2))
    write(tmp_path / "t-1.parquet", [1, 0], ["ant", "bee"])
    assert told(open_source(tmp_path)) == [(-1, ""), (-1, ""), (1, "bee"), (0, "ant")]
    write(tmp_path / "t-1.parquet", [1, 0])
    write(tmp_path / "t-0.parquet", [-1, -1], ["ant", "bee"])
    assert told(open_source(tmp_path)) == [(-1, ""), (-1, ""), (1, ""), (0, "")]


def test_files_without_a_row_are_passed_over_and_told_and_nothing_but_such_is_refused(tmp_path: Path, imagenet_sample: Path) -> None:
    folders = archives.class_folders(tmp_path / "folders", imagenet_sample)
    root = archives.parquet_files(tmp_path / "parquet", folders, count=4)
    whole = open_source(root)
    expected = [(item.label, whole.read(i)) for i, item in enumerate(whole.items)]
    rows = pq.read_table(root / "train-00000-of-00004.parquet")
    pq.write_table(rows.slice(0, 0), root / "train-00000-of-00004.parquet")
    pq.ParquetWriter(root / "train-00002-of-00004.parquet", pa.schema([("image", pa.null())])).close()  # no row group, and no type
    source = open_source(root)
    assert [(item.label, source.read(i)) for i, item in enumerate(source.items)] == expected[5:10] + expected[15:]
    assert source.skipped.counts() == {"file without a row": 2}
    assert "2 file without a row (train-00000-of-00004.parquet, ...)" in source.notes[-1]
    with pytest.raises(ImageError, match="holds no row, in 1 files; expected one image in each row"):
        open_source(root / "train-00000-of-00004.parquet")
