"""Properties of selections: balanced, of the right size, the same for the same seed, and parts that make the whole."""

from collections import Counter

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from advcl_hub.data import ImageData
from advcl_hub.data.image_data import batches, few_shot, train_val_split
from tests.support import properties  # noqa: F401

label_lists = st.lists(st.integers(0, 3), min_size=1, max_size=40)


def labelled(labels: list[int]) -> ImageData:
    """Images of one pixel that tells their position."""
    rows = torch.arange(len(labels))
    return ImageData(rows.byte().reshape(-1, 1, 1, 1), torch.tensor(labels), rows, ("a", "b", "c", "d"), "mine")


@given(label_lists, st.data())
def test_a_balanced_selection_is_as_even_as_the_classes_allow(labels: list[int], data: st.DataObject) -> None:
    count = data.draw(st.integers(1, len(labels)))
    positions = labelled(labels).balanced_positions(count).tolist()
    assert positions == sorted(set(positions)) and len(positions) == count
    taken, there = Counter(labels[position] for position in positions), Counter(labels)
    most = max(taken.values())
    assert all(taken[label] >= min(there[label], most - 1) for label in there)
    extra = [label for label in sorted(there) if taken[label] == most]
    assert all(label in extra or label > extra[-1] or there[label] < most for label in there)  # to the first classes
    if count > 1:
        assert set(labelled(labels).balanced_positions(count - 1).tolist()) < set(positions)


@given(label_lists, st.integers(-2, 60))
def test_other_counts_are_refused(labels: list[int], count: int) -> None:
    assume(not 1 <= count <= len(labels))
    with pytest.raises(ValueError, match=f"{count} images were asked for"):
        labelled(labels).balanced_positions(count)


@given(st.lists(st.integers(2, 8), min_size=4, max_size=4), st.floats(0.01, 0.99), st.integers(0, 2**32 - 1))
def test_a_split_is_disjoint_whole_and_balanced(counts: list[int], fraction: float, seed: int) -> None:
    data = labelled([label for label, count in enumerate(counts) for _ in range(count)])
    train, val = train_val_split(data, fraction, seed)
    assert sorted([*train.indices.tolist(), *val.indices.tolist()]) == list(range(len(data)))
    for part in (train, val):
        assert part.indices.tolist() == sorted(part.indices.tolist())
        assert torch.equal(part.images.flatten().long(), part.indices) and torch.equal(part.labels, data.labels[part.indices])
    for label, count in enumerate(counts):
        held = int((val.labels == label).sum())
        assert 1 <= held <= count - 1 and abs(held - fraction * count) <= 1
    assert torch.equal(train_val_split(data, fraction, seed)[1].indices, val.indices)


@given(st.lists(st.integers(1, 6), min_size=4, max_size=4), st.integers(1, 6), st.integers(0, 2**32 - 1))
def test_few_shots_are_balanced_and_fewer_are_a_part_of_them(counts: list[int], shots: int, seed: int) -> None:
    data = labelled([label for label, count in enumerate(counts) for _ in range(count)])
    if shots > min(counts):
        with pytest.raises(ValueError, match=f"{shots} images of every class"):
            few_shot(data, shots, seed)
        return
    found = few_shot(data, shots, seed)
    assert found.labels.bincount().tolist() == [shots] * 4 and found.indices.tolist() == sorted(found.indices.tolist())
    assert shots == 1 or set(few_shot(data, shots - 1, seed).indices.tolist()) < set(found.indices.tolist())


@given(label_lists, st.integers(1, 50), st.data())
def test_batches_are_all_images_of_the_order(labels: list[int], size: int, data: st.DataObject) -> None:
    order = torch.tensor(data.draw(st.lists(st.integers(0, len(labels) - 1), max_size=30)), dtype=torch.int64)
    found = list(batches(labelled(labels), size, order=order))
    rows = [row for _, part in found for row in part.tolist()]
    assert rows == order.tolist() == [pixel for images, _ in found for pixel in images.flatten().tolist()]
    assert all(len(part) == size for _, part in found[:-1]) and len(found) == -(-len(order) // size)
    for wrong in (-1, len(labels)):
        with pytest.raises(ValueError, match="positions go from"):
            batches(labelled(labels), size, order=torch.tensor([0, wrong]))
