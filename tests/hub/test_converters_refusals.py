"""What `convert` does not take: one error that says why, no code of the file run, nothing written."""

import argparse
import errno
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from advcl_hub.hub.converters import convert, runner
from tests.support.published_networks import acl, acl_finetuned, advcl, kuangliu, solo_simclr

State = dict[str, Tensor]


def save(folder: Path, content: Any) -> Path:
    torch.save(content, folder / "model.pt")
    return folder / "model.pt"


def refusal(file: Path, **arguments: Any) -> str:
    """The error, after which the folder is not there."""
    folder = file.parent / "folder"
    with pytest.raises(ValueError) as error:
        convert(file, folder, **arguments)
    assert not folder.exists()
    assert str(file.parent) not in str(error.value)
    return str(error.value)


# -------------------------------------------------------------------------------------------------------- files


class Payload:
    """Unpickling this makes a folder."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_checkpoint_is_not_run(tmp_path: Path, zipped: bool) -> None:
    file, ran = tmp_path / "model.pt", tmp_path / "ran"
    content = {"state_dict": kuangliu().state_dict(), "args": Payload(ran)}
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    message = refusal(file)
    assert message.startswith(f"model.pt holds more than tensors ({os.mkdir.__module__}.mkdir): opening it would run code")
    assert not ran.exists()
    torch.load(file, weights_only=False)
    assert ran.exists(), "the payload has to work, or the test shows nothing"


def test_a_namespace_is_refused_with_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = acl_finetuned().state_dict()
    file = save(tmp_path, {"state_dict": state, "args": argparse.Namespace(lr=0.5)})
    message = refusal(file)
    assert "(argparse.Namespace)" in message
    way_out = [line.strip() for line in message.splitlines()[1:]]
    assert way_out[0] == "loaded = torch.load('model.pt', map_location='cpu', weights_only=False)"
    monkeypatch.chdir(tmp_path)
    exec("\n".join(way_out), {"torch": torch})
    convert("weights.pt", "folder")


@pytest.mark.filterwarnings("error::UserWarning", "ignore:.*torch.jit")
def test_other_pickles_are_refused(tmp_path: Path) -> None:
    """Without the warnings that torch has about them."""
    file = tmp_path / "model.pkl"
    file.write_bytes(pickle.dumps(kuangliu().state_dict()))
    assert refusal(file).startswith("model.pkl holds more than tensors (a pickle)")
    torch.jit.script(nn.Conv2d(3, 4, 3)).save(tmp_path / "model.pt")
    assert refusal(tmp_path / "model.pt").startswith("model.pt holds more than tensors (a TorchScript program)")


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_truncated_files(tmp_path: Path, kind: str) -> None:
    file, state = tmp_path / "model.pt", kuangliu().state_dict()
    if kind == "safetensors":
        save_file(state, file)
    else:
        torch.save(state, file, _use_new_zipfile_serialization=kind == "zip")
    whole = file.read_bytes()
    for length in (0, 1, 9, 100, 5000, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:length])
        assert refusal(file, mean=0, std=1).startswith("model.pt is damaged or incomplete, or neither"), length
    file.write_bytes(whole)
    convert(file, tmp_path / "folder", mean=0, std=1)


def test_a_flipped_bit_is_found(tmp_path: Path) -> None:
    """torch.load does not look."""
    file = save(tmp_path, kuangliu().state_dict())
    content = bytearray(file.read_bytes())
    weights = kuangliu().state_dict()["layer3.0.conv1.weight"].numpy().tobytes()
    content[content.index(weights)] ^= 1
    file.write_bytes(content)
    torch.load(file, weights_only=True)
    assert "checksum" in refusal(file, mean=0, std=1)


def test_a_table_of_contents_that_leads_nowhere(tmp_path: Path) -> None:
    """Seeking there is an OSError, although nothing is wrong with the disk."""
    file = save(tmp_path, kuangliu().state_dict())
    content = bytearray(file.read_bytes())
    content[content.rindex(b"PK\x06\x06") + 50] ^= 0x40
    file.write_bytes(content)
    assert refusal(file, mean=0, std=1).startswith("model.pt is damaged or incomplete, or neither")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"<!DOCTYPE html><title>Google Drive - Virus scan warning", "it starts with b'<!DOCTYPE'"),
        (
            b"version https://git-lfs.github.com/spec/v1",
            "model.pt is a Git LFS pointer, not the file itself: run `git lfs pull`",
        ),
    ],
)
def test_files_of_something_else(tmp_path: Path, content: bytes, expected: str) -> None:
    (tmp_path / "model.pt").write_bytes(content)
    assert expected in refusal(tmp_path / "model.pt")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), MemoryError),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"),
            RuntimeError,
        ),
        (OSError(errno.EIO, "Input/output error"), OSError),
        (ImportError("a broken installation"), ImportError),
    ],
)
def test_errors_of_the_machine_are_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, expected: type[Exception]
) -> None:
    def load(*_: Any, **__: Any) -> None:
        raise error

    file = save(tmp_path, acl().state_dict())
    monkeypatch.setattr(torch, "load", load)
    with pytest.raises(expected) as raised:
        convert(file, tmp_path / "folder")
    assert raised.value is error


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.pt does not exist"):
        convert(tmp_path / "none.pt", tmp_path / "folder")
    with pytest.raises(FileNotFoundError, match="is a folder, not a checkpoint file"):
        convert(tmp_path, tmp_path / "folder")


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ({"epoch": 3, "optim": {"state": {0: {"momentum_buffer": torch.ones(4, 3, 3, 3)}}}}, "epoch, optim"),
        ({}, "nothing"),
        ([torch.ones(4, 3, 3, 3)], "list"),
        ({"fc.weight": torch.ones(3, 4)}, "fc.weight"),
    ],
)
def test_files_without_a_network(tmp_path: Path, content: Any, found: str) -> None:
    message = refusal(save(tmp_path, content))
    assert message == f"model.pt holds no state dict of a convolutional network: found {found}."


def test_a_folder_of_something_else_stays(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(ValueError, match="not an earlier export"):
        convert(save(tmp_path, acl().state_dict()), tmp_path / "mine")
    assert (tmp_path / "mine" / "notes.txt").read_text(encoding="utf-8") == "mine"


@pytest.mark.parametrize(
    ("folder", "arguments", "error", "expected"),
    [
        ("folder", {"keep_head": True, "keep_projector": True}, ValueError, "keep one head, linear or projection"),
        ("folder", {"dtype": "int8"}, ValueError, "dtype must be one of float32, float16, got 'int8'"),
        ("folder", {"layout": "dynacl"}, ValueError, "layout must be auto, advcl, acl, kuangliu, solo; got 'dynacl'"),
        ("file/folder", {}, OSError, "cannot be written"),
        (".", {}, ValueError, "not an earlier export"),
    ],
)
def test_what_can_be_known_is_said_before_the_file_is_read(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    folder: str,
    arguments: dict[str, Any],
    error: type[Exception],
    expected: str,
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(runner, "read_checkpoint", lambda *_: pytest.fail("the file was read"))
    with pytest.raises(error, match=expected):
        convert(tmp_path / "model.pt", tmp_path / folder, **arguments)


# --------------------------------------------------------------------------------------------------------- keys


def without(state: State, *keys: str) -> State:
    assert set(keys) <= state.keys()
    return {k: v for k, v in state.items() if k not in keys}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda s: s | {"mu": torch.zeros(3)}, ["unknown key mu"]),
        (lambda s: s | {"layer4.2.bn1.bn_list.0.bias": torch.zeros(10)}, ["unknown key layer4.2.bn1.bn_list.0.bias"]),
        (lambda s: s | {"bn1.weight": torch.zeros(4)}, ["unknown key bn1.weight"]),
        (lambda s: s | {"layer2.0.downsample.0.weight": torch.zeros(6, 4, 1, 1)}, ["unknown key layer2.0.downsample.0.weight"]),
        (lambda s: s | {"conv1.bias": torch.zeros(4)}, ["unknown key conv1.bias"]),
        (lambda s: s | {"classifier.fc.weight": torch.zeros(3, 10)}, ["unknown key classifier.fc.weight"]),
        (lambda s: s | {"fc.weight": torch.ones(3, 10)}, ["missing key fc.bias"]),
        (lambda s: without(s, "bn1.bn_list.1.num_batches_tracked"), ["missing key bn1.bn_list.1.num_batches_tracked"]),
        (
            lambda s: without(s, "conv1.weight", "layer2.0.downsample.bn.bn_list.1.running_var", "layer1.0.bn2.bn_list.0.bias"),
            ["missing key conv1.weight", "missing key layer2.0.downsample.bn.bn_list.1.running_var"],
        ),
        (
            lambda s: (
                without(s, "layer3.1.conv2.weight")
                | {"extra.weight": torch.zeros(1), "bn1.bn_list.0.bias": torch.zeros(5)}
                | {"conv1.weight": torch.zeros(4, 1, 3, 3), "bn1.bn_list.1.weight": torch.tensor([1, 2, 3, torch.nan])}
                | {"layer1.0.conv1.weight": torch.zeros(4, 4, 3, 3, dtype=torch.int8)}
            ),
            [
                "missing key layer3.1.conv2.weight",
                "shape of bn1.bn_list.0.bias: (5,), the model has (4,)",
                "shape of conv1.weight: (4, 1, 3, 3), the model has (4, 3, 3, 3)",
                "type of layer1.0.conv1.weight: int8, not floats",
                "unknown key extra.weight",
                "values of bn1.bn_list.1.weight: not all are finite",
            ],
        ),
    ],
)
def test_every_key_without_a_place_is_listed(tmp_path: Path, change: Callable[[State], State], expected: list[str]) -> None:
    message = refusal(save(tmp_path, change(acl().state_dict())), architecture="resnet18_cifar")
    first, *problems = message.splitlines()
    assert first == "model.pt is no complete network of the layout 'acl' (2 batch-norm branches, downsample.conv):"
    assert sorted(problem.strip() for problem in problems) == expected


def test_a_branch_too_many_is_refused(tmp_path: Path) -> None:
    message = refusal(save(tmp_path, advcl().state_dict() | {"bn1.bn_list.3.weight": torch.zeros(4)}))
    assert message.splitlines()[1:] == ["  unknown key bn1.bn_list.3.weight"]


def test_heads_of_other_sizes_are_refused(tmp_path: Path) -> None:
    state = kuangliu().state_dict()
    message = refusal(save(tmp_path, state | {"fc.bias": torch.ones(3)}), mean=0, std=1)
    assert message.splitlines()[1:] == ["  unknown key fc.bias"]
    state["linear.weight"] = torch.ones(3, 11)
    assert "shape of linear.weight: (3, 11), the model has (3, 10)" in refusal(save(tmp_path, state), mean=0, std=1)


def test_an_architecture_can_be_asked_for(tmp_path: Path) -> None:
    file = save(tmp_path, acl().state_dict())
    message = refusal(file, architecture="resnet34_cifar")
    assert message.count("missing key layer3.5.") == 4 + 2 * 5 - 2
    assert "converted to resnet18_cifar, resnet34_cifar, resnet50_cifar, not to resnet18" in refusal(
        file, architecture="resnet18"
    )


@pytest.mark.parametrize("depth", [34, 50])
def test_of_another_architecture_every_key_is_listed(tmp_path: Path, depth: int) -> None:
    state = kuangliu(depth=depth).state_dict()
    file = save(tmp_path, state)
    problems = [line.strip() for line in refusal(file, architecture="resnet18_cifar", mean=0, std=1).splitlines()[1:]]
    deeper = ("layer1.2.", "layer2.2.", "layer2.3.", "layer3.2.", "layer3.3.", "layer3.4.", "layer3.5.", "layer4.2.")
    surplus = [f"unknown key {key}" for key in state if key.startswith(deeper)]
    if depth == 34:
        assert problems == surplus
    else:
        others = {"unknown key layer1.0.conv3.weight", "unknown key layer1.0.shortcut.0.weight"}
        shapes = {
            "shape of layer1.0.conv1.weight: (4, 4, 1, 1), the model has (4, 4, 3, 3)",
            "shape of linear.weight: (3, 40), the model has (3, 10)",
        }
        assert {*surplus, *others, *shapes} <= set(problems)


def test_a_prefix_of_some_keys_is_not_removed(tmp_path: Path) -> None:
    state = {f"module.{k}": v for k, v in kuangliu().state_dict().items()} | {"linear.bias": torch.ones(3)}
    assert "none of the layouts" in refusal(save(tmp_path, state), mean=0, std=1)


# ------------------------------------------------------------------------------------------- layouts and choices


@pytest.mark.parametrize(
    ("make", "said", "found"),
    [
        (advcl, "acl", "'advcl' (3 batch-norm branches, downsample.conv)"),
        (acl, "kuangliu", "'acl' (2 batch-norm branches, downsample.conv)"),
        (acl_finetuned, "advcl", "'acl' (one batch norm, downsample.0)"),
        (kuangliu, "acl", "'kuangliu' (one batch norm, shortcut.0)"),
        (solo_simclr, "acl", "'solo' (one batch norm, downsample.0 in backbone.*)"),
    ],
)
def test_a_wrong_layout_is_named(tmp_path: Path, make: Any, said: str, found: str) -> None:
    file = save(tmp_path, make().state_dict())
    assert refusal(file, layout=said) == f"model.pt is not in the layout {said!r}: its keys are those of {found}."


def renamed(state: State, old: str, new: str) -> State:
    return {key.replace(old, new): value for key, value in state.items()}


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (
            lambda: without(kuangliu().state_dict(), *(k for k in kuangliu().state_dict() if ".shortcut.1." in k)),
            "pre-activation",
        ),
        (
            lambda: renamed(acl().state_dict(), "bn_list.0", "bn_branches.clean"),
            "checkpoint of a run of advcl-hub: take the folder export",
        ),
        (lambda: timm.create_model("resnet8_cifar").state_dict(), r"basic blocks, \(1, 1, 1, 0\) in its stages"),
        (
            lambda: {"features.0.weight": torch.ones(4, 3, 3, 3)},
            r"none of the layouts advcl, acl, kuangliu, solo: its 1 keys are feat",
        ),
        (  # two copies as in DynACL's files, but those hold nothing else: of MoCo neither is taken
            lambda: {f"encoder_k.{k}": v for k, v in acl_finetuned().state_dict().items()} | {"queue": torch.ones(8, 12)},
            r"none of the layouts .* keys are encoder_k\.normalize",
        ),
    ],
)
def test_networks_of_other_codes_are_named(tmp_path: Path, make: Callable[[], State], expected: str) -> None:
    message = refusal(save(tmp_path, make()), mean=0, std=1)
    assert re.search(expected, message), message


@pytest.mark.parametrize(
    ("make", "arguments", "expected"),
    [
        (kuangliu, {}, "kuangliu's main.py takes mean (0.4914, 0.4822, 0.4465) and std (0.2023, 0.1994, 0.2010)"),
        (kuangliu, {}, "as they are, mean 0 and std 1."),
        (lambda: acl_finetuned(normalize=None), {}, "ACL's and DynACL's own networks have mean (0.485, 0.456, 0.406)"),
        (kuangliu, {"mean": 0}, "needs both mean and std"),
        (kuangliu, {"mean": (0, 0), "std": 1}, "one number or three"),
        (kuangliu, {"mean": 0, "std": (1, 0, 1)}, "std above 0"),
        (kuangliu, {"mean": float("nan"), "std": 1}, "cannot take mean nan"),
        (lambda: acl_finetuned(normalize=((0, 0, 0), (1, 0, 1))), {}, "normalize.std that are no normalisation of three"),
        (lambda: acl_finetuned(normalize=((0,), (1,))), {}, "normalize.std that are no normalisation of three channels"),
        (lambda: acl_finetuned(normalize=((0, 0, torch.inf), (1, 1, 1))), {}, "that are no normalisation of three channels"),
        (kuangliu, {"mean": 0, "std": 1, "size": 64}, "takes images of 32x32 only"),
        (acl, {"size": 4}, "8 pixels at least"),
        (acl, {"branch": "adv_ce"}, "it has clean (published as normal), adv (published as pgd)."),
        (acl, {"branch": "pgd"}, "adv (published as pgd)"),
        (acl_finetuned, {"branch": "adv"}, "one batch norm, no branches"),
        (acl_finetuned, {"label_names": ("a", "b")}, "has a head of 3 classes, but 2 label names were given"),
        (acl, {"label_names": ("a", "b")}, "has no head, but 2 label names"),
        (acl, {"entry": "ema"}, "has no entry 'ema'; it has nothing to choose"),
    ],
)
def test_choices_that_do_not_fit(tmp_path: Path, make: Any, arguments: dict[str, Any], expected: str) -> None:
    assert expected in refusal(save(tmp_path, make().state_dict()), **arguments)


def test_half_a_normalisation_is_refused(tmp_path: Path) -> None:
    file = save(tmp_path, without(acl().state_dict(), "normalize.std"))
    assert "of normalize.mean and normalize.std it has normalize.mean only" in refusal(file)
