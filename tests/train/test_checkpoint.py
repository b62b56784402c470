"""Checkpoints of earlier versions: what runs had begun goes on under the name that its method has now."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from advcl_hub.training.state import load_state, save_state
from train.checkpoint import load_checkpoint
from train.pretrain import Trainer
from train.recipe import load_recipe

PAIR = ["strong1", "strong2"]
EARLIER: dict[str, dict[str, Any]] = {
    "advcl": {"clean_views": [*PAIR, "high_frequency"], "adversarial_views": ["weak"], "pairing": "joint"},
    "simclr": {"clean_views": PAIR, "adversarial_views": [], "pairing": "joint"},
    "acl": {"clean_views": PAIR, "adversarial_views": PAIR, "pairing": "separate"},
}
TINY = ["data.source=fake:40", "data.size=16", "model_kwargs.channels=[16,16,16]", "batch_size=16", "judge.every=0"]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    trainer = Trainer(load_recipe("digits_demo", [*TINY, "objective.pseudo_label_weight=0"]), tmp_path / "run")
    trainer.begin()
    return tmp_path / "run"


@pytest.mark.parametrize("method", EARLIER)
def test_settings_of_advcls_objective_become_a_method(run: Path, method: str) -> None:
    recipe = load_checkpoint(run).recipe
    info, tensors = load_state(run)
    before = info["recipe"]
    del before["method"], before["start_from"]
    before["objective"] |= {**EARLIER[method], "pseudo_label_weight": 0.0}
    save_state(run, info, tensors)
    earlier = load_checkpoint(run).recipe
    expected = load_recipe("digits_demo", [f"method={method}"]).objective
    if method == "advcl":
        expected = replace(expected, pseudo_label_weight=0.0)
    assert (earlier.method, earlier.objective) == (method, expected)
    assert replace(earlier, method="advcl", objective=recipe.objective) == recipe


def test_a_run_from_before_the_rule_of_the_warm_up_still_opens(run: Path) -> None:
    info, tensors = load_state(run)
    info["recipe"]["optimizer"] |= {"lr": 1e-3, "warmup_lr": 0.01}  # which `load_recipe` refuses now
    save_state(run, info, tensors)
    assert load_checkpoint(run).recipe.optimizer.lr == 1e-3


def test_what_no_method_does_any_more_is_said_with_its_file(run: Path) -> None:
    info, tensors = load_state(run)
    info["recipe"]["objective"] |= {"clean_views": PAIR, "adversarial_views": ["weak"], "pairing": "joint"}
    save_state(run, info, tensors)
    with pytest.raises(
        ValueError, match=r"run/checkpoint\.safetensors is of another version.*contrasts \['strong1'.*continue it"
    ):
        load_checkpoint(run)
