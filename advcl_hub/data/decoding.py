"""Encoded images become uint8 tensors: all at once (small sets), or on access (large ones)."""

import io
import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

from advcl_hub.files import LFS_POINTER

IN_MEMORY_BYTES = 2 * 2**30
"""Sets of encoded images that take more than this once decoded stay encoded (`LazyImages`)."""

Item = Path | bytes | np.ndarray
"""An image file, an encoded image, or uint8 pixels (H, W) or (H, W, 3)."""

Fit = Callable[[Image.Image], Image.Image]
"""Brings images of any size to one size. It has to survive pickling, for the processes that decode."""


@dataclass(frozen=True)
class Square:
    """Scales the shorter edge to `size` pixels, bicubic with antialiasing, and crops the centre."""

    size: int

    def __call__(self, image: Image.Image) -> Image.Image:
        return F.center_crop(F.resize(image, self.size, InterpolationMode.BICUBIC), self.size)


class MixedSizesError(ValueError):
    """Images of different sizes where no common size was asked for."""


@dataclass(frozen=True, eq=False)
class LazyImages(Dataset[Tensor]):
    """Images decoded on access: `images[row]` is uint8 (C, H, W).

    Attributes:
        items: the images as they are stored.
        names: what to call each of them in a message; for files the path below the source's folder.
        shape: (C, H, W) of every image.
        fit: what brings images to that size; None raises MixedSizesError for those of another one.
    """

    items: Sequence[Item]
    names: Sequence[str]
    shape: tuple[int, int, int]
    fit: Fit | None

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, row: int) -> Tensor:
        """Decodes one image. Raises ValueError with its name if that fails."""
        try:
            image = decode_image(self.items[row], self.shape[0], self.fit)
        except Exception as error:  # PIL's decoders raise OSError, SyntaxError, ValueError, struct.error ...
            raise ValueError(f"{self.names[row]} ({_reason(error)})") from error
        self._check_size(row, image.shape[1], image.shape[2])
        return image

    def verify(self, row: int) -> None:
        """Raises what `images[row]` would raise, without decoding where the file format allows."""
        try:
            height, width = _verify_image(self.items[row])
        except Exception as error:
            raise ValueError(f"{self.names[row]} ({_reason(error)})") from error
        if self.fit is None:
            self._check_size(row, height, width)

    def select(self, rows: Sequence[int]) -> "LazyImages":
        """The images at these rows, in this order."""
        return replace(self, items=[self.items[row] for row in rows], names=[self.names[row] for row in rows])

    def _check_size(self, row: int, height: int, width: int) -> None:
        if (height, width) != self.shape[1:]:
            raise MixedSizesError(
                f"{self.names[row]} is {height}x{width} (height x width) but the first image is "
                f"{self.shape[1]}x{self.shape[2]}; pass size= (in a recipe: data.size) to bring all images to one size"
            )


def decode_image(item: Item, channels: int, fit: Fit | None) -> Tensor:
    """Decodes one image to uint8 (channels, H, W), of the size that `fit` gives it."""
    with _open(item) as opened:
        image = opened.convert("RGB" if channels == 3 else "L")
    return F.pil_to_tensor(image if fit is None else fit(image))


def read_images(
    items: Sequence[Item], names: Sequence[str], channels: int, fit: Fit | None
) -> tuple[Tensor | LazyImages, dict[int, str]]:
    """Decodes a small set (or one of pixels), or checks a large one.

    Returns:
        The images, uint8 (N, C, H, W), and those that cannot be read: name and reason by row. Their rows
        are still among the images.

    Raises:
        MixedSizesError: images of different sizes, and fit is None.
        ValueError: not one image can be read.
    """
    shape = _first_shape(items, names, channels) if fit is None else _fitted_shape(channels, fit)
    lazy = LazyImages(items, names, shape, fit)
    if len(items) * math.prod(shape) > IN_MEMORY_BYTES and not isinstance(items[0], np.ndarray):
        return lazy, _failures(lazy.verify, len(items))
    images = torch.zeros(len(items), *shape, dtype=torch.uint8)

    def decode(row: int) -> None:
        images[row] = lazy[row]

    return images, _failures(decode, len(items))


def _failures(function: Callable[[int], None], count: int) -> dict[int, str]:
    """Calls function(row) for all rows in threads (PIL decodes without the GIL); returns errors by row."""
    failures: dict[int, str] = {}

    def run(start: int) -> None:
        for row in range(start, min(start + 256, count)):
            try:
                function(row)
            except MixedSizesError:
                raise
            except ValueError as error:
                failures[row] = str(error)

    with ThreadPoolExecutor(min(os.cpu_count() or 1, 16)) as pool:
        list(pool.map(run, range(0, count, 256)))  # the list asks for the results, and so for the errors
    return failures


def _fitted_shape(channels: int, fit: Fit) -> tuple[int, int, int]:
    # Of the channels that will come: timm's border mode fills with a colour of as many.
    width, height = fit(Image.new("RGB" if channels == 3 else "L", (8, 8))).size
    return channels, height, width


def _first_shape(items: Sequence[Item], names: Sequence[str], channels: int) -> tuple[int, int, int]:
    reasons = []
    for item in items:
        try:
            image = decode_image(item, channels, None)
        except Exception as error:  # reported with the others later
            reasons.append(_reason(error))
            continue
        return channels, image.shape[1], image.shape[2]
    raise ValueError(f"none of the {len(items)} images can be read, the first is {names[0]} ({reasons[0]})")


def _open(item: Item) -> Image.Image:
    if isinstance(item, np.ndarray):
        return Image.fromarray(item)
    try:
        image = Image.open(io.BytesIO(item) if isinstance(item, bytes) else item)
    except UnidentifiedImageError:
        if _first_bytes(item, len(LFS_POINTER)) == LFS_POINTER:
            raise ValueError("a Git LFS pointer and not the image: run git lfs pull") from None
        raise
    # PIL converts 16-bit and float images by clipping to 255: white pictures instead of an error.
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        image.close()
        raise ValueError(f"mode {image.mode}, expected 8 bits a channel")
    return image


def _first_bytes(item: Path | bytes, count: int) -> bytes:
    if isinstance(item, bytes):
        return item[:count]
    with item.open("rb") as file:
        return file.read(count)


def _verify_image(item: Item) -> tuple[int, int]:
    """Finds a damaged image as cheaply as is safe; returns (height, width)."""
    with _open(item) as image:
        height, width = image.height, image.width
        if image.format == "PNG":
            image.verify()  # the checksums of its chunks
        else:
            image.draft("L", (1, 1))  # of a JPEG: all of the stream is read, an eighth of the size comes out
            image.load()
    return height, width


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):  # its text is the address of a buffer or an absolute path
        return "no image format that PIL knows"
    return str(error) or type(error).__name__
