"""Random crops and flips of whole batches, on the device where these are.

Given the same choices, torchvision makes the same image bit for bit. Nothing waits for the device, and `torch.compile` sees no
graph break.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class WeakParams(NamedTuple):
    """Random choices of a weak view; the first dimension is the image.

    Attributes:
        top, left: (N,) int64 corner of the crop, in pixels from the corner of the unpadded image.
        flip: (N,) bool, mirrored after the crop.
    """

    top: Tensor
    left: Tensor
    flip: Tensor


def draw_weak(count: int, padding: int, flip: bool, device: torch.device | str = "cpu") -> WeakParams:
    """Draws the choices of weak views of `count` images.

    They are distributed as those of torchvision's `RandomCrop(size, padding)` and, with `flip`, `RandomHorizontalFlip`.
    """
    offsets = torch.randint(-padding, padding + 1, (2, count), device=device)
    return WeakParams(offsets[0], offsets[1], draw_flip(count, flip, device))


def draw_flip(count: int, flip: bool, device: torch.device | str = "cpu") -> Tensor:
    """Draws bool (count,), True with probability 0.5, or never without `flip`."""
    return torch.rand(count, device=device) < (0.5 if flip else 0.0)


def weak_view(images: Tensor, params: WeakParams) -> Tensor:
    """Shifts float32 images (N, C, H, W) by whole pixels, zeros coming in at the border, and flips them."""
    height, width = images.shape[-2:]
    rows = params.top[:, None] + torch.arange(height, device=images.device)
    columns = params.left[:, None] + torch.arange(width, device=images.device)
    return sample(images, rows, columns, params.flip, mode="nearest")


def sample(images: Tensor, rows: Tensor, columns: Tensor, flip: Tensor, mode: str) -> Tensor:
    """Reads images at pixel positions rows (N, H) x columns (N, W), mirrored where `flip`; zero outside."""
    height, width = images.shape[-2:]
    columns = torch.where(flip[:, None], columns.flip(1), columns)
    y = ((2 * rows + 1) / height - 1)[:, :, None]
    x = ((2 * columns + 1) / width - 1)[:, None, :]
    grid = torch.stack(torch.broadcast_tensors(x, y), dim=-1)
    return F.grid_sample(images, grid, mode=mode, padding_mode="zeros", align_corners=False)
