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
