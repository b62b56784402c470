"""Parquet sets are read whole, in the order of their rows, or an error says which files are missing or too many."""

import json
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from advcl_hub.data import ImageData, load_data
from advcl_hub.data.sources import read_source
from tests.support.image_files import all_images, encode, pixels, write

HASHES = ("5b3cd5e1cf2a3f41", "77aa00e1cf2a3f41")
IMAGE = encode(pixels())


def write_parquet(
    path: Path,
    images: list[bytes | None],
    labels: Sequence[int | None],
    names: list[str] | None = None,
    column: str = "img",
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    structs = pa.array(
        [{"bytes": image, "path": None} for image in images],
        pa.struct({"bytes": pa.binary(), "path": pa.string()}),
    )
    table = pa.table({column: structs, "label": pa.array(labels, pa.int64())})
    if names:
        features = {"label": {"names": names, "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, path)


@pytest.mark.parametrize(("folder", "column"), [("", "img"), ("data", "image")])
def test_parquet(tmp_path: Path, storage: str, folder: str, column: str) -> None:
    arrays = [pixels() for _ in range(5)]
    encoded: list[bytes | None] = [encode(array) for array in arrays]
    shards = tmp_path / "flags" / folder
    write_parquet(shards / "train-00001-of-00002.parquet", encoded[3:], [1, 0], ["no", "yes"], column)
    with pytest.raises(FileNotFoundError, match="has 1 of the 2 files"):
        load_data("parquet:flags", root=tmp_path)
    write_parquet(shards / "train-00000-of-00002.parquet", encoded[:3], [0, 1, 1], ["no", "yes"], column)
    data = load_data("parquet:flags", root=tmp_path)
    assert (data.name, data.classes, data.labels.tolist()) == (
        "parquet:flags",
        ("no", "yes"),
        [0, 1, 1, 1, 0],
    )
    assert torch.equal(all_images(data), torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2))
    with pytest.raises(ValueError, match=r"no split 'test', it has: train"):
        load_data("parquet:flags", "test", root=tmp_path)


def test_parquet_without_names_and_with_missing_bytes(tmp_path: Path, storage: str) -> None:
    write_parquet(tmp_path / "train-0.parquet", [encode(pixels()), None, encode(pixels())], [1, 1, 0])
    with pytest.warns(UserWarning, match=r"1 of 3 images cannot be read: train-0\.parquet row 1"):
        data = load_data(f"parquet:{tmp_path}")
    assert data.classes == ("0", "1")
    assert data.indices.tolist() == [0, 2]


def test_parquet_errors(tmp_path: Path) -> None:
    path = tmp_path / "train-0.parquet"
    image = encode(pixels())
    write_parquet(path, [image, image], [0, 2], ["no", "yes"])
    with pytest.raises(ValueError, match=r"labels from 0 to 2, its 2 classes go from 0 to 1"):
        load_data(f"parquet:{tmp_path}")
    write_parquet(path, [image, image], [0, -1], ["no", "yes"])
    with pytest.raises(ValueError, match=r"labels from -1 to 0"):
        load_data(f"parquet:{tmp_path}")
    write_parquet(path, [image, image], [0, 0], ["no", "yes"])
    with pytest.raises(ValueError, match=r"no readable image of the class yes"):
        load_data(f"parquet:{tmp_path}")
    write_parquet(path, [image] * 3, [0, None, None], ["no", "yes"])
    with pytest.raises(ValueError, match=r"train-0\.parquet has 2 rows without a label$"):
        load_data(f"parquet:{tmp_path}")
    write_parquet(path, [image], [0], column="picture")
    with pytest.raises(ValueError, match=r"has picture: struct.*label: int64; expected img or image"):
        load_data(f"parquet:{tmp_path}")
    write_parquet(path, [], [])
    with pytest.raises(ValueError, match="has no images"):
        load_data(f"parquet:{tmp_path}")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match="cannot be read as Parquet"):
        load_data(f"parquet:{tmp_path}")
    write_parquet(path, [image, image], [0, 1])
    with pytest.raises(ValueError, match=r"has 2 classes but cifar10 has 10"):
        load_data("cifar10", root=tmp_path)


@pytest.mark.slow
def test_real_cifar10(cifar10_folder: Path) -> None:
    test = load_data("cifar10", "test", root=cifar10_folder.parent)
    assert (test.name, test.shape, test.classes[3]) == ("parquet:cifar10", (3, 32, 32), "cat")
    assert test.labels.bincount().tolist() == [1000] * 10
    assert test.labels[:10].tolist() == [3, 8, 8, 0, 6, 6, 1, 6, 3, 1]
    # A copy recompressed as JPEG keeps the published channel means of CIFAR-10 within 1/255.
    assert isinstance(test.images, Tensor)
    means = test.images.double().mean((0, 2, 3)) / 255
    assert torch.allclose(means, torch.tensor([0.494, 0.485, 0.450], dtype=torch.float64), atol=1 / 255)
    train = read_source("parquet:cifar10", "train", cifar10_folder.parent, download=False)
    assert np.bincount(train.labels).tolist() == [5000] * 10
    assert train.labels[:10].tolist() == [6, 9, 9, 4, 1, 1, 2, 7, 8, 3]


# ---- which files are a split -----------------------------------------------------------------------------------------


def shards(folder: Path, *files: str) -> Path:
    """Each file holds one image of either class."""
    for file in files:
        write_parquet(folder / file, [IMAGE, IMAGE], [0, 1], ["no", "yes"])
    return folder


def loaded(folder: Path, split: str = "train") -> ImageData:
    return load_data(f"parquet:{folder}", split)


@pytest.mark.parametrize(
    "files",
    [
        ["train-00000-of-00001.parquet", "test-00000-of-00002.parquet"],  # another split may be incomplete
        [f"data/train-0000{i}-of-00002-{HASHES[i]}.parquet" for i in range(2)],  # a hash of its own for each file
        [f"train-0000{i}-of-00002-{HASHES[0]}.parquet" for i in range(2)],
        [f"train-{i}.parquet" for i in range(11)],  # 10 comes after 9
        ["train.parquet", "test.parquet"],
        ["train/0000.parquet", "train/0001.parquet", "test/0000.parquet"],
        ["data/train/0.parquet"],
        ["train-00000-of-00001.parquet", "train-extra-00000-of-00001.parquet", "train-a.parquet", "validation.parquet"],
        ["train-00000-of-00001.parquet", "._train-00000-of-00001.parquet", ".cache/0000.parquet", "data/test.parquet"],
    ],
)
def test_a_whole_split_is_read_and_nothing_else(tmp_path: Path, files: list[str]) -> None:
    data = loaded(shards(tmp_path, *files))
    mine = [file for file in files if file.removeprefix("data/").startswith(("train-0", "train-1", "train.", "train/"))]
    mine += [file for file in files if file.startswith("train-") and file[6] in "23456789"]
    assert len(data) == 2 * len(mine)
    assert data.labels.tolist() == [0, 1] * len(mine) and data.classes == ("no", "yes")


def test_files_come_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for number in range(11):
        write_parquet(tmp_path / f"train-{number}.parquet", [IMAGE], [number])
    assert loaded(tmp_path).labels.tolist() == list(range(11))


NAMES = "does not tell which files are the split train: "


@pytest.mark.parametrize(
    ("files", "error", "said"),
    [
        ([f"train-00000-of-00002-{HASHES[0]}.parquet"], FileNotFoundError, r"has 1 of the 2 files .*5b3c.*Missing: 1; fetch"),
        (["train-00001-of-00003.parquet"], FileNotFoundError, r"has 1 of the 3 files .*Missing: 0, 2; fetch"),
        (["train-00000-of-00002.parquet", "train-00002-of-00002.parquet"], FileNotFoundError, "Missing: 1; fetch"),
        (["train-00000-of-00000.parquet"], ValueError, "number 0 of 0 files"),
        ([f"train-0000{i}-of-00002.parquet" for i in range(3)], ValueError, "number 2 of 2 files"),
        ([f"train-00000-of-00001-{h}.parquet" for h in HASHES], ValueError, NAMES + ".*5b3c.*77aa.*number 0 is there 2 times"),
        (["train-00000-of-00001.parquet", "train-00000-of-00001 (1).parquet"], ValueError, r"\(1\).*number 0 is there 2 times"),
        (["train-00000-of-00001.parquet", f"train-00000-of-00002-{HASHES[0]}.parquet"], ValueError, "of 1 and of 2 files"),
        (["train-00000-of-00002.parquet", f"train-00001-of-00002-{HASHES[0]}.parquet"], ValueError, "only some .* in a hash"),
        (["train.parquet", "train-00000-of-00001.parquet"], ValueError, r"train\.parquet.*SPLIT-N-of-M\.parquet and SPLIT\."),
        (["train-0.parquet", "train-00000-of-00001.parquet"], ValueError, r"names follow .*; leave the files of one layout"),
        (["train/0000.parquet", "train-00000-of-00001.parquet"], ValueError, r"names follow .*; leave the files of one layout"),
        (["train-0.parquet", "train-2.parquet"], ValueError, "their numbers are not 0 to 1; fetch"),
        (["train/0001.parquet"], ValueError, r"train/0001\.parquet\. Seen: their numbers are not 0 to 0; fetch"),
        (["train-0.parquet", "train-00.parquet"], ValueError, "number 0 is there 2 times"),
        (
            ["train-00000-of-00001.parquet", "data/train-00000-of-00001.parquet"],
            ValueError,
            "split train twice, in .* and in .*",
        ),
        (["train-a.parquet", "train-b.parquet"], ValueError, "no split 'train', it has: train-a, train-b"),
        (["train-extra-00000-of-00001.parquet"], ValueError, "no split 'train', it has: train-extra"),
        (["0000.parquet", "0001.parquet"], ValueError, r"it has: none; 0000\.parquet names no split: give the folder above"),
        (
            ["plain/train-00000-of-00001.parquet"],
            ValueError,
            "it has: none; there are Parquet files in plain: give one of these",
        ),
        (["default/train/0000.parquet"], ValueError, "it has: none; there are Parquet files in default: give one of these"),
        (["partial-train/0000.parquet"], ValueError, "no split 'train', it has: partial-train"),
    ],
)
def test_anything_else_is_an_error_that_lists_what_is_there(
    tmp_path: Path, files: list[str], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        loaded(shards(tmp_path, *files))


def test_a_known_set_is_found_in_its_own_folder_beside_others(tmp_path: Path) -> None:
    shards(tmp_path, "birds/0000.parquet", "readme.parquet")
    for split in ("train", "test"):
        write_parquet(tmp_path / "cifar10" / f"{split}-00000-of-00001.parquet", [IMAGE] * 10, list(range(10)))
    assert load_data("cifar10", root=tmp_path).name == "parquet:cifar10"


# ---- files that do not belong together -------------------------------------------------------------------------------


def two_shards(folder: Path, first: Mapping[str, Any], second: Mapping[str, Any], split: str = "train") -> Path:
    standard: dict[str, Any] = {"images": [IMAGE, IMAGE], "labels": [0, 1], "names": ["no", "yes"]}
    for number, (place, given) in enumerate((("train", first), (split, second))):
        name = f"train-0000{number}-of-00002" if split == "train" else f"{place}-00000-of-00001"
        write_parquet(folder / f"{name}.parquet", **{**standard, **given})
    return folder


DIFFERENT = [
    ({"names": ["no", "maybe"]}, "different class names, only one of them has: maybe, yes"),
    ({"names": ["yes", "no"]}, "the same class names in another order"),
    ({"names": None}, "must both have class names in their metadata or neither"),
]


@pytest.mark.parametrize(
    ("second", "said"),
    [*DIFFERENT, ({"column": "image"}, r"00000.* has the columns img and label, .*00001.* has image and label")],
)
def test_shards_of_different_sets_are_told_apart(tmp_path: Path, second: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said + ".*different sets"):
        loaded(two_shards(tmp_path, {}, second))


@pytest.mark.parametrize(("second", "said"), DIFFERENT)
def test_a_label_means_the_same_in_all_splits(tmp_path: Path, second: dict[str, Any], said: str) -> None:
    two_shards(tmp_path, {}, second, split="test")
    for split in ("train", "test"):
        with pytest.raises(ValueError, match=f"The splits {split} .* {said}"):
            loaded(tmp_path, split)


def test_without_names_the_classes_are_those_of_all_splits(tmp_path: Path) -> None:
    two_shards(tmp_path, {"names": None, "images": [IMAGE] * 3, "labels": [0, 1, 2]}, {"names": None}, split="test")
    assert loaded(tmp_path).classes == ("0", "1", "2")
    with pytest.raises(ValueError, match="no readable image of the class 2"):
        loaded(tmp_path, "test")


def test_other_splits_without_labels_or_content_do_not_matter(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["no image"]}), tmp_path / "notes.parquet")
    write(tmp_path / "test-00000-of-00001.parquet", POINTER)
    assert len(loaded(shards(tmp_path, "train-00000-of-00001.parquet"))) == 2


def test_another_split_that_is_damaged_before_its_end_does_not_matter(tmp_path: Path) -> None:
    two_shards(tmp_path, {"names": None}, {"names": None, "labels": [0, 2]}, split="test")
    with pytest.raises(ValueError, match="no readable image of the class 2"):
        loaded(tmp_path)
    path = tmp_path / "test-00000-of-00001.parquet"
    whole = path.read_bytes()
    end = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")  # where what says what is in it begins
    path.write_bytes(whole[:4] + b"\xff" * (end - 4) + whole[end:])
    assert loaded(tmp_path).classes == ("0", "1")
    with pytest.raises(ValueError, match=r"test-00000-of-00001\.parquet cannot be read as Parquet"):
        loaded(tmp_path, "test")


def test_a_shard_may_be_empty(tmp_path: Path) -> None:
    data = loaded(two_shards(tmp_path, {"images": [], "labels": []}, {}))
    assert data.labels.tolist() == [0, 1]


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:5b3c\nsize 1234\n"


def test_a_git_lfs_pointer_says_what_to_run(tmp_path: Path) -> None:
    write(shards(tmp_path, "train-00000-of-00002.parquet") / "train-00001-of-00002.parquet", POINTER)
    with pytest.raises(ValueError, match=r"train-00001-of-00002\.parquet is a Git LFS pointer.*run `git lfs pull`"):
        loaded(tmp_path)


def test_class_names_are_compared_as_people_read_them(tmp_path: Path) -> None:
    composed, apart = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    assert composed != apart
    data = loaded(two_shards(tmp_path, {"names": ["no", apart]}, {"names": ["no", composed]}))
    assert data.classes == ("no", composed)
    write_parquet(tmp_path / "other" / "train.parquet", [IMAGE, IMAGE], [0, 1], [apart, composed])
    with pytest.raises(ValueError, match="names several classes café"):
        loaded(tmp_path / "other")


@pytest.mark.parametrize("metadata", [b"{", b"[]", b'{"info": {"features": {"label": {"names": [1, 2]}}}}', b'{"info": 3}'])
def test_damaged_metadata_are_named(tmp_path: Path, metadata: bytes) -> None:
    path = shards(tmp_path, "train.parquet") / "train.parquet"
    pq.write_table(pq.read_table(path).replace_schema_metadata({"huggingface": metadata}), path)
    with pytest.raises(ValueError, match=r"train\.parquet has damaged Hugging Face metadata"):
        loaded(tmp_path)
