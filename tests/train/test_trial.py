"""The trial of a recipe's step: what it measures, how many epochs fit, and what becomes of a compiler that fails."""

import json
from pathlib import Path
from typing import Any

import pytest

from advcl_hub.records import counted
from train import trial
from train.benchmark.timing import Timing
from train.pretrain import Trainer
from train.recipe import load_recipe
from train.trial import COMPILED, EAGER, Way, choose

TINY = [
    *("digits_demo", "data.source=fake:40", "data.size=16", "data.val_fraction=0", "batch_size=8", "judge.every=0"),
    *("model_kwargs.channels=[16,16,16]", "pseudo_labels.ks=[2]", "attack.steps=1"),
]


def way(step: float, first: float) -> Way:
    return Way(Timing(step, step, step), first, None)


def test_as_many_epochs_fit_as_the_learning_rate_needs_to_reach_its_end() -> None:
    """Analytic: 1000 s less 6 % of it, less 20 s of compilation, in steps of 0.1 s, 95 an epoch."""
    assert way(0.1, 20.1).epochs(1000, 95) == int((940 - 20) / 9.5) == 96
    assert way(0.1, 0.1).epochs(1000, 95) == int(940 / 9.5) == 98
    assert way(0.1, 2000.0).epochs(1000, 95) == 0
    assert way(0.1, 0.05).start_up == 0  # a first step that happens to be fast gives no time


@pytest.mark.parametrize(
    ("seconds", "chosen", "epochs"),
    [(60, EAGER, 5), (400, EAGER, 39), (1000, COMPILED, 123)],  # two minutes of compiling pay in long runs only
)
def test_compiled_or_eager_is_chosen_by_the_epochs_that_fit(seconds: float, chosen: str, epochs: int) -> None:
    ways = {EAGER: way(0.1, 0.1), COMPILED: way(0.07, 120.07)}
    assert choose(ways, seconds, 95) == (chosen, epochs)


@pytest.mark.slow
def test_a_trial_measures_the_step_that_pretraining_takes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    arguments = [*TINY, f"pseudo_labels.cache={tmp_path / 'labels'}", "--fit", "60s", "--rounds", "2"]
    with caplog.at_level("INFO", logger="advcl"):
        trial.main([*arguments, "--output", str(tmp_path)])
    assert "## Training step of the recipe" in caplog.text and "| eager | " in caplog.text
    assert [path.name for path in tmp_path.iterdir() if path.name != "labels"] == ["trial.json"]
    record = json.loads((tmp_path / "trial.json").read_text(encoding="utf-8"))
    assert (record["chosen"], record["steps_per_epoch"], record["fit_seconds"]) == ("eager", 5, 60.0)
    (eager,) = record["ways"].values()
    median, low, high = eager["seconds"]
    assert 0 < low <= median <= high and eager["images_per_second"] == pytest.approx(8 / median)
    assert record["epochs"] == max(0, int((60 * 0.94 - max(0, eager["first_step_seconds"] - median)) / (5 * median)))
    assert f"Best: eager, {counted(record['epochs'], 'epoch')}. (The trial took" in caplog.text
    assert eager["graphs"] == [] and record["recipe"]["batch_size"] == 8 and {"hardware", "versions", "date"} <= set(record)
    assert eager["share_of_matrix_rate"] == pytest.approx(record["step_flops"] / median / record["matrix_flops_per_second"])


def test_operations_grow_with_the_batch_and_the_attack(tmp_path: Path) -> None:
    """19 forward-equivalents an image with one attack step, 35 with five; see test_benchmark.py."""
    counts = {}
    for batch, steps in ((8, 1), (16, 1), (8, 5)):
        overrides = [*TINY[1:], f"pseudo_labels.cache={tmp_path}", f"batch_size={batch}", f"attack.steps={steps}"]
        recipe = load_recipe(TINY[0], overrides)
        counts[batch, steps] = trial.step_flops(recipe, Trainer(recipe, tmp_path / "run"))
    assert counts[16, 1] == pytest.approx(2 * counts[8, 1], rel=0.01)
    assert counts[8, 5] / counts[8, 1] == pytest.approx(35 / 19, rel=0.05)


@pytest.mark.slow
def test_a_compiler_that_fails_costs_nothing_but_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*args: Any) -> None:
        raise RuntimeError("no C++ compiler\nand a long explanation")

    monkeypatch.setattr("train.pretrain.compile_encoder", broken)
    arguments = [*TINY, "speed.compile=true", f"pseudo_labels.cache={tmp_path / 'labels'}"]
    with caplog.at_level("INFO", logger="advcl"):
        trial.main([*arguments, "--rounds", "1", "--output", str(tmp_path)])
    record = json.loads((tmp_path / "trial.json").read_text(encoding="utf-8"))
    assert (
        record["chosen"] == EAGER
        and record["not_compiled"] == "no C++ compiler and a long explanation"
        and record["epochs"] > 0
    )
    assert "Not compiled: no C++ compiler" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["digits_dmo"], "No recipe 'digits_dmo'"),
        (["digits_demo", "attack.step=2"], "Did you mean 'attack.steps'"),
        (["digits_demo", "--rounds", "0"], "--rounds must be at least 1"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(arguments: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as refused:
        trial.main([*arguments, "--output", str(tmp_path / "out")])
    assert message in str(refused.value) and not (tmp_path / "out").exists()
