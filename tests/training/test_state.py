"""Checkpoints: what goes in comes out, of every optimizer; a failed write leaves the earlier one."""

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import safetensors.torch
import torch
from accelerate import Accelerator
from torch import nn

from advcl_hub.training import state as module
from advcl_hub.training.ambient import undisturbed
from advcl_hub.training.state import FILE, load_state, pack_state, save_state, unpack_state
from advcl_hub.training.tensors import check_averageable
from train.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from train.network import build_optimizer, build_schedule
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


OPTIMIZERS = {"sgd": 0.1, "adamw": 0.01, "lars": 5.0, "lamb": 0.05}  # by name a learning rate


class Run:
    """A network, channels-last, with a frozen layer and a head that no loss reaches, trained as the trainer does it."""

    def __init__(self, name: str, decay_all: bool, seed: int) -> None:
        torch.manual_seed(seed)
        first = nn.Sequential(nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.Flatten())
        self.network = nn.Sequential(first, nn.Linear(32, 4), nn.Linear(4, 4), nn.Linear(4, 1), nn.Linear(4, 2))
        self.network[2].requires_grad_(False)
        self.network.to(memory_format=torch.channels_last)
        settings = [f"optimizer.name={name}", f"optimizer.lr={OPTIMIZERS[name]}", "optimizer.weight_decay=0.01"]
        recipe = load_recipe("digits_demo", [*settings, f"optimizer.decay_norms_and_biases={str(decay_all).lower()}"])
        self.optimizer = build_optimizer(recipe, self.network)
        self.schedule = build_schedule(recipe, self.optimizer, steps_per_epoch=1)
        self.done = 0

    def resume(self, folder: Path) -> "Run":
        info, tensors = load_state(folder)
        unpack_state(tensors, self.network, self.optimizer, None)
        self.done = info["step"]
        return self

    def train(self, steps: int) -> "Run":
        with undisturbed():
            model, stepper = Accelerator(cpu=True).prepare(self.network, self.optimizer)
            for _ in range(steps):
                self.schedule.step_update(self.done)
                images = torch.rand(5, 3, 5, 5, generator=torch.Generator().manual_seed(self.done))
                model[:4](images.contiguous(memory_format=torch.channels_last)).square().sum().backward()
                stepper.step()
                stepper.zero_grad()
                self.done += 1
        return self

    def save(self, folder: Path) -> None:
        save_state(folder, {"step": self.done}, pack_state(self.network, self.optimizer, None))


@pytest.mark.parametrize("decay_all", [True, False])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_of_a_recipe_goes_on_bit_by_bit(tmp_path: Path, name: str, decay_all: bool) -> None:
    whole = Run(name, decay_all, 0).train(6)
    first = Run(name, decay_all, 0).train(3)
    first.save(tmp_path)
    # Into new objects, and into some that have trained: nothing of theirs stays.
    for other in (Run(name, decay_all, 1), Run(name, decay_all, 2).train(5)):
        other.resume(tmp_path).train(3)
        assert [group["lr"] for group in other.optimizer.param_groups] == [
            group["lr"] for group in whole.optimizer.param_groups
        ]
        found, expected = (pack_state(run.network, run.optimizer, None) for run in (other, whole))
        assert found.keys() == expected.keys()
        assert [key for key, value in expected.items() if not torch.equal(value, found[key])] == []
    moved = Run(name, decay_all, 0).network.state_dict()
    changed = {key for key, value in whole.network.state_dict().items() if not torch.equal(value, moved[key])}
    assert {"0.0.weight", "0.1.weight", "3.bias"} <= changed and not changed & {"2.weight", "2.bias", "4.weight"}


def test_the_state_of_sgd_is_stored_as_ever(tmp_path: Path) -> None:
    run = Run("sgd", True, 0).train(1)
    run.network[2].requires_grad_(True)
    slots = {key for key in pack_state(run.network, run.optimizer, None) if key.startswith("optimizer")}
    assert slots == {f"optimizer.{index}.momentum_buffer" for index in range(10)}  # by the parameter's position


def test_the_state_of_before_the_first_step(tmp_path: Path) -> None:
    run = Run("lamb", False, 0)
    run.save(tmp_path)
    after = Run("lamb", False, 1).train(2).resume(tmp_path).train(1)
    expected = run.train(1).network.state_dict()
    assert [key for key, value in after.network.state_dict().items() if not torch.equal(value, expected[key])] == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"optimizer.6.momentum_buffer": torch.zeros(4, 4)},
            r"momentum_buffer of parameter 6 is \(4, 4\), the parameter is \(4, 32\)",
        ),
        ({"optimizer.12.momentum_buffer": torch.zeros(4)}, "there is no such parameter"),
        ({"optimizer_groups.1.step": torch.zeros(())}, "it has a group 1, of 1 here"),
    ],
)
def test_the_state_of_another_optimizer_is_refused(change: dict[str, torch.Tensor], message: str) -> None:
    run = Run("sgd", True, 0).train(1)
    tensors = pack_state(run.network, run.optimizer, None) | change
    with pytest.raises(ValueError, match=message):
        unpack_state(tensors, run.network, run.optimizer, None)


def test_what_cannot_be_stored_is_named() -> None:
    run = Run("adamw", True, 0).train(1)
    next(iter(run.optimizer.state.values()))["mu_product"] = 0.5
    with pytest.raises(ValueError, match="AdamW keeps mu_product as float; only tensors can be stored"):
        pack_state(run.network, run.optimizer, None)


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


def test_a_state_replaced_while_it_is_read_is_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, replaced = safetensors.torch.load, []

    def load(content: bytes) -> dict[str, torch.Tensor]:
        save_state(tmp_path, {"step": 2}, {"model.w": torch.full((9,), 2.0)})
        replaced.append(True)
        return read(content)

    save_state(tmp_path, {"step": 1}, {"model.w": torch.full((9,), 1.0)})
    monkeypatch.setattr(safetensors.torch, "load", load)
    info, tensors = load_state(tmp_path)
    assert info == {"step": 1} and tensors["model.w"].unique().tolist() == [1.0] and replaced
    assert load_state(tmp_path)[0] == {"step": 2}


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


@pytest.mark.parametrize("count", [3, 2.5])
def test_numbers_that_an_optimizer_counts_come_back_as_numbers(tmp_path: Path, count: float) -> None:
    """timm's older LAMB counts its steps so; what an optimizer has none of yet, such as a momentum, is left out."""
    run = Run("sgd", True, 0).train(1)
    run.optimizer.param_groups[0]["counted"] = count
    first = run.optimizer.param_groups[0]["params"][0]
    run.optimizer.state[first]["momentum_buffer"] = None
    run.save(tmp_path)
    other = Run("sgd", True, 1)
    other.optimizer.param_groups[0]["counted"] = 0
    other.resume(tmp_path)
    found = other.optimizer.param_groups[0]["counted"]
    assert found == count and type(found) is type(count)
    assert other.optimizer.param_groups[0]["params"][0] not in other.optimizer.state
    assert len(other.optimizer.state) == len(run.optimizer.state) - 1


def test_a_folder_without_a_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=rf"^No checkpoint in {tmp_path} \(expected {FILE}\)\.$"):
        load_state(tmp_path)


def test_tied_weights_are_not_averaged() -> None:
    check_averageable(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)))
    with pytest.raises(
        ValueError, match=r"^Sequential has tied weights \(2\.weight is one\), which cannot be averaged: set ema"
    ):
        check_averageable(tied(0)[0])
