"""What each step sees, what is averaged, judged, saved and compiled: the trainer in this process, step by step."""

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from advcl_hub.evaluation import Robustness
from advcl_hub.training import loop
from advcl_hub.training.runlog import read_log
from advcl_hub.training.state import FILE
from advcl_hub.training.stop import StopRequest
from tests.support.speed import needs_compiler
from train import pretrain as module
from train.checkpoint import load_checkpoint
from train.pretrain import Trainer, main, pretrain
from train.recipe import Recipe, load_recipe

TINY = [
    *("data.source=fake:120", "data.size=16", "batch_size=16", "epochs=2", "optimizer.warmup_epochs=1", "attack.steps=1"),
    *("pseudo_labels.ks=[3,5]", "judge.every=0", "model_kwargs.channels=[16,16,16]", "speed.mixed_precision=no"),
]


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[..., Recipe]:
    return lambda *settings: load_recipe("digits_demo", [*TINY, f"pseudo_labels.cache={tmp_path / 'labels'}", *settings])


class Recorder(nn.Module):
    """Stands before the network and keeps what goes in, and the state of the random numbers."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.seen: list[tuple[Tensor, Tensor | None]] = []
        self.random: list[Tensor] = []

    def forward(self, images: Tensor, labels: Tensor | None) -> Any:
        self.seen.append((images.clone(), labels))
        self.random.append(torch.get_rng_state())
        return self.network(images, labels)


def record(trainer: Trainer) -> Recorder:
    recorder = Recorder(trainer.model)
    trainer.model = recorder
    assert trainer.run(StopRequest())
    return recorder


def test_every_image_comes_once_an_epoch_with_its_own_labels_in_another_order(
    recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    trainer = Trainer(recipe(), tmp_path / "run")
    images, labels = trainer.data.images, trainer.labels
    assert isinstance(images, Tensor) and labels is not None
    row_of = {bytes(image.numpy().tobytes()): row for row, image in enumerate(images)}
    assert len(row_of) == len(images) == 110
    seen = record(trainer).seen
    assert [len(batch) for batch, _ in seen] == [16] * 12
    rows = [[row_of[image.numpy().tobytes()] for image in batch] for batch, _ in seen]
    for batch, (_, given) in zip(rows, seen, strict=True):
        assert torch.equal(given, labels[batch])
    first, second = ([row for batch in rows[i : i + 6] for row in batch] for i in (0, 6))
    assert len(set(first)) == len(set(second)) == 96 and first != second
    assert first != sorted(first)


def test_ranks_share_each_batch_without_overlap(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    trainer = Trainer(recipe("data.val_fraction=0.2"), tmp_path / "run")
    assert isinstance(trainer.data.images, Tensor)
    whole = [images for images, _ in trainer.remaining_batches()]
    trainer.world = 2
    halves = []
    for trainer.rank in range(2):
        halves.append([images for images, _ in trainer.remaining_batches()])
    assert [torch.equal(torch.cat(pair), batch) for *pair, batch in zip(*halves, whole, strict=True)] == [True] * 12


def test_every_step_draws_its_own_random_numbers(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    states = record(Trainer(recipe(), tmp_path / "run")).random
    assert len({state.numpy().tobytes() for state in states}) == len(states) == 12


def test_the_averaged_weights_follow_the_trained_ones(
    recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(recipe("ema_decay=0.9"), tmp_path / "run")
    assert trainer.ema
    slow = copy.deepcopy(trainer.core).state_dict()
    decays: list[float] = []

    def step(images: Tensor, labels: Tensor | None) -> None:
        Trainer.train_step(trainer, images, labels)
        assert trainer.ema
        decays.append(trainer.ema.get_decay(trainer.state.step))
        for key, value in trainer.core.state_dict().items():
            slow[key] = slow[key] * decays[-1] + value * (1 - decays[-1]) if value.is_floating_point() else value

    monkeypatch.setattr(trainer, "train_step", step)
    trainer.run(StopRequest())
    assert max(decays) > 0.3
    averaged, trained = trainer.ema.module.state_dict(), trainer.core.state_dict()
    for key, value in slow.items():
        if value.is_floating_point():
            torch.testing.assert_close(averaged[key], value, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(averaged["encoder.conv1.weight"], trained["encoder.conv1.weight"], atol=1e-4)


@pytest.mark.parametrize(("precision", "expected"), [("no", None), ("bf16", torch.bfloat16)])
def test_autocast_in_the_encoder_but_not_in_projections(
    recipe: Callable[..., Recipe],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    precision: str,
    expected: torch.dtype | None,
) -> None:
    trainer = Trainer(recipe(f"speed.mixed_precision={precision}", "epochs=1", "optimizer.warmup_epochs=0"), tmp_path / "run")
    batch = begun(trainer)
    inside: set[torch.dtype] = set()
    trainer.core.encoder.conv1.register_forward_hook(lambda m, i, output: inside.add(output.dtype))
    projections: set[torch.dtype] = set()
    project = trainer.core.project

    def spy(views: Any, branch: str) -> Tensor:
        result = project(views, branch)
        projections.add(result.dtype)
        torch.testing.assert_close(result.norm(dim=2), torch.ones(result.shape[:2]), rtol=0, atol=1e-5)
        return result

    monkeypatch.setattr(trainer.core, "project", spy)
    trainer.train_step(*batch)
    assert inside == {expected or torch.float32}
    assert projections == {torch.float32}


def begun(trainer: Trainer) -> tuple[Tensor, Tensor | None]:
    """Opens the run; gives its first batch."""
    trainer.begin()
    return next(trainer.remaining_batches())


def test_the_probe_judges_the_exported_weights_on_held_out_images(
    recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judged: list[dict[str, Any]] = []

    def linear_probe(encoder: nn.Module, data: Any, device: Any) -> nn.Module:
        judged.append({"state": copy.deepcopy(encoder.state_dict()), "fit": data})
        return encoder

    def robustness(probe: nn.Module, data: Any, **protocol: Any) -> Any:
        judged[-1] |= {"data": data, **protocol}
        return Robustness(0.5, 0.25, len(data), 0, 0, 0, 0)

    monkeypatch.setattr(module, "linear_probe", linear_probe)
    monkeypatch.setattr(module, "robustness", robustness)
    trainer = Trainer(recipe("judge.every=1", "judge.train_images=50", "judge.val_images=7"), tmp_path / "run")
    assert trainer.run(StopRequest())
    assert len(judged) == 2 and trainer.held_out is not None
    last, held_out = judged[-1], set(trainer.held_out.indices.tolist())
    assert len(last["data"]) == 7 and set(last["data"].indices.tolist()) <= held_out
    assert len(last["fit"]) == 50 and not set(last["fit"].indices.tolist()) & held_out
    assert (last["eps"], last["step_size"], last["steps"]) == (16 / 255, 4 / 255, 20)
    expected = load_checkpoint(tmp_path / "run").encoder_state("adv", ema=True)
    assert last["state"].keys() == expected.keys()
    assert all(torch.equal(v, last["state"][k]) for k, v in expected.items())


@pytest.mark.slow
def test_a_start_that_was_killed_leaves_no_trace(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    """The picture of the views runs the network; its passes must not move the statistics that are trained."""
    for name, starts in (("once", 1), ("twice", 2)):
        for _ in range(starts):
            trainer = Trainer(recipe(), tmp_path / name)
            trainer.train_step(*begun(trainer))
    for name in ("once", "twice", "fresh"):
        assert Trainer(recipe(), tmp_path / name).run(StopRequest())
    one, other, whole = (load_checkpoint(tmp_path / name).tensors for name in ("once", "twice", "fresh"))
    assert [k for k in whole if not (torch.equal(whole[k], one[k]) and torch.equal(whole[k], other[k]))] == []


def probes(folder: Path) -> list[float]:
    return [record["epoch"] for record in read_log(folder) if "probe_robust" in record]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[list[float]]:
    """The epochs of the probes that each drawing of the curves shows."""
    found: list[list[float]] = []
    monkeypatch.setattr(loop, "save_curves", lambda folder, panels: found.append(probes(folder)))
    return found


JUDGED = ("judge.every=1", "judge.steps=1", "judge.train_images=40", "judge.val_images=10")


def test_curves_that_are_due_show_the_probe_of_the_epoch(
    recipe: Callable[..., Recipe], tmp_path: Path, drawn: list[list[float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "_DRAW_EVERY", 0)
    assert Trainer(recipe(*JUDGED, "checkpoint_minutes=60"), tmp_path / "run").run(StopRequest())
    assert drawn == [[1], [1, 2]]


def test_a_stop_at_the_end_of_an_epoch_owes_its_probe(
    recipe: Callable[..., Recipe], tmp_path: Path, drawn: list[list[float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "_DRAW_EVERY", math.inf)
    trainer = Trainer(recipe(*JUDGED), tmp_path / "run")

    class AfterOneEpoch(StopRequest):
        @property
        def requested(self) -> bool:
            return trainer.state.step == trainer.steps_per_epoch

    assert not trainer.run(AfterOneEpoch())
    again = Trainer(recipe(*JUDGED), tmp_path / "run")
    assert again.run(StopRequest())
    assert probes(tmp_path / "run") == [1, 2]
    assert drawn == [[], [1, 2]], "at the stop and at the end"


def test_weights_that_are_not_finite_are_not_saved(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    trainer = Trainer(recipe(), tmp_path / "run")
    trainer.train_step(*begun(trainer))
    before = (tmp_path / "run" / FILE).read_bytes()
    next(trainer.core.parameters()).data[0] = torch.nan
    with pytest.raises(FloatingPointError, match=r"weights are not finite at step 1.*checkpoint\.safetensors"):
        trainer.save()
    assert (tmp_path / "run" / FILE).read_bytes() == before


def test_an_export_made_on_the_way_is_not_the_end(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    assert pretrain(recipe(), tmp_path / "run", StopRequest())
    record = tmp_path / "run" / "export" / "results.json"
    whole = record.read_text(encoding="utf-8")
    record.write_text(json.dumps(json.loads(whole) | {"step": 1, "finished": False}), encoding="utf-8")
    assert pretrain(recipe(), tmp_path / "run", StopRequest())
    assert record.read_text(encoding="utf-8") == whole


def test_an_output_that_cannot_be_written_is_refused_first(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="cannot be written"):
        Trainer(recipe("data.source=folder:/nowhere"), tmp_path / "file" / "run")


def test_an_interruption_before_training_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "load_labels", interrupted)
    with pytest.raises(SystemExit, match=r"^Interrupted"):
        main(["digits_demo", *TINY, "--output", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@needs_compiler
def test_a_compiled_run_trains_like_the_usual_one(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    losses = {}
    for compiled in ("false", "true"):
        trainer = Trainer(recipe(f"speed.compile={compiled}"), tmp_path / compiled)
        trainer.train_step(*begun(trainer))
        losses[compiled] = trainer.meter.sums
    torch.testing.assert_close(losses["true"], losses["false"], rtol=1e-3, atol=0)
