"""The training step waits nowhere for the device: it runs on `meta`, where tensors have no values that anyone could ask for."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from advcl_hub.pretraining.losses import contrastive_loss
from advcl_hub.training.ambient import undisturbed
from advcl_hub.training.runlog import Meter
from train.network import build_optimizer, build_schedule
from train.pretrain import Trainer
from train.recipe import load_recipe

pytestmark = pytest.mark.usefixtures("fresh_accelerator")
META = torch.device("meta")
SIMCLR = ("objective.clean_views=[strong1,strong2]", "objective.adversarial_views=[]", "objective.pseudo_label_weight=0")
ACL = (
    *("objective.clean_views=[strong1,strong2]", "objective.adversarial_views=[strong1,strong2]"),
    *("objective.pairing=separate", "objective.pseudo_label_weight=0"),
)


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
    labels = torch.zeros(8, 1, dtype=torch.int64, device=META) if trainer.core.heads else None
    for _ in range(count):
        trainer.train_step(torch.zeros(8, 3, 16, 16, dtype=torch.uint8, device=META), labels)


@pytest.mark.parametrize(
    ("objective", "optimizer"),
    [((), "sgd"), ((), "adamw"), (SIMCLR, "sgd"), (ACL, "sgd")],
    ids=["AdvCL", "AdamW", "SimCLR", "ACL"],
)
def test_a_step_asks_for_no_value(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, objective: tuple[str, ...], optimizer: str
) -> None:
    """Views, attack, losses, backward, optimizer, averaged weights and the sums of the log."""
    made = trainer(tmp_path, monkeypatch, f"optimizer.name={optimizer}", *objective)
    evaluations: list[tuple[str, int]] = []

    def counted(views: Any, *args: float) -> Tensor:
        evaluations.append((views[0].device.type, len(views)))
        return contrastive_loss(views, *args)

    monkeypatch.setattr("advcl_hub.pretraining.advcl.contrastive_loss", counted)
    take_steps(made)
    attacked = {(): 3 * [("meta", 4)], SIMCLR: [("meta", 2)], ACL: 6 * [("meta", 2)]}
    assert evaluations == 2 * attacked[objective]  # the attack ran: two steps, and the loss after it
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
    made = trainer(tmp_path, monkeypatch, *SIMCLR)
    monkeypatch.setattr("advcl_hub.pretraining.advcl.contrastive_loss", lambda *args: wait(contrastive_loss(*args)))
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
