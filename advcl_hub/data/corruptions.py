"""Common corruptions: a small set made here from any images, and the reader of the published CIFAR-10-C and CIFAR-100-C.

    corrupted = corrupt(images, "gaussian_noise", 3, indices)
    for name in corruption_names("CIFAR-10-C"):
        for severity in SEVERITIES:
            images, labels = read_corrupted("CIFAR-10-C", name, severity)

What `corrupt` makes is ours, not CIFAR-10-C: figures are comparable among runs of this generator only. It follows
Hendrycks & Dietterich (arXiv 1903.12261) with the constants of their make_cifar_c.py, which are meant for 32x32 images (those
of ImageNet-C are harsher). The noise is another draw, and values are rounded where they truncate. NumPy may change how it
draws, and Pillow how it compresses: a figure has to name both versions.
"""

import math
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from zlib import crc32

import numpy as np
import torch
from numpy.lib.format import open_memmap
from numpy.lib.stride_tricks import sliding_window_view
from numpy.random import PCG64, Generator, SeedSequence
from PIL import Image
from torch import Tensor

SEVERITIES = range(1, 6)

# ---- the generator: functions of a float64 (C, H, W) in [0, 1] that may leave this range -------------------------------


def gaussian_noise(image: np.ndarray, severity: int, random: Generator) -> np.ndarray:
    """Adds normal noise, independent for every value."""
    return image + random.normal(scale=(0.04, 0.06, 0.08, 0.09, 0.10)[severity - 1], size=image.shape)


def shot_noise(image: np.ndarray, severity: int, random: Generator) -> np.ndarray:
    """Counts photons: Poisson numbers of which white has 500 to 50 on average."""
    white = (500, 250, 100, 75, 50)[severity - 1]
    return random.poisson(image * white) / white


def impulse_noise(image: np.ndarray, severity: int, random: Generator) -> np.ndarray:
    """Sets a share of the values (of single channels, not of whole pixels) to 0 or 1, with equal chances."""
    share = (0.01, 0.02, 0.03, 0.05, 0.07)[severity - 1]
    draw = random.random(image.shape)
    return np.where(draw < share / 2, 0.0, np.where(draw >= 1 - share / 2, 1.0, image))


def defocus_blur(image: np.ndarray, severity: int, random: Generator) -> np.ndarray:
    """Convolves with a disk, whose edge a 3x3 Gaussian softens; the image continues beyond its border as in a mirror."""
    radius, sigma = ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1.0, 0.2), (1.5, 0.1))[severity - 1]
    x = np.arange(-2, 3)  # room for the largest disk, which reaches 1 pixel, and 1 more for the Gaussian
    disk = (x**2 + x[:, None] ** 2 <= radius**2).astype(float)
    soften = np.eye(5) + math.exp(-1 / (2 * sigma**2)) * (np.eye(5, k=1) + np.eye(5, k=-1))
    kernel = soften @ disk @ soften
    padded = np.pad(image, ((0, 0), (2, 2), (2, 2)), mode="reflect")
    return np.einsum("chwij,ij->chw", sliding_window_view(padded, (5, 5), axis=(1, 2)), kernel / kernel.sum())


def brightness(image: np.ndarray, severity: int, random: Generator) -> np.ndarray:
    """Raises the value V of HSV, at most to 1; hue and saturation stay, so that the channels grow in proportion."""
    value = image.max(0, keepdims=True)
    raised = np.minimum(value + (0.05, 0.1, 0.15, 0.2, 0.3)[severity - 1], 1)
    # Black has no hue and becomes grey. The smallest value above it is 1/255, so that maximum() changes nothing else.
    return np.where(value > 0, image / np.maximum(value, 1 / 255) * raised, raised)


def contrast(image: np.ndarray, severity: int, random: Generator) -> np.ndarray:
    """Shrinks the distance of every value to the mean of its channel."""
    mean = image.mean((1, 2), keepdims=True)
    return mean + (image - mean) * (0.75, 0.5, 0.4, 0.3, 0.15)[severity - 1]


def pixelate(image: np.ndarray, severity: int, random: Generator) -> np.ndarray:
    """Scales down and back up with a box filter (Pillow)."""
    scale = (0.95, 0.9, 0.85, 0.75, 0.65)[severity - 1]
    full = _to_pillow(image)
    small = full.resize((max(int(full.width * scale), 1), max(int(full.height * scale), 1)), Image.Resampling.BOX)
    return _from_pillow(small.resize(full.size, Image.Resampling.BOX))


def jpeg_compression(image: np.ndarray, severity: int, random: Generator) -> np.ndarray:
    """Compresses as JPEG of quality 80 to 40, with Pillow's other defaults (colours at half the resolution)."""
    encoded = BytesIO()
    _to_pillow(image).save(encoded, "JPEG", quality=(80, 65, 58, 50, 40)[severity - 1])
    with Image.open(encoded) as decoded:
        return _from_pillow(decoded)


def _to_pillow(image: np.ndarray) -> Image.Image:
    pixels = np.rint(image * 255).astype(np.uint8)
    return Image.fromarray(pixels[0] if len(pixels) == 1 else np.ascontiguousarray(pixels.transpose(1, 2, 0)))


def _from_pillow(image: Image.Image) -> np.ndarray:
    pixels = np.asarray(image) / 255
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


CORRUPTIONS: dict[str, Callable[[np.ndarray, int, Generator], np.ndarray]] = {
    function.__name__: function
    for function in (gaussian_noise, shot_noise, impulse_noise, defocus_blur, brightness, contrast, pixelate, jpeg_compression)
}


def corrupt(images: Tensor, name: str, severity: int, indices: Tensor, seed: int = 0) -> Tensor:
    """Corrupts images; ours, not CIFAR-10-C: figures are comparable among runs of this generator only.

    The noise of an image depends on the seed, the name, the severity and its index alone, not on its batch.

    Args:
        images: uint8 (N, C, H, W) in 0 to 255 on the CPU, of 1 or 3 channels and any size.
        name: one of CORRUPTIONS.
        severity: 1 to 5.
        indices: int64 (N,), what tells each image from the others, as in `ImageData`.
        seed: not negative.

    Returns:
        The corrupted images, uint8 (N, C, H, W).

    Raises:
        ValueError: unknown name or severity, images or indices of another type or shape, negative indices or seed.
    """
    _check_choice(name, severity, tuple(CORRUPTIONS))
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
        given = f"{images.dtype} {tuple(images.shape)}"
        raise ValueError(f"images are {given}, expected torch.uint8 (N, C, H, W) with 1 or 3 channels")
    _check_int64("indices", indices)
    if len(indices) != len(images) or seed < 0 or (indices < 0).any():
        expected = "expected as many indices as images, and neither indices nor seed below 0"
        raise ValueError(f"{len(images)} images, {len(indices)} indices, seed {seed}: {expected}")
    corrupted = torch.empty_like(images)
    for row, index in enumerate(indices.tolist()):
        # The name by its checksum: its place in the list may change.
        random = Generator(PCG64(SeedSequence([seed, crc32(name.encode()), severity, index])))
        image = CORRUPTIONS[name](images[row].numpy() / 255, severity, random)
        corrupted[row] = torch.from_numpy(np.rint(image.clip(0, 1) * 255).astype(np.uint8))
    return corrupted


# ---- the published sets ----------------------------------------------------------------------------------------------


def corruption_names(folder: str | Path) -> tuple[str, ...]:
    """The corruptions in a folder of the layout of CIFAR-10-C and CIFAR-100-C, sorted.

    NAME.npy is uint8 (5M, H, W, C), five blocks of the same M test images at severity 1 to 5, and labels.npy (5M,) holds
    their labels. The headers of all files are checked here, before the first one is used. The published sets have 19
    corruptions; the usual mean is over 15, without gaussian_blur, saturate, spatter and speckle_noise (kept for tuning).

    Raises:
        FileNotFoundError: no such folder, no labels.npy in it, or no other .npy.
        ValueError: a file that is damaged or pickled, or of another type, shape or length.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder; give the one that CIFAR-10-C.tar or CIFAR-100-C.tar unpacks to")
    total = len(_read_labels(folder))
    # Hidden files are tools' leftovers (._fog.npy), not corruptions.
    names = sorted(file.stem for file in folder.glob("*.npy") if file.name != "labels.npy" and file.name[0] != ".")
    if not names:
        raise FileNotFoundError(f"{folder} has labels.npy but no CORRUPTION.npy; unpack the whole archive")
    for name in names:
        path = folder / f"{name}.npy"
        array = _open(path)
        if array.dtype != np.uint8 or array.ndim != 4 or array.shape[3] not in (1, 3) or len(array) != total:
            expected = f"uint8 ({total}, H, W, C) with 1 or 3 channels, as labels.npy has {total} labels"
            raise ValueError(f"{path} is {array.dtype} {array.shape}, expected {expected}; fetch it again or remove it")
    return tuple(names)


def read_corrupted(folder: str | Path, name: str, severity: int, positions: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Reads one corruption at one severity from a folder of the layout of `corruption_names`, or a part of it.

    Args:
        folder: holds labels.npy and NAME.npy.
        name: one of `corruption_names(folder)`.
        severity: 1 to 5.
        positions: int64 (K,), which images to read, in this order: positions in the clean test split, 0 to M - 1.
            None for all in their order.

    Returns:
        images uint8 (K, C, H, W) in 0 to 255 and labels int64 (K,).

    Raises:
        FileNotFoundError, ValueError: as `corruption_names`.
        ValueError: unknown name or severity, or positions are no vector of int64 or not all within the set.
    """
    folder = Path(folder).expanduser()
    _check_choice(name, severity, corruption_names(folder))
    labels = _read_labels(folder)
    count = len(labels) // len(SEVERITIES)
    positions = torch.arange(count) if positions is None else positions
    _check_int64("positions", positions)
    if len(positions) and (positions.min() < 0 or positions.max() >= count):
        low, high = int(positions.min()), int(positions.max())
        raise ValueError(f"positions go from {low} to {high}, expected 0 to {count - 1}: {folder} has {count} images")
    rows = positions.cpu().numpy()
    block = _open(folder / f"{name}.npy")[(severity - 1) * count : severity * count]
    images = np.ascontiguousarray(block[rows].transpose(0, 3, 1, 2))  # indexing by rows has copied them from the file
    return torch.from_numpy(images), torch.from_numpy(labels[rows].astype(np.int64))


def _read_labels(folder: Path) -> np.ndarray:
    path = folder / "labels.npy"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no labels.npy; give the folder of an unpacked CIFAR-10-C or CIFAR-100-C")
    labels = _open(path)
    if labels.ndim != 1 or labels.dtype.kind not in "iu" or not len(labels) or len(labels) % len(SEVERITIES):
        expected = "integers (5M,), a block for each of 5 severities"
        raise ValueError(f"{path} is {labels.dtype} {labels.shape}, expected {expected}; fetch it again")
    blocks = labels.reshape(len(SEVERITIES), -1)
    if (blocks != blocks[0]).any():
        raise ValueError(f"{path} has other labels at one severity than at another, expected five equal blocks; fetch it again")
    return labels


def _open(path: Path) -> np.ndarray:
    """Maps an array without reading it; never unpickles."""
    try:
        return open_memmap(path, mode="r")
    except ValueError as error:
        raise ValueError(f"{path} cannot be read as an array in NumPy's format: {error}; fetch it again") from error


def _check_choice(name: str, severity: int, known: tuple[str, ...]) -> None:
    if name not in known:
        raise ValueError(f"unknown corruption {name!r}, known are: {', '.join(known)}")
    if severity not in SEVERITIES:
        raise ValueError(f"severity is {severity}, known are: {', '.join(map(str, SEVERITIES))}")


def _check_int64(what: str, values: Tensor) -> None:
    if values.ndim != 1 or values.dtype != torch.int64:
        raise ValueError(f"{what} are {values.dtype} {tuple(values.shape)}, expected torch.int64, one dimension")
