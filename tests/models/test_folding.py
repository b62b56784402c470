"""Batch norms folded into convolutions: the same function as the encoder in evaluation mode, while that goes on learning."""

import copy
from typing import Any

import pytest
import timm
import torch
from torch import nn

import advcl_hub  # noqa: F401
from advcl_hub.models.branch_norm import add_branches
from advcl_hub.models.companion import Companion
from advcl_hub.models.folding import FoldedCopy, fold_batch_norms

NAMES = {
    "resnet8_cifar": {"channels": (8, 8, 12)},
    "resnet18_cifar": {"channels": (8, 8, 8, 8)},
    "resnet50_cifar": {"channels": (4, 4, 4, 4)},
    "resnet26d": {"layers": (1, 1, 1, 1), "channels": (4, 4, 4, 4), "stem_width": 4},  # pooling and a deep stem
    "preact_resnet18_cifar": {},
    "vit_tiny_patch16_224": {"img_size": 16, "patch_size": 8, "embed_dim": 12, "depth": 1, "num_heads": 2},
    "mobilenetv3_small_050": {},  # BatchNormAct2d stays
}


def make(name: str) -> Any:
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=0, **NAMES[name]).double()


@torch.no_grad()
def move(model: nn.Module) -> None:
    """Weights and running statistics as after some training."""
    for parameter in model.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(0, 0.3)
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 2)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_the_copy_computes_what_the_encoder_computes_in_evaluation_mode(name: str) -> None:
    """Before and after the encoder has moved, of one branch of two; the encoder stays in training mode and as it is."""
    encoder = make(name)
    switch = add_branches(encoder, ("clean", "adv"))
    attacked = FoldedCopy(encoder, "adv")
    images = torch.rand(3, 3, 16, 16, dtype=torch.float64)
    for _ in range(2):
        move(encoder)
        before = copy.deepcopy(encoder.state_dict())
        attacked.refresh(encoder)
        assert encoder.training and not attacked.network.training
        assert all(torch.equal(value, before[key]) for key, value in encoder.state_dict().items())
        encoder.eval()
        with switch.use("adv"):
            expected = encoder(images)
        with switch.use("clean"):
            other = encoder(images)
        encoder.train()
        torch.testing.assert_close(attacked(images), expected, rtol=1e-9, atol=1e-11)
        if name != "vit_tiny_patch16_224":
            assert not torch.allclose(other, expected)


@torch.no_grad()
def test_under_autocast_it_is_the_same_up_to_bfloat16() -> None:
    encoder = make("resnet18_cifar").float()
    switch = add_branches(encoder, ("adv",))
    attacked = FoldedCopy(encoder, "adv")
    move(encoder)
    attacked.refresh(encoder)
    images = torch.rand(4, 3, 16, 16)
    encoder.eval()
    with torch.autocast("cpu", torch.bfloat16), switch.use("adv"):
        made, expected = attacked(images).float(), encoder(images).float()
    assert (made - expected).norm() < 0.03 * expected.norm()


def test_what_is_folded() -> None:
    encoder = make("resnet8_cifar").eval()
    folded = fold_batch_norms(encoder)
    assert [f.norm for f in folded if not f.norm.startswith("layer")] == ["bn1"]
    assert len(folded) == 1 + 3 * 2 + 2  # the stem, two in each block, two shortcuts
    assert not any(isinstance(m, nn.BatchNorm2d) for m in encoder.modules())
    assert fold_batch_norms(make("resnet8_cifar")) == []  # in training mode a batch norm depends on the batch


def test_gradients_by_the_images_are_the_same_and_none_reaches_a_parameter() -> None:
    encoder = make("resnet8_cifar")
    switch = add_branches(encoder, ("adv",))
    attacked = FoldedCopy(encoder, "adv")
    move(encoder)
    attacked.refresh(encoder)
    gradients = []
    encoder.eval()
    for network in (encoder, attacked):
        images = torch.rand(3, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
        with switch.use("adv"):
            network(images).square().sum().backward()
        gradients.append(images.grad)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-9, atol=1e-12)
    assert all(p.grad is None and not p.requires_grad for p in attacked.network.parameters())


def test_a_companion_moves_with_its_module_and_leaves_no_trace_in_it() -> None:
    network = nn.Linear(2, 2)
    module = nn.Sequential(nn.Linear(2, 2), Companion(network))
    assert len(list(module.parameters())) == 2 and set(module.state_dict()) == {"0.weight", "0.bias"}
    assert not network.training and not any(p.requires_grad for p in network.parameters())
    module.train()
    assert not network.training
    module.double()
    assert network.weight.dtype == torch.float64
    twin = copy.deepcopy(module)
    assert twin[1].network is not network and torch.equal(twin[1].network.weight, network.weight)
    images = torch.rand(3, 2, dtype=torch.float64, requires_grad=True)
    module(images).sum().backward()
    assert images.grad is not None and images.grad.norm() > 0
