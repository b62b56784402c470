"""What the plain references of the pretraining methods share: a small network, images, an attack, and the comparison."""

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import timm
import torch
from torch import Tensor, nn

import advcl_hub  # noqa: F401
from advcl_hub.pretraining import Attack, Method

N, SIZE = 6, 8


def make_encoder(mean: tuple[float, ...] = (0.0,) * 3, std: tuple[float, ...] = (1.0,) * 3) -> Any:
    """A small network in float64; each norm has weights, biases and averages of its own."""
    torch.manual_seed(0)
    cfg = {"input_size": (3, SIZE, SIZE), "mean": mean, "std": std}
    encoder = timm.create_model("resnet8_cifar", num_classes=0, channels=(8, 8, 12), pretrained_cfg_overlay=cfg).double()
    for module in encoder.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.running_var):
                nn.init.uniform_(tensor, 0.8, 1.2)
            for tensor in (module.bias, module.running_mean):
                nn.init.uniform_(tensor, -0.2, 0.2)
    return encoder


def weak_images(seed: int = 1) -> Tensor:
    """Float64 images in [0, 1] with many black and white pixels."""
    generator = torch.Generator().manual_seed(seed)
    return (1.4 * torch.rand(N, 3, SIZE, SIZE, generator=generator, dtype=torch.float64) - 0.2).clamp(0, 1)


def cosines(first: Tensor, second: Tensor) -> Tensor:
    return (first * second).sum(1) / (first.norm(dim=1) * second.norm(dim=1))


def plain_attack(loss: Callable[[Tensor], Tensor], images: Tensor, attack: Attack) -> Tensor:
    """PGD from a uniform start that torch's generator draws."""
    adversarial = images + torch.zeros_like(images).uniform_(-attack.eps, attack.eps)
    for _ in range(attack.steps):
        adversarial = adversarial.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(adversarial), adversarial)
        adversarial = adversarial.detach() + attack.step_size * gradient.sign()
        adversarial = torch.min(torch.max(adversarial, images - attack.eps), images + attack.eps).clamp(0, 1)
    return adversarial


def named(name: str) -> Callable[[str], str]:
    """For `torch.testing.assert_close`: a message that begins with a name."""
    return lambda message: f"{name}: {message}"


def check_same_step(
    network: Method,
    plain: nn.Module,
    views: Any,
    reference: Callable[[], tuple[Tensor, ...]],
    labels: Tensor | None = None,
    others: dict[str, nn.Parameter] | None = None,
) -> None:
    """One step of a method and of its reference, from the same random numbers, is the same.

    Args:
        network: in float64.
        plain: a copy of its encoder without branches, which the reference trains.
        views: what `network.losses` takes.
        reference: returns the losses, the total first and without those that are not compared, and the adversarial images.
        labels: pseudo-labels.
        others: the reference's parameters besides the encoder's, by their name in the network.
    """
    network.train()
    plain.train()
    taken: list[Tensor] = []
    run = Attack.run

    def watched(*args: Any) -> Tensor:
        taken.append(run(*args))
        return taken[-1]

    torch.manual_seed(7)
    with patch.object(Attack, "run", watched):
        losses = network.losses(views, labels)
    torch.manual_seed(7)
    *expected, adversarial = reference()
    torch.testing.assert_close(taken[0], adversarial, rtol=0, atol=1e-12)
    centre = views.student if hasattr(views, "student") else views
    assert (adversarial - centre).abs().max() > 0.9 * network.attack.eps
    torch.testing.assert_close(torch.stack(list(losses)), torch.stack(list(expected)), rtol=1e-9, atol=1e-12)
    losses.total.backward()
    expected[0].backward()
    ours = {name.replace(".bn_branches.adv", ""): p for name, p in network.named_parameters()}
    theirs = {f"encoder.{name}": p for name, p in plain.named_parameters()} | (others or {})
    assert ours.keys() == theirs.keys()
    for name, parameter in ours.items():
        assert parameter.grad is not None and theirs[name].grad is not None, name
        torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=1e-8, atol=1e-11, msg=named(name))
        assert parameter.grad.norm() > 1e-6, f"{name}: the gradient is too small to compare"
    buffers = dict(plain.named_buffers())
    after = dict(network.plain_encoder().named_buffers())
    assert len(after) > 20 and after.keys() == buffers.keys()
    for name, buffer in after.items():
        torch.testing.assert_close(buffer, buffers[name], rtol=1e-10, atol=1e-12, msg=named(name))
