"""Properties of label files: aligned with any subset of the data, or refused by name."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from advcl_hub.data import ImageData
from advcl_hub.pretraining.pseudo_labels import _digests, load_pseudo_labels
from tests.support.properties import odd_text

COUNT = 6
IMAGES = torch.arange(COUNT, dtype=torch.uint8).reshape(-1, 1, 1, 1)
DATA = ImageData(IMAGES, torch.zeros(COUNT, dtype=torch.int64), torch.arange(COUNT), ("a",), "mine", COUNT)
DTYPES = (torch.int16, torch.int64, torch.uint8, torch.float32, torch.bool, torch.complex64, torch.uint16)
names = st.sampled_from(
    ["train_2", "train_3", "train_03", "train_", "train_x", "train_\u0663", "train_0", "train_digest", "test_2"]
)
tensors = st.tuples(st.lists(st.integers(0, 7), max_size=2), st.sampled_from(DTYPES))


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("labels") / "labels.safetensors"


@given(
    st.permutations(range(COUNT)),
    st.integers(1, COUNT),
    st.lists(st.integers(0, 1), min_size=COUNT, max_size=COUNT),
    st.booleans(),
)
def test_labels_follow_the_images_of_any_subset(
    path: Path, order: list[int], size: int, labels: list[int], hashed: bool
) -> None:
    columns: dict[str, Tensor] = {"train_2": torch.tensor(labels, dtype=torch.int16), "train_5": torch.arange(COUNT) % 5}
    if hashed:
        columns["train_digest"] = _digests(IMAGES)
    save_file(columns, path)
    subset = DATA.subset(torch.tensor(order[:size]))
    found = load_pseudo_labels(path, subset, ks=(5, 2))
    assert found.labels.tolist() == [[row % 5, labels[row]] for row in order[:size]] and found.ks == (5, 2)
    assert load_pseudo_labels(path, subset).ks == (2, 5)


@given(st.dictionaries(names, tensors, min_size=1, max_size=3), st.integers(0, 3))
@example({"train_03": ([6], torch.int16)}, 0)
@example({"train_\u0663": ([6], torch.int16)}, 0)
@example({"train_2": ([6], torch.int16), "train_digest": ([3], torch.int64)}, 0)
@example({"train_2": ([6], torch.int16), "train_digest": ([6], torch.float32)}, 0)
@example({"train_2": ([6], torch.int16)}, 2)
@example({"train_2": ([6], torch.complex64)}, 0)
@example({"train_" + "9" * 5000: ([6], torch.int16)}, 0)
def test_other_tensors_are_labels_or_refused_by_name(path: Path, state: dict[str, Any], value: int) -> None:
    save_file({name: torch.full(shape, value).to(dtype) for name, (shape, dtype) in state.items()}, path)
    try:
        found = load_pseudo_labels(path, DATA)
    except ValueError as error:
        assert str(path) in str(error)
        return
    assert found.labels.shape == (COUNT, len(found.ks)) and found.labels.dtype == torch.int64
    assert all(0 <= int(column.min()) <= int(column.max()) < k for column, k in zip(found.labels.T, found.ks, strict=True))


@given(st.binary(max_size=40) | odd_text.map(lambda text: text.encode("utf-8", "replace")))
def test_another_file_is_refused_by_name(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(ValueError) as refusal:
        load_pseudo_labels(path, DATA)
    assert str(path) in str(refusal.value)
