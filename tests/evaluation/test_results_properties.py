"""Properties of finished evaluations: read as they were saved, or refused by name; figures and folders' names."""

import csv
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from advcl_hub.evaluation.protocol import Protocol
from advcl_hub.evaluation.results import Evaluation, finished, folder_name, per_class, proportion
from tests.support.evaluation_records import RECORD
from tests.support.properties import odd_text

columns = st.dictionaries(odd_text, st.just(None), min_size=1, max_size=3).flatmap(
    lambda names: st.integers(1, 4).flatmap(
        lambda rows: st.fixed_dictionaries(
            dict.fromkeys(names, st.lists(st.booleans() | st.integers(-5, 10**6), min_size=rows, max_size=rows))
        )
    )
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("evaluation")
    Evaluation(RECORD, {"index": [0]}).save(path)
    return path


@given(columns)
def test_an_evaluation_is_read_as_it_was_saved(folder: Path, images: dict[str, list[Any]]) -> None:
    assume(all(name.isprintable() for name in images))  # ours; csv would make new lines of others
    with (folder / "images.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([[*images], *zip(*images.values(), strict=True)])
    found = finished(folder, {"data": RECORD["data"]})
    assert found is not None and found.record == RECORD and found.images == images
    assert [[type(v) for v in column] for column in found.images.values()] == [[type(v) for v in c] for c in images.values()]


@given(st.binary(max_size=30) | odd_text.map(lambda text: text.encode("utf-8", "replace")))
@example(b"")
@example(b"index\n")
@example(b"index\nx\n")
@example(b"index,label\n1\n")
@example(b"index\n1\n\n")
@example(b"index,index\n1,2\n")
@example(b"a\xff\n1\n")
@example(b'a\n"' + b"1" * 200_000)
@example(b"a\n" + b"1" * 5000)
def test_other_images_csv_are_refused_by_name(folder: Path, content: bytes) -> None:
    (folder / "images.csv").write_bytes(content)
    try:
        found = finished(folder, {})
    except ValueError as error:
        assert str(error) == f"{folder} has a damaged images.csv: remove that folder to measure again."
        return
    assert found is not None and found.images and all(found.images.values())
    assert all(isinstance(value, int) for column in found.images.values() for value in column)


def test_an_evaluation_without_its_images_is_refused(tmp_path: Path) -> None:
    assert finished(tmp_path, {}) is None
    Evaluation(RECORD, {"index": [0]}).save(tmp_path)
    (tmp_path / "images.csv").unlink()
    with pytest.raises(ValueError) as error:
        finished(tmp_path, {})
    assert str(error.value) == f"{tmp_path} lacks its images.csv: remove that folder to measure again."


@given(st.integers(1, 10**6), st.floats(0, 1))
@example(205, 0.0)  # the lower end would be 1.7e-18
def test_a_proportion_is_in_its_interval(total: int, share: float) -> None:
    found = proportion(correct := round(share * total), total)
    low, high = found["interval_95"]
    assert 0 <= low <= found["value"] <= high <= 1 and low < high
    mirrored = proportion(total - correct, total)["interval_95"]
    assert [1 - high, 1 - low] == pytest.approx(mirrored, abs=1e-12)


@given(st.lists(st.tuples(st.integers(0, 3), st.booleans()), max_size=20))
def test_every_image_counts_in_one_class(images: list[tuple[int, bool]]) -> None:
    labels, right = [label for label, _ in images], [flag for _, flag in images]
    table = per_class({"standard": right}, labels, ["a", "b", "c", "d"])
    assert sum(row["images"] for row in table.values()) == len(images)
    assert sum(row["standard"] for row in table.values()) == sum(right)
    assert {"abcd".index(name) for name in table} == set(labels)


@given(odd_text, st.sampled_from([8 / 255, 0.5]), st.sampled_from(["Linf", "L2"]), st.none() | st.integers(1, 5), st.booleans())
def test_a_folder_s_name_is_plain_and_differs_with_every_option(
    data: str, eps: float, norm: Any, n: int | None, first: bool
) -> None:
    protocol = Protocol(norm=norm, eps=eps)
    name = folder_name(data, protocol, {"n": n, "first": first, "device": "cpu"})
    assert "/" not in name and name.isprintable() and not name.startswith(("-", "."))
    assert name == folder_name(data, protocol, {"n": n, "first": first, "device": "cuda"})
    assert name != folder_name(data, Protocol(norm=norm, eps=eps, seed=1), {"n": n, "first": first, "device": "cpu"})
