"""The trainer as a user runs it: whole runs in real processes, killed, stopped, continued, refused."""

import json
import logging
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import timm
import torch

import advcl_hub  # noqa: F401
from advcl_hub.data import decoding
from advcl_hub.hub.export import verify_folder
from advcl_hub.training.runlog import read_log
from advcl_hub.training.seeds import mix
from advcl_hub.training.state import FILE, group
from advcl_hub.training.stop import StopRequest
from tests.support import warm
from tests.support.held import HELD, program
from tests.support.image_files import encode, pixels, write
from tests.support.slow import slow
from train.checkpoint import load_checkpoint
from train.pretrain import Trainer, main, pretrain
from train.recipe import load_recipe

TINY = [
    *("data.source=fake:120", "data.size=16", "batch_size=16", "epochs=3", "optimizer.warmup_epochs=1", "attack.steps=1"),
    *("pseudo_labels.ks=[3]", "judge.every=0", "model_kwargs.channels=[16,16,16]", "checkpoint_minutes=0"),
]


def command(output: Path, *arguments: str) -> list[str]:
    settings = [*TINY, *arguments, f"pseudo_labels.cache={output.parent / 'labels'}"]
    return ["-m", "train.pretrain", "digits_demo", *settings, "--output", str(output)]


@contextmanager
def held(step: int, output: Path, *arguments: str) -> Iterator[warm.Warm]:
    """The command, while it waits after a step."""
    with warm.start(*program("train.pretrain", f"at_step({step})"), *command(output, *arguments)[2:]) as process:
        process.wait_for(HELD)
        yield process


def run(output: Path, *arguments: str, code: int = 0) -> str:
    done = warm.run(*command(output, *arguments), code=code)
    return done.stdout + done.stderr


def refusal(output: Path, *arguments: str) -> str:
    """What the command, called in this process, ends with."""
    with pytest.raises(SystemExit) as ended:
        main(["digits_demo", *TINY, *arguments, "--output", str(output), f"pseudo_labels.cache={output.parent / 'labels'}"])
    return str(ended.value)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run with averaged weights."""
    output = tmp_path_factory.mktemp("whole") / "run"
    said = run(output)
    assert 'timm.create_model("local-dir:' in said
    return output


def assert_same_weights(one: Path, other: Path) -> None:
    a, b = load_checkpoint(one), load_checkpoint(other)
    assert a.finished and b.finished and a.step == b.step == 18
    assert a.tensors.keys() == b.tensors.keys()
    assert any(k.startswith("optimizer.") for k in a.tensors) and any(k.startswith("ema.") for k in a.tensors)
    assert [k for k in a.tensors if not torch.equal(a.tensors[k], b.tensors[k])] == []


def test_what_a_run_leaves_behind(whole: Path) -> None:
    for name in ("recipe.yaml", "log.jsonl", "views.png", "curves.png", FILE, "export/config.json", "export/model.safetensors"):
        assert (whole / name).stat().st_size > 0, name
    assert any((whole / "tensorboard").iterdir())
    records = read_log(whole)
    assert records[-1]["step"] == 18 and records[-1]["epoch"] == 3
    assert records[0]["lr"] < max(r["lr"] for r in records) > records[-1]["lr"]
    assert verify_folder(whole / "export") < 1e-3
    results = json.loads((whole / "export" / "results.json").read_text(encoding="utf-8"))
    assert results["branch"] == "adv" and results["ema"] is True
    assert results["provenance"]["data"]["images"] == 110  # of 120, a tenth of every class is held out


def test_the_export_is_the_averaged_adversarial_branch(whole: Path) -> None:
    model = timm.create_model(f"local-dir:{whole / 'export'}", pretrained=True)
    expected = group(load_checkpoint(whole).tensors, "ema")
    assert torch.equal(model.state_dict()["bn1.running_mean"], expected["encoder.bn1.bn_branches.adv.running_mean"])
    assert torch.equal(model.state_dict()["conv1.weight"], expected["encoder.conv1.weight"])


def test_killed_anywhere_it_ends_with_the_same_weights(whole: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    for step in (0, 4, 11):
        with held(step, output) as process:
            process.kill()
        assert load_checkpoint(output).step == step
    run(output)
    assert_same_weights(whole, output)
    steps = [r["step"] for r in read_log(output)]
    assert steps == sorted(set(steps)), "records of the killed starts are dropped"


@pytest.mark.slow
def test_sigterm_and_time_budget_stop_cleanly_and_continue(whole: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    with held(3, output, "checkpoint_minutes=60") as process:
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate()
    assert process.returncode == 0
    assert "python -m train.pretrain digits_demo" in out and str(output) in out
    stopped = load_checkpoint(output).step
    assert stopped == 4
    assert "To continue" in run(output, "--time-budget", "0s")
    assert load_checkpoint(output).step == stopped + 1
    run(output)
    assert_same_weights(whole, output)


def test_a_finished_run_says_so(whole: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = (whole / FILE).stat().st_mtime_ns
    recipe = load_recipe("digits_demo", [*TINY, f"pseudo_labels.cache={whole.parent / 'labels'}"])
    with caplog.at_level(logging.INFO):
        assert pretrain(recipe, whole, StopRequest())
    assert "finished already" in caplog.text and f"local-dir:{whole / 'export'}" in caplog.text
    assert (whole / FILE).stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["attack.steps=2"], "attack.steps: 1 there, 2 now"),
        (["seed=5"], "seed: 0 there, 5 now"),
    ],
)
def test_another_recipe_is_refused_and_loses_nothing(whole: Path, arguments: list[str], message: str) -> None:
    before = (whole / FILE).read_bytes()
    said = refusal(whole, *arguments)
    assert said.startswith("error: ") and message in said
    assert (whole / FILE).read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model=resnet18_cifr"], "Did you mean resnet18_cifar"),
        (["model=vit_tiny_patch16_224", "model_kwargs={img_size: 32}"], "does not take 3x16x16 images"),
        (
            ["model=deit_tiny_distilled_patch16_224", "model_kwargs={img_size: 16, patch_size: 4, depth: 1}", "judge.every=1"],
            "one Linear layer",
        ),
        (["batch_size=1000"], "there are"),
        (["data.source=folder:/nowhere"], "/nowhere"),
        (["objective.pseudo_label_weight=0.2", "pseudo_labels.encoder=null", "pseudo_labels.path=/nowhere"], "/nowhere"),
        (["speed.sync_batch_norm=true"], "needs GPUs"),
    ],
)
def test_refusals_before_anything_starts(tmp_path: Path, arguments: list[str], message: str) -> None:
    said = refusal(tmp_path / "run", *arguments)
    assert said.startswith("error: ") and message in said
    assert not (tmp_path / "run").exists()


def test_a_corrupt_checkpoint_is_named(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / FILE).write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    said = run(tmp_path / "run", code=1)
    assert "is not a readable training checkpoint" in said and "Traceback" not in said


def test_a_loss_that_is_not_finite_stops_with_the_last_good_checkpoint(tmp_path: Path) -> None:
    output = tmp_path / "run"
    said = refusal(output, "optimizer.lr=1e30", "optimizer.warmup_epochs=0", "checkpoint_minutes=60")
    assert "The loss is not finite at step" in said and str(output / FILE) in said
    assert (output / "curves.png").is_file()
    assert all(v.isfinite().all() for v in load_checkpoint(output).tensors.values())


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("vit_tiny_patch16_224", "{img_size: 32, patch_size: 8, embed_dim: 24, depth: 1, num_heads: 2}"),
        slow("convnext_atto", "{patch_size: 2, depths: [1, 1, 1, 1], dims: [8, 8, 8, 8]}"),
        slow(
            "swin_tiny_patch4_window7_224",
            "{img_size: 32, patch_size: 2, window_size: 4, embed_dim: 12, depths: [2, 2], num_heads: [2, 2]}",
        ),
    ],
)
def test_stock_timm_models_train_at_32x32_by_name_and_kwargs(tmp_path: Path, name: str, kwargs: str) -> None:
    settings = [
        *TINY,
        "data.size=32",
        "epochs=2",
        "optimizer.name=adamw",
        "optimizer.lr=1e-3",
        "optimizer.warmup_lr=1e-6",
        f"pseudo_labels.cache={tmp_path}",
    ]
    recipe = load_recipe("digits_demo", [*settings, f"model={name}", f"model_kwargs={kwargs}"])
    assert pretrain(recipe, tmp_path / "run", StopRequest())
    assert verify_folder(tmp_path / "run" / "export") < 1e-3


def write_images(folder: Path) -> None:
    for name in ("a", "b"):
        for number in range(20):
            write(folder / "train" / name / f"{number}.png", encode(pixels(16, 16)))


@pytest.mark.slow
def test_images_decoded_when_needed_train_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sets too large for memory stream through worker processes: same order, same views, same end, also after a stop."""
    write_images(tmp_path / "images")
    settings = [*TINY, f"data.source=folder:{tmp_path / 'images'}", "judge.every=1", "judge.steps=1", "batch_size=8"]
    recipe = load_recipe("digits_demo", [*settings, f"pseudo_labels.cache={tmp_path}"])
    assert pretrain(recipe, tmp_path / "whole", StopRequest())
    monkeypatch.setattr(decoding, "IN_MEMORY_BYTES", 0)
    trainer = Trainer(recipe, tmp_path / "lazy")
    assert isinstance(trainer.data.images, decoding.LazyImages)
    assert not trainer.run(StopRequest(budget=0)) and load_checkpoint(tmp_path / "lazy").step == 1
    assert pretrain(recipe, tmp_path / "lazy", StopRequest())
    one, other = (load_checkpoint(tmp_path / name) for name in ("whole", "lazy"))
    assert one.finished and other.finished and one.step == other.step == 12
    assert [k for k in one.tensors if not torch.equal(one.tensors[k], other.tensors[k])] == []


@pytest.mark.slow
def test_sigterm_to_the_whole_group_stops_a_streaming_run_cleanly(tmp_path: Path) -> None:
    """Batch schedulers signal every process of a job, the workers that decode images too."""
    write_images(tmp_path / "images")
    code = "from advcl_hub.data import decoding; decoding.IN_MEMORY_BYTES = 0; " + program("train.pretrain", "at_step(3)")[1]
    settings = [*TINY, f"data.source=folder:{tmp_path / 'images'}", "batch_size=8", "epochs=500", "data.workers=2"]
    settings += ["checkpoint_minutes=60", f"pseudo_labels.cache={tmp_path}"]
    with warm.start("-c", code, "digits_demo", *settings, "--output", tmp_path / "run") as process:
        process.wait_for(HELD)
        os.killpg(process.pid, signal.SIGTERM)
        _, err = process.communicate()
    assert process.returncode == 0, err[-3000:]
    assert load_checkpoint(tmp_path / "run").step == 4


def test_seeds_of_steps_and_ranks_differ() -> None:
    seeds = {mix(1, seed, step, rank) for seed in range(3) for step in range(50) for rank in range(4)}
    seeds |= {mix(0, seed, epoch) for seed in range(3) for epoch in range(50)}
    assert len(seeds) == 750 and all(0 <= s < 2**63 for s in seeds)
