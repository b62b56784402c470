"""Which learning rate a step has, and which step the averaged weights are told."""

from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch

from advcl_hub.finetuning.objective import Losses
from advcl_hub.finetuning.presets import choose_settings
from advcl_hub.finetuning.trainer import Finetuner


def learning_rate(step: int) -> float:
    """Of a step in epochs of 10 steps, with milestones after 1.5 and 2 epochs."""
    settings = choose_settings("slf", "advcl", overrides={"lr": 1.0, "milestones": (1.5, 2)})
    run: Any = SimpleNamespace(state=SimpleNamespace(step=step), steps_per_epoch=10, settings=settings)
    return Finetuner.learning_rate(run)


def test_the_learning_rate_falls_with_the_first_step_after_a_milestone() -> None:
    rates = [1.0] * 15 + [0.1] * 5 + [0.01] * 5
    assert [learning_rate(step) for step in range(25)] == pytest.approx(rates)


def test_the_averaged_weights_count_the_step_that_was_made() -> None:
    run = MagicMock(rank=0, seed=0, batch_size=4)
    run.state.step, run.settings.accumulate, run.objective.noise.return_value = 7, 1, None
    run.wrapped.return_value = Losses(*torch.zeros(4))
    with torch.random.fork_rng():
        Finetuner.train_step(run, torch.zeros(4, 2), torch.zeros(4))
    run.ema.update.assert_called_once_with(run.model, 8)
