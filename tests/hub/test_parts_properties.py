"""Properties of weights in parts: whatever the models are, joined parts are their very files, and small."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from advcl_hub.files import file_sha256
from advcl_hub.hub.export import WEIGHTS
from advcl_hub.hub.parts import _HEADER, contains, join, read, split
from tests.support import properties
from tests.support.properties import odd_text

FEW = settings(max_examples=12 if properties.PROFILE == "usual" else 200)  # they write files
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool)
shapes = st.lists(st.integers(0, 3), max_size=2)
tensors = st.tuples(shapes, st.sampled_from(DTYPES), st.integers(0, 3))
states = st.dictionaries(st.sampled_from(["a", "b.weight", "c", "d", "fc.bias"]), tensors, min_size=1)


def made(state: dict[str, tuple[list[int], torch.dtype, int]]) -> dict[str, Tensor]:
    return {
        key: (9 * torch.rand(shape, generator=torch.Generator().manual_seed(seed))).to(dtype)
        for key, (shape, dtype, seed) in state.items()
    }


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("parts")


@FEW
@given(states, states, states, st.integers(20, 200))
def test_joined_parts_are_the_files_that_were_split(home: Path, one: Any, two: Any, head: Any, room: int) -> None:
    folder = home / str(len(list(home.iterdir())))
    first = made(one)
    models = {"one": first, "two": made(two), "on one": first | {f"head.{key}": value for key, value in made(head).items()}}
    for name, state in models.items():
        (folder / name).mkdir(parents=True)
        save_file(state, folder / name / WEIGHTS, metadata={"format": "pt"})
    limit = _HEADER + room
    parts = split({name: folder / name for name in models}, folder / "parts", limit)
    assert {path.name for path in (folder / "parts").iterdir()} == {part for names in parts.values() for part in names}
    assert all(path.stat().st_size <= limit for path in (folder / "parts").iterdir())
    for path in (folder / "parts").iterdir():
        sizes = [tensor.nbytes for tensor in read(path).values()]
        assert sum(sizes) <= room or len(sizes) == 1
    shared = "two" if contains(models["on one"], models["two"]) else "one"  # the later one
    assert parts["on one"][: len(parts[shared])] == parts[shared]
    for name in models:
        weights = folder / name / WEIGHTS
        joined = join([folder / "parts" / part for part in parts[name]], folder / name / "joined", file_sha256(weights))
        assert joined.read_bytes() == weights.read_bytes()
    with pytest.raises(ValueError, match="do not give the weights"):
        join([folder / "parts" / part for part in parts["one"]], folder / "wrong", "0" * 64)
    assert not (folder / "wrong").exists()


@given(states, st.data())
def test_a_model_contains_another_only_bit_for_bit(state: Any, data: st.DataObject) -> None:
    whole = made(state)
    part = {name: value.clone() for name, value in whole.items() if data.draw(st.booleans())}
    assert contains(whole, part) and contains(whole, {})
    taken = [name for name, value in part.items() if value.numel()]
    if not taken:
        return
    changed = part[data.draw(st.sampled_from(taken))]
    assert contains({"a": changed}, {"a": changed}) and not contains({"a": changed}, {"a": changed[None]})
    assert not contains({"a": changed}, {"a": changed.reshape(-1).view(torch.uint8)}) or changed.dtype == torch.uint8
    raw = changed.reshape(-1).view(torch.uint8)
    raw[0] ^= 1
    assert not contains(whole, part)
    raw[0] ^= 1
    assert contains(whole, part) and (len(part) == len(whole)) == contains(part, whole)


@given(st.binary(max_size=40) | odd_text.map(lambda text: text.encode("utf-8", "replace")))
@example(b"version https://git-lfs.github.com/spec/v1\n")
def test_a_damaged_part_is_refused_by_name(home: Path, content: bytes) -> None:
    path = home / "damaged.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError) as refusal:
        read(path)
    path.unlink()
    assert str(path) in str(refusal.value)
