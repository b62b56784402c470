"""Small real files for the tests of data: images, folders of images."""

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from advcl_hub.data import ImageData, batches

RANDOM = np.random.RandomState(0)


def pixels(height: int = 8, width: int = 8, channels: int = 3) -> np.ndarray:
    """Random uint8 pixels (H, W, 3), or (H, W) for one channel."""
    shape = (height, width) if channels == 1 else (height, width, channels)
    return RANDOM.randint(0, 256, shape, dtype=np.uint8)


def encode(array: np.ndarray, form: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, form)
    return buffer.getvalue()


def write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def write_pets(folder: Path) -> Path:
    """Writes folder/pets: 8x8 images of 2 classes, 4 for training and 2 for test of each."""
    for split, count in {"train": 4, "test": 2}.items():
        for name in ("dog", "cat"):
            for number in range(count, 0, -1):  # an order by time or by disk is not the order by name
                write(folder / "pets" / split / name / f"{number}.png", encode(pixels()))
    return folder / "pets"


def all_images(data: ImageData) -> Tensor:
    """uint8 (N, C, H, W), decoded if need be."""
    return torch.cat([images for images, _ in batches(data, 3)])
