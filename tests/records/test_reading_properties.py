"""Properties of the record of an evaluation: written and read again it is the same, and a damaged one is refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from advcl_hub.records import counted, in_markdown, load_record, pixels
from advcl_hub.records.reading import one_line
from advcl_hub.records.tables import FORMATS, report
from tests.support.evaluation_records import RECORD, records
from tests.support.properties import DEEP, damaged, json_values, odd_text


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("records") / "results.json"


@given(records())
def test_a_record_is_read_as_it_was_written(path: Path, record: dict[str, Any]) -> None:
    path.write_text(json.dumps(record), encoding="utf-8")
    assert load_record(path) == record == load_record(path.parent)


@given(damaged(RECORD))
@example(RECORD | {"warnings": None})
@example(RECORD | {"seconds": "1"})
@example(RECORD | {"batch_size": True})
@example(RECORD | {"autoattack_left_out": {"an attack of tomorrow": "why"}})
@example(RECORD | {"accuracy": {**RECORD["accuracy"], "pgd": {"value": 10**400, "interval_95": [0, 1]}}})
@example(RECORD | {"format": 2})
def test_a_damaged_record_can_be_tabled_or_is_refused_by_name(path: Path, record: Any) -> None:
    path.write_text(json.dumps(record), encoding="utf-8")
    try:
        found = load_record(path)
    except ValueError as error:
        assert str(path) in str(error) and one_line(str(error)) == str(error)
        return
    for style in FORMATS:
        assert report([found], style, literature=True)


@given(st.binary(max_size=30) | json_values.map(json.dumps).map(str.encode))
@example(DEEP.encode())
@example(b'{"kind": "\xff"}')
@example(b"1" * 5000)
def test_anything_else_is_refused_by_name(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"results\.json is not the result of an evaluation"):
        load_record(path)


@given(odd_text)
def test_text_in_markdown_is_one_line_without_html(text: str) -> None:
    shown = in_markdown(text)
    assert shown.isprintable() and not set(shown) & set("<|") and in_markdown(shown) == shown
    assert in_markdown(f"a{shown}b") == f"a{shown}b"


@given(st.integers(0, 510))
def test_a_length_in_pixels_is_a_fraction_of_255(number: int) -> None:
    assert pixels(number / 255) == f"{number}/255" and float(pixels(number / 10, "L2")) == number / 10


@given(st.integers(0, 10**9))
def test_a_count_reads_back_and_has_its_plural(number: int) -> None:
    figure, noun = counted(number, "step").split(" ")
    assert int(figure.replace(",", "")) == number and noun == ("step" if number == 1 else "steps")
