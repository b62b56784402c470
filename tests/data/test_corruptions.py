"""Corruptions whose effect is known beforehand, and the published layout on a small set."""

import colorsys
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from advcl_hub.data import load_data
from advcl_hub.data.corruptions import CORRUPTIONS, SEVERITIES, corrupt, corruption_names, read_corrupted

names = pytest.mark.parametrize("name", CORRUPTIONS)
severities = pytest.mark.parametrize("severity", SEVERITIES)


def grey(value: int, count: int = 1, channels: int = 3, size: int = 32) -> Tensor:
    return torch.full((count, channels, size, size), value, dtype=torch.uint8)


def patterns(count: int = 12) -> Tensor:
    images = load_data(f"fake:{count}", "test", size=32).images
    assert isinstance(images, Tensor)
    return images


def simply(images: Tensor, name: str, severity: int) -> Tensor:
    return corrupt(images, name, severity, torch.arange(len(images)))


@names
def test_an_image_is_corrupted_alike_in_every_batch_and_order(name: str) -> None:
    images, indices = patterns(), torch.arange(12) * 1000
    before, state, torch_state = images.clone(), np.random.get_state()[1].copy(), torch.get_rng_state()
    together = corrupt(images, name, 3, indices, seed=5)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    assert torch.equal(corrupt(images[order], name, 3, indices[order], seed=5), together[order])
    alone = [corrupt(images[row : row + 1], name, 3, indices[row : row + 1], seed=5) for row in range(12)]
    assert torch.equal(torch.cat(alone), together) and torch.equal(images, before)
    assert (np.random.get_state()[1] == state).all() and torch.equal(torch.get_rng_state(), torch_state)


# Sums over an image: where one changes, figures made before are not comparable with those made after.
SUMS = {"gaussian_noise": [307190, 304900], "shot_noise": [306527, 306260], "impulse_noise": [310860, 313240]}


@names
def test_the_seed_the_index_and_the_severity_decide_the_noise(name: str) -> None:
    if name not in SUMS:
        assert torch.equal(corrupt(patterns(), name, 1, torch.arange(12) + 7, seed=1), simply(patterns(), name, 1))
        return
    keys = [(1, 7, 0), (5, 7, 0), (1, 8, 0), (1, 7, 1)]
    drawn = torch.cat([corrupt(grey(100), name, severity, torch.tensor([index]), seed) for severity, index, seed in keys])
    assert drawn.flatten(1).double().corrcoef().fill_diagonal_(0).abs().max() < 0.1
    assert corrupt(grey(100, 2), name, 5, torch.tensor([0, 7]), seed=1).sum((1, 2, 3)).tolist() == SUMS[name]


@names
def test_each_severity_disturbs_more(name: str) -> None:
    images = patterns(100)
    change = [(simply(images, name, severity).float() - images).abs().mean().item() for severity in SEVERITIES]
    assert change[0] > 1 and change == sorted(set(change)), change


@names
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 1, 9), (1, 7, 5), (3, 33, 47)])
def test_any_size_and_one_or_three_channels(name: str, shape: tuple[int, ...]) -> None:
    images = torch.randint(0, 256, (2, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert (corrupted := simply(images, name, 5)).dtype == torch.uint8 and corrupted.shape == images.shape
    assert len(simply(images[:0], name, 5)) == 0
    if name in ("defocus_blur", "brightness", "contrast", "pixelate"):  # a grey image is one channel of its colour copy
        copies = images[:, :1].expand(-1, 3, -1, -1)
        assert torch.equal(simply(copies, name, 4), simply(images[:, :1], name, 4).expand_as(copies))


@severities
def test_noises_have_the_published_strength(severity: int) -> None:
    sigma, white, share = ((0.04, 500, 0.01), (0.06, 250, 0.02), (0.08, 100, 0.03), (0.09, 75, 0.05), (0.10, 50, 0.07))[
        severity - 1
    ]
    noise = simply(grey(128, 64), "gaussian_noise", severity).double() / 255 - 128 / 255
    assert noise.std().item() == pytest.approx(sigma, rel=0.01) and abs(noise.mean().item()) < sigma / 100
    assert noise.transpose(0, 1).flatten(1).corrcoef().fill_diagonal_(0).abs().max() < 0.02  # not one for all channels

    for value in (0, 64, 128):
        counts = simply(grey(value, 64), "shot_noise", severity).double() / 255 * white
        assert (counts - counts.round()).abs().max() <= 0.5 * white / 255 + 1e-9
        assert counts.mean().item() == pytest.approx(value / 255 * white, rel=0.005)
        assert counts.var().item() == pytest.approx(value / 255 * white, rel=0.05)  # of a Poisson number: its mean

    impulses = simply(grey(128, 128), "impulse_noise", severity)
    for value, expected in ((0, share / 2), (128, 1 - share), (255, share / 2)):
        assert (impulses == value).double().mean().item() == pytest.approx(expected, rel=0.06, abs=1e-4)
    assert (impulses != 128).all(1).double().mean() < 0.002  # single channels, not whole pixels


# What a white pixel leaves at its place, beside it and at the corner.
POINTS = {1: (215, 9, 0), 2: (158, 21, 3), 3: (114, 28, 7), 4: (51, 51, 0), 5: (28, 28, 28)}


@severities
def test_defocus_blur_spreads_a_point_over_a_disk(severity: int) -> None:
    point = grey(0, size=7)
    point[..., 3, 3] = 255
    centre, side, corner = POINTS[severity]
    expected = torch.tensor([[corner, side, corner], [side, centre, side], [corner, side, corner]])
    blurred = simply(point, "defocus_blur", severity)
    assert (blurred[..., 2:5, 2:5] == expected).all() and blurred.sum() == 3 * expected.sum()
    assert torch.equal(simply(grey(77), "defocus_blur", severity), grey(77))
    line = grey(0)
    line[..., 1] = 90  # the pixel at the border sees it twice: the box of severity 5 gives 2/3 of it there
    assert simply(line, "defocus_blur", 5)[0, 0, 0, :4].tolist() == [60, 30, 30, 0]


@severities
def test_brightness_raises_the_value_of_hsv(severity: int) -> None:
    shift = (0.05, 0.1, 0.15, 0.2, 0.3)[severity - 1]
    assert torch.equal(simply(grey(0), "brightness", severity), grey(round(255 * shift)))
    image = patterns()[:1]
    brighter = simply(image, "brightness", severity) / 255
    for before, after in zip((image / 255).flatten(2)[0].T.tolist(), brighter.flatten(2)[0].T.tolist(), strict=True):
        hue, saturation, value = colorsys.rgb_to_hsv(*before)
        assert after == pytest.approx(colorsys.hsv_to_rgb(hue, saturation, min(value + shift, 1.0)), abs=0.501 / 255)


@severities
def test_contrast_shrinks_around_the_mean_of_each_channel(severity: int) -> None:
    image = grey(50, size=4)
    image[:, 0, :2], image[:, 0, 2:] = 60, 180
    kept = (45, 30, 24, 18, 9)[severity - 1]  # of 60, the distance to 120
    flat = simply(image, "contrast", severity)
    assert (flat[:, 0, :2] == 120 - kept).all() and (flat[:, 0, 2:] == 120 + kept).all() and (flat[:, 1:] == 50).all()


@severities
def test_pixelate_leaves_fewer_rows_and_columns(severity: int) -> None:
    left = (30, 28, 27, 24, 20)[severity - 1]
    ramp = (torch.arange(32) * 8).to(torch.uint8).expand(1, 3, 32, 32)
    wide = simply(ramp, "pixelate", severity)
    assert len(wide[0, 0, 0].unique()) == left and (wide == wide[:, :, :1]).all()
    assert torch.equal(simply(ramp.transpose(2, 3), "pixelate", severity), wide.transpose(2, 3))
    if severity != 3:  # 16 pixels become 15, 14, 12 or 10 and come back
        blocks = patterns()[..., :2, :2].repeat_interleave(16, 2).repeat_interleave(16, 3)
        assert torch.equal(simply(blocks, "pixelate", severity), blocks)


@severities
def test_jpeg_drops_the_finest_detail_below_half_a_step_of_its_quality(severity: int) -> None:
    step = (40, 69, 83, 99, 124)[severity - 1]  # of the last coefficient at quality 80, 65, 58, 50, 40: a share of 99
    wave = torch.tensor([math.cos((2 * x + 1) * 7 * math.pi / 16) for x in range(8)])
    for part, kept in ((0.45, False), (0.55, True)):
        image = 128 + wave * wave[:, None] * step * part / 4  # the coefficient is 4 times the amplitude
        compressed = simply(image.round().to(torch.uint8).expand(1, 1, 8, 8), "jpeg_compression", severity)
        assert (compressed != 128).any() == kept


def test_wrong_requests_name_what_is_known() -> None:
    images, indices = grey(1, 2), torch.arange(2)
    with pytest.raises(ValueError, match=r"'fog'.*gaussian_noise, .*jpeg_compression"):
        corrupt(images, "fog", 1, indices)
    for severity in (0, 6):
        with pytest.raises(ValueError, match=rf"severity is {severity}.* 1, 2, 3, 4, 5"):
            corrupt(images, "contrast", severity, indices)
    for wrong in (images.float(), images[0], images[:, :2]):
        with pytest.raises(ValueError, match=r"images are .*expected torch.uint8 \(N, C, H, W\)"):
            corrupt(wrong, "contrast", 1, indices)
    for vector in (indices.int(), indices[None]):
        with pytest.raises(ValueError, match=r"indices are .*expected torch.int64"):
            corrupt(images, "contrast", 1, vector)
    for other, seed in ((torch.arange(3), 0), (torch.tensor([0, -1]), 0), (indices, -1)):
        with pytest.raises(ValueError, match=rf"2 images, {len(other)} indices, seed {seed}: expected"):
            corrupt(images, "contrast", 1, other, seed)


# ---------------------------------------------------------------------------------------------------- the published layout


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """Two corruptions of six images, and what else may lie beside them."""
    np.save(tmp_path / "labels.npy", np.tile(np.array([3, 8, 8, 0, 6, 1], np.uint8), 5))
    for name in ("fog", "brightness"):
        np.save(tmp_path / f"{name}.npy", np.random.RandomState(len(name)).randint(0, 256, (30, 4, 5, 3)).astype(np.uint8))
    (tmp_path / "._fog.npy").write_bytes(b"left by an archiver")
    return tmp_path


@pytest.mark.parametrize("channels", [1, 3])
def test_a_block_of_the_published_layout(published: Path, channels: int) -> None:
    np.save(published / "fog.npy", np.load(published / "fog.npy")[..., :channels])
    assert corruption_names(published) == corruption_names(str(published)) == ("brightness", "fog")
    stored = torch.from_numpy(np.load(published / "fog.npy")).permute(0, 3, 1, 2)
    for severity in SEVERITIES:
        images, labels = read_corrupted(published, "fog", severity)
        assert torch.equal(images, stored[6 * severity - 6 : 6 * severity]) and images.is_contiguous()
        assert labels.dtype == torch.int64 and labels.tolist() == [3, 8, 8, 0, 6, 1]
        chosen, some = read_corrupted(published, "fog", severity, torch.tensor([5, 0, 3]))
        assert torch.equal(chosen, images[[5, 0, 3]]) and some.tolist() == [1, 3, 0]
        images.zero_()  # a copy: the file stays
        assert torch.equal(read_corrupted(published, "fog", severity, torch.tensor([5]))[0], chosen[:1])
    assert read_corrupted(published, "fog", 1, torch.arange(0))[0].shape == (0, channels, 4, 5)


def test_wrong_requests_for_published_images(published: Path) -> None:
    with pytest.raises(ValueError, match=r"'snow', known are: brightness, fog"):
        read_corrupted(published, "snow", 1)
    with pytest.raises(ValueError, match=r"severity is 6"):
        read_corrupted(published, "fog", 6)
    for low, high in ((0, 6), (-1, 2)):
        with pytest.raises(ValueError, match=rf"positions go from {low} to {high}, expected 0 to 5"):
            read_corrupted(published, "fog", 1, torch.tensor([low, high]))
    for wrong in (torch.tensor([1.0]), torch.tensor(1)):
        with pytest.raises(ValueError, match=r"positions are .*expected torch.int64"):
            read_corrupted(published, "fog", 1, wrong)


PICKLED = np.array([{}] * 30)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("labels", np.zeros(30), r"is float64 \(30,\), expected integers"),
        ("labels", np.zeros((30, 1), np.uint8), r"\(30, 1\), expected integers"),
        ("labels", np.zeros(31, np.uint8), r"\(31,\), expected integers \(5M,\)"),
        ("labels", np.zeros(0, np.uint8), r"\(0,\), expected integers \(5M,\)"),
        ("labels", np.arange(30, dtype=np.uint8), "has other labels at one severity"),
        ("labels", PICKLED, "cannot be read"),
        ("fog", PICKLED, "cannot be read"),
        ("fog", np.zeros((30, 4, 5, 3)), "is float64"),
        ("fog", np.zeros((30, 4, 5), np.uint8), r"is uint8 \(30, 4, 5\)"),
        ("fog", np.zeros((30, 3, 4, 5), np.uint8), "with 1 or 3 channels"),
        ("fog", np.zeros((6, 4, 5, 3), np.uint8), r"is uint8 \(6, .*as labels.npy has 30 labels"),
        ("fog", b"", "cannot be read.*; fetch it again"),
        ("fog", b"no array at all", "cannot be read"),
        ("fog", None, "cannot be read"),  # the download broke off
    ],
)
def test_files_that_do_not_fit_are_refused_at_once(
    published: Path, file: str, content: np.ndarray | bytes | None, message: str
) -> None:
    path = published / f"{file}.npy"
    if isinstance(content, np.ndarray):
        np.save(path, content, allow_pickle=True)
    else:
        path.write_bytes(path.read_bytes()[:-1] if content is None else content)
    with pytest.raises(ValueError, match=rf"{file}\.npy .*{message}"):
        corruption_names(published)
    with pytest.raises(ValueError, match=rf"{file}\.npy"):
        read_corrupted(published, "brightness", 1)


def test_missing_files_are_named(published: Path) -> None:
    for no_folder in (published / "absent", published / "labels.npy"):
        with pytest.raises(FileNotFoundError, match="is no folder; give"):
            corruption_names(no_folder)
    (published / "fog.npy").unlink()
    for name, message in (("brightness", r"no CORRUPTION.npy; unpack"), ("labels", r"has no labels.npy; give")):
        (published / f"{name}.npy").unlink()
        with pytest.raises(FileNotFoundError, match=message):
            read_corrupted(published, "fog", 1)
