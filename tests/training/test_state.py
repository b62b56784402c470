"""Checkpoints: what goes in comes out, also for AdamW; a failed write leaves the earlier one."""

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from advcl_hub.training import state as module
from advcl_hub.training.state import FILE, load_state, pack_state, save_state, unpack_state
from train.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from train.recipe import load_recipe

KINDS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": partial(torch.optim.SGD, lr=0.1, momentum=0.9),
    "adamw": partial(torch.optim.AdamW, lr=0.1),
}


def trained(kind: str, seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    optimizer = KINDS[kind](network.parameters())
    step(network, optimizer)
    return network, optimizer


def step(network: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    network(torch.arange(15.0).reshape(5, 3)).square().sum().backward()
    optimizer.step()


@pytest.mark.parametrize("kind", KINDS)
def test_a_restored_state_goes_on_bit_by_bit(tmp_path: Path, kind: str) -> None:
    network, optimizer = trained(kind, 0)
    recipe = load_recipe("digits_demo")
    save_checkpoint(tmp_path, Checkpoint(1, 2.5, recipe, {"data": "x"}, pack_state(network, optimizer, None)))
    other, other_optimizer = trained(kind, 1)
    loaded = load_checkpoint(tmp_path)
    assert (loaded.step, loaded.seconds, loaded.recipe, loaded.provenance, loaded.finished) == (
        1,
        2.5,
        recipe,
        {"data": "x"},
        False,
    )
    unpack_state(loaded.tensors, other, other_optimizer, None)
    step(network, optimizer)
    step(other, other_optimizer)
    state = other.state_dict()
    assert [k for k, v in network.state_dict().items() if not torch.equal(v, state[k])] == []


def tied(seed: int, kind: str = "adamw") -> tuple[nn.Sequential, torch.optim.Optimizer]:
    """Two layers of one matrix, after a step."""
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))
    assert isinstance(network[0], nn.Linear) and isinstance(network[2], nn.Linear)
    network[2].weight = network[0].weight
    optimizer = KINDS[kind](network.parameters())
    step(network, optimizer)
    return network, optimizer


@pytest.mark.parametrize("kind", KINDS)
def test_tied_weights_go_on_bit_by_bit_and_tied(tmp_path: Path, kind: str) -> None:
    (network, optimizer), (other, other_optimizer) = tied(0, kind), tied(1, kind)
    averaged = copy.deepcopy(network)
    save_state(tmp_path, {}, pack_state(network, optimizer, averaged) | {"best.weight": network[0].weight})
    _, tensors = load_state(tmp_path)
    assert torch.equal(tensors["best.weight"], tensors["model.2.weight"])
    other_averaged = tied(2, kind)[0]
    unpack_state(tensors, other, other_optimizer, other_averaged)
    step(network, optimizer)
    step(other, other_optimizer)
    state = other.state_dict()
    assert [key for key, value in network.state_dict().items() if not torch.equal(value, state[key])] == []
    assert other[0].weight is other[2].weight and other_averaged[0].weight is other_averaged[2].weight
    assert torch.equal(other_averaged[0].weight, averaged[0].weight)


def test_a_full_disk_leaves_the_earlier_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network, optimizer = trained("sgd", 0)
    state = Checkpoint(1, 0.0, load_recipe("digits_demo"), {}, pack_state(network, optimizer, None))
    save_checkpoint(tmp_path, state)
    before = (tmp_path / FILE).read_bytes()

    def full(tensors: object, path: Path, metadata: object) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "save_file", full)
    with pytest.raises(OSError, match=r"No space left on device.*What was there before is untouched"):
        save_checkpoint(tmp_path, state)
    assert (tmp_path / FILE).read_bytes() == before and [p.name for p in tmp_path.iterdir()] == [FILE]


def test_which_weights_are_exported(tmp_path: Path) -> None:
    recipe = load_recipe("digits_demo", ["ema_decay=0.5"])
    leaf = "encoder.bn.bn_branches.{}.bias"
    tensors = {
        f"{group}.{leaf.format(branch)}": torch.full((1,), float(value))
        for value, (group, branch) in enumerate([("model", "clean"), ("model", "adv"), ("ema", "clean"), ("ema", "adv")])
    }
    state = Checkpoint(0, 0.0, recipe, {}, tensors | {"model.projector.weight": torch.zeros(1)})
    assert state.encoder_state() == {"bn.bias": torch.tensor([3.0])}
    assert state.encoder_state("clean", ema=False) == {"bn.bias": torch.tensor([0.0])}
    with pytest.raises(ValueError, match=r"No batch-norm branch 'x'.*clean, adv, adv_ce"):
        state.encoder_state("x")
    state.recipe = load_recipe("digits_demo", ["ema_decay=0"])
    assert state.encoder_state() == {"bn.bias": torch.tensor([1.0])}
    with pytest.raises(ValueError, match="kept no averaged weights"):
        state.encoder_state(ema=True)
