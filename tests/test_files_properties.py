"""Properties of file names, JSON and safetensors files of other people, and of what of a record is published."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors import SafetensorError

from advcl_hub.files import parse_json, read_safetensors, slug, without_local_paths
from tests.support.properties import DEEP, json_values, odd_text

DTYPES = ("F64", "F32", "F16", "BF16", "I64", "U8", "BOOL", "U16", "F8_E4M3", "F8_E8M0", "F4", "C64", "X9")
tensors = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(DTYPES),
        "shape": st.lists(st.sampled_from([0, 1, 2, 3, 2**31, 2**62]), max_size=3),
        "data_offsets": st.sampled_from([[0, 0], [0, 1], [0, 2], [0, 4], [0, 8], [0, 16], [4, 8], [8, 4]]),
    }
)
headers = st.dictionaries(
    odd_text | st.just("__metadata__"), tensors | st.dictionaries(odd_text, odd_text) | json_values, max_size=3
)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("files") / "file.safetensors"


@given(odd_text | st.lists(odd_text).map("/".join))
@example("?/?")
@example("-/-/x")
@example("../..")
def test_a_slug_is_a_plain_file_name(text: str) -> None:
    name = slug(text)
    assert name and "/" not in name and not name.startswith(("-", ".")) and not name.endswith("-")
    assert all(letter.isalnum() or letter in "_.-" for letter in name) or not name.isascii()
    assert slug(name) == name


@given(json_values)
def test_json_that_was_written_is_read_again(value: Any) -> None:
    text = json.dumps(value)
    assert json.dumps(parse_json(text)) == text  # NaN differs from itself


@given(
    st.binary(max_size=20)
    | odd_text.map(lambda text: text.encode("utf-8", "replace"))
    | json_values.map(json.dumps).map(str.encode)
)
@example(DEEP.encode())
@example(b"[" * 700 + b"]" * 700)  # Python's recursion would not take it later
@example(b"1" * 5000)
@example(b"\xff")
def test_any_bytes_are_json_or_a_value_error(content: bytes) -> None:
    try:
        value = parse_json(content)
    except ValueError:
        return
    without_local_paths(value)


@given(headers, st.integers(0, 16), st.integers(0, 3))
@example({"t": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}, 1, 0)
@example({"t": {"dtype": "F8_E8M0", "shape": [1], "data_offsets": [0, 1]}}, 1, 0)
@example({"t": {"dtype": "F32", "shape": [0, 2**62], "data_offsets": [0, 0]}}, 0, 0)
@example({"t": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, 4, 0)
def test_a_safetensors_header_gives_its_tensors_or_a_refusal(path: Path, header: dict[str, Any], size: int, cut: int) -> None:
    text = json.dumps(header).encode()
    path.write_bytes((len(text).to_bytes(8, "little") + text + b"\x3f" * size)[: -cut or None])
    try:
        found = read_safetensors(path)
    except SafetensorError:
        return
    assert found.tensors.keys() == header.keys() - {"__metadata__"} and found.metadata == (header.get("__metadata__") or {})
    for name, tensor in found.tensors.items():
        first, last = header[name]["data_offsets"]
        assert list(tensor.shape) == header[name]["shape"] and tensor.nbytes == last - first


@given(st.binary(max_size=40))
def test_any_bytes_are_no_safetensors_file(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(SafetensorError):
        read_safetensors(path)


@given(json_values)
def test_publishing_a_record_twice_changes_no_more(record: Any) -> None:
    once = without_local_paths(record)
    assert json.dumps(without_local_paths(once)) == json.dumps(once)


@given(
    st.lists(st.sampled_from(["ann", "runs", "x.y", "a b"]), min_size=1, max_size=4),
    st.sampled_from(["see {} there", "--root={}", "{}"]),
)
def test_of_a_path_only_its_last_part_is_published(parts: list[str], phrase: str) -> None:
    hidden = ["home-of-ann", *(part.replace(" ", "_") for part in parts)]
    text = without_local_paths(phrase.format("/" + "/".join([*hidden, "end"])))
    assert text == phrase.format("end")


@given(st.integers(1, 300), st.sampled_from([("[", "]"), ('{"a":', "}")]))
@example(99, ("[", "]"))
@example(100, ("[", "]"))
def test_values_within_values_are_read_to_a_fixed_depth(depth: int, ends: tuple[str, str]) -> None:
    text = "1".join((ends[0] * depth, ends[1] * depth))
    if depth < 100:  # and the number
        assert json.dumps(parse_json(text), separators=(",", ":")) == text
    else:
        with pytest.raises(ValueError, match="nested too deeply"):
            parse_json(text)
