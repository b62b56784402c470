"""How near to the golden output a copy has to be."""

import errno
import math
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn

from advcl_hub.finetuning.encoder import zero_head
from advcl_hub.hub import export
from advcl_hub.hub.export import export_folder, load_folder, verify_folder


class Scaled(nn.Module):
    """A model whose output comes out times a factor."""

    def __init__(self, model: nn.Module, factor: float) -> None:
        super().__init__()
        self.model, self.factor = model, factor

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images) * self.factor


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return export_folder(timm.create_model("resnet8_cifar", num_classes=3), tmp_path_factory.mktemp("golden") / "e", results={})


@pytest.mark.parametrize(("factor", "near"), [(1 + 5e-4, True), (1 + 2e-3, False), (math.nan, False), (math.inf, False)])
def test_the_golden_output_may_differ_by_a_thousandth(
    folder: Path, monkeypatch: pytest.MonkeyPatch, factor: float, near: bool
) -> None:
    model = load_folder(folder)
    monkeypatch.setattr(export, "load_folder", lambda folder: Scaled(model, factor))
    if near:
        assert verify_folder(folder) == pytest.approx(5e-4, rel=0.01)
    else:
        with pytest.raises(ValueError, match="computes something else"):
            verify_folder(folder)


def test_a_head_that_was_not_trained_yet_gives_zeros_and_any_other_output_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = timm.create_model("resnet8_cifar", num_classes=3).eval()
    zero_head(model)
    folder = export_folder(model, tmp_path / "e", results={})
    assert verify_folder(folder) == 0
    monkeypatch.setattr(export, "load_folder", lambda folder: lambda images: model(images) + 0.01)
    with pytest.raises(ValueError, match="computes something else"):
        verify_folder(folder)


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), ImportError("a broken installation")])
def test_errors_of_the_machine_are_not_the_folders(folder: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def load_folder(folder: Path) -> None:
        raise error

    monkeypatch.setattr(export, "load_folder", load_folder)
    with pytest.raises(type(error)) as caught:
        verify_folder(folder)
    assert caught.value is error
