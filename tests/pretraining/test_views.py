"""The views against torchvision: same image for the same choices, and same distribution of the choices."""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from advcl_hub.data.augmentation import WeakParams, draw_weak, weak_view
from advcl_hub.pretraining import views
from advcl_hub.pretraining.views import StrongParams, ViewConfig, make_views
from tests.support.golden import load_golden, ramp

PUBLISHED = ViewConfig()
EXTREME = ViewConfig(crop_scale=(0.05, 1.0), jitter=(1.0, 1.0, 1.0, 0.5), jitter_p=1.0, grayscale_p=0.1)
OFF = ViewConfig(crop_scale=(1, 1), jitter=(0, 0, 0, 0), jitter_p=0, grayscale_p=0, flip=False, padding=0, hfc_radius=0)
SIZES = [(32, 32), (31, 33), (7, 20), (96, 96)]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def random_images(count: int = 64, channels: int = 3, size: tuple[int, int] = (32, 32)) -> Tensor:
    """Noise with black, white, gray and saturated patches: every clamp and every sector of the hue is met."""
    images = torch.randint(0, 256, (count, channels, *size), dtype=torch.uint8)
    images[0::4, :, : size[0] // 2] = torch.randint(0, 2, (channels, 1, size[1])).mul(255).to(torch.uint8)
    images[1::4, :, :, : size[1] // 2] = images[1::4, :1, :, : size[1] // 2]
    return images


def neutral(count: int, size: tuple[int, int], **changes: Tensor) -> StrongParams:
    """Choices that leave an image as it is, but for `changes`."""
    height, width = (torch.full((count,), float(n)) for n in size)
    params = StrongParams(
        top=torch.zeros(count),
        left=torch.zeros(count),
        height=height,
        width=width,
        flip=torch.zeros(count, dtype=torch.bool),
        factors=torch.tensor([[1.0, 1.0, 1.0, 0.0]]).repeat(count, 1),
        order=torch.arange(4).repeat(count, 1),
        grayscale=torch.zeros(count, dtype=torch.bool),
    )
    return params._replace(**changes)


def jitter_reference(image: Tensor, factors: list[float], order: list[int]) -> Tensor:
    adjust = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue)
    for operation in order:
        image = adjust[operation](image, factors[operation])
    return image


def assert_in_range(images: Tensor) -> None:
    assert images.min() >= 0
    assert images.max() <= 1


def strong_reference(image: Tensor, params: StrongParams, i: int) -> Tensor:
    """The strong view of one image (C, H, W), step by step with torchvision."""
    box = [int(side[i]) for side in params[:4]]
    image = TF.resized_crop(image, *box, size=list(image.shape[-2:]))
    if params.flip[i]:
        image = TF.horizontal_flip(image)
    image = jitter_reference(image, params.factors[i].tolist(), params.order[i].tolist())
    return TF.rgb_to_grayscale(image, image.shape[0]) if params.grayscale[i] else image


def weak_reference(image: Tensor, params: WeakParams, i: int, padding: int) -> Tensor:
    padded = TF.pad(image, [padding])
    top, left = int(params.top[i]) + padding, int(params.left[i]) + padding
    cropped = TF.crop(padded, top, left, *image.shape[-2:])
    return TF.horizontal_flip(cropped) if params.flip[i] else cropped


def assert_strong_equals_torchvision(pixels: Tensor, params: StrongParams, atol: float = 1e-5) -> None:
    expected = torch.stack([strong_reference(image, params, i) for i, image in enumerate(pixels)])
    torch.testing.assert_close(views.strong_view(pixels, params), expected, rtol=0, atol=atol)


# ---- the same image for the same choices


def test_every_crop_of_a_small_image_equals_torchvision() -> None:
    height, width = 5, 6
    boxes = [
        (top, left, h, w)
        for h, w in itertools.product(range(1, height + 1), range(1, width + 1))
        for top, left in itertools.product(range(height - h + 1), range(width - w + 1))
    ]
    top, left, h, w = torch.tensor(boxes, dtype=torch.float32).T
    flip = torch.arange(len(boxes)) % 2 == 0
    params = neutral(len(boxes), (height, width), top=top, left=left, height=h, width=w, flip=flip)
    pixels = random_images(len(boxes), size=(height, width)) / 255
    assert_strong_equals_torchvision(pixels, params, atol=2e-6)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("operation", range(4))
def test_each_jitter_operation_equals_torchvision(operation: int, channels: int) -> None:
    pixels = random_images(41, channels) / 255
    low, high = (-0.5, 0.5) if operation == views.HUE else (0.0, 2.0)
    params = neutral(41, (32, 32))
    params.factors[:, operation] = torch.linspace(low, high, 41)
    result = views.color_jitter(pixels, params.factors, params.order)
    for one, image, factors in zip(result, pixels, params.factors.tolist(), strict=True):
        torch.testing.assert_close(one, jitter_reference(image, factors, [operation]), rtol=0, atol=2e-6)


def test_hue_of_every_corner_and_edge_of_the_colour_cube() -> None:
    colours = torch.tensor(list(itertools.product((0, 1, 64, 128, 254, 255), repeat=3)))
    pixels = (colours.T.reshape(3, -1, 1) / 255).repeat(21, 1, 1, 1)
    params = neutral(21, (len(colours), 1))
    params.factors[:, views.HUE] = torch.linspace(-0.5, 0.5, 21)
    result = views.color_jitter(pixels, params.factors, params.order)
    expected = torch.stack(list(map(TF.adjust_hue, pixels, params.factors[:, views.HUE].tolist())))
    torch.testing.assert_close(result, expected, rtol=0, atol=2e-6)
    assert_in_range(result)


def test_each_order_of_the_jitter_equals_torchvision_in_that_order() -> None:
    order = torch.tensor(list(itertools.permutations(range(4))))
    pixels = (random_images(1) / 255).repeat(24, 1, 1, 1)
    factors = torch.tensor([[1.7, 1.8, 1.6, 0.3]]).repeat(24, 1)
    result = views.color_jitter(pixels, factors, order)
    for i, (one, permutation) in enumerate(zip(result, order.tolist(), strict=True)):
        expected = jitter_reference(pixels[i], factors[i].tolist(), permutation)
        difference = (one - expected).abs().max()
        assert difference < 2e-5, f"order {permutation}: {difference}"
    assert torch.pdist(result.flatten(1)).min() > 0.1, "the factors do not tell all orders apart"


def test_an_image_that_is_not_jittered_does_not_change() -> None:
    pixels = random_images() / 255
    params = neutral(64, (32, 32))
    torch.testing.assert_close(views.color_jitter(pixels, params.factors, params.order), pixels, rtol=0, atol=2e-6)
    gray = pixels[:, :1]
    assert torch.equal(views.color_jitter(gray, params.factors, params.order), gray)


def test_grayscale_equals_torchvision_and_touches_only_its_images() -> None:
    pixels = random_images() / 255
    grayscale = torch.arange(64) % 3 == 0
    result = views.strong_view(pixels, neutral(64, (32, 32), grayscale=grayscale))
    torch.testing.assert_close(result[grayscale], TF.rgb_to_grayscale(pixels[grayscale], 3), rtol=0, atol=2e-6)
    torch.testing.assert_close(result[~grayscale], pixels[~grayscale], rtol=0, atol=3e-6)


@pytest.mark.parametrize("config", [PUBLISHED, EXTREME], ids=["published", "extreme"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", SIZES)
def test_strong_view_equals_torchvision(size: tuple[int, int], channels: int, config: ViewConfig) -> None:
    images = random_images(64, channels, size)
    before = (pixels := images / 255).clone()
    # Rounding of a float32 pixel position grows with the size; strong contrast and hue magnify it.
    atol = (5e-7 if config is PUBLISHED else 1e-6) * max(size)
    assert_strong_equals_torchvision(pixels, views.draw_strong(images, config), atol)
    assert torch.equal(pixels, before), "the input was changed in place"


@pytest.mark.parametrize("size", SIZES)
def test_weak_view_equals_torchvision_bit_for_bit(size: tuple[int, int]) -> None:
    pixels = random_images(200, size=size) / 255
    params = draw_weak(len(pixels), 4, True)
    expected = [weak_reference(image, params, i, PUBLISHED.padding) for i, image in enumerate(pixels)]
    assert torch.equal(weak_view(pixels, params), torch.stack(expected))


def test_make_views_puts_the_views_together() -> None:
    images = random_images(32)
    made = make_views(images, PUBLISHED)
    torch.manual_seed(0)
    random_images(32)
    pixels = images / 255
    strong1, strong2 = views.draw_strong(images, PUBLISHED), views.draw_strong(images, PUBLISHED)
    weak = draw_weak(len(images), 4, True)
    for view, params in ((made.strong1, strong1), (made.strong2, strong2)):
        expected = torch.stack([strong_reference(image, params, i) for i, image in enumerate(pixels)])
        torch.testing.assert_close(view, expected, rtol=0, atol=1e-5)
    assert torch.equal(made.weak, torch.stack([weak_reference(p, weak, i, 4) for i, p in enumerate(pixels)]))
    torch.testing.assert_close(made.high_frequency, slow_high_frequency(made.weak, 8), rtol=0, atol=2e-6)


# ---- the high-frequency view


def slow_high_frequency(images: Tensor, radius: float) -> Tensor:
    """The published definition with a loop over the mask and the whole complex spectrum."""
    height, width = images.shape[-2:]
    kept = torch.ones(height, width, dtype=images.dtype)
    for i, j in itertools.product(range(height), range(width)):
        if math.hypot(i - height / 2, j - width / 2) < radius:
            kept[i, j] = 0
    spectrum = torch.fft.fftshift(torch.fft.fft2(images), dim=(-2, -1)) * kept
    return torch.fft.ifft2(torch.fft.ifftshift(spectrum, dim=(-2, -1))).real


@pytest.mark.parametrize(("size", "radius"), [(32, 8), (31, 8), (96, 24)])
def test_high_frequency_reproduces_the_published_values(size: int, radius: int) -> None:
    images = ramp((2, 3, size, size), f"hfc{size}")
    expected = load_golden()[f"hfc_{size}_r{radius}"]
    result = views.high_frequency(images, radius)
    assert result.dtype == torch.float64
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-9)
    single = views.high_frequency(images.float(), radius)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("radius", [0, 0.5, 2.5, 5, 8, 11, 40])
@pytest.mark.parametrize("size", [(16, 16), (15, 15), (9, 14), (14, 9), (1, 6), (11, 1)])
def test_high_frequency_equals_the_definition_at_any_size(size: tuple[int, int], radius: float) -> None:
    images = torch.rand(2, 3, *size, dtype=torch.float64)
    torch.testing.assert_close(views.high_frequency(images, radius), slow_high_frequency(images, radius), rtol=0, atol=1e-12)


def test_high_frequency_removes_slow_waves_and_keeps_fast_ones() -> None:
    phase = 2 * math.pi * torch.arange(32, dtype=torch.float64) / 32
    slow, fast = torch.cos(7 * phase).expand(1, 1, 32, 32), torch.cos(8 * phase).expand(1, 1, 32, 32)
    torch.testing.assert_close(views.high_frequency(0.5 + slow + fast, 8), fast, rtol=0, atol=1e-12)


# ---- robustness


@pytest.mark.parametrize("config", [PUBLISHED, EXTREME], ids=["published", "extreme"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("value", [0, 1, 128, 254, 255])
def test_flat_images_stay_gray_and_in_range(value: int, channels: int, config: ViewConfig) -> None:
    made = make_views(torch.full((256, channels, 9, 8), value, dtype=torch.uint8), config)
    assert all(view.isfinite().all() for view in made)
    for view in (made.strong1, made.strong2):
        assert_in_range(view)
        assert (view.amax((1, 2, 3)) - view.amin((1, 2, 3))).max() < 1e-5


@pytest.mark.parametrize(("channels", "size"), [(1, (28, 28)), (3, (31, 33)), (3, (5, 64)), (3, (96, 96))])
def test_views_have_the_shape_of_the_images_and_lie_in_range(channels: int, size: tuple[int, int]) -> None:
    for view in (made := make_views(random_images(16, channels, size), EXTREME)):
        assert view.shape == (16, channels, *size)
        assert view.dtype == torch.float32
        assert view.isfinite().all()
    for view in made[:3]:
        assert_in_range(view)
    assert made.high_frequency.min() < 0


def test_augmentation_switched_off_gives_the_images_back() -> None:
    images = random_images()
    made = make_views(images, OFF)
    torch.testing.assert_close(made.strong1, images / 255, rtol=0, atol=3e-6)
    torch.testing.assert_close(made.strong2, images / 255, rtol=0, atol=3e-6)
    assert torch.equal(made.weak, images / 255)
    torch.testing.assert_close(made.high_frequency, made.weak, rtol=0, atol=1e-6)


def test_the_seed_repeats_the_views() -> None:
    images = random_images()
    made = [make_views(images, PUBLISHED) for s in (1, 1, 2) if torch.manual_seed(s)]
    assert all(torch.equal(a, b) for a, b in zip(made[0], made[1], strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(made[0], made[2], strict=True))
    assert not torch.equal(made[0].strong1, made[0].strong2)


@pytest.mark.parametrize("layout", ["channels_last", "strided"])
def test_memory_layout_does_not_matter(layout: str) -> None:
    images = random_images()
    if layout == "channels_last":
        other = images.to(memory_format=torch.channels_last)
    else:
        other = images.repeat_interleave(2, dim=3)[..., ::2]
    made = [make_views(i, PUBLISHED) for i in (images, other) if torch.manual_seed(1)]
    assert all(torch.equal(a, b) for a, b in zip(*made, strict=True))


def test_autocast_does_not_change_a_pixel() -> None:
    images = random_images()
    expected = make_views(images, PUBLISHED)
    torch.manual_seed(0)
    random_images()
    with torch.autocast("cpu", torch.bfloat16):
        made = make_views(images, PUBLISHED)
    assert all(torch.equal(a, b) for a, b in zip(made, expected, strict=True))


@pytest.mark.parametrize("channels", [1, 3])
def test_nothing_waits_for_the_device(channels: int) -> None:
    """Tensors on the meta device have no values: reading one, or a shape that depends on one, is an error."""
    images = torch.empty(8, channels, 32, 32, dtype=torch.uint8, device="meta")
    assert all(view.shape == images.shape for view in make_views(images, PUBLISHED))


def test_compile_sees_one_graph() -> None:
    images = random_images()
    compiled = torch.compile(make_views, fullgraph=True, backend="eager")
    made = [function(images, PUBLISHED) for function in (make_views, compiled) if torch.manual_seed(1)]
    assert all(torch.equal(a, b) for a, b in zip(*made, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_makes_the_same_views_without_waiting() -> None:
    images = random_images()
    strong, weak = views.draw_strong(images, EXTREME), draw_weak(len(images), EXTREME.padding, EXTREME.flip)
    pixels, on_device = images / 255, (images / 255).cuda()
    result = views.strong_view(on_device, StrongParams(*(p.cuda() for p in strong))).cpu()
    torch.testing.assert_close(result, views.strong_view(pixels, strong), rtol=0, atol=1e-5)
    result = weak_view(on_device, WeakParams(*(p.cuda() for p in weak))).cpu()
    assert torch.equal(result, weak_view(pixels, weak))

    images = images.cuda()
    make_views(images, PUBLISHED)
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        made = make_views(images, PUBLISHED)
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    assert all(view.isfinite().all() and view.device == images.device for view in made)


# ---- errors


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.rand(2, 3, 32, 32), "expected uint8 images .* got torch.float32"),
        (torch.zeros(3, 32, 32, dtype=torch.uint8), r"\(N, C, H, W\) .* got \(3, 32, 32\)"),
        (torch.zeros(2, 32, 32, 3, dtype=torch.uint8), r"C = 1 or 3 .* got \(2, 32, 32, 3\)"),
        (torch.zeros(2, 4, 32, 32, dtype=torch.uint8), r"C = 1 or 3 .* got \(2, 4, 32, 32\)"),
        (torch.zeros(0, 3, 32, 32, dtype=torch.uint8), r"none empty, got \(0, 3, 32, 32\)"),
        (
            torch.zeros(2, 3, 32, 4, dtype=torch.uint8),
            r"padding 4 must be smaller than the images, \(32, 4\)",
        ),
    ],
)
def test_wrong_images_are_refused(images: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_views(images, PUBLISHED)


@pytest.mark.parametrize(
    ("images", "radius", "message"),
    [
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), 8, "float32 or float64 images, got torch.uint8"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.bfloat16), 8, "got torch.bfloat16"),
        (torch.zeros(2, 3, 8, 8), -1, "radius must be >= 0"),
        (torch.zeros(2, 3, 8, 8), math.nan, "radius must be >= 0"),
    ],
)
def test_high_frequency_refuses_wrong_input(images: Tensor, radius: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        views.high_frequency(images, radius)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("crop_scale", (0.0, 1.0)),
        ("crop_scale", (0.8, 0.2)),
        ("crop_scale", (0.2, 1.1)),
        ("crop_scale", (0.2, math.nan)),
        ("crop_scale", 0.2),
        ("crop_scale", "0."),
        ("jitter", (0.4, 0.4, 0.4)),
        ("jitter", (0.4, -0.1, 0.4, 0.1)),
        ("jitter", (0.4, 0.4, 0.4, 0.6)),
        ("jitter", (math.inf, 0.4, 0.4, 0.1)),
        ("jitter_p", 1.5),
        ("jitter_p", math.nan),
        ("grayscale_p", -0.1),
        ("grayscale_p", "0.2"),
        ("flip", 0.5),
        ("padding", -1),
        ("padding", 4.0),
        ("padding", True),
        ("hfc_radius", -8),
        ("hfc_radius", math.inf),
    ],
)
def test_view_config_refuses_values_out_of_range(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name):
        ViewConfig(**{name: value})


def test_view_config_takes_the_limits_of_its_ranges() -> None:
    ViewConfig(crop_scale=(1, 1), jitter=(0, 3, 0, 0.5), jitter_p=0, grayscale_p=1, padding=0, hfc_radius=0)
