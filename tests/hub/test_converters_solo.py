"""Checkpoints of solo-learn, DeACL and ProFeAT: stems that pad by 2 pixels, two copies of a network, projection heads."""

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import advcl_hub  # noqa: F401
from advcl_hub.hub.converters import Conversion, convert, runner
from advcl_hub.hub.converters.layouts import outline
from advcl_hub.hub.export import load_folder, verify_folder
from advcl_hub.hub.projector import load_projector
from advcl_hub.models.pixel_space import PixelSpace
from tests.support.commands import invoke, run
from tests.support.published_networks import (
    DEACL,
    KUANGLIU,
    Normalize,
    Published,
    Solo,
    acl,
    acl_finetuned,
    advcl,
    advcl_finetuned,
    deacl,
    profeat,
    solo_moco,
    solo_simclr,
    solo_simsiam,
)

State = dict[str, Tensor]
AS_THEY_ARE = {"mean": 0, "std": 1}


def save(folder: Path, content: Mapping[str, Any]) -> Path:
    torch.save(dict(content), folder / "last.ckpt")
    return folder / "last.ckpt"


def lightning(folder: Path, network: nn.Module) -> Path:
    """A file as Lightning writes it."""
    more = {"epoch": 99, "global_step": 19500, "optimizer_states": [{"state": {0: {"momentum_buffer": torch.ones(2)}}}]}
    return save(folder, {"state_dict": network.state_dict(), "pytorch-lightning_version": "1.6.0", **more})


def images(size: int = 32) -> Tensor:
    return torch.rand(3, 3, size, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def outputs(folder: Path, size: int = 32) -> Tensor:
    with torch.no_grad():
        return PixelSpace(load_folder(folder)).double()(images(size))


def check(done: Conversion, *parts: nn.Module, size: int = 32) -> None:
    """The folder computes what the published parts compute one after the other."""
    with torch.no_grad():
        expected = nn.Sequential(*copy.deepcopy(parts)).double().eval()(images(size))
    assert expected.std(0).max() > 1e-3, "the outputs have to depend on the image"
    torch.testing.assert_close(outputs(done.folder, size), expected, rtol=1e-9, atol=1e-9)


def refusal(file: Path, **arguments: Any) -> str:
    """The error, after which the folder is not there."""
    with pytest.raises(ValueError) as error:
        convert(file, file.parent / "folder", **arguments)
    assert not (file.parent / "folder").exists()
    return str(error.value)


# ----------------------------------------------------------------------------------------------------- networks


@pytest.mark.parametrize("depth", [18, 50])
def test_solo_learns_encoder(tmp_path: Path, depth: int) -> None:
    """Through timm, with the padding in the config and not only in the tensors of this process."""
    network = solo_simclr(depth=depth)
    done = convert(lightning(tmp_path, network), tmp_path / "folder", keep_head=False, mean=KUANGLIU[0], std=KUANGLIU[1])
    check(done, Normalize(*KUANGLIU), network.backbone)
    assert (done.layout, done.record["kind"], done.record["entry"]) == ("solo", "encoder", "state_dict/backbone")
    assert done.record["architecture"] == f"resnet{depth}_cifar"
    config = json.loads((done.folder / "config.json").read_text(encoding="utf-8"))
    assert config["model_args"]["stem_padding"] == 2
    assert config["pretrained_cfg"]["pool_size"] == [5, 5]
    assert verify_folder(done.folder) < 1e-6
    model = timm.create_model(f"local-dir:{done.folder}", pretrained=True, features_only=True)
    assert [tuple(level.shape[-2:]) for level in model(torch.rand(1, 3, 32, 32))] == [(s, s) for s in (34, 34, 17, 9, 5)]
    assert done.record["dropped"] == {
        "projection head": [f"projector.{i}.{leaf}" for i in (0, 2) for leaf in ("weight", "bias")],
        "linear head, which was not wanted": ["classifier.weight", "classifier.bias"],
    }
    assert any("by 2 pixels" in note for note in done.record["notes"])


def test_the_padding_matters(tmp_path: Path) -> None:
    """What resnet18_cifar makes of the same weights is far from what they were trained as."""
    network = solo_simclr()
    done = convert(lightning(tmp_path, network), tmp_path / "folder", keep_head=False, **AS_THEY_ARE)
    model = load_folder(done.folder).double()
    usual = timm.create_model("resnet18_cifar", num_classes=0, channels=(4, 6, 8, 10)).double().eval()
    usual.load_state_dict(model.state_dict())
    with torch.no_grad():
        ours, theirs = model(images()), usual(images())
    assert (ours - theirs).abs().max() > 0.05 * ours.abs().max()


def test_the_output_check_finds_another_padding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "outline", lambda *arguments: replace(outline(*arguments), stem_padding=1))
    assert "computes something else after its conversion" in refusal(lightning(tmp_path, solo_simclr()), **AS_THEY_ARE)


def test_the_linear_head_of_pretraining_makes_a_classifier(tmp_path: Path) -> None:
    network = solo_simclr()
    done = convert(lightning(tmp_path, network), tmp_path / "folder", label_names=("a", "b", "c"), **AS_THEY_ARE)
    check(done, network.backbone, network.classifier)
    assert done.record["kind"] == "classifier"
    assert any("beside pretraining or after it" in hint for hint in done.hints)


def test_of_two_copies_the_trained_one_is_taken(tmp_path: Path) -> None:
    network = solo_moco()
    file = lightning(tmp_path, network)
    done = convert(file, tmp_path / "folder", **AS_THEY_ARE)
    check(done, network.backbone, network.classifier)
    left = done.record["dropped"]
    own = len(network.backbone.state_dict())
    assert {reason: len(keys) for reason, keys in left.items()} == {
        "another copy of the network (momentum_backbone)": own,
        "heads of the other copy of the network": 6,
        "projection head": 4,
        "memory of features": 2,
    }
    done = convert(file, tmp_path / "momentum", entry="momentum_backbone", **AS_THEY_ARE)
    check(done, network.momentum_backbone, network.momentum_classifier)
    assert done.record["entry"] == "state_dict/momentum_backbone"
    assert done.record["dropped"]["projection head"][0] == "momentum_projector.0.weight"
    assert set(done.record["dropped"]["heads of the other copy of the network"]) == {
        *("classifier.weight", "classifier.bias"),
        *(f"projector.{i}.{leaf}" for i in (0, 2) for leaf in ("weight", "bias")),
    }


def test_deacls_student_and_teacher(tmp_path: Path) -> None:
    """Both normalise images by the file's own numbers."""
    network = deacl()
    file = lightning(tmp_path, network)
    student = convert(file, tmp_path / "student", keep_head=False)
    check(student, network.backbone)
    norm = student.record["normalisation"]
    assert (norm["mean"], norm["std"]) == (list(DEACL[0]), list(DEACL[1]))
    assert norm["from"] == "the file's backbone.normalize.mean and backbone.normalize.std"
    assert student.record["dropped"]["a second linear head, which DeACL's training never trains"] == [
        "classifier_adv.weight",
        "classifier_adv.bias",
    ]
    teacher = convert(file, tmp_path / "teacher", entry="momentum_backbone")
    check(teacher, network.momentum_backbone)
    assert teacher.record["kind"] == "encoder", "the linear heads in the file are those of the student"
    check(convert(file, tmp_path / "classifier"), network.backbone, network.classifier)
    given = convert(file, tmp_path / "given", keep_head=False, **AS_THEY_ARE)
    assert any("mean 0.4914 0.4822 0.4465 and std 0.247 0.243 0.261, was replaced" in note for note in given.record["notes"])


@pytest.mark.parametrize("finetuned", [False, True])
def test_profeat(tmp_path: Path, finetuned: bool) -> None:
    """Its files are plain ones of torch.save, of a DataParallel module; its finetuning has a head `fc`."""
    network = profeat(finetuned)
    state = {f"module.{key}": value for key, value in network.state_dict().items()}
    content = {"state_dict": state, "best_acc": 0.6} if finetuned else {"model": state, "rng_state": torch.zeros(9)}
    done = convert(save(tmp_path, content), tmp_path / "folder")
    check(done, network.backbone, network.fc if finetuned else network.classifier)
    assert (done.layout, done.record["kind"]) == ("solo", "classifier")


def test_old_files_of_solo_learn_have_to_be_named(tmp_path: Path) -> None:
    """They call the network `encoder`, as many codes with another padding do."""
    network = solo_simclr(name="encoder")
    file = lightning(tmp_path, network)
    message = refusal(file, **AS_THEY_ARE)
    assert message.startswith("last.ckpt has a ResNet in encoder.*, but not what marks the files of solo-learn")
    assert message.endswith("whose stems pad images by 2 pixels, ask for the layout solo.")
    check(convert(file, tmp_path / "folder", "solo", **AS_THEY_ARE), network.encoder, network.classifier)


def test_a_backbone_alone_is_taken_for_nobodys(tmp_path: Path) -> None:
    network = solo_simclr().backbone
    file = save(tmp_path, {f"backbone.{key}": value for key, value in network.state_dict().items()})
    assert "if it is one of theirs" in refusal(file, **AS_THEY_ARE)
    check(convert(file, tmp_path / "folder", "solo", **AS_THEY_ARE), network)


def test_size_of_the_images(tmp_path: Path) -> None:
    network = solo_simclr()
    done = convert(lightning(tmp_path, network), tmp_path / "folder", size=64, keep_head=False, **AS_THEY_ARE)
    check(done, network.backbone, size=64)
    assert load_folder(done.folder).pretrained_cfg["pool_size"] == [9, 9]


# --------------------------------------------------------------------------------------------- projection heads


@pytest.mark.parametrize("make", [solo_simclr, solo_simsiam])
def test_the_projection_head_is_kept(tmp_path: Path, make: Callable[[], Solo]) -> None:
    network = make()
    done = convert(lightning(tmp_path, network), tmp_path / "folder", keep_projector=True, **AS_THEY_ARE)
    check(done, network.backbone)
    head = load_projector(done.folder).double()
    with torch.no_grad():
        expected = network.double().projector(network.backbone(images()))
        torch.testing.assert_close(head(outputs(done.folder)), expected, rtol=1e-9, atol=1e-9)
    assert expected.std(0).max() > 1e-3
    assert done.record["dropped"]["linear head: the encoder has its projection head instead"] == [
        *("classifier.weight", "classifier.bias")
    ]
    assert "projection head" not in done.record["dropped"]
    assert any("taken for ReLU (of VIbCReg it is GELU" in note for note in done.record["notes"])


def test_the_projection_head_is_that_of_the_copy(tmp_path: Path) -> None:
    network = solo_moco()
    done = convert(
        lightning(tmp_path, network), tmp_path / "folder", entry="momentum_backbone", keep_projector=True, **AS_THEY_ARE
    )
    assert torch.equal(load_projector(done.folder)[0].weight, network.momentum_projector[0].weight)
    assert "projector.0.weight" in done.record["dropped"]["heads of the other copy of the network"]


@pytest.mark.parametrize("make", [advcl, advcl_finetuned])
def test_advcls_projection_head(tmp_path: Path, make: Callable[[], Published]) -> None:
    """With a batch norm before finetuning, without one after it."""
    network = make()
    done = convert(save(tmp_path, {"model": network.state_dict()}), tmp_path / "folder", keep_projector=True)
    features = torch.rand(4, network.width)
    with torch.no_grad():
        torch.testing.assert_close(load_projector(done.folder)(features), network.head_proj.eval()(features))
    assert not any(key.startswith("head_proj.") for keys in done.record["dropped"].values() for key in keys)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: deacl().state_dict(), "has no projection head that can be kept: it has no keys projector.*"),
        (lambda: acl().state_dict(), "has no projection head that can be kept: it has no keys projector.* or head_proj.*"),
        (lambda: acl_finetuned().state_dict(), "has no projection head that can be kept"),
        (
            lambda: solo_simclr().state_dict() | {"projector.5.weight": torch.ones(4, 8), "projector.5.bias": torch.ones(4)},
            "with keys for its layers 0, 2, 5 only: what the others are is not known",
        ),
        (
            lambda: solo_simclr().state_dict() | {"projector.0.weight": torch.ones(16, 7)},
            "of 7 features, but its encoder has 10",
        ),
        (
            lambda: solo_simclr().state_dict() | {"projector.3.running_wm": torch.ones(2, 4, 4)},  # VIbCReg's IterNorm
            "has a projection head projector.* that cannot be kept",
        ),
    ],
)
def test_projection_heads_that_cannot_be_kept(tmp_path: Path, make: Callable[[], State], expected: str) -> None:
    message = refusal(save(tmp_path, make()), keep_projector=True, **AS_THEY_ARE)
    assert expected in message
    assert len(message.splitlines()) == 1


# ----------------------------------------------------------------------------------------------------- refusals


def without(state: State, *keys: str) -> State:
    assert set(keys) <= state.keys()
    return {key: value for key, value in state.items() if key not in keys}


def test_every_key_without_a_place_is_listed(tmp_path: Path) -> None:
    state = without(solo_simclr().state_dict(), "backbone.layer3.1.conv2.weight") | {
        "backbone.fc.weight": torch.ones(3, 10),
        "conv1.weight": torch.ones(4, 3, 3, 3),
        "extra.weight": torch.ones(2),
        "backbone.bn1.bias": torch.ones(5),
    }
    first, *problems = refusal(save(tmp_path, state), **AS_THEY_ARE).splitlines()
    assert first == "last.ckpt is no complete network of the layout 'solo' (one batch norm, downsample.0 in backbone.*):"
    assert sorted(problem.strip() for problem in problems) == [
        "missing key backbone.layer3.1.conv2.weight",
        "shape of backbone.bn1.bias: (5,), the model has (4,)",
        "unknown key backbone.fc.weight",
        "unknown key conv1.weight",
        "unknown key extra.weight",
    ]


def vit() -> State:
    return {"backbone.patch_embed.proj.weight": torch.ones(4, 3, 16, 16), "classifier.weight": torch.ones(3, 4)}


@pytest.mark.parametrize(
    ("make", "arguments", "expected"),
    [
        (vit, {}, "has no ResNet with torchvision's names in backbone.*, which is what is converted of solo-learn, DeACL"),
        (lambda: solo_simclr(large_stem=True).state_dict(), AS_THEY_ARE, "has the 7x7 stem of solo-learn's networks for large"),
        (lambda: solo_simclr().state_dict(), {}, "solo-learn's loaders normalise CIFAR-10 by mean (0.4914, 0.4822, 0.4465)"),
        (lambda: solo_simclr().state_dict(), {}, "DeACL's ResNet-50 takes images in [0, 1] as they are, mean 0 and std 1."),
        (lambda: without(deacl().state_dict(), "backbone.normalize.std"), {}, "of backbone.normalize.mean and backbone.normal"),
        (lambda: deacl().state_dict(), {"entry": "encoder_q"}, "has no entry 'encoder_q'; it has backbone, momentum_backbone."),
        (lambda: deacl().state_dict(), {"branch": "adv"}, "one batch norm, no branches"),
        (lambda: acl().state_dict(), {"layout": "solo"}, "is not in the layout 'solo': its keys are those of 'acl'"),
    ],
)
def test_what_is_not_taken_is_said_in_one_sentence(
    tmp_path: Path, make: Callable[[], State], arguments: dict[str, Any], expected: str
) -> None:
    message = refusal(save(tmp_path, {"state_dict": make()}), **arguments)
    assert expected in message
    assert len(message.splitlines()) == 1


@pytest.mark.slow
def test_the_command(tmp_path: Path) -> None:
    network, folder = solo_simclr(), tmp_path / "folder"
    file = lightning(tmp_path, network)
    arguments = (file, folder, "--mean", "0", "--std", "1", "--keep-projector")
    printed = run("convert", *arguments)
    assert "last.ckpt, entry state_dict/backbone: layout solo" in printed
    assert "note: The stem pads images by 2 pixels" in printed
    assert torch.equal(load_projector(folder)[2].bias, network.projector[2].bias)
    refused = invoke("convert", *arguments, "--keep-head")
    assert "keep one head, linear or projection" in refused.output and refused.exit_code == 1
