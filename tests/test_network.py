"""From a recipe to a network, an optimizer and a schedule; compiled or with statistics over all processes, the same network."""

import math
import shutil

import pytest
import torch
from torch import nn

from train.network import build_encoder, build_network, build_optimizer, build_schedule
from train.recipe import Recipe, load_recipe

SHAPE = (3, 16, 16)


def recipe(*overrides: str) -> Recipe:
    small = ["model_kwargs.channels=[8,8,16]", "pseudo_labels.ks=[3]", "speed.mixed_precision=no"]
    return load_recipe("digits_demo", [*small, *overrides])


def test_synchronised_batch_norm_changes_layers_but_no_name(monkeypatch: pytest.MonkeyPatch) -> None:
    usual = build_network(recipe(), SHAPE)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    synchronised = build_network(recipe("speed.sync_batch_norm=true"), SHAPE)
    norms = [m for m in synchronised.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert norms and all(isinstance(m, nn.SyncBatchNorm) for m in norms)
    assert len(norms) == sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in usual.modules())
    state = synchronised.state_dict()
    assert [k for k, v in usual.state_dict().items() if not torch.equal(v, state[k])] == []


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on a CPU needs g++")
def test_a_compiled_step_equals_the_usual_one() -> None:
    images = torch.randint(256, (6, *SHAPE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[0], [1], [2], [0], [1], [2]])
    results = []
    for compiled in (False, True):
        network = build_network(recipe(), SHAPE)
        if compiled:
            network.encoder.compile()
        torch.manual_seed(0)
        losses = network(images, labels)
        losses.total.backward()
        gradient = torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])
        results.append((torch.stack([x.detach() for x in losses]), gradient, network.state_dict()))
    (losses, gradient, state), (other_losses, other_gradient, other_state) = results
    torch.testing.assert_close(other_losses, losses, rtol=1e-3, atol=0)
    assert (other_gradient - gradient).norm() < 0.02 * gradient.norm()
    for name, value in state.items():  # every branch saw its own views
        torch.testing.assert_close(other_state[name], value, rtol=1e-2, atol=1e-3)


def test_the_learning_rate_warms_up_and_falls_to_its_minimum() -> None:
    settings = ["epochs=10", "optimizer.lr=0.4", "optimizer.warmup_epochs=2", "optimizer.warmup_lr=0.1"]
    r = recipe(*settings, "optimizer.min_lr_ratio=0.01")
    optimizer = build_optimizer(r, nn.Linear(2, 2))
    schedule = build_schedule(r, optimizer, steps_per_epoch=50)
    rates = []
    for step in range(500):
        schedule.step_update(step)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates[0] == pytest.approx(0.1) and rates[50] == pytest.approx(0.25)  # linear: half-way after one epoch
    # The cosine runs over all steps; the warm-up covers its start.
    cosine = [0.004 + 0.396 * (1 + math.cos(math.pi * step / 500)) / 2 for step in range(100, 500)]
    assert rates[100:] == pytest.approx(cosine)


@pytest.mark.parametrize(("name", "kind"), [("sgd", torch.optim.SGD), ("adamw", torch.optim.AdamW)])
def test_the_optimizer_has_every_parameter(name: str, kind: type[torch.optim.Optimizer]) -> None:
    network = build_network(recipe(), SHAPE)
    optimizer = build_optimizer(recipe(f"optimizer.name={name}", "optimizer.weight_decay=0.05"), network)
    assert type(optimizer) is kind
    assert {p for g in optimizer.param_groups for p in g["params"]} == set(network.parameters())
    assert all(g["weight_decay"] == 0.05 for g in optimizer.param_groups)


def test_the_encoder_takes_images_as_they_are() -> None:
    cfg = build_encoder(recipe(), SHAPE).pretrained_cfg
    assert (cfg["mean"], cfg["std"], cfg["input_size"]) == ((0.0,) * 3, (1.0,) * 3, SHAPE)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model=resnet18_cifr"], "Did you mean resnet18_cifar"),
        (["model_kwargs={drop_pth: 1}"], "drop_pth"),
        (["model=vit_tiny_patch16_224", "model_kwargs={img_size: 32}"], "does not take 3x16x16 images"),
        (["model=resnet8_cifar", "model_kwargs={global_pool: ''}"], "set model_kwargs.global_pool"),
    ],
)
def test_networks_that_cannot_be_built(overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_encoder(load_recipe("digits_demo", overrides), SHAPE)
