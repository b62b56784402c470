"""python -m train.export: which weights of a run go where, and what it says."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from advcl_hub.hub.export import WEIGHTS, load_folder
from train.checkpoint import load_checkpoint
from train.export import export_checkpoint, main
from train.pretrain import Trainer
from train.recipe import load_recipe


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run with averaged weights, stopped after its first step."""
    folder = tmp_path_factory.mktemp("export") / "run"
    settings = ["data.source=fake:120", "objective.pseudo_label_weight=0", "judge.every=0", "speed.mixed_precision=no"]
    trainer = Trainer(load_recipe("digits_demo", [*settings, "batch_size=16", "attack.steps=1"]), folder)
    trainer.begin()
    trainer.train_step(*next(trainer.remaining_batches()))
    trainer.save()
    yield folder
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def export(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    def command(*arguments: str) -> str:
        monkeypatch.setattr("sys.argv", ["export", str(run), *arguments])
        main()
        return capsys.readouterr().out

    return command


@pytest.mark.parametrize("branch", ["clean", "adv"])
@pytest.mark.parametrize("ema", [True, False])
def test_any_branch_averaged_or_not(run: Path, tmp_path: Path, export: Callable[..., str], branch: str, ema: bool) -> None:
    said = export("--output", str(tmp_path / "e"), "--branch", branch, "--ema" if ema else "--no-ema")
    assert "not finished (step 1)" in said and f'"local-dir:{tmp_path / "e"}"' in said
    expected, stored = load_checkpoint(run).encoder_state(branch, ema), load_file(tmp_path / "e" / WEIGHTS)
    assert expected.keys() == stored.keys() and all(torch.equal(v, stored[k]) for k, v in expected.items())


def test_a_linear_head_on_the_branch_that_was_asked_for(run: Path, tmp_path: Path, export: Callable[..., str]) -> None:
    folder = tmp_path / "c"
    said = export("--output", str(folder), "--branch", "clean", "--no-ema", "--linear-head")
    assert f"advcl-hub evaluate {folder} --data fake:120" in said
    checkpoint, stored = load_checkpoint(run), load_file(folder / WEIGHTS)
    expected = checkpoint.encoder_state("clean", ema=False)
    assert expected.keys() < stored.keys() and all(torch.equal(v, stored[k]) for k, v in expected.items())
    results, config = (json.loads((folder / name).read_text(encoding="utf-8")) for name in ("results.json", "config.json"))
    assert (results["kind"], results["branch"], results["ema"]) == ("classifier", "clean", False)
    assert config["num_classes"] == 10 and len(config["label_names"]) == 10
    with pytest.raises(ValueError, match="was not made from this encoder"):
        export_checkpoint(checkpoint, tmp_path / "other", branch="adv", ema=False, classifier=load_folder(folder))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--branch", "x"], "error: No batch-norm branch 'x': this run's objective has clean, adv"),
        (["--output", "{run}"], "is not an earlier export"),
    ],
)
def test_requests_that_cannot_be_met(
    run: Path, export: Callable[..., str], capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as stop:
        export(*(a.format(run=run) for a in arguments))
    assert message in f"{stop.value}{capsys.readouterr().err}"
