"""`AdvCL.losses` in float64 against references that are written plainly: every pass in every step, dense losses, autograd."""

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import advcl_hub  # noqa: F401
from advcl_hub.pretraining import ACL, AdvCL, Attack, Method, SimCLR
from advcl_hub.pretraining.losses import contrastive_loss
from advcl_hub.pretraining.views import ViewConfig, Views, high_frequency
from train.benchmark.published import published_losses

N, SIZE, KS = 6, 8, (2, 3, 5)
ATTACK = Attack(steps=3)
EPS = ATTACK.eps
CLEAN_VIEWS = ("strong1", "strong2", "high_frequency")


def make_network(kind: type[Method] = AdvCL, attack: Attack = ATTACK) -> Any:
    """A small network in training mode; each norm of each branch has weights, biases and averages of its own."""
    torch.manual_seed(0)
    encoder = timm.create_model("resnet8_cifar", num_classes=0, channels=(8, 8, 12))
    network: Method
    if kind is AdvCL:
        network = AdvCL(encoder, AdvCL.Objective(), attack, ViewConfig(), KS)
    elif kind is ACL:
        network = ACL(encoder, ACL.Objective(base_temperature=0.5), attack)
    else:
        network = SimCLR(encoder, SimCLR.Objective(base_temperature=0.5))
    network.double()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            for tensor in (module.weight, module.running_var):
                nn.init.uniform_(tensor, 0.8, 1.2)
            for tensor in (module.bias, module.running_mean):
                nn.init.uniform_(tensor, -0.2, 0.2)
    return network


def make_batch() -> tuple[Views, Tensor]:
    """Views with many black and white pixels, and pseudo-labels (N, K) whose columns all differ."""
    generator = torch.Generator().manual_seed(1)
    strong1, strong2, weak = (1.4 * torch.rand(3, N, 3, SIZE, SIZE, generator=generator, dtype=torch.float64) - 0.2).clamp(0, 1)
    labels = torch.stack([torch.randint(k, (N,), generator=generator) for k in KS], 1)
    return Views(strong1, strong2, weak, high_frequency(weak, 2)), labels


def draw_noise(like: Tensor, count: int) -> Tensor:
    """One draw from torch's generator for each perturbation, as the published code draws."""
    return torch.stack([torch.zeros_like(like).uniform_(-EPS, EPS) for _ in range(count)])


def nt_xent(first: Tensor, second: Tensor, temperature: float) -> Tensor:
    """The loss of SimCLR (arXiv 2002.05709), image by image."""
    vectors = torch.cat([first, second])
    s = vectors @ vectors.T / temperature
    terms = []
    for i in range(2 * N):
        others = [j for j in range(2 * N) if j != i]
        terms.append(s[i, others].logsumexp(0) - s[i, (i + N) % (2 * N)])
    return torch.stack(terms).mean()


def project(network: SimCLR | ACL, x: Tensor, branch: str) -> Tensor:
    with network.branch.use(branch):
        return F.normalize(network.projector(network.encoder(x)), dim=1)


def simclr_losses(network: SimCLR | ACL, views: Views) -> Tensor:
    z1, z2 = (project(network, x, "clean") for x in (views.strong1, views.strong2))
    return nt_xent(z1, z2, network.objective.temperature)


def acl_losses(network: ACL, views: Views, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The dual stream of ACL (arXiv 2010.13337): a clean pair, and an adversarial pair that is attacked by its own loss."""
    images = [views.strong1, views.strong2]
    perturbed = [x + n for x, n in zip(images, noise, strict=True)]
    for _ in range(network.attack.steps):
        perturbed = [x.detach().requires_grad_() for x in perturbed]
        z1, z2 = (project(network, x, "adv") for x in perturbed)
        gradients = torch.autograd.grad(nt_xent(z1, z2, network.objective.temperature), perturbed)
        for i, gradient in enumerate(gradients):
            x = perturbed[i].detach() + network.attack.step_size * gradient.sign()
            perturbed[i] = torch.clamp(x, images[i] - EPS, images[i] + EPS).clamp(0, 1)
    z1, z2 = (project(network, x, "adv") for x in perturbed)
    clean, adversarial = simclr_losses(network, views), nt_xent(z1, z2, network.objective.temperature)
    return (clean + adversarial) / 2, clean, adversarial


def reference(network: Method, views: Views, labels: Tensor) -> Tensor:
    """The losses, the total first, of a plain implementation; its starts come from torch's generator."""
    if isinstance(network, AdvCL):
        return torch.stack(published_losses(network, views, draw_noise(views.weak, 2), labels))
    if isinstance(network, ACL):
        return torch.stack(acl_losses(network, views, draw_noise(views.strong1, 2)))
    return simclr_losses(network, views)[None]


def ours(network: Method, views: Views, labels: Tensor) -> Tensor:
    """Our step, of those views that the method has."""
    if isinstance(network, AdvCL):
        return torch.stack(network.losses(views, labels))
    pair = torch.stack([views.strong1, views.strong2])
    return torch.stack(list(network.losses(pair)))


class Pass(NamedTuple):
    """One pass of the encoder: branch, images, whether all layers are in training mode and all parameters want a gradient."""

    branch: str
    images: Tensor
    training: bool
    learns: bool


class Run(NamedTuple):
    """A network after a step: losses (the total first), passes in order, and how often the projector ran on each branch."""

    network: Any
    losses: Tensor
    passes: list[Pass]
    projections: Counter[str]

    def images(self, branch: str) -> list[Tensor]:
        return [p.images for p in self.passes if p.branch == branch]


def run(network: Any, step: Callable[..., Any], views: Views, labels: Tensor, seed: int = 7) -> Run:
    """Runs a step on a copy of the network and looks at its passes; the same seed gives the same random starts."""
    network = copy.deepcopy(network)
    passes: list[Pass] = []
    projected: list[Tensor] = []
    features: list[Tensor] = []

    def look(encoder: nn.Module, args: tuple[Tensor]) -> None:
        training = all(m.training for m in network.modules())
        learns = torch.is_grad_enabled() and all(p.requires_grad for p in network.parameters())
        passes.append(Pass(network.branch.active, args[0].detach().clone(), training, learns))

    handles = [
        network.encoder.register_forward_pre_hook(look),
        network.encoder.register_forward_hook(lambda module, args, made: features.append(made)),
        network.projector.register_forward_pre_hook(lambda module, args: projected.append(args[0])),
    ]
    torch.manual_seed(seed)
    losses = step(network, views, labels)
    for handle in handles:
        handle.remove()
    origin = {id(f): p.branch for f, p in zip(features, passes, strict=True)}
    projections = Counter(origin.get(id(f), "other") for f in projected)
    return Run(network, torch.stack(list(losses)), passes, projections)


def run_both(kind: type[Method] = AdvCL, attack: Attack = ATTACK) -> tuple[Run, Run]:
    """Our step and the reference, from the same weights and the same random numbers."""
    network, (views, labels) = make_network(kind, attack), make_batch()
    return run(network, ours, views, labels), run(network, reference, views, labels)


def check(made: Tensor, expected: Tensor, name: str, rtol: float = 1e-8, atol: float = 1e-11) -> None:
    torch.testing.assert_close(made, expected, rtol=rtol, atol=atol, msg=lambda message: f"{name}: {message}")


methods = pytest.mark.parametrize("kind", [AdvCL, ACL, SimCLR])


@methods
def test_losses_and_gradients_of_all_parameters_are_those_of_the_reference(kind: type[Method]) -> None:
    made, expected = run_both(kind)
    check(made.losses, expected.losses, "losses")
    made.losses[0].backward()
    expected.losses[0].backward()
    gradients = {name: p.grad for name, p in expected.network.named_parameters()}
    for name, p in made.network.named_parameters():
        assert p.grad is not None and gradients[name] is not None, f"{name} has no gradient"
        check(p.grad, gradients[name], name)
        if name != "projector.0.bias":  # the batch norm after it takes every constant away
            assert gradients[name].norm() > 1e-4, f"{name}: the gradient is too small to compare"


@pytest.mark.parametrize("view", CLEAN_VIEWS)
def test_the_final_loss_teaches_through_each_clean_view(view: str) -> None:
    """The gradient by the images of one view passes through that view's own projections alone."""
    network, (views, labels) = make_network(), make_batch()
    gradients = []
    for step in (ours, reference):
        images = getattr(views, view).clone().requires_grad_()
        done = run(network, step, views._replace(**{view: images}), labels)
        (gradient,) = torch.autograd.grad(done.losses[0], images, allow_unused=True)
        assert gradient is not None, f"no gradient reaches {view}"
        gradients.append(gradient)
    check(gradients[0], gradients[1], view)
    assert gradients[0].norm() > 1e-2


def test_the_losses_that_are_logged_need_no_gradient() -> None:
    network, (views, labels) = make_network(), make_batch()
    losses = network.losses(views, labels)
    assert [x.requires_grad for x in losses] == [True, False, False]


@methods
def test_every_iterate_of_the_attack_is_that_of_the_reference(kind: type[Method]) -> None:
    """From the random start to the view that is learnt, of each perturbation."""
    made, expected = run_both(kind)
    for branch in made.network.objective.branches[1:]:
        mine, theirs = made.images(branch), expected.images(branch)
        assert len(mine) == len(theirs) == (2 if kind is ACL else 1) * (ATTACK.steps + 1)
        for iterate, (x, y) in enumerate(zip(mine, theirs, strict=True)):
            check(x, y, f"{branch}, pass {iterate}", rtol=0, atol=1e-12)


def test_adversarial_views_stay_within_eps_and_within_images() -> None:
    network, (views, labels) = make_network(attack=Attack(steps=9)), make_batch()
    done = run(network, ours, views, labels)
    for branch in ("adv", "adv_ce"):
        for x in done.images(branch)[1:]:
            assert (x - views.weak).abs().max() <= EPS + 1e-15
            assert x.min() >= 0 and x.max() <= 1
        distance = (x - views.weak).abs()
        assert (distance > EPS - 1e-12).float().mean() > 0.2  # the border of the ball is reached
        assert ((x == 0) & (views.weak == 0)).any() and ((x == 1) & (views.weak == 1)).any()


@pytest.mark.parametrize("kind", [AdvCL, ACL])
@pytest.mark.parametrize("way", ["losses", "pictures"])
def test_starts_are_two_independent_uniform_draws_around_the_views_and_not_clamped(
    way: str, kind: type[Method], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without attack steps, what is encoded is the start."""
    network, (views, labels) = make_network(kind, Attack(steps=0)), make_batch()
    if way == "losses":
        done = run(network, ours, views, labels)
        starts = [x for branch in network.objective.branches[1:] for x in done.images(branch)]
    else:
        monkeypatch.setattr(network, "augment", lambda images: images)
        torch.manual_seed(7)
        shown = network.pictures(views if kind is AdvCL else torch.stack([views.strong1, views.strong2]), labels)
        starts = [x for name, x in shown.items() if name.startswith("adversarial")]
    sources = [views.weak, views.weak] if kind is AdvCL else [views.strong1, views.strong2]
    noise = torch.stack([x - source for x, source in zip(starts, sources, strict=True)]) / EPS
    torch.manual_seed(7)
    torch.testing.assert_close(noise * EPS, draw_noise(views.weak, 2), rtol=0, atol=1e-15)
    count = noise[0].numel()
    assert count > 1000 and noise.abs().max() <= 1 + 1e-12
    for one in noise:  # uniform in [-1, 1]: mean 0, standard deviation 0.577, a hundredth beyond 0.99
        assert one.mean().abs() < 0.1 and 0.54 < one.std() < 0.61 and one.max() > 0.97 and one.min() < -0.97
        assert one.unique().numel() > 0.99 * count
    assert torch.corrcoef(noise.flatten(1))[0, 1].abs() < 0.15
    assert all(x.min() < 0 and x.max() > 1 for x in starts)


def test_starts_follow_torchs_generator() -> None:
    network, (views, labels) = make_network(), make_batch()
    losses = [run(network, ours, views, labels, seed).losses for seed in (7, 7, 8)]
    assert torch.equal(losses[0], losses[1]) and not torch.equal(losses[0], losses[2])


def test_clean_views_are_encoded_once_and_each_view_through_its_branch() -> None:
    """The attack learns nothing and runs in training mode; the projector sees no features of the pseudo-label view."""
    network, (views, labels) = make_network(), make_batch()
    done = run(network, ours, views, labels)
    assert Counter((p.branch, p.learns) for p in done.passes) == {
        ("clean", True): 3,
        ("adv", False): ATTACK.steps,
        ("adv_ce", False): ATTACK.steps,
        ("adv", True): 1,
        ("adv_ce", True): 1,
    }
    assert all(p.training for p in done.passes) and all(m.training for m in done.network.modules())
    assert all(p.requires_grad for p in done.network.parameters())
    assert all(torch.equal(x, getattr(views, v)) for x, v in zip(done.images("clean"), CLEAN_VIEWS, strict=True))
    assert done.projections == {"clean": 3, "adv": ATTACK.steps + 1}


def test_in_the_attack_only_the_adversarial_view_asks_for_a_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clean projections are constant there, which saves their part of the backward pass; in the final loss all four ask."""
    network, (views, labels) = make_network(), make_batch()
    asked = []

    def counted(vectors: list[Tensor], *args: float) -> Tensor:
        asked.append([v.requires_grad for v in vectors])
        return contrastive_loss(vectors, *args)

    monkeypatch.setattr("advcl_hub.pretraining.contrastive.contrastive_loss", counted)
    network.losses(views, labels)
    assert asked == ATTACK.steps * [[False, False, False, True]] + [[True, True, True, True]]


def test_running_averages_of_the_adversarial_branches_are_those_of_the_reference() -> None:
    """Also these are exported. Those of `clean` move once a view: the reference moves them in every attack step."""
    made, expected = run_both()
    theirs = dict(expected.network.named_buffers())
    compared = 0
    for name, value in made.network.named_buffers():
        if ".adv." in name or ".adv_ce." in name:
            check(value, theirs[name], name)
            compared += 1
        elif ".clean." in name and name.endswith("num_batches_tracked"):
            assert value == 3 and theirs[name] == 3 * (ATTACK.steps + 1)
    assert compared > 20


@pytest.mark.parametrize("column", range(len(KS)))
def test_each_pseudo_label_head_learns_from_its_own_column(column: int) -> None:
    network, (views, labels) = make_network(attack=Attack(steps=0)), make_batch()
    changed = labels.clone()
    changed[:, column] = (changed[:, column] + 1) % KS[column]
    gradients = []
    for targets in (labels, changed):
        done = run(network, ours, views, targets)
        done.losses[0].backward()
        gradients.append([head.weight.grad for head in done.network.heads.values()])
    same = [torch.equal(a, b) for a, b in zip(*gradients, strict=True)]
    assert same == [i != column for i in range(len(KS))]
