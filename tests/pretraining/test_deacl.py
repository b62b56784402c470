"""DeACL in float64 against its equations, written plainly: arXiv 2207.10899, sections 3.2 and 3.3, and the published step."""

import copy
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from advcl_hub.pretraining import Attack, DeACL, ProFeAT
from tests.support.reference_steps import check_same_step, cosines, make_encoder, plain_attack, weak_images

ATTACK = Attack(steps=3)


def make_network(weight: float = 2.0, **arguments: Any) -> DeACL:
    """A student that has left its teacher, in training mode."""
    network = DeACL(make_encoder(**arguments), DeACL.Objective(robust_weight=weight), ATTACK).double()
    with torch.no_grad():
        for parameter in network.encoder.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return network


def reference(encoder: nn.Module, teacher: nn.Module, images: Tensor, weight: float) -> tuple[Tensor, ...]:
    """The losses of one step (total, distillation, robustness) of plain networks, and the adversarial images."""
    target = teacher.eval()(images).detach()
    encoder.eval()
    adversarial = plain_attack(lambda x: -cosines(encoder(x), target).sum(), images, ATTACK)
    encoder.train()
    features = encoder(torch.cat([images, adversarial]))
    clean, robust = features[: len(images)], features[len(images) :]
    distillation, robustness = -cosines(clean, target).mean(), -cosines(robust, clean).mean()
    return distillation + weight * robustness, distillation, robustness, adversarial


@pytest.mark.parametrize("weight", [2.0, 0.5])
def test_a_step_is_the_published_one(weight: float) -> None:
    """Losses, adversarial images, gradients of all parameters, running statistics."""
    network, images = make_network(weight), weak_images()
    encoder, teacher = network.plain_encoder(), copy.deepcopy(network.teacher.network)
    check_same_step(network, encoder, images, lambda: reference(encoder, teacher, images, weight))


def test_the_student_starts_as_its_teacher_and_only_the_student_is_trained() -> None:
    encoder = make_encoder().float()
    start = copy.deepcopy(encoder.state_dict())
    network = DeACL(encoder, attack=ATTACK).train()
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    images = torch.randint(256, (6, 3, 8, 8), dtype=torch.uint8)
    losses = network(images)
    assert losses.distillation < 0 and losses.robustness < 0 and losses.total.requires_grad
    losses.total.backward()
    optimizer.step()
    assert not network.teacher.network.training and not any(p.requires_grad for p in network.teacher.network.parameters())
    assert all(torch.equal(value, start[key]) for key, value in network.teacher.network.state_dict().items())
    trained = network.plain_encoder().state_dict()
    assert not any(torch.equal(trained[key], start[key]) for key in start if key.endswith("conv1.weight"))
    assert {name.partition(".")[0] for name in network.state_dict()} == {"encoder"}  # a checkpoint does not grow by the teacher


def test_an_encoder_that_was_in_evaluation_mode_is_trained() -> None:
    """As `plain_encoder` gives it: its running averages have to move."""
    encoder = make_encoder().float().eval()
    network = DeACL(encoder, attack=ATTACK)
    before = network.plain_encoder().bn1.running_mean.clone()
    network(torch.randint(256, (6, 3, 8, 8), dtype=torch.uint8))
    assert network.encoder.training and not network.teacher.network.training
    assert not torch.equal(network.plain_encoder().bn1.running_mean, before)


def test_attack_and_student_see_images_normalised_as_the_teacher_wants() -> None:
    """eps counts in pixels: the same network with its normalisation inside takes the same step."""

    class Inside(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            return self.model(
                (x - torch.tensor([0.5, 0.4, 0.3])[:, None, None]) / torch.tensor([0.2, 0.25, 0.3])[:, None, None]
            )

    network, images = make_network(mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3)), weak_images()
    encoder, teacher = network.plain_encoder(), copy.deepcopy(network.teacher.network)
    wrapped = (Inside(encoder), Inside(teacher))
    check_same_step(network, encoder, images, lambda: reference(*wrapped, images, 2.0))


def test_settings_and_encoders_that_are_refused() -> None:
    with pytest.raises(ValueError, match="robust_weight must not be negative"):
        DeACL.Objective(robust_weight=-1)
    with pytest.raises(ValueError, match="a classifier of 1000 classes"):
        DeACL(timm.create_model("resnet10t"))
    of_another: Any = ProFeAT.Objective()
    with pytest.raises(ValueError, match=r"^DeACL takes a DeACLObjective, got ProFeATObjective\("):
        DeACL(make_encoder(), of_another)
