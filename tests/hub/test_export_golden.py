"""How near to the golden output a copy has to be."""

import math
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn

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
