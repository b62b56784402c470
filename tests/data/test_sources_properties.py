"""Properties of IDX files, of names of sources and of the order of classes."""

import gzip
import math
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from advcl_hub.data.sources import balanced_holdout, canonical, natural, read_idx, read_source
from tests.support.properties import odd_text

sides = st.lists(st.integers(0, 5), min_size=1, max_size=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("idx")


def header(shape: list[int]) -> bytes:
    return struct.pack(f">BBBB{len(shape)}I", 0, 0, 8, len(shape), *shape)


@given(sides, st.booleans(), st.integers(0, 9))
def test_an_idx_file_is_read_as_it_was_written(folder: Path, shape: list[int], zipped: bool, seed: int) -> None:
    values = np.random.default_rng(seed).integers(0, 256, shape, np.uint8)
    content = header(shape) + values.tobytes()
    path = folder / ("file.gz" if zipped else "file")
    path.write_bytes(gzip.compress(content) if zipped else content)
    assert np.array_equal(read_idx(path, len(shape)), values)


@given(st.lists(st.integers(0, 2**32 - 1), min_size=3, max_size=3), st.binary(max_size=30), st.integers(0, 20), st.booleans())
@example([2**31, 2**31, 4], b"", 0, False)  # 2**64 values: none, if counted in 64 bits
@example([2**32 - 1, 2**32 - 1, 2**32 - 1], b"x", 0, False)
@example([0, 2**32 - 1, 2**32 - 1], b"", 0, False)
@example([1, 1, 1], b"x", 9, True)
@example([1, 1, 1], b"", 13, False)
def test_other_idx_files_are_refused_by_name(folder: Path, shape: list[int], values: bytes, cut: int, zipped: bool) -> None:
    whole = header(shape) + values
    content = gzip.compress(whole) if zipped else whole
    for name, damaged in (("wrong.gz" if zipped else "wrong", content[: -cut or None]), ("noise.gz", values)):
        (folder / name).write_bytes(damaged)
        try:
            found = read_idx(folder / name, 3)
        except ValueError as error:
            assert str(folder / name) in str(error)
        else:
            assert found.shape == tuple(shape) and math.prod(shape) == len(values) and (not cut or zipped)


@given(odd_text, odd_text)
@example("fake:", "train")
@example("fake:\u0663", "train")
@example("folder:\0", "train")
@example("parquet:a\0b", "train")
def test_other_sources_are_refused(folder: Path, source: str, split: str) -> None:
    try:
        assert read_source(source, split, folder, False)
    except (ValueError, OSError) as error:
        assert str(error)


@given(st.lists(st.text(st.sampled_from("aB1230\u0663é_-."), max_size=6), min_size=2, max_size=8))
def test_any_names_have_one_natural_order(names: list[str]) -> None:
    ordered, turned = sorted(names, key=natural), names[::-1]
    turned.sort(key=natural)
    assert ordered == turned
    numbers = [str(number) for number in (10, 2, 1, 33)]
    assert sorted([f"a{number}" for number in numbers], key=natural) == ["a1", "a2", "a10", "a33"]
    assert all(canonical(canonical(name)) == canonical(name) for name in names)


@given(st.lists(st.integers(0, 3), max_size=40), st.floats(0, 1), st.integers(0, 2**32 - 1))
def test_a_holdout_takes_its_share_of_every_class_or_says_why_not(labels: list[int], fraction: float, seed: int) -> None:
    array = np.array(labels, np.int64)
    try:
        held = balanced_holdout(array, fraction, seed)
    except ValueError:
        assert fraction in (0, 1) or 1 in np.unique(array, return_counts=True)[1]
        return
    for label in set(labels):
        count, total = int(held[array == label].sum()), labels.count(label)
        assert count == min(max(round(fraction * total), 1), total - 1)
    assert np.array_equal(balanced_holdout(array, fraction, seed), held)
