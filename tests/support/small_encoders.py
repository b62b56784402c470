"""Data that cluster in one sensible way or have labels of their own, and a small pretrained timm model in a folder."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from advcl_hub.data import ImageData, load_data
from advcl_hub.hub.export import export_folder


def blobs(per_class: int = 20, seed: int = 0) -> ImageData:
    """Red, green and blue images with noise: k-means at K = 3 has one sensible answer."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(3).repeat(per_class)
    images = torch.randint(0, 60, (len(labels), 3, 8, 8), generator=generator)
    images[torch.arange(len(labels)), labels] += 180
    return ImageData(images.byte(), labels, torch.arange(len(labels)), ("red", "green", "blue"), "blobs")


def relabelled(labels: Callable[[Tensor], Tensor], classes: int = 10) -> ImageData:
    data = load_data("fake:80")
    return ImageData(data.images, labels(data.labels), data.indices, tuple(map(str, range(classes))), "mine")


def pixels(data: ImageData) -> Tensor:
    assert isinstance(data.images, Tensor)
    return data.images


def save_encoder(folder: Path, seed: int = 0, **config: Any) -> Path:
    torch.manual_seed(seed)
    overlay = {"input_size": (3, 16, 16)} | config
    model = timm.create_model("test_resnet", num_classes=5, pretrained_cfg_overlay=overlay)
    timm.models.save_for_hf(model, str(folder), safe_serialization=True)
    return folder


SMALL_RESNET = {"channels": [16, 16, 16]}
SMALL_VIT = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2}


@cache
def _digits(size: int) -> Tensor:
    return pixels(load_data("digits", "train", size=size).sample(100))


def export_encoder(
    folder: Path,
    name: str = "resnet8_cifar",
    seed: int = 0,
    size: int = 16,
    num_classes: int = 0,
    projector: nn.Sequential | None = None,
    **arguments: Any,
) -> Path:
    """An encoder, or a classifier, with random weights for images in [0, 1], in a folder as `train.export` writes it."""
    torch.manual_seed(seed)
    cfg = {"input_size": (3, size, size), "mean": (0.0,) * 3, "std": (1.0,) * 3, "crop_pct": 1.0}
    model = timm.create_model(name, num_classes=num_classes, pretrained_cfg_overlay=cfg, **arguments)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = 1.0
    with torch.no_grad():  # batch norms learn statistics; without them the features would be of no size
        model(_digits(size) / 255)
    kind = "classifier" if num_classes else "encoder"
    return export_folder(model.eval(), folder, results={"kind": kind}, model_args=arguments, projector=projector)


def export_head(encoder: Path, folder: Path, seed: int, **arguments: Any) -> Path:
    """A classifier of ten classes on the frozen encoder in a folder, with a random head."""
    model: Any = timm.create_model(f"local-dir:{encoder}", pretrained=True)
    torch.manual_seed(seed)
    model.reset_classifier(10)
    return export_folder(model, folder, results={}, model_args=arguments)


def export_teacher(folder: Path) -> Path:
    """A small encoder with its projection head, as DeACL and ProFeAT start from."""
    torch.manual_seed(1)
    projector = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 8))
    return export_encoder(folder, projector=projector.eval(), **SMALL_RESNET)
