"""The training step waits nowhere for the device: it runs on `meta`, where tensors have no values that anyone could ask for."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from advcl_hub.pretraining import METHODS
from advcl_hub.pretraining.losses import contrastive_loss
from advcl_hub.training.ambient import undisturbed
from advcl_hub.training.runlog import Meter
from tests.support.slow import slow
from tests.support.small_encoders import export_teacher
from train.network import build_optimizer, build_schedule
from train.pretrain import Trainer
from train.recipe import load_recipe

META = torch.device("meta")
CONTRASTED = {  # by method: the views that meet in a loss, in each of its evaluations in a step: two attack steps, and the last
    "advcl": 3 * [4],
    "simclr": [2],
    "acl": 4 * [2],
}


def trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *settings: str) -> Trainer:
    """A trainer whose network, averaged weights, optimizer and meter are on the device without values."""
    tiny = [
        *("data.source=fake:40", "data.size=16", "batch_size=8", "epochs=1", "optimizer.warmup_epochs=0", "attack.steps=2"),
        *("model_kwargs.channels=[16,16,16]", "pseudo_labels.ks=[3]", f"pseudo_labels.cache={tmp_path / 'labels'}"),
        *("judge.every=0", "speed.mixed_precision=no", "ema_decay=0.9"),
    ]
    made = Trainer(load_recipe("digits_demo", [*tiny, *settings]), tmp_path / "run")
    assert made.ema
    made.ema.to(META)
    made.core.to(META)
    made.model = made.core
    made.optimizer = build_optimizer(made.recipe, made.core)
    with undisturbed(made.accelerator):
        made.stepper = made.accelerator.prepare_optimizer(made.optimizer)
    made.stepper.accelerator_state, made.stepper.gradient_state = made.accelerator.state, made.accelerator.gradient_state
    made.schedule = build_schedule(made.recipe, made.optimizer, made.steps_per_epoch)
    made.meter = Meter(META, len(made.losses))
    # torch.autocast does not know the device.
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: contextlib.nullcontext())
    return made


def take_steps(trainer: Trainer, count: int = 2) -> None:
    labels = torch.zeros(8, 1, dtype=torch.int64, device=META) if trainer.recipe.objective.uses_labels else None
    for _ in range(count):
        trainer.train_step(torch.zeros(8, 3, 16, 16, dtype=torch.uint8, device=META), labels)


@pytest.mark.parametrize(
    ("method", "optimizer"),
    [("advcl", "sgd"), *(slow(name, "sgd") for name in METHODS if name != "advcl"), slow("advcl", "adamw")],
)
def test_a_step_asks_for_no_value(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, optimizer: str) -> None:
    """Views, attack, losses, backward, optimizer, averaged weights and the sums of the log."""
    settings = [f"method={method}", f"optimizer.name={optimizer}"]
    if METHODS[method].Objective.needs_start:
        settings.append(f"start_from={export_teacher(tmp_path / 'teacher')}")
    if method == "profeat":  # torchvision's AutoAugment looks at pixels
        settings.append("objective.autoaugment=false")
    made = trainer(tmp_path, monkeypatch, *settings)
    evaluations: list[tuple[str, int]] = []

    def counted(views: Any, *args: float) -> Tensor:
        evaluations.append((views[0].device.type, len(views)))
        return contrastive_loss(views, *args)

    monkeypatch.setattr("advcl_hub.pretraining.contrastive.contrastive_loss", counted)
    take_steps(made)
    assert evaluations == 2 * [("meta", views) for views in CONTRASTED.get(method, [])]
    assert made.state.step == 2
    assert {tensor.device.type for slots in made.optimizer.state.values() for tensor in slots.values()} <= {"meta", "cpu"}
    assert all(p in made.optimizer.state for p in made.core.encoder.parameters() if p.ndim > 1)


def item(loss: Tensor) -> Tensor:
    return loss * (1 if loss.item() > 0 else 2)


def branch(loss: Tensor) -> Tensor:
    return loss if loss.isfinite() else loss * 0


def mask(loss: Tensor) -> Tensor:
    return loss[loss > 0].sum()


def copied(loss: Tensor) -> Tensor:
    return loss.cpu()


@pytest.mark.parametrize("wait", [item, branch, mask, copied])
def test_what_waits_for_the_device_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wait: Callable[[Tensor], Tensor]
) -> None:
    """The test above can fail: with any of these in the step it does."""
    made = trainer(tmp_path, monkeypatch, "method=simclr")
    monkeypatch.setattr("advcl_hub.pretraining.contrastive.contrastive_loss", lambda *args: wait(contrastive_loss(*args)))
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        take_steps(made)


def test_a_wait_in_the_encoder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = trainer(tmp_path, monkeypatch)

    class Nonzero(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * len(x.nonzero())

    made.core.encoder.act1 = Nonzero()
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        take_steps(made)
