"""python -m train.export: which weights of a run go where, and what it says."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from advcl_hub.hub.export import WEIGHTS, load_folder
from advcl_hub.hub.projector import PROJECTOR, load_projector
from advcl_hub.training.state import group
from train.checkpoint import load_checkpoint
from train.export import export_checkpoint, main
from train.network import build_network
from train.pretrain import Trainer
from train.recipe import load_recipe


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with averaged weights, stopped after its first step."""
    folder = tmp_path_factory.mktemp("export") / "run"
    settings = ["data.source=fake:120", "objective.pseudo_label_weight=0", "judge.every=0", "speed.mixed_precision=no"]
    trainer = Trainer(load_recipe("digits_demo", [*settings, "batch_size=16", "attack.steps=1"]), folder)
    trainer.begin()
    trainer.train_step(*next(trainer.remaining_batches()))
    trainer.save()
    return folder


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


@pytest.mark.parametrize("ema", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_projection_head_goes_with_its_encoder(run: Path, tmp_path: Path, ema: bool, dtype: str) -> None:
    checkpoint = load_checkpoint(run)
    for key, value in checkpoint.tensors.items():
        if key.startswith("ema.") and value.is_floating_point():
            value += 0.25  # after one step the averaged weights are the others
    folder = export_checkpoint(checkpoint, tmp_path / "e", ema=ema, dtype=dtype, projector=True)
    weights = group(checkpoint.tensors, "ema.projector" if ema else "model.projector")
    rounded = {
        k: v.to(getattr(torch, dtype)).float() for k, v in weights.items() if v.is_floating_point() and "running" not in k
    }
    stored = weights | rounded
    projector, found = load_projector(folder), load_projector(folder).state_dict()
    assert found.keys() == stored.keys() and [key for key, value in stored.items() if not torch.equal(found[key], value)] == []
    shape = tuple(checkpoint.provenance["data"]["shape"])
    trained = build_network(checkpoint.recipe, shape).projector.eval()
    trained.load_state_dict(stored)
    features = load_folder(folder)(torch.rand(2, *shape))
    assert torch.equal(projector(features), trained(features))  # the layers are those of the run


def test_the_command_keeps_the_projection_head(run: Path, tmp_path: Path, export: Callable[..., str]) -> None:
    export("--output", str(tmp_path / "e"), "--keep-projector", "--no-ema")
    expected = load_checkpoint(run).projector_state(ema=False)
    assert torch.equal(load_projector(tmp_path / "e").state_dict()["0.weight"], expected["0.weight"])


def test_no_projection_head_by_default_and_none_where_there_is_none(
    run: Path, tmp_path: Path, export: Callable[..., str]
) -> None:
    export("--output", str(tmp_path / "e"))
    assert not (tmp_path / "e" / PROJECTOR).exists()
    checkpoint = load_checkpoint(run)
    checkpoint.tensors = {key: value for key, value in checkpoint.tensors.items() if ".projector." not in key}
    export_checkpoint(checkpoint, tmp_path / "plain")
    with pytest.raises(ValueError, match="has no projection head, its method trains none"):
        export_checkpoint(checkpoint, tmp_path / "other", projector=True)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--linear-head", "--keep-projector"], "--keep-projector goes with the encoder, not with --linear-head"),
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
