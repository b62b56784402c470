"""Properties of a run's log: whole records are read, whatever else lies in the file."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from advcl_hub.training.runlog import LOG, RunLog, read_log
from tests.support.properties import DEEP, json_values

records = st.lists(st.fixed_dictionaries({"step": st.integers(0, 9)}, optional={"loss": st.floats(-9, 9)}), max_size=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("log")


@given(records, st.binary(max_size=20) | json_values.map(json.dumps).map(str.encode), records)
@example([{"step": 1}], DEEP.encode(), [{"step": 2}])
@example([{"step": 1}], b"1" * 5000, [{"step": 2}])
@example([{"step": 1}], b"\xff", [{"step": 2}])
@example([{"step": 1}], b'{"step": "1"}', [{"step": 2}])
def test_a_damaged_line_costs_itself_alone(
    folder: Path, before: list[dict[str, Any]], line: bytes, after: list[dict[str, Any]]
) -> None:
    written = [*(json.dumps(record).encode() for record in before), line, *(json.dumps(record).encode() for record in after)]
    (folder / LOG).write_bytes(b"\n".join(written))
    found = read_log(folder)
    assert found[: len(before)] == before and found[len(found) - len(after) :] == after
    assert all(isinstance(record, dict) for record in found)


@example([{"step": 1}, {"step": "1"}, {"loss": 2.0}, {"step": 3}], 2)
@given(
    st.lists(st.dictionaries(st.sampled_from(["step", "loss", "probe_clean"]), st.integers(0, 5), max_size=2), max_size=4),
    st.integers(0, 5),
)
def test_a_run_that_starts_again_keeps_what_lies_before_its_step(
    folder: Path, written: list[dict[str, Any]], step: int
) -> None:
    (folder / LOG).write_text("".join(json.dumps(record) + "\n" for record in written), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "torch.utils.tensorboard", None)
        RunLog(folder, step).close()
    steps = [(record.get("step"), record) for record in written]
    whole = [record for place, record in steps if isinstance(place, int) and place <= step]
    assert read_log(folder) == [record for record in whole if record["step"] < step or "probe_clean" not in record]
