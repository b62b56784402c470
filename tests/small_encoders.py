"""Data that cluster in one sensible way, and a small pretrained timm model in a folder."""

from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor

from advcl_hub.data import ImageData


def blobs(per_class: int = 20, seed: int = 0) -> ImageData:
    """Red, green and blue images with noise: k-means at K = 3 has one sensible answer."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(3).repeat(per_class)
    images = torch.randint(0, 60, (len(labels), 3, 8, 8), generator=generator)
    images[torch.arange(len(labels)), labels] += 180
    return ImageData(images.byte(), labels, torch.arange(len(labels)), ("red", "green", "blue"), "blobs")


def pixels(data: ImageData) -> Tensor:
    assert isinstance(data.images, Tensor)
    return data.images


def save_encoder(folder: Path, seed: int = 0, **config: Any) -> Path:
    torch.manual_seed(seed)
    overlay = {"input_size": (3, 16, 16)} | config
    model = timm.create_model("test_resnet", num_classes=5, pretrained_cfg_overlay=overlay)
    timm.models.save_for_hf(model, str(folder), safe_serialization=True)
    return folder
