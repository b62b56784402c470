"""Folders of images as timm reads them: the same classes, the same pixels, the same accuracy."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.data import create_dataset, create_loader, resolve_data_config
from torch import Tensor, nn

from advcl_hub.data import load_data
from advcl_hub.data.decoding import LazyImages
from advcl_hub.data.matching import load_images
from advcl_hub.evaluation import Protocol, evaluate
from advcl_hub.models.pixel_space import PixelSpace
from advcl_hub.models.preprocessing import data_config
from tests.support.odd_sets import SETS
from tests.support.slow import slow

# Among them every interpolation, crop mode and kind of size that timm has, and ten values of crop_pct and size.
ARCHITECTURES = [
    "resnet8_cifar",
    "resnet18_cifar",
    "preact_resnet18_cifar",
    "test_resnet",
    "test_vit",
    "test_byobnet",
    "test_mambaout",
    "resnet18",
    "resnet50",
    "resnetv2_50",
    "vit_tiny_patch16_224",
    "vit_base_patch16_siglip_224",
    "deit_tiny_patch16_224",
    "convnext_atto",
    "xcit_nano_12_p16_224",
    "mobilevit_xxs",
    "fastvit_t8",
    "deepseek_vit_412m",
    "coat_lite_tiny",
    "tinynet_e",
    "efficientnet_b0",
    "tf_efficientnet_b1",
    "lcnet_035",
    "repvgg_a0",
    "regnetx_002",
    "swin_tiny_patch4_window7_224",
    "inception_v3",
    "nasnetalarge",
    "vit_base_patch14_dinov2",
    "vit_base_patch16_sapiens2",
]
NETWORKS = ("resnet8_cifar", "test_resnet", "test_vit", "test_convnext", "test_efficientnet")
# PIL rounds to 8 bits after the rows and after the columns, by half a level each; of the first a bicubic kernel makes 0.63.
ROUNDING = 1.15 / 255


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sets")
    for name, write in SETS.items():
        write(root / name)
    return root


class Recorder(nn.Module):
    """Keeps what a timm model of this architecture would see."""

    def __init__(self, architecture: str) -> None:
        super().__init__()
        cfg = timm.get_pretrained_cfg(architecture)
        assert cfg is not None
        self.pretrained_cfg = cfg.to_dict() | {"architecture": architecture}
        channels, *size = cfg.input_size
        while max(size) > 400:  # 1024x768 would take seconds
            size = [side // 2 for side in size]
        self.pretrained_cfg["input_size"] = (channels, *size)

    def forward(self, images: Tensor) -> Tensor:
        self.seen = images
        return images


def as_timm(folder: Path, model: nn.Module) -> tuple[Tensor, Tensor]:
    """All images and labels as timm's validate.py makes them of a folder with --use-train-size."""
    config = resolve_data_config(pretrained_cfg=model.pretrained_cfg)
    dataset = create_dataset(
        "", str(folder / "test"), input_img_mode="RGB" if data_config(model)["input_size"][0] == 3 else "L"
    )
    loader = create_loader(
        dataset,
        **{key: config[key] for key in ("interpolation", "mean", "std", "crop_pct", "crop_mode")},
        input_size=data_config(model)["input_size"],
        batch_size=len(dataset),
        use_prefetcher=False,
        num_workers=0,
        persistent_workers=False,
    )
    ((images, labels),) = loader
    return images, labels


@cache
def recorder(architecture: str) -> Recorder:
    return Recorder(architecture)


@pytest.mark.parametrize("name", SETS)
def test_classes_and_images_are_numbered_as_timm_does(folders: Path, name: str) -> None:
    dataset: Any = create_dataset("", str(folders / name / "test"))
    data = load_data(f"folder:{folders / name}", "test", size=8)
    assert data.classes == tuple(dataset.reader.class_to_idx)
    theirs = sorted((Path(dataset.filename(i, absolute=True)), dataset.reader.samples[i][1]) for i in range(len(dataset)))
    ours = [(folders / name / "test" / c / f"{i}", y) for y, c in enumerate(data.classes) for i in range(2)]
    if name not in ("modes", "rotated"):
        assert sorted((path.with_suffix(""), label) for path, label in theirs) == sorted(ours)
    assert sorted(data.labels.tolist()) == sorted(label for _, label in theirs)


@pytest.mark.parametrize("architecture", [*ARCHITECTURES[:7], *map(slow, ARCHITECTURES[7:])])
def test_a_model_sees_the_pixels_that_it_sees_in_timm(folders: Path, architecture: str) -> None:
    if not timm.is_model(architecture):
        pytest.skip(f"this timm has no {architecture}")
    model = recorder(architecture)
    for name in SETS:
        data = load_images(f"folder:{folders / name}", "test", None, model)
        assert not isinstance(data.images, LazyImages)
        PixelSpace(model, fit=not data.fitted)(data.images / 255)
        expected, labels = as_timm(folders / name, model)
        order = torch.argsort(labels, stable=True)  # ours are sorted by class, timm's by path
        std = torch.tensor(model.pretrained_cfg["std"]).view(1, -1, 1, 1)
        difference = ((model.seen - expected[order]) * std).abs().max().item()
        assert difference < (1e-6 if data.fitted else ROUNDING), f"{name}: {difference * 255:.2f} levels"


@pytest.mark.parametrize("architecture", [NETWORKS[0], *map(slow, NETWORKS[1:])])
def test_accuracy_is_that_of_timm(folders: Path, architecture: str) -> None:
    """The logits of every image are timm's up to the rounding of pixels, so that only ties could change a prediction."""
    for name in SETS:
        torch.manual_seed(0)
        model = timm.create_model(architecture, num_classes=len(list((folders / name / "test").iterdir()))).eval()
        images, labels = as_timm(folders / name, model)
        order = torch.argsort(labels, stable=True)
        with torch.no_grad():
            for _ in range(2):  # a random network sees all images alike: take from its logits what they have in common
                logits = model(images[order])
                head: Any = model.get_classifier()  # type: ignore[operator]
                head.bias -= logits.mean(0)
                head.weight *= 1 / logits.std(0).mean()
            logits = model(images[order])
        found = evaluate(model, f"folder:{folders / name}", Protocol(steps=0, check_images=0), class_order="natural")
        assert found.images["label"] == labels[order].tolist()
        top = logits.topk(2).values
        clear = ((top[:, 0] - top[:, 1]) > 0.2).tolist()
        theirs = [p for p, sure in zip(logits.argmax(1).tolist(), clear, strict=True) if sure]
        assert [p for p, sure in zip(found.images["prediction"], clear, strict=True) if sure] == theirs
        assert len(theirs) >= len(clear) / 2, "most images tell"
