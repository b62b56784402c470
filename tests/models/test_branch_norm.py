"""Named batch-norm branches on timm's families."""

import copy

import pytest
import timm
import torch
from timm.layers.norm_act import convert_sync_batchnorm
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from advcl_hub.models.branch_norm import BranchNorm, add_branches, branch_state_dict

FAMILIES = ["resnet8_cifar", "mobilenetv3_small_050", "regnetx_002", "efficientnet_b0", "levit_128s"]


def moved(model: nn.Module) -> None:
    """Gives every branch statistics of its own."""
    generator = torch.Generator().manual_seed(0)
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.copy_(0.1 * torch.randn(buffer.shape, generator=generator))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_branch_exports_to_the_plain_model_bit_by_bit(name: str) -> None:
    model = timm.create_model(name, num_classes=3)
    plain = timm.create_model(name, num_classes=3).eval()
    switch = add_branches(model, ("clean", "adv"))
    norms = {n for n, m in plain.named_modules() if isinstance(m, _BatchNorm)}
    assert norms and {n for n, m in model.named_modules() if isinstance(m, BranchNorm)} == norms
    moved(model)
    model.eval()
    size = plain.pretrained_cfg["input_size"][-1] if name == "levit_128s" else 64
    images, outputs = torch.rand(2, 3, size, size), {}
    for branch in ("clean", "adv"):
        plain.load_state_dict(branch_state_dict(model.state_dict(), branch), strict=True)
        with torch.no_grad(), switch.use(branch):
            outputs[branch] = model(images)
            assert torch.equal(outputs[branch], plain(images))
    assert not torch.equal(outputs["clean"], outputs["adv"])


@pytest.mark.parametrize("branch", ["clean", "adv"])
def test_training_moves_the_statistics_of_the_active_branch_only(branch: str) -> None:
    model = timm.create_model("resnet8_cifar")
    switch = add_branches(model, ("clean", "adv"))
    before = copy.deepcopy(model.state_dict())
    with switch.use(branch):
        model.train()(torch.rand(4, 3, 32, 32))
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed and all(f".{branch}." in k for k in changed)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "convnext_atto"])
def test_models_without_batch_norm_pass_through(name: str) -> None:
    model = timm.create_model(name).eval()
    keys, images = list(model.state_dict()), torch.rand(1, 3, 224, 224)
    with torch.no_grad():
        before = model(images)
        switch = add_branches(model, ("clean", "adv"))
        assert list(model.state_dict()) == keys
        with switch.use("adv"):
            assert torch.equal(model(images), before)
    assert list(branch_state_dict(model.state_dict(), "adv")) == keys
    model.set_grad_checkpointing(True)


def test_sync_batch_norm_is_converted_too() -> None:
    model = convert_sync_batchnorm(timm.create_model("efficientnet_b0"))
    add_branches(model, ("clean", "adv"))
    inner = {m.bn_branches["adv"].__class__.__name__ for m in model.modules() if isinstance(m, BranchNorm)}
    assert inner == {"SyncBatchNormAct"} or inner == {"SyncBatchNormAct", "SyncBatchNorm"}


def test_the_switch() -> None:
    model = timm.create_model("resnet8_cifar")
    switch = add_branches(model, ("clean", "adv"))
    with pytest.raises(RuntimeError), switch.use("adv"):
        assert switch.active == "adv"
        raise RuntimeError
    assert switch.active == "clean"
    twin = copy.deepcopy(model)
    switches = {id(m.switch) for m in twin.modules() if isinstance(m, BranchNorm)}
    assert len(switches) == 1 and id(switch) not in switches
    with pytest.raises(ValueError, match=r"No batch-norm branch 'x'; this network has \['clean', 'adv'\]"):
        switch.select("x")
    with pytest.raises(ValueError, match="they have"):
        branch_state_dict(model.state_dict(), "x")


def test_nested_use_restores_the_branch_around_it() -> None:
    switch = add_branches(nn.Sequential(nn.BatchNorm2d(3)), ("a", "b", "c"))
    with switch.use("b"):
        with pytest.raises(RuntimeError), switch.use("c"), switch.use("a"):
            raise RuntimeError
        assert switch.active == "b"
        with pytest.raises(ValueError, match="No batch-norm branch"), switch.use("x"):
            pass
        assert switch.active == "b"
    assert switch.active == "a"


def test_a_deep_copy_switches_by_itself() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3))
    switch = add_branches(model, ("a", "b"))
    twin = copy.deepcopy(model)
    with switch.use("b"):
        twin(torch.rand(2, 3, 4, 4))
    counts = {k: v.item() for k, v in twin.state_dict().items() if k.endswith("num_batches_tracked")}
    assert {k: int(".a." in k) for k in counts} == counts


def test_a_norm_used_twice_stays_one() -> None:
    norm = nn.BatchNorm2d(3)
    model = nn.Sequential(norm, nn.ReLU(), norm)
    add_branches(model, ("a", "b"))
    assert model[0] is model[2]


@pytest.mark.parametrize("names", [(), ("a", "a"), ("a.b",)])
def test_unusable_names(names: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="distinct identifiers"):
        add_branches(nn.Sequential(nn.BatchNorm2d(3)), names)


def test_refusals() -> None:
    model = timm.create_model("resnet8_cifar")
    model.set_grad_checkpointing(True)
    with pytest.raises(ValueError, match="Gradient checkpointing"):
        add_branches(model, ("clean", "adv"))
    model.set_grad_checkpointing(False)
    add_branches(model, ("clean", "adv"))
    with pytest.raises(ValueError, match="Gradient checkpointing"):
        model.set_grad_checkpointing()
    model.set_grad_checkpointing(False)  # off it is already: code that sets it either way goes on to work
    assert not model.grad_checkpointing
    with pytest.raises(ValueError, match="already"):
        add_branches(model, ("clean", "adv"))
    wrapped = nn.Sequential(timm.create_model("resnet8_cifar"))
    add_branches(wrapped, ("clean", "adv"))
    with pytest.raises(ValueError, match="Gradient checkpointing"):
        wrapped[0].set_grad_checkpointing()
    with pytest.raises(ValueError, match="itself a batch norm"):
        add_branches(nn.BatchNorm2d(3), ("clean",))
