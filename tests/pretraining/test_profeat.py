"""ProFeAT in float64 against its equations, written plainly: arXiv 2406.05796, section 4, and the published step."""

import copy

import pytest
import torch
from torch import Tensor, nn

from advcl_hub.pretraining import Attack, ProFeAT
from advcl_hub.pretraining.profeat import ProFeATViews
from tests.support.reference_steps import check_same_step, cosines, make_encoder, plain_attack, weak_images

ATTACK = Attack(steps=3)


def make_projector() -> nn.Sequential:
    """With a batch norm that has running averages of its own."""
    torch.manual_seed(2)
    projector = nn.Sequential(nn.Linear(12, 10), nn.BatchNorm1d(10), nn.ReLU(), nn.Linear(10, 4)).double()
    nn.init.uniform_(projector[1].running_mean, -0.2, 0.2)
    return projector


def make_network(**objective: float) -> ProFeAT:
    """A student that has left its teacher."""
    network = ProFeAT(make_encoder(), make_projector(), ProFeAT.Objective(**objective), ATTACK).double()  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in network.encoder.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return network


def reference(
    encoder: nn.Module, teacher: nn.Module, projector: nn.Module, views: ProFeATViews, robust_weight: float, share: float
) -> tuple[Tensor, ...]:
    """The losses of one step (total, distillation, robustness) of plain networks, and the adversarial images."""
    features = encoder(views.student)  # in training mode, before the attack
    projections = projector(features)
    target = teacher.eval()(views.teacher).detach()
    encoder.eval()

    def loss(x: Tensor) -> Tensor:
        found = encoder(x)
        return -cosines(found, features.detach()).sum() - cosines(projector(found), projector(target)).sum()

    adversarial = plain_attack(loss, views.student, ATTACK)
    encoder.train()
    robust = encoder(adversarial)

    def agreement(first: Tensor, second: Tensor) -> Tensor:
        on_projections = cosines(projector(first), projector(second)).mean()
        return (1 - share) * cosines(first, second).mean() + share * on_projections

    assert projections.shape == (len(features), 4)
    distillation, robustness = -agreement(features, target), -agreement(robust, features)
    return distillation + robust_weight * robustness, distillation, robustness, adversarial


@pytest.mark.parametrize(("robust_weight", "share"), [(8.0, 0.5), (2.0, 0.25)])
def test_a_step_is_the_published_one(robust_weight: float, share: float) -> None:
    """Losses, adversarial images, gradients of all parameters, running statistics; the projection head stays as it is."""
    network = make_network(robust_weight=robust_weight, projector_weight=share)
    views = ProFeATViews(weak_images(1), weak_images(2))
    encoder, teacher = network.plain_encoder(), copy.deepcopy(network.teacher.network)
    projector = make_projector().eval().requires_grad_(False)
    check_same_step(network, encoder, views, lambda: reference(encoder, teacher, projector, views, robust_weight, share))
    for key, value in make_projector().state_dict().items():
        assert torch.equal(network.projector.network.state_dict()[key], value)


def test_teacher_and_student_see_crops_of_their_own_and_only_the_student_autoaugment() -> None:
    """Padding and flips off: the teacher's view is the image, the student's is not; without AutoAugment both are."""
    images = torch.randint(256, (16, 3, 8, 8), dtype=torch.uint8)
    network = make_network()
    still = type(network.views)(flip=False, padding=0)
    network.views = still
    torch.manual_seed(0)
    views = network.augment(images)
    assert torch.equal(views.teacher, images / 255)
    changed = (views.student != images / 255).flatten(1).any(1)
    assert 8 < changed.sum() <= 16  # a policy of its own for each image
    assert views.student.min() >= 0 and views.student.max() <= 1
    network.autoaugment = None
    assert torch.equal(network.augment(images).student, images / 255)
    network.views = type(network.views)(padding=2)
    views = network.augment(images)
    assert not torch.equal(views.student, views.teacher)


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="projector_weight must be in"):
        ProFeAT.Objective(projector_weight=1.5)
    with pytest.raises(ValueError, match="robust_weight must not be negative"):
        ProFeAT.Objective(robust_weight=-1)
    with pytest.raises(ValueError, match="takes 7 features, the encoder has 12"):
        ProFeAT(make_encoder(), nn.Sequential(nn.Linear(7, 4)))
