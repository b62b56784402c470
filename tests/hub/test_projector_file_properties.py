"""Properties of projection heads: what is saved is read, and any other tensors are refused by the file's name."""

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from advcl_hub.hub.projector_file import layers_of, read_projector, save_projector, widths_of
from tests.support import properties  # noqa: F401

LAYERS = ("Linear", "BatchNorm1d", "ReLU")
DTYPES = (torch.float32, torch.float64, torch.int64, torch.uint16, torch.bool, torch.complex64, torch.float8_e5m2)
widths = st.lists(st.integers(1, 4), min_size=2, max_size=4)
names = st.sampled_from(
    ["0.weight", "0.bias", "1.weight", "1.running_mean", "1.num_batches_tracked", "2.weight", "x", "00.weight"]
)
tensors = st.tuples(st.lists(st.integers(0, 3), max_size=3), st.sampled_from(DTYPES))
states = st.dictionaries(names, tensors, max_size=5)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("projector") / "projector.safetensors"


@given(widths, st.booleans(), st.booleans(), st.integers(0, 9))
def test_a_head_is_read_as_it_was_saved(path: Path, sizes: list[int], norms: bool, bias: bool, seed: int) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        for takes, gives in itertools.pairwise(sizes):
            layers += [nn.Linear(takes, gives, bias=bias), *([nn.BatchNorm1d(gives)] if norms else []), nn.ReLU()]
        head = nn.Sequential(*layers).eval()
        inputs = torch.rand(3, sizes[0])
    save_projector(head.state_dict(), layers_of(head), path)
    before = torch.get_rng_state()
    found = read_projector(path)
    assert torch.equal(torch.get_rng_state(), before)
    assert layers_of(found) == layers_of(head) and widths_of(found) == sizes and not found.training
    assert torch.equal(found(inputs), head(inputs))


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@given(
    states,
    st.none() | st.lists(st.sampled_from([*LAYERS, "Dropout", ""]), max_size=4),
    st.sampled_from([1.0, math.nan, math.inf]),
)
@example({"0.weight": ([2, 2], torch.uint16)}, ["Linear"], 1.0)
@example({"0.weight": ([2, 2], torch.float8_e5m2)}, ["Linear"], 1.0)
@example({"0.weight": ([2, 3], torch.float32)}, ["Linear"], math.nan)
@example({"0.weight": ([0, 3], torch.float32)}, ["Linear"], 1.0)
@example({"0.weight": ([2, 3], torch.complex64)}, ["Linear"], 1.0)
def test_other_tensors_are_a_head_or_refused_by_name(path: Path, state: Any, layers: list[str] | None, value: float) -> None:
    made = {name: torch.full(shape, value).to(dtype) for name, (shape, dtype) in state.items()}
    save_file(made, path, metadata=None if layers is None else {"layers": ",".join(layers)})
    try:
        found = read_projector(path)
    except ValueError as error:
        assert str(path) in str(error) and "\n" not in str(error)
        return
    assert layers is not None and layers_of(found) == layers
    assert {*found.state_dict()} == {*made} and all(value.isfinite().all() for value in found.state_dict().values())
    assert found(torch.rand(2, widths_of(found)[0])).shape == (2, widths_of(found)[-1])
