"""The encoder that a run starts from: what is opened, what is refused, and what is recorded of it."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

from advcl_hub.hub.export import export_folder, load_folder
from advcl_hub.opening import weights_sha256
from advcl_hub.training.stop import StopRequest
from tests.support.small_encoders import SMALL_RESNET, export_encoder, export_teacher, save_encoder
from train.checkpoint import load_checkpoint
from train.pretrain import Trainer, pretrain
from train.recipe import Recipe, load_recipe
from train.start import open_start

TINY = [
    *("data.source=fake:60", "data.size=16", "batch_size=16", "epochs=1", "optimizer.warmup_epochs=0", "attack.steps=1"),
    *("judge.every=0", "checkpoint_minutes=0", "ema_decay=0", "method=deacl", "model_kwargs.channels=[16,16,16]"),
]


def recipe(start: Path | str, *more: str) -> Recipe:
    return load_recipe("digits_demo", [*TINY, f"start_from={start}", *more])


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_teacher(tmp_path_factory.mktemp("run") / "export")


def test_a_run_an_export_and_its_local_dir_name_are_the_same_start(teacher: Path) -> None:
    opened = [open_start(recipe(name)) for name in (teacher.parent, teacher, f"local-dir:{teacher}")]
    assert open_start(load_recipe("digits_demo", ["method=simclr"])) is None
    expected = weights_sha256(load_folder(teacher))
    for start in opened:
        assert start is not None and start.encoder.num_classes == 0
        assert (start.facts["architecture"], start.facts["weights_sha256"]) == ("resnet8_cifar", expected)
        assert start.facts["provenance"]["kind"] == "encoder"


def test_a_classifier_is_a_start_without_its_head(tmp_path: Path) -> None:
    start = open_start(recipe(export_encoder(tmp_path / "classifier", num_classes=3, **SMALL_RESNET)))
    assert start is not None and not any(key.startswith("fc.") for key in start.encoder.state_dict())


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        (
            "resnet8_cifar",
            ["model=resnet20_cifar"],
            r"a resnet8_cifar; the recipe trains a resnet20_cifar: set model=resnet8_cifar",
        ),
        (
            "resnet8_cifar",
            ["model_kwargs.channels=[8,8,8]"],
            r"not those of the recipe's network: set model_kwargs=\"\{'channels': \[16, 16, 16\].*\}\", as it was made",
        ),
        ("resnet8_cifar", ["model_kwargs.stem_padding=2"], "computes something else with its weights: set model_kwargs="),
        ("resnet18.a1_in1k", [], r"start_from is resnet18\.a1_in1k, a resnet18; the recipe trains a resnet8_cifar"),
        ("missing", [], "start_from: .*missing is"),
    ],
)
def test_what_is_refused_before_training(teacher: Path, tmp_path: Path, name: str, settings: list[str], message: str) -> None:
    start = {"resnet8_cifar": teacher, "missing": tmp_path / name}.get(name, name)
    with pytest.raises((ValueError, OSError), match=message):
        Trainer(recipe(start, *settings), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_profeat_says_how_to_get_a_projection_head(tmp_path: Path) -> None:
    plain = export_encoder(tmp_path / "plain", **SMALL_RESNET)
    with pytest.raises(
        FileNotFoundError, match=r"has no projector\.safetensors: export the encoder again with --keep-projector"
    ):
        Trainer(recipe(plain, "method=profeat"), tmp_path / "run")


def test_training_starts_at_these_weights_and_the_record_names_them(teacher: Path, tmp_path: Path) -> None:
    trainer = Trainer(recipe(teacher), tmp_path / "run")
    before = trainer.core.plain_encoder().state_dict()
    assert all(torch.equal(value, before[key]) for key, value in load_folder(teacher).state_dict().items())
    assert trainer.run(StopRequest())
    record = load_checkpoint(tmp_path / "run").provenance["start_from"]
    assert record["weights_sha256"] == weights_sha256(load_folder(teacher)) and record["name"].endswith("/export")


def test_a_run_does_not_go_on_from_another_teacher(teacher: Path, tmp_path: Path) -> None:
    Trainer(recipe(teacher), tmp_path / "run").begin()
    moved = export_teacher(tmp_path / "moved")  # the same weights in another place
    assert Trainer(recipe(moved), tmp_path / "run").core is not None
    other = export_encoder(tmp_path / "other", seed=5, **SMALL_RESNET)
    with pytest.raises(ValueError, match=r"started from another encoder.*Choose another --output"):
        Trainer(recipe(other), tmp_path / "run")


def test_a_run_does_not_go_on_with_another_projection_head_or_normalisation(teacher: Path, tmp_path: Path) -> None:
    made = recipe(teacher, "method=profeat")
    Trainer(made, tmp_path / "run").begin()
    changed = export_encoder(tmp_path / "head", projector=nn.Sequential(nn.Linear(16, 8)).eval(), **SMALL_RESNET)
    with pytest.raises(ValueError, match="started from another encoder"):
        Trainer(recipe(changed, "method=profeat"), tmp_path / "run")
    model = load_folder(teacher)
    cfg: Any = model.pretrained_cfg
    cfg["mean"] = (0.5, 0.5, 0.5)
    normalised = export_folder(model, tmp_path / "mean", results={"kind": "encoder"}, model_args=SMALL_RESNET)
    Trainer(recipe(teacher), tmp_path / "other").begin()
    with pytest.raises(ValueError, match=r"started from another encoder.*now mean/|mean \[0\.5"):
        Trainer(recipe(normalised), tmp_path / "other")


def test_a_finished_run_says_so_only_for_the_encoder_that_it_started_from(
    teacher: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert pretrain(recipe(teacher), tmp_path / "run", StopRequest())
    moved, other = export_teacher(tmp_path / "moved"), export_encoder(tmp_path / "other", seed=5, **SMALL_RESNET)
    caplog.set_level("INFO", "advcl")
    assert pretrain(recipe(moved), tmp_path / "run", StopRequest()) and "is finished already" in caplog.text
    with pytest.raises(ValueError, match=r"started from another encoder: run\d*/export \(weights_sha256 \w{16}, mean"):
        pretrain(recipe(other), tmp_path / "run", StopRequest())


def test_a_run_that_is_not_exported_says_how_to(teacher: Path, tmp_path: Path) -> None:
    Trainer(load_recipe("digits_demo", [s for s in TINY if s != "method=deacl"] + ["method=simclr"]), tmp_path / "run").begin()
    with pytest.raises(FileNotFoundError, match=r"run without export: finish it, or `python -m train\.export"):
        open_start(recipe(tmp_path / "run"))


def test_a_teacher_of_normalised_images_gives_a_student_of_such_images(tmp_path: Path) -> None:
    """A stock network of timm with mean and standard deviation; the export keeps both."""
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
    start = save_encoder(tmp_path / "timm", mean=mean, std=std)
    # Of bfloat16 convolutions on maps of one pixel oneDNN gives gradients that are not finite, sometimes.
    settings = [
        "model=test_resnet",
        "model_kwargs={}",
        "speed.mixed_precision=no",
        "speed.channels_last=false",
        "judge.every=1",
        "judge.train_images=20",
        "judge.val_images=5",
    ]
    made = load_recipe("digits_demo", [*[s for s in TINY if "channels" not in s], f"start_from=local-dir:{start}", *settings])
    trainer = Trainer(made, tmp_path / "run")
    images = torch.rand(4, 3, 16, 16)
    inputs = (images - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    torch.testing.assert_close(trainer.core.inputs(images), inputs)
    torch.testing.assert_close(
        trainer.core.teacher(inputs), timm.create_model(f"local-dir:{start}", pretrained=True, num_classes=0).eval()(inputs)
    )
    assert trainer.run(StopRequest())
    cfg = load_folder(tmp_path / "run" / "export").pretrained_cfg
    assert (tuple(cfg["mean"]), tuple(cfg["std"])) == (mean, std)
