"""Folders of images as people have them: odd names, sizes, colours and formats, in one split `test`."""

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from PIL import Image

Size = tuple[int, int]  # height, width


def smooth(height: int, width: int, seed: int) -> Image.Image:
    """A photograph of sorts: large shapes under a little noise."""
    random = np.random.RandomState(seed)
    shapes = Image.fromarray(random.randint(0, 256, (6, 6, 3), dtype=np.uint8)).resize(
        (width, height), Image.Resampling.BILINEAR
    )
    noisy = np.asarray(shapes, np.float64) + random.normal(0, 10, (height, width, 3))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def write(root: Path, classes: Iterable[str], sizes: Iterable[Size], suffix: str = ".png", mode: str = "RGB") -> None:
    """Two images a class, of these sizes in turn."""
    sizes = list(sizes)
    for number, name in enumerate(classes):
        folder = root / "test" / name
        folder.mkdir(parents=True, exist_ok=True)
        for i in range(2):
            image = smooth(*sizes[(2 * number + i) % len(sizes)], seed=2 * number + i)
            image.convert(mode).save(folder / f"{i}{suffix}")


def rotated(root: Path) -> None:
    """Photographs whose EXIF says that they lie on their side: neither timm nor torchvision turns them."""
    for name in "ab":
        (root / "test" / name).mkdir(parents=True)
        exif = Image.Exif()
        exif[0x0112] = 6
        smooth(60, 80, seed=ord(name)).save(root / "test" / name / "0.jpg", exif=exif)


def modes(root: Path) -> None:
    """Palette, grey, transparent and bilevel PNG, grey and CMYK JPEG."""
    for i, (mode, suffix) in enumerate(
        (("P", "png"), ("L", "png"), ("RGBA", "png"), ("1", "png"), ("L", "jpg"), ("CMYK", "jpg"))
    ):
        (root / "test" / f"{mode} {suffix}").mkdir(parents=True)
        smooth(48, 40, seed=i).convert(mode).save(root / "test" / f"{mode} {suffix}" / f"x.{suffix}")


SETS: dict[str, Callable[[Path], None]] = {
    "numbers": lambda root: write(root, map(str, range(12)), [(32, 32)]),
    "case": lambda root: write(root, ["Bee", "ant", "Cat", "dog10", "dog9", "_x", "Zebra 2", "zebra 10"], [(40, 40)]),
    "accents": lambda root: write(root, ["école", "Ärger", "猫", "e\u0301t\u0065\u0301", "zoo"], [(28, 28)]),
    "wide": lambda root: write(root, "ab", [(20, 30)]),
    "a pixel taller": lambda root: write(root, "ab", [(20, 30), (21, 30), (20, 30), (20, 30)]),
    "narrow": lambda root: write(root, "ab", [(7, 61), (50, 9), (1, 1), (33, 34)]),
    "photographs": lambda root: write(root, "ab", [(300, 411), (375, 250), (256, 256), (240, 321)], ".jpg"),
    "large": lambda root: write(root, "ab", [(353, 353)]),
    "modes": modes,
    "rotated": rotated,
}
