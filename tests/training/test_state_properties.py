"""Properties of training states: what was saved is loaded, and other files are refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import save

from advcl_hub.training.state import FILE, differences, load_state
from tests.support.properties import DEEP, json_values, odd_text

TENSORS = {"model.weight": torch.arange(6.0).reshape(2, 3)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("state")


@given(st.dictionaries(odd_text, json_values, max_size=3))
def test_a_state_is_loaded_as_it_was_saved(folder: Path, info: dict[str, Any]) -> None:
    (folder / FILE).write_bytes(save(TENSORS, {"advcl": json.dumps(info)}))
    found, tensors = load_state(folder)
    assert json.dumps(found) == json.dumps(info) and tensors.keys() == TENSORS.keys()
    assert torch.equal(tensors["model.weight"], TENSORS["model.weight"])


@given(st.binary(max_size=60), st.integers(0, 200))
@example(b"[" * 60, 1)
@example(save(TENSORS), 0)
@example(save(TENSORS, {"advcl": "5"}), 0)
@example(save(TENSORS, {"advcl": "{"}), 0)
@example(save(TENSORS, {"advcl": "1" * 5000}), 0)
@example(save(TENSORS, {"advcl": DEEP}), 0)
def test_other_files_are_refused_by_name(folder: Path, content: bytes, cut: int) -> None:
    whole = save(TENSORS, {"advcl": "{}"})
    for damaged in (content, whole[: max(0, len(whole) - cut - 1)], whole + content + b"\0"):
        (folder / FILE).write_bytes(damaged)
        with pytest.raises(ValueError) as refusal:
            load_state(folder)
        assert str(folder / FILE) in str(refusal.value)


@given(st.dictionaries(st.sampled_from("abc"), st.integers(0, 2) | st.dictionaries(st.sampled_from("de"), st.integers(0, 2))))
def test_differences_name_what_was_changed(values: dict[str, Any]) -> None:
    assert not differences(values, values)
    assert list(differences(values, {**values, "z": {"y": 1}})) == ["z.y"]
    assert differences({**values, "b": 7}, {**values, "b": 8}) == {"b": "b: 7 there, 8 now"}
