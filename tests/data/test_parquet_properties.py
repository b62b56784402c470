"""Properties of Parquet files of other people: read row by row, or refused by name."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from advcl_hub.data.parquet import read_parquet
from tests.support.properties import DEEP, json_values, odd_text

rows = st.lists(st.tuples(st.binary(max_size=4) | st.none(), st.integers(0, 5)), max_size=5)
class_names = st.none() | st.lists(odd_text.map(lambda text: text.encode("utf-8", "replace").decode()), min_size=6, max_size=7)
IMAGE = pa.struct({"bytes": pa.binary(), "path": pa.string()})
KINDS = {
    "text": pa.struct({"bytes": pa.string()}),
    "list": pa.struct({"bytes": pa.list_(pa.int8())}),
    "no bytes": pa.struct({"path": pa.string()}),
    "number": pa.int64(),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("parquet")


def write(path: Path, images: Any, labels: Any, metadata: str | None = None) -> None:
    table = pa.table({"img": images, "label": labels})
    pq.write_table(table.replace_schema_metadata({"huggingface": metadata}) if metadata is not None else table, path)


@given(rows, class_names)
def test_rows_are_read_in_their_order(folder: Path, found: list[tuple[bytes | None, int]], names: list[str] | None) -> None:
    images = pa.array([None if image is None else {"bytes": image} for image, _ in found], IMAGE)
    labels = [label for _, label in found]
    metadata = None if names is None else json.dumps({"info": {"features": {"label": {"names": names}}}})
    write(folder / "train.parquet", images, pa.array(labels, pa.int64()), metadata)
    try:
        split = read_parquet(folder, "train")
    except ValueError as error:
        assert names is not None and "names several classes" in str(error)
        return
    assert split.images == [image or b"" for image, _ in found] and split.labels.tolist() == labels
    assert len(split.names) == len(found) and len(split.classes) == (len(names) if names else max(labels, default=-1) + 1)


@given(st.sampled_from(sorted(KINDS)), st.sampled_from([pa.int64(), pa.string(), pa.float64(), pa.uint64()]))
@example("text", pa.int64())  # of which PIL would open the file of that name
def test_other_columns_are_refused_by_name(folder: Path, image: str, label: Any) -> None:
    write(folder / "train.parquet", pa.array([None], KINDS[image]), pa.array([0]).cast(label))
    with pytest.raises(ValueError) as refusal:
        read_parquet(folder, "train")
    assert str(folder / "train.parquet") in str(refusal.value)


def test_a_column_that_is_there_twice_is_refused_by_name(folder: Path) -> None:
    arrays = [pa.array([{"bytes": b"x"}], IMAGE), pa.array([1]), pa.array([2])]
    pq.write_table(pa.Table.from_arrays(arrays, ["img", "label", "label"]), folder / "train.parquet")
    with pytest.raises(ValueError, match=r"train\.parquet"):
        read_parquet(folder, "train")


@given(st.sampled_from([10**12, 2**62, 2**20]))
def test_a_label_that_numbers_no_class_is_refused_before_the_classes_are_named(folder: Path, label: int) -> None:
    write(folder / "train.parquet", pa.array([{"bytes": b"x"}], IMAGE), pa.array([label]))
    with pytest.raises(ValueError, match=rf"train\.parquet has the label {label}"):
        read_parquet(folder, "train")


@given(json_values.map(json.dumps) | odd_text.map(lambda text: text.encode("utf-8", "replace").decode()))
@example(DEEP)
@example('{"info": {"features": {"label": {"names": "ab"}}}}')
@example('{"info": {"features": {"label": {"names": [1, 2]}}}}')
@example('{"info": []}')
def test_damaged_metadata_are_refused_by_name(folder: Path, metadata: str) -> None:
    write(folder / "train.parquet", pa.array([{"bytes": b"x"}], IMAGE), pa.array([1]), metadata)
    try:
        assert read_parquet(folder, "train").classes in (("0", "1"),)
    except ValueError as error:
        assert str(folder / "train.parquet") in str(error)


@given(st.binary(max_size=30), st.integers(0, 3000), st.integers(0, 255))
@example(b"PAR1PAR1", 0, 0)
@example(b"version https://git-lfs", 0, 0)
def test_a_damaged_file_is_refused_by_name_or_read(folder: Path, noise: bytes, place: int, value: int) -> None:
    images = pa.array([{"bytes": bytes([row])} for row in range(9)], IMAGE)
    write(folder / "train.parquet", images, pa.array(np.arange(9)))
    whole = bytearray((folder / "train.parquet").read_bytes())
    whole[place % len(whole)] ^= value
    for content in (bytes(whole), bytes(whole[: place % len(whole)]), noise):
        (folder / "train.parquet").write_bytes(content)
        try:
            assert len(read_parquet(folder, "train").labels) >= 0
        except ValueError as error:
            assert "train.parquet" in str(error)
