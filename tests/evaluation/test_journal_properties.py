"""Properties of the journal of an evaluation: what was written is read again, and damaged lines are measured again."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from advcl_hub.evaluation.journal import Journal
from advcl_hub.training.processes import ALONE
from tests.support.properties import DEEP, json_values, odd_text

HEADER = {"seed": 0}
payloads = st.dictionaries(odd_text, st.lists(st.booleans() | st.integers(-5, 5), max_size=3), max_size=2)
units = st.dictionaries(odd_text, payloads, max_size=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("journal")


def lines(found: dict[str, Any]) -> list[bytes]:
    entries = [{"header": HEADER}, *({"unit": unit, "seconds": 1.5, "payload": payload} for unit, payload in found.items())]
    return [json.dumps(entry).encode() for entry in entries]


@given(units, st.integers(0, 200))
def test_a_journal_that_was_cut_goes_on_with_its_whole_lines(folder: Path, found: dict[str, Any], cut: int) -> None:
    whole = b"".join(line + b"\n" for line in lines(found))
    kept = whole[: max(0, len(whole) - cut)]
    (folder / "0.jsonl").write_bytes(kept)
    journal = Journal(folder, HEADER, ALONE)
    journal.close()
    finished = kept.count(b"\n") - 1
    assert list(journal.units.items())[: max(finished, 0)] == list(found.items())[: max(finished, 0)]
    assert len(journal.units) in (max(finished, 0), max(finished + 1, 0))  # a last line may lack its end alone
    again = Journal(folder, HEADER, ALONE)
    again.close()
    assert (folder / "0.jsonl").read_bytes().endswith(b"\n") and len(again.units) == max(finished, 0)


@given(st.integers(0, 3), st.binary(max_size=20) | json_values.map(json.dumps).map(str.encode))
@example(1, DEEP.encode())
@example(1, b"\xff\xfe")
@example(1, b"\0" * 20)
@example(1, b"5")
@example(0, b"5")
@example(2, b'{"unit": "pgd/1"}')
@example(2, b'{"unit": ["pgd/1"], "seconds": 1, "payload": {}}')
@example(2, b'{"unit": "pgd/1", "seconds": "1", "payload": {}}')
@example(0, b'{"header": 5}')
def test_a_damaged_line_is_dropped_with_what_follows_or_refused_by_name(folder: Path, place: int, line: bytes) -> None:
    found = {"pgd/0": {"right": [True]}, "pgd/2": {"right": [False]}}
    written = lines(found)
    written[place:place] = [line]
    (folder / "0.jsonl").write_bytes(b"".join(each + b"\n" for each in written))
    try:
        journal = Journal(folder, HEADER, ALONE)
    except ValueError as error:
        assert str(folder) in str(error) and place == 0
        return
    journal.close()
    assert all(found[unit] == payload for unit, payload in journal.units.items() if unit in found)
    assert list(journal.units)[: max(place - 1, 0)] == list(found)[: max(place - 1, 0)]
