"""Which journal an evaluation may continue."""

from pathlib import Path

import pytest

from advcl_hub.evaluation.journal import Journal
from advcl_hub.training.processes import ALONE


def test_a_journal_of_another_protocol_is_refused_and_stays(tmp_path: Path) -> None:
    first = Journal(tmp_path, {"protocol": {"steps": 20}, "data": "a"}, ALONE)
    first.write("pgd/0", {"restart": [-1, 0]}, 1.0)
    first.close()
    with pytest.raises(ValueError, match="unfinished evaluation with another protocol"):
        Journal(tmp_path, {"protocol": {"steps": 50}, "data": "a"}, ALONE)
    again = Journal(tmp_path, {"protocol": {"steps": 20}, "data": "a"}, ALONE)
    assert again.units == {"pgd/0": {"restart": [-1, 0]}} and again.total_seconds() == 1.0
    again.close()


def test_behind_a_damaged_line_the_journal_goes_on(tmp_path: Path) -> None:
    """What is measured again after it is known the next time."""
    first = Journal(tmp_path, {"seed": 0}, ALONE)
    for unit in "abc":
        first.write(unit, {"right": [True]}, 1.0)
    first.close()
    lines = (tmp_path / "0.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "0.jsonl").write_bytes(b"".join([*lines[:2], b"\xff\xff\n", *lines[2:]]))
    second = Journal(tmp_path, {"seed": 0}, ALONE)
    assert list(second.units) == ["a"]
    for unit in "bc":
        second.write(unit, {"right": [False]}, 1.0)
    second.close()
    third = Journal(tmp_path, {"seed": 0}, ALONE)
    third.close()
    assert third.units == {"a": {"right": [True]}, "b": {"right": [False]}, "c": {"right": [False]}}


def test_a_journal_with_a_damaged_first_line_is_refused_and_stays(tmp_path: Path) -> None:
    content = b'{"header": {"se\xff\n{"unit": "a", "payload": {"right": [true]}, "seconds": 1.0}\n'
    (tmp_path / "0.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match="unfinished evaluation with another seed"):
        Journal(tmp_path, {"seed": 0}, ALONE)
    assert (tmp_path / "0.jsonl").read_bytes() == content
