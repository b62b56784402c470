"""timm's families of architectures train, export and open again with the same outputs, or are refused in one clear sentence."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import nn

import advcl_hub
from advcl_hub.data import ImageData
from advcl_hub.finetuning import trainer
from advcl_hub.hub.export import WEIGHTS, export_folder, verify_folder
from tests.support.slow import slow

# One small architecture of a family, with a linear head.
LINEAR = [
    "coat_lite_tiny",
    "convit_tiny",
    "cs3darknet_focus_s",
    "cspnext_tiny",
    "deit_tiny_patch16_224",
    "edgenext_xx_small",
    "efficientvit_b0",
    "efficientvit_m0",
    "ese_vovnet19b_slim_dw",
    "fasternet_t0",
    "fastvit_t8",
    "ghostnet_050",
    "hardcorenas_b",
    "hgnetv2_b0",
    "inception_next_atto",
    "lcnetv2_small",
    "mobilenetv3_small_050",
    "mobilevit_xxs",
    "pit_ti_224",
    "regnetx_002",
    "repghostnet_050",
    "resnet8_cifar",
    "rexnet_100",
    "starnet_s050",
    "test_byobnet",
    "test_coatnet",
    "test_convnext",
    "test_efficientnet",
    "test_mambaout",
    "test_nfnet",
    "test_resnet",
    "test_vit",
    "test_vit_relpos",
    "vit_tiny_patch16_dinov3_qkvb",
]
# These take a part of a second each; the others are left to `make test-all`.
QUICK = {name for name in LINEAR if name.startswith("test_")} | {"resnet8_cifar", "regnetx_002", "mobilenetv3_small_050"}
# Their heads are convolutions, have norms in them, or are several: only full finetuning takes them.
OTHER_HEADS = [
    "dla46x_c",
    "resnetv2_18",
    "efficientformerv2_s0",
    "swiftformer_xs",
    "cpubone_nano",
    "deit_tiny_distilled_patch16_224",
]
NORMED_HEADS = ("levit_128s", "repvit_m1")


@pytest.fixture
def data() -> ImageData:
    images = torch.randint(0, 256, (4, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return ImageData(images, torch.tensor([0, 1, 0, 1]), torch.arange(4), ("no", "yes"), "random")


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """The model that a run exports."""
    models: list[nn.Module] = []

    def export(model: nn.Module, *arguments: Any, **options: Any) -> Path:
        models.append(model)
        return export_folder(model, *arguments, **options)

    monkeypatch.setattr(trainer, "export_folder", export)
    return models


def check_round_trip(
    name: str, protocol: str, data: ImageData, output: Path, trained: list[nn.Module], **settings: Any
) -> None:
    """After one step of finetuning on 64x64 images the export, opened by timm, gives the outputs of the trained model."""
    if not timm.is_model(name):
        pytest.skip(f"this timm has no {name}")
    options = {"epochs": 1, "batch_size": 4, "augment": "none", "size": 64, **settings}
    tuned = advcl_hub.finetune(f"random:{name}", data, protocol, output=output, **options)
    again = timm.create_model(f"local-dir:{tuned.folder}", pretrained=True).eval()
    (model,) = trained
    assert load_file(tuned.folder / WEIGHTS).keys() == model.state_dict().keys()
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(again(images), model.eval()(images), rtol=1e-4, atol=1e-5)
    assert verify_folder(tuned.folder) < 1e-3


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "protocol"),
    [(pytest.param if name in QUICK else slow)(name, ("slf", "sff")[i % 2]) for i, name in enumerate(LINEAR)],
)
def test_linear_heads(name: str, protocol: str, data: ImageData, tmp_path: Path, trained: list[nn.Module]) -> None:
    check_round_trip(name, protocol, data, tmp_path / "run", trained)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [OTHER_HEADS[0], *map(slow, [*OTHER_HEADS[1:], *NORMED_HEADS])])
def test_other_heads_are_refused_by_linear_finetuning_and_taken_by_full(
    name: str, data: ImageData, tmp_path: Path, trained: list[nn.Module]
) -> None:
    if not timm.is_model(name):
        pytest.skip(f"this timm has no {name}")
    with pytest.raises(ValueError, match="A linear head needs a model whose classifier is one Linear layer"):
        advcl_hub.finetune(f"random:{name}", data, "slf", epochs=1, batch_size=4, size=64, output=tmp_path / "slf")
    check_round_trip(name, "sff", data, tmp_path / "run", trained)
