"""The published AdvCL step, reproduced number by number in float64."""

from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor

import advcl_hub  # noqa: F401
from advcl_hub.pretraining import AdvCL, Attack
from advcl_hub.pretraining.losses import contrastive_loss
from advcl_hub.pretraining.views import ViewConfig, Views, high_frequency
from tests.support.golden import KS, load_golden, published_state, ramp
from tests.support.slow import slow

GOLDEN = load_golden()
BRANCHES = {"normal": "clean", "pgd": "adv", "pgd_ce": "adv_ce"}
EPS = 8 / 255


def published_key(ours: str) -> str:
    """The published name of one of our keys, written independently of `advcl_hub.hub.converters`."""
    if ours.startswith("heads."):
        _, k, leaf = ours.split(".")
        return f"fc_{int(k):03d}.{leaf}"
    if ours.startswith("projector."):
        return ours.replace("projector", "head_proj")
    key = ours.removeprefix("encoder.").replace("downsample.0.", "downsample.conv.").replace("downsample.1.", "downsample.bn.")
    for number, branch in enumerate(BRANCHES.values()):
        key = key.replace(f"bn_branches.{branch}.", f"bn_list.{number}.")
    return key


def load_published(model: AdvCL) -> None:
    """The published network's weights, also those of the projection and the pseudo-label heads."""
    ours = model.state_dict()
    published = published_state({published_key(key): value.shape for key, value in ours.items()})
    model.load_state_dict({key: published[published_key(key)] for key in ours})


@pytest.fixture(scope="module", params=["contiguous", slow("channels_last")])
def built(request: pytest.FixtureRequest) -> AdvCL:
    encoder = timm.create_model("resnet18_cifar", num_classes=0)
    memory_format = getattr(torch, f"{request.param}_format" if request.param == "contiguous" else request.param)
    network = AdvCL(encoder, AdvCL.Objective(), Attack(), ViewConfig(), KS, memory_format)
    return network.double().to(memory_format=memory_format)


@pytest.fixture
def model(built: AdvCL) -> AdvCL:
    """As published, whatever the last test did to its statistics."""
    load_published(built)
    return built


def smooth(name: str) -> Tensor:
    return F.avg_pool2d(F.pad(ramp((8, 3, 32, 32), name), (2, 2, 2, 2), mode="reflect"), 5, stride=1)


def batch() -> tuple[Views, Tensor, Tensor]:
    weak = smooth("xo")
    views = Views(strong1=smooth("x1"), strong2=smooth("x2"), weak=weak, high_frequency=high_frequency(weak, 8))
    labels = torch.stack([(k * ramp((8,), f"lab{k}")).long() for k in KS], 1)
    noise = torch.stack([(2 * ramp((8, 3, 32, 32), name) - 1) * EPS for name in ("ncl", "nce")])
    return views, labels, noise


def check(ours: Tensor, name: str, atol: float = 0.0) -> None:
    expected = GOLDEN[name]
    torch.testing.assert_close(
        ours.detach().reshape(expected.shape), expected, rtol=1e-6, atol=atol, msg=lambda m: f"{name}: {m}"
    )


@pytest.mark.parametrize(("v", "b", "d", "t"), [(2, 6, 16, 0.5), (4, 6, 16, 0.5), (4, 8, 128, 0.1)])
def test_contrastive_loss_and_its_gradient(v: int, b: int, d: int, t: float) -> None:
    features = F.normalize(2 * ramp((b, v, d), f"feat{v}{b}{d}") - 1, dim=2).requires_grad_()
    loss = contrastive_loss(features.transpose(0, 1), t)
    loss.backward()
    check(loss, f"supcon_v{v}_b{b}_d{d}_t{t}")
    assert features.grad is not None
    check(features.grad, f"supcon_grad_v{v}_b{b}_d{d}_t{t}", atol=1e-12)


@pytest.mark.parametrize("published", BRANCHES)
def test_features_of_each_branch(model: AdvCL, published: str) -> None:
    model.eval()
    with torch.no_grad():
        check(model.features(smooth("xo"), BRANCHES[published]), f"eval_feat_{published}", atol=1e-12)


@pytest.mark.slow
def test_training_step(model: AdvCL, monkeypatch: pytest.MonkeyPatch) -> None:
    """`AdvCL.losses`, which training calls, from the published noise: attack losses before each step, projections, adversarial
    views, losses, and the gradients of one whole step."""
    model.train()
    model.zero_grad()
    views, labels, noise = batch()
    monkeypatch.setattr("advcl_hub.pretraining.advcl.uniform_start", lambda images, eps: images + noise)
    terms, project = model.objective_terms, model.project
    adversarial: list[Tensor] = []
    values: list[Tensor] = []
    projections: dict[str, Tensor] = {}

    def recorded_terms(images: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        made = terms(images, *args, **kwargs)
        adversarial.append(images.detach())
        values.append(torch.stack(made).detach())
        return made

    def recorded_project(images: list[Tensor] | Tensor, branch: str) -> Tensor:
        projections[branch] = project(images, branch)
        return projections[branch]

    monkeypatch.setattr(model, "objective_terms", recorded_terms)
    monkeypatch.setattr(model, "project", recorded_project)
    losses = model.losses(views, labels)
    check(views.high_frequency, "x_hfc", atol=1e-12)
    check(torch.stack(values[:-1]), "attack_losses")
    check(adversarial[-1][0], "x_cl", atol=1e-9)
    check(adversarial[-1][1], "x_ce", atol=1e-9)
    check(projections["clean"][0], "proj_x1", atol=1e-9)
    check(projections["adv"][0], "proj_cl", atol=1e-9)
    check(losses.contrastive, "loss_contrast")
    check(losses.pseudo_label, "loss_ce")
    check(losses.total, "loss")

    losses.total.backward()
    gradients = {published_key(name): p.grad for name, p in model.named_parameters()}
    for name in [k for k in GOLDEN if k.startswith("gradnorm_")]:
        key = name.removeprefix("gradnorm_")
        gradient = gradients[key if key in gradients else f"{key}.weight"]
        assert gradient is not None
        check(gradient.norm(), name)
