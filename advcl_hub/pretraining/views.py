"""The views of pretraining, as AdvCL has them: two strong augmentations, a weak one, and the high frequencies of the weak one.

Whole batches are augmented where they lie, CPU or GPU. Every image has its own random choices, nothing waits
for the device, and `torch.compile` sees no graph break. Each view is made in two steps: `draw_*` draws the
choices, `*_view` applies them. Given the same choices, torchvision makes the same image to float rounding.
No step is a matrix product, so neither autocast nor TF32 changes a pixel.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from advcl_hub.data.augmentation import draw_flip, draw_weak, sample, weak_view

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)  # torchvision's numbering of the ColorJitter operations
CROP_RATIO = (3 / 4, 4 / 3)
CROP_TRIES = 10
GRAY_WEIGHTS = (0.2989, 0.587, 0.114)  # ITU-R 601-2 luma, rounded as torchvision rounds it


@dataclass(frozen=True)
class ViewConfig:
    """Augmentation strengths; the defaults are those of AdvCL (arXiv 2111.01124).

    Attributes:
        crop_scale: least and greatest area of the strong crop, as a fraction of the image, in (0, 1].
        jitter: strengths of brightness, contrast, saturation (each >= 0) and hue (0 to 0.5, in turns of the
            colour wheel), as in `torchvision.transforms.v2.ColorJitter`.
        jitter_p: probability that an image is colour-jittered, in [0, 1].
        grayscale_p: probability that an image loses its colour, in [0, 1].
        flip: whether views are mirrored horizontally with probability 0.5.
        padding: zero pixels around the image from which the weak view is cropped.
        hfc_radius: frequencies nearer to zero than this are taken out of the high-frequency view, in cycles
            per image.

    Raises:
        ValueError: a value is outside its range.
    """

    crop_scale: tuple[float, float] = (0.2, 1.0)
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.4, 0.1)
    jitter_p: float = 0.8
    grayscale_p: float = 0.2
    flip: bool = True
    padding: int = 4
    hfc_radius: float = 8

    def __post_init__(self) -> None:
        if not _is_numbers(self.crop_scale, 2) or not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise ValueError(f"crop_scale must be (low, high) with 0 < low <= high <= 1, got {self.crop_scale!r}")
        if not _is_numbers(self.jitter, 4) or min(self.jitter) < 0 or self.jitter[HUE] > 0.5:
            raise ValueError(
                f"jitter must be (brightness, contrast, saturation, hue), each >= 0 and hue <= 0.5, got {self.jitter!r}"
            )
        for name, value in (("jitter_p", self.jitter_p), ("grayscale_p", self.grayscale_p)):
            if not _is_numbers((value,), 1) or not 0 <= value <= 1:
                raise ValueError(f"{name} is a probability, between 0 and 1, got {value!r}")
        if not isinstance(self.flip, bool):
            raise ValueError(f"flip must be true or false, got {self.flip!r}")
        if not isinstance(self.padding, int) or isinstance(self.padding, bool) or self.padding < 0:
            raise ValueError(f"padding must be a whole number of pixels >= 0, got {self.padding!r}")
        if not _is_numbers((self.hfc_radius,), 1) or self.hfc_radius < 0:
            raise ValueError(f"hfc_radius must be >= 0 cycles per image, got {self.hfc_radius!r}")


class Views(NamedTuple):
    """Four float32 views (N, C, H, W) of one batch: in [0, 1], but `high_frequency`, which is not clamped."""

    strong1: Tensor
    strong2: Tensor
    weak: Tensor
    high_frequency: Tensor


class StrongParams(NamedTuple):
    """Random choices of a strong view; the first dimension is the image.

    Attributes:
        top, left, height, width: (N,) crop box in pixels, whole numbers stored as float32.
        flip: (N,) bool, mirrored after the crop.
        factors: (N, 4) brightness, contrast, saturation, hue; (1, 1, 1, 0) where the image is not jittered.
        order: (N, 4) int64, the order in which the four are applied (0 = brightness ... 3 = hue).
        grayscale: (N,) bool, made gray at the end.
    """

    top: Tensor
    left: Tensor
    height: Tensor
    width: Tensor
    flip: Tensor
    factors: Tensor
    order: Tensor
    grayscale: Tensor


def make_views(images: Tensor, config: ViewConfig) -> Views:
    """Makes the two strong views, the weak view and the high-frequency view of a batch.

    Random numbers come from the global generator of `images.device`: `torch.manual_seed` repeats them.
    The published code augments 8-bit images; here nothing is rounded between the operations.

    Args:
        images: (N, C, H, W) uint8, C = 1 or 3. Gray images keep only the brightness and contrast jitter.
        config: strengths of the augmentations.

    Returns:
        Four views of the size of `images`, float32, on its device.

    Raises:
        ValueError: `images` is not such a batch, or `config.padding` is not smaller than the image.
    """
    strong1, strong2 = strong_views(images, config)
    weak = weak_view_of(images, config)
    return Views(strong1, strong2, weak, high_frequency(weak, config.hfc_radius))


def strong_views(images: Tensor, config: ViewConfig) -> tuple[Tensor, Tensor]:
    """The two strong views alone; everything else as in `make_views`."""
    pixels = _pixels(images, config)
    first = strong_view(pixels, draw_strong(pixels, config))
    return first, strong_view(pixels, draw_strong(pixels, config))


def weak_view_of(images: Tensor, config: ViewConfig) -> Tensor:
    """The weak view alone (a shifted crop, mirrored); everything else as in `make_views`."""
    pixels = _pixels(images, config)
    return weak_view(pixels, draw_weak(len(pixels), config.padding, config.flip, pixels.device))


def high_frequency(images: Tensor, radius: float) -> Tensor:
    """Takes the low frequencies out of images (AdvCL, arXiv 2111.01124, the high-frequency view).

    Definition of the published code: after `fftshift`, entry (i, j) of the spectrum is low if its distance
    from (H/2, W/2) is below `radius`; the real part of the rest is kept. For an odd size that centre lies
    half an entry off the zero frequency. The result is not clamped: it lies around 0, within about [-1, 1].

    Args:
        images: (N, C, H, W), float32 or float64.
        radius: >= 0, in cycles per image; 0 removes nothing.

    Returns:
        Images minus their low frequencies, same shape and dtype.

    Raises:
        ValueError: wrong dtype, or a negative radius.
    """
    if images.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"expected float32 or float64 images, got {images.dtype}; convert them first")
    if not radius >= 0:
        raise ValueError(f"radius must be >= 0 cycles per image, got {radius!r}")
    height, width = images.shape[-2:]
    rows = torch.arange(height, device=images.device) - height / 2
    columns = torch.arange(width, device=images.device) - width / 2
    low = (rows[:, None] ** 2 + columns**2 < radius**2).to(images.dtype)
    low = torch.fft.ifftshift(low)
    # The real part of a filtered real image is what the mask's even part passes: half a spectrum is enough.
    mirrored = low.flip(0, 1).roll((1, 1), (0, 1))
    even = ((low + mirrored) / 2)[:, : width // 2 + 1]
    return images - torch.fft.irfft2(torch.fft.rfft2(images) * even, s=(height, width))


def draw_strong(images: Tensor, config: ViewConfig) -> StrongParams:
    """Draws the choices of a strong view of images (N, C, H, W).

    They are distributed as those of torchvision's `RandomResizedCrop((H, W), crop_scale)`,
    `RandomHorizontalFlip`, `RandomApply([ColorJitter(*jitter)], jitter_p)`, `RandomGrayscale(grayscale_p)`.
    """
    count, device = len(images), images.device
    box = _draw_crop(images, config.crop_scale)
    jittered = torch.rand(count, device=device) < config.jitter_p
    factors = []
    for operation, strength in enumerate(config.jitter):
        neutral = 0.0 if operation == HUE else 1.0
        lowest = -strength if operation == HUE else max(0.0, 1 - strength)
        factor = torch.empty(count, device=device).uniform_(lowest, neutral + strength)
        factors.append(torch.where(jittered, factor, neutral))
    return StrongParams(
        *box,
        flip=draw_flip(count, config.flip, device),
        factors=torch.stack(factors, dim=1),
        order=torch.rand(count, 4, device=device).argsort(dim=1),
        grayscale=torch.rand(count, device=device) < config.grayscale_p,
    )


def strong_view(images: Tensor, params: StrongParams) -> Tensor:
    """Crops and resizes to the old size (bilinear), flips, jitters and grays float32 images (N, C, H, W)."""
    height, width = images.shape[-2:]
    # A crop is never larger than the result, so torchvision's antialiasing would change nothing.
    rows = _resize_positions(params.top, params.height, height)
    columns = _resize_positions(params.left, params.width, width)
    view = sample(images, rows, columns, params.flip, mode="bilinear")
    view = color_jitter(view, params.factors, params.order)
    if view.shape[1] == 1:
        return view
    return torch.lerp(view, _gray(view), params.grayscale.to(view.dtype)[:, None, None, None])


def color_jitter(images: Tensor, factors: Tensor, order: Tensor) -> Tensor:
    """Applies torchvision's ColorJitter operations, each image with its own factors in its own order.

    Args:
        images: (N, C, H, W) float32 in [0, 1]; with C = 1, saturation and hue change nothing.
        factors: (N, 4) brightness, contrast, saturation (>= 0), hue (-0.5 to 0.5).
        order: (N, 4) int64, a permutation of 0 ... 3 for each image.
    """
    # Hue, the expensive operation, is computed once: each image's other operations fall before or after it.
    # An operation that falls on the other side runs there with factor 1, which leaves every bit as it is.
    hue_slot = (order == HUE).int().argmax(dim=1)
    for slot in range(3):
        images = _blend(images, factors, order[:, slot], active=slot < hue_slot)
    if images.shape[1] == 3:
        images = _adjust_hue(images, factors[:, HUE])
    for slot in range(1, 4):
        images = _blend(images, factors, order[:, slot], active=slot > hue_slot)
    return images


def _blend(images: Tensor, factors: Tensor, operation: Tensor, active: Tensor) -> Tensor:
    """Brightness, contrast and saturation: mixes each image with black, its mean gray or its gray image."""
    factor = factors.gather(1, operation[:, None])[:, 0].where(active, 1.0)
    gray = _gray(images)
    mean = gray.mean((1, 2, 3)) * (operation == CONTRAST)
    saturates = (operation == SATURATION).to(images.dtype)
    reference = torch.addcmul(mean[:, None, None, None], gray, saturates[:, None, None, None])
    return torch.lerp(reference, images, factor[:, None, None, None]).clamp_(0, 1)


def _gray(images: Tensor) -> Tensor:
    """Luma (N, 1, H, W) of RGB images; a gray image is its own."""
    if images.shape[1] == 1:
        return images
    red, green, blue = images.split(1, dim=1)
    r, g, b = GRAY_WEIGHTS
    return (red * r).add(green, alpha=g).add(blue, alpha=b)  # torch 2.11's compiler rounds add_ with alpha twice


def _adjust_hue(images: Tensor, turns: Tensor) -> Tensor:
    """Turns the hue of RGB images (N, 3, H, W) at constant HSV saturation and value, by (N,) turns."""
    red, green, blue = images.split(1, dim=1)
    largest = torch.maximum(torch.maximum(red, green), blue)
    chroma = largest - torch.minimum(torch.minimum(red, green), blue)
    is_red, is_green = largest == red, largest == green
    difference = torch.where(is_red, green - blue, torch.where(is_green, blue - red, red - green))
    sector = torch.where(is_red, 0.0, torch.where(is_green, 2.0, 4.0))
    # Gray pixels have no hue: 0 / tiny is 0, and their chroma of 0 cancels it anyway.
    hue = (difference / chroma.clamp_min(torch.finfo(images.dtype).tiny)).add_(sector).div_(6)
    # Over the hue, each channel is a trapezoid from `largest` to `largest - chroma`, a third of a turn apart.
    # hue + turns is at least -2/3; a whole turn is added, as frac() is not periodic below zero.
    thirds = torch.arange(3, 0, -1, device=images.device, dtype=images.dtype) / 3
    phase = hue.add_(turns[:, None, None, None]) + (1 + thirds)[:, None, None]
    weight = phase.frac_().mul_(6).sub_(3).abs_().sub_(1).clamp_(0, 1)
    return torch.addcmul(largest, chroma, weight.sub_(1))


def _draw_crop(images: Tensor, scale: tuple[float, float]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Draws boxes as torchvision's RandomResizedCrop: the first of ten tries that fits, else the centre."""
    (height, width), count, device = images.shape[-2:], len(images), images.device
    area = height * width * torch.empty(count, CROP_TRIES, device=device).uniform_(*scale)
    log_ratio = torch.empty(count, CROP_TRIES, device=device).uniform_(*map(math.log, CROP_RATIO))
    heights = torch.sqrt(area / log_ratio.exp()).round()
    widths = torch.sqrt(area * log_ratio.exp()).round()
    fits = (heights > 0) & (heights <= height) & (widths > 0) & (widths <= width)

    central_height = min(height, round(width / CROP_RATIO[0]))
    central_width = min(width, round(height * CROP_RATIO[1]))
    heights = F.pad(heights, (0, 1), value=central_height)
    widths = F.pad(widths, (0, 1), value=central_width)
    # argmax gives the first of equals, and the centre, appended last, always fits.
    chosen = F.pad(fits.int(), (0, 1), value=1).argmax(dim=1, keepdim=True)
    crop_height, crop_width = heights.gather(1, chosen)[:, 0], widths.gather(1, chosen)[:, 0]

    central = chosen[:, 0] == CROP_TRIES
    top = torch.where(central, (height - central_height) // 2, _draw_offset(height - crop_height))
    left = torch.where(central, (width - central_width) // 2, _draw_offset(width - crop_width))
    return top, left, crop_height, crop_width


def _draw_offset(slack: Tensor) -> Tensor:
    """Draws a whole number from 0 to `slack`, both included, for each entry of `slack`."""
    # The product can round up to slack + 1.
    return (torch.rand_like(slack) * (slack + 1)).floor().minimum(slack)


def _resize_positions(start: Tensor, length: Tensor, size: int) -> Tensor:
    """Where a resize to `size` reads (N, size): half-pixel centres, never outside the crop."""
    centres = torch.arange(size, device=start.device) + 0.5
    positions = centres * (length / size)[:, None] - 0.5
    return start[:, None] + positions.clamp_min(0).minimum(length[:, None] - 1)


def _is_numbers(values: Sequence[float], count: int) -> bool:
    """Whether `values` is a sequence of `count` finite numbers."""
    return (
        isinstance(values, Sequence)
        and len(values) == count
        and all(isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v) for v in values)
    )


def _pixels(images: Tensor, config: ViewConfig) -> Tensor:
    """uint8 images as float32 in [0, 1]. Raises ValueError for other images."""
    if images.ndim != 4 or images.shape[1] not in (1, 3) or images.numel() == 0:
        raise ValueError(f"expected images of shape (N, C, H, W) with C = 1 or 3 and none empty, got {tuple(images.shape)}")
    if images.dtype != torch.uint8:
        raise ValueError(f"expected uint8 images in 0 ... 255, as data sets hold them, got {images.dtype}")
    if config.padding >= min(images.shape[-2:]):
        raise ValueError(
            f"padding {config.padding} must be smaller than the images, {tuple(images.shape[-2:])}; "
            "lower `padding` in the view configuration"
        )
    return images.float() / 255
