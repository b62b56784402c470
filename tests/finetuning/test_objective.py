"""The losses of finetuning against slow references that follow the published code line by line, and what they leave alone."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from advcl_hub.finetuning.objective import Objective
from advcl_hub.finetuning.presets import TWO, choose_settings

EPS, STEP, STEPS, BETA = 8 / 255, 2 / 255, 6, 6.0  # more steps than reach eps: projection counts, too


class Net(nn.Module):
    """Small, with batch norm and dropout, both of which tell training from evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv2d(3, 6, 3, 2), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten())
        self.fc = nn.Linear(6 * 9, 4)
        self.double()

    def forward(self, images: Tensor) -> Tensor:
        return 8 * self.fc(self.body(images))


def batch(count: int = 7) -> tuple[Tensor, Tensor]:
    """Images in [0, 1] with many black and white pixels, around which noise leaves [0, 1]; and labels."""
    generator = torch.Generator().manual_seed(1)
    images = (torch.rand(count, 3, 8, 8, generator=generator, dtype=torch.float64) * 1.5 - 0.25).clamp(0, 1)
    return images, torch.randint(4, (count,), generator=generator)


def build(protocol: str, network: nn.Module | None = None, **overrides: Any) -> Objective:
    settings = choose_settings(protocol, "advcl", overrides={"steps": STEPS, **overrides})
    objective = Objective(network or Net(), settings)
    objective.train()
    return objective


def trades_reference(clean: nn.Module, adv: nn.Module, x: Tensor, y: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """trades.py of github.com/yaodongyu/TRADES; with two networks trades_loss_dual of DynACL's utils.py."""
    clean.eval()
    adv.eval()
    x_adv = x.detach() + 0.001 * noise
    for _ in range(STEPS):
        x_adv.requires_grad_()
        kl = nn.KLDivLoss(reduction="sum")(F.log_softmax(adv(x_adv), 1), F.softmax(clean(x), 1))
        gradient = torch.autograd.grad(kl, [x_adv])[0]
        x_adv = x_adv.detach() + STEP * torch.sign(gradient.detach())
        x_adv = torch.min(torch.max(x_adv, x - EPS), x + EPS)
        x_adv = torch.clamp(x_adv, 0.0, 1.0)
    clean.train()
    adv.train()
    natural = F.cross_entropy(clean(x), y)
    logits_adv = adv(x_adv)
    robust = (1.0 / len(x)) * nn.KLDivLoss(reduction="sum")(F.log_softmax(logits_adv, 1), F.softmax(clean(x), 1))
    return natural + BETA * robust, x_adv


def gradients(network: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in network.named_parameters() if p.grad is not None}


def test_trades_with_one_branch_is_the_published_loss_and_attack() -> None:
    (x, y), objective, reference = batch(), build("aff"), Net()
    noise = objective.noise(x.shape, x.device)
    assert noise is not None and abs(noise.std() - 1) < 0.1
    noise = noise.double()
    expected, x_adv = trades_reference(reference, reference, x, y, noise)
    assert torch.equal(objective.attack(x, y, noise), x_adv)
    assert abs((x_adv - x).abs().max() - EPS) < 1e-12
    losses = objective(x, y, noise)
    torch.testing.assert_close(losses.total, expected, rtol=1e-12, atol=0)
    assert losses.total == losses.natural + BETA * losses.robust and losses.robust > 1e-3
    losses.total.backward()
    expected.backward()
    ours, theirs = gradients(objective.network), gradients(reference)
    assert ours.keys() == theirs.keys() and len(ours) == 6
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-9, atol=1e-14)


def test_trades_with_two_branches_is_the_published_dual_loss() -> None:
    (x, y), objective = batch(), build("aff", branches=TWO)
    noise = torch.randn(x.shape, dtype=torch.float64)
    clean, adv = Net(), Net()
    with torch.no_grad():  # statistics and scales of their own, or the two could be confused unseen
        for network, branch, shift in ((clean, "clean", 0.1), (adv, "adv", 0.3)):
            for norm in (network.body[1], objective.network.body[1].bn_branches[branch]):
                norm.bias.fill_(shift)
                norm.running_mean.fill_(-shift)
                norm.running_var.fill_(0.1 + shift)
    expected, x_adv = trades_reference(clean, adv, x, y, noise)
    assert torch.equal(objective.attack(x, y, noise), x_adv)
    losses = objective(x, y, noise)
    torch.testing.assert_close(losses.total, expected, rtol=1e-12, atol=0)
    losses.total.backward()
    expected.backward()
    ours = gradients(objective.network)
    for branch, network in (("clean", clean), ("adv", adv)):
        theirs = gradients(network)
        for leaf in ("weight", "bias"):
            key = f"body.1.bn_branches.{branch}.{leaf}"
            torch.testing.assert_close(ours[key], theirs[f"body.1.{leaf}"], rtol=1e-9, atol=1e-14)
    shared = gradients(clean)["fc.weight"] + gradients(adv)["fc.weight"]
    torch.testing.assert_close(ours["fc.weight"], shared, rtol=1e-9, atol=1e-14)


def pgd_reference(network: nn.Module, x: Tensor, y: Tensor, noise: Tensor) -> Tensor:
    """pgd_attack of DynACL's utils.py, which is also the RobustSSL benchmark's: what it starts from is not clamped."""
    network.eval()
    delta = EPS * noise
    for _ in range(STEPS):
        delta.requires_grad_()
        gradient = torch.autograd.grad(nn.CrossEntropyLoss()(network(x + delta), y), [delta])[0]
        delta = delta.detach() + STEP * gradient.sign()
        delta = torch.clamp(torch.clamp(delta, -EPS, EPS) + x, 0, 1) - x
    return (x + delta).detach()


@pytest.mark.parametrize(("protocol", "training"), [("alf", False), ("aff", True)])
def test_pgd_training_is_cross_entropy_on_the_published_attack(protocol: str, training: bool) -> None:
    (x, y), objective, reference = batch(), build(protocol, objective="pgd"), Net()
    noise = objective.noise(x.shape, x.device)
    assert noise is not None and 0.95 < noise.abs().max() <= 1
    noise = noise.double()
    x_adv = pgd_reference(reference, x, y, noise)
    seen: list[Tensor] = []
    with objective.network.register_forward_pre_hook(lambda network, inputs: seen.append(inputs[0].detach())):
        torch.testing.assert_close(objective.attack(x, y, noise), x_adv, rtol=0, atol=1e-12)
    assert len(seen) == STEPS and torch.equal(seen[0], x + EPS * noise), "the first gradient is that of the start as it is"
    assert seen[0].min() < -EPS / 2 and seen[0].max() > 1 + EPS / 2
    assert all(images.min() >= 0 and images.max() <= 1 for images in (*seen[1:], x_adv))
    reference.train(training)
    logits = reference(x_adv)
    losses = objective(x, y, noise)
    torch.testing.assert_close(losses.total, F.cross_entropy(logits, y), rtol=1e-10, atol=0)
    assert losses.robust == losses.total and losses.natural == 0
    assert losses.train_accuracy == (logits.argmax(1) == y).float().mean()


@pytest.mark.parametrize("protocol", ["slf", "sff"])
def test_standard_finetuning_is_cross_entropy_on_the_images_as_they_are(protocol: str) -> None:
    (x, y), objective, reference = batch(), build(protocol), Net()
    assert objective.noise(x.shape, x.device) is None
    reference.train(protocol == "sff")
    losses = objective(x, y, None)
    torch.testing.assert_close(losses.total, F.cross_entropy(reference(x), y), rtol=1e-12, atol=0)
    assert losses.natural == losses.total and losses.robust == 0


@pytest.mark.parametrize(("protocol", "moves"), [("slf", 0), ("alf", 0), ("sff", 1), ("aff", 2)])
def test_only_full_protocols_move_statistics_and_attacks_never_do(protocol: str, moves: int) -> None:
    (x, y), objective = batch(), build(protocol)
    noise = objective.noise(x.shape, x.device)
    before = copy.deepcopy(objective.state_dict())
    if noise is not None:
        noise = noise.double()
        objective.attack(x, y, noise)
        assert all(torch.equal(value, before[key]) for key, value in objective.state_dict().items())
        assert objective.network.training is (moves > 0)
    objective(x, y, noise)
    counts = int(objective.network.body[1].num_batches_tracked)
    assert counts == moves and objective.network.training is (moves > 0)


def test_clean_images_go_to_the_clean_branch_alone() -> None:
    (x, y), objective = batch(), build("aff", branches=TWO)
    objective(x, y, torch.randn(x.shape, dtype=torch.float64))
    branches = objective.network.body[1].bn_branches
    assert [int(branches[name].num_batches_tracked) for name in ("clean", "adv")] == [1, 1]
    expected = 0.1 * objective.network.body[0](x).mean((0, 2, 3))
    torch.testing.assert_close(branches["clean"].running_mean, expected)
    assert not torch.allclose(branches["adv"].running_mean, expected, rtol=1e-4)
