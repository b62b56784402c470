"""Where images come from: a string names a source, and `read_source` returns one of its splits, not decoded.

Nothing is decoded here (`advcl_hub.data.decoding` does that), and the order of the images never depends on the
machine: files are sorted by name, rows keep their order, and every random choice is seeded.
"""

import contextlib
import difflib
import gzip
import math
import os
import re
import unicodedata
import warnings
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import torchvision
from torchvision.datasets.folder import IMG_EXTENSIONS

from advcl_hub.data.decoding import Item
from advcl_hub.data.parquet import has_parquet, read_parquet
from advcl_hub.errors import need, reason_of

FORMS = ("digits", "cifar10", "cifar100", "stl10", "fashion-mnist", "folder:PATH", "parquet:PATH", "fake:N")
FOLDER_SPLITS = ("train", "val", "test")
_NETWORK_ERRORS = (URLError, ConnectionError, TimeoutError, HTTPException)
DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")


@dataclass(frozen=True)
class Source:
    """One split as its source stores it.

    Attributes:
        items: the images as they are stored.
        names: what to call each item in a message; for files the path below the source's folder.
        labels: int64 (N,), -1 in an unlabeled split.
        classes: class names by label.
        name: the source's name, without the place on this machine.
        default_size: size the images are scaled to if the caller asks for none.
    """

    items: Sequence[Item]
    names: Sequence[str]
    labels: np.ndarray
    classes: tuple[str, ...]
    name: str
    default_size: int | None = None


def read_source(source: str, split: str, root: str | Path | None, download: bool) -> Source:
    """Reads one split of a source. See `advcl_hub.data.load_data` for the sources and the errors.

    A new source is a case here, a word in `FORMS`, a line in the docstring of `load_data`, in `DATA` of `advcl_hub.cli.common`
    and, if the Hub has the set, in `_DATASETS` of `advcl_hub.hub.cards.metadata`.
    """
    base = None if root is None else Path(root).expanduser()
    match source.partition(":"):
        case ("digits", "", _):
            return _read_digits(split)
        case ("cifar10" | "cifar100" | "stl10" as name, "", _):
            return _read_torchvision(name, split, base, download)
        case ("fashion-mnist", "", _):
            return _read_fashion_mnist(split, base, download)
        case ("folder", ":", path) if path:
            return _read_folder((base or Path()) / Path(path).expanduser(), split)
        case ("parquet", ":", path) if path:
            folder = (base or Path()) / Path(path).expanduser()
            return _read_parquet(folder, split, name=f"parquet:{folder.resolve().name}")
        case ("fake", "", _):
            return _read_fake(source, "1000", split)
        case ("fake", ":", count):
            return _read_fake(source, count, split)
    kinds = {form.partition(":")[0]: form for form in FORMS}
    near = difflib.get_close_matches(source.partition(":")[0].lower(), kinds, n=1)
    hint = f"; did you mean {kinds[near[0]]!r}?" if near else "."
    if ((base or Path()) / source).expanduser().is_dir():
        hint = f"; for the folder of this name write 'folder:{source}'."
    raise ValueError(f"unknown data source {source!r}{hint} Known sources: {', '.join(FORMS)}")


def balanced_holdout(labels: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Chooses `fraction` of every class, rounded, at least one image of it and never all.

    Returns:
        bool (N,), True for the images held out.

    Raises:
        ValueError: fraction is not in (0, 1), or a class has a single image.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"fraction is {fraction}, expected a number between 0 and 1, both excluded")
    # RandomState and not default_rng: NumPy froze its stream (NEP 19), so the split outlives upgrades.
    random = np.random.RandomState(seed)
    held_out = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        if len(rows) < 2:
            raise ValueError(f"label {label} has a single image, a split needs at least 2 of every class")
        count = min(max(round(fraction * len(rows)), 1), len(rows) - 1)
        held_out[random.permutation(rows)[:count]] = True
    return held_out


def _check_split(split: str, available: Sequence[str], where: str) -> None:
    if split not in available:
        there = ", ".join(available) or "none"
        raise ValueError(
            f"{where} has no split {split!r}, it has: {there}{': choose with split (--split)' if available else ''}"
        )


def _check_folder(folder: Path) -> None:
    """Raises an error that says what is wrong unless `folder` is a folder that can be listed."""
    try:
        os.scandir(folder).close()
    except FileNotFoundError:
        raise FileNotFoundError(f"folder {folder} does not exist, check the path and root") from None
    except NotADirectoryError:
        raise NotADirectoryError(f"{folder} is a file, expected a folder") from None
    except PermissionError:
        raise PermissionError(f"folder {folder} cannot be read, check its permissions") from None


def _numbered(count: int) -> list[str]:
    return [f"image {position}" for position in range(count)]


# ---- sources that are made or come with a package ------------------------------------------------


def _read_digits(split: str) -> Source:
    """scikit-learn's digits, 1,797 grey 8x8 images with values 0 to 16.

    The set has no test split: 20 % of every class, drawn once with seed 0, is ours (1,438 + 359 images).
    """
    need("sklearn", "The source digits", "data")
    from sklearn.datasets import load_digits  # here: half a second that no other source needs

    _check_split(split, ("train", "test"), "digits")
    digits = load_digits()
    rows = balanced_holdout(digits.target, fraction=0.2, seed=0) == (split == "test")
    images = np.rint(digits.images[rows] * (255 / 16)).astype(np.uint8)
    classes = tuple(str(digit) for digit in digits.target_names)
    labels = digits.target[rows].astype(np.int64)
    return Source(list(images), _numbered(len(images)), labels, classes, "digits", default_size=32)


def _read_fake(source: str, count: str, split: str) -> Source:
    """`count` 32x32 RGB images of 10 classes: a pattern of 4x4 colours for each class under strong noise."""
    _check_split(split, ("train", "test"), source)
    if not count.isdecimal() or int(count) < 10:
        raise ValueError(f"{source!r}: expected fake:N with N images, at least one for each of 10 classes")
    patterns = np.random.RandomState(0).uniform(64, 192, (10, 4, 4, 3)).repeat(8, axis=1).repeat(8, axis=2)
    labels = np.arange(int(count), dtype=np.int64) % 10
    noise = np.random.RandomState(1 if split == "train" else 2)
    noisy = (patterns[label] + noise.normal(0, 48, (32, 32, 3)) for label in labels)
    images = [np.rint(image.clip(0, 255)).astype(np.uint8) for image in noisy]
    return Source(images, _numbered(len(images)), labels, tuple(map(str, range(10))), source)


# ---- torchvision's sets --------------------------------------------------------------------------


def _read_torchvision(name: str, split: str, root: Path | None, download: bool) -> Source:
    """CIFAR-10, CIFAR-100 or STL-10 as torchvision stores them, or as Parquet files in root or root/name.

    torchvision unpickles the CIFAR files. That is the one pickle read here, and an acceptable one: its
    constructor checks every file against the published md5 first (always, this function cannot turn it
    off), and nobody can make another file with a given md5.
    """
    splits = ("train", "test", "unlabeled") if name == "stl10" else ("train", "test")
    _check_split(split, splits, name)
    if root is None:
        raise ValueError(f"{name} needs root, the folder that holds it (or will, with download=True)")
    if not download or root.exists():
        _check_folder(root)
    kind = {"cifar10": "CIFAR10", "cifar100": "CIFAR100", "stl10": "STL10"}[name]
    dataset_class = getattr(torchvision.datasets, kind)
    if not (root / dataset_class.base_folder).is_dir():
        for folder in (root, root / name):
            if has_parquet(folder, splits):
                return _read_known_parquet(name, folder, split)
    which: dict[str, Any] = {"split": split} if name == "stl10" else {"train": split == "train"}
    try:
        dataset = dataset_class(root, download=download, **which)
    except _NETWORK_ERRORS as error:
        raise _failed_download(name, root, error) from error
    except RuntimeError as error:
        if download:
            raise _failed_download(name, root, error) from error
        raise FileNotFoundError(
            f"{name} is absent from {root} or its files fail their checksums: expected "
            f"{dataset_class.base_folder}/ as torchvision stores it or Parquet files {split}-*.parquet; "
            "give another root, or download=True"
        ) from error
    images, labels = dataset.data, dataset.labels if name == "stl10" else dataset.targets
    if name == "stl10":
        images = images.transpose(0, 2, 3, 1)  # stored channels first
    labels = np.asarray(labels, np.int64)
    return Source(list(images), _numbered(len(images)), labels, tuple(dataset.classes), name)


def _read_known_parquet(name: str, folder: Path, split: str) -> Source:
    """Parquet files that stand for a known set; they keep `parquet:` in the name, their pixels may differ."""
    source = _read_parquet(folder, split, name=f"parquet:{name}")
    expected = 100 if name == "cifar100" else 10
    if len(source.classes) != expected:
        raise ValueError(f"{folder} has {len(source.classes)} classes but {name} has {expected}, check root")
    return source


# ---- IDX files -----------------------------------------------------------------------------------


def _read_fashion_mnist(split: str, root: Path | None, download: bool) -> Source:
    _check_split(split, ("train", "test"), "fashion-mnist")
    prefix = "train" if split == "train" else "t10k"
    if root is not None and (not download or root.exists()):
        _check_folder(root)
    folders = ([] if root is None else [root, root / "FashionMNIST" / "raw"]) + [DEBIAN_FASHION_MNIST]
    image_file = _find_idx(folders, f"{prefix}-images-idx3-ubyte")
    if image_file is None and download and root is not None:
        _download_fashion_mnist(root)
        image_file = _find_idx(folders, f"{prefix}-images-idx3-ubyte")
    if image_file is None:
        raise FileNotFoundError(
            f"fashion-mnist: no {prefix}-images-idx3-ubyte or .gz in {', '.join(map(str, folders))}; "
            "give root, or root and download=True, or install Debian's dataset-fashion-mnist"
        )
    label_file = _find_idx([image_file.parent], f"{prefix}-labels-idx1-ubyte")
    if label_file is None:
        raise FileNotFoundError(f"fashion-mnist: no {prefix}-labels-idx1-ubyte or .gz beside {image_file}")
    images, labels = read_idx(image_file, dimensions=3), read_idx(label_file, dimensions=1)
    if len(images) != len(labels):
        raise ValueError(f"{image_file} has {len(images)} images but {label_file} has {len(labels)} labels")
    classes = tuple(torchvision.datasets.FashionMNIST.classes)
    return Source(list(images), _numbered(len(images)), labels.astype(np.int64), classes, "fashion-mnist")


def _download_fashion_mnist(root: Path) -> None:
    try:
        torchvision.datasets.FashionMNIST(str(root), download=True)
    except (*_NETWORK_ERRORS, RuntimeError) as error:  # RuntimeError: of a checksum
        raise _failed_download("fashion-mnist", root, error) from error


def _failed_download(name: str, root: Path, error: Exception) -> ConnectionError:
    reason = error.reason if isinstance(error, URLError) else reason_of(error)
    return ConnectionError(f"{name} could not be downloaded to {root}: {reason}")


def _find_idx(folders: Sequence[Path], name: str) -> Path | None:
    candidates = (folder / file for folder in folders for file in (name, f"{name}.gz"))
    return next((path for path in candidates if path.is_file()), None)


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """Reads an IDX file of unsigned bytes, plain or gzipped (`.gz`).

    Raises:
        ValueError: another magic number, or more or fewer bytes than the header announces.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            content = file.read()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is truncated or no gzip file: {error}; fetch it again") from error
    header = 4 * (1 + dimensions)
    magic = bytes([0, 0, 8, dimensions])  # 8: unsigned byte
    if content[:4] != magic:
        raise ValueError(f"{path} begins with {content[:4].hex()}, expected the IDX magic {magic.hex()}")
    shape = [int.from_bytes(content[start : start + 4], "big") for start in range(4, header, 4)]
    if len(content) == header + math.prod(shape):
        with contextlib.suppress(ValueError):  # sides too large for NumPy, even where another one is 0
            return np.frombuffer(content, np.uint8, offset=header).reshape(shape)
    raise ValueError(
        f"{path} has {len(content)} bytes, its header announces {'x'.join(map(str, shape))} values: "
        "the file is truncated or damaged, fetch it again"
    )


# ---- folders of images ---------------------------------------------------------------------------


def _read_folder(folder: Path, split: str) -> Source:
    """PATH/{train,val,test}/CLASS/**/IMAGE; classes in timm's order, the images of each by name."""
    _check_folder(folder)
    splits = [name for name in FOLDER_SPLITS if (folder / name).is_dir()]
    if not splits:
        raise ValueError(
            f"folder {folder} has no split {split!r}: expected {folder}/SPLIT/CLASS/IMAGE, with SPLIT one of "
            f"{', '.join(FOLDER_SPLITS)}"
        )
    _check_split(split, splits, f"folder {folder}")
    places = {name: _class_folders(folder / name) for name in splits}
    for other in splits:
        if difference := places[split].keys() ^ places[other].keys():
            raise ValueError(
                f"{folder}: {split}/ and {other}/ must have the same class folders, "
                f"only one of them has: {', '.join(sorted(difference))}"
            )
    # All splits are numbered as the first one, in which names may be spelt otherwise (`canonical`).
    numbered = {name: _text(place.name) for name, place in places[splits[0]].items()}
    files, labels = [], []
    for label, name in enumerate(numbered):
        found = sorted(_image_files(places[split][name]), key=Path.as_posix)
        files += found
        labels += [label] * len(found)
    _warn_of_inner_folders(folder, files, labels)
    names = [_text(file.relative_to(folder).as_posix()) for file in files]
    return Source(files, names, np.array(labels, np.int64), tuple(numbered.values()), f"folder:{folder.resolve().name}")


def _warn_of_inner_folders(folder: Path, files: Sequence[Path], labels: Sequence[int]) -> None:
    """timm takes the innermost folder of an image for its class. Where that makes as many classes, nothing else would tell."""
    inner = sorted({_text(file.parent.name) for file in files}, key=natural)
    theirs = [inner.index(_text(file.parent.name)) for file in files] if len(inner) == len(set(labels)) else labels
    if list(theirs) != list(labels):
        warnings.warn(
            f"{folder} has class folders within class folders. The outer ones are the classes here, as in torchvision's "
            f"ImageFolder; timm takes the inner ones, and numbers them {', '.join(inner[:3])} ...",
            stacklevel=2,
        )


def _class_folders(folder: Path) -> dict[str, Path]:
    """The class folders in a folder by `canonical` name, in timm's order."""
    _check_folder(folder)
    # Hidden folders are tools' leftovers (.ipynb_checkpoints), not classes.
    places = [Path(entry.path) for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith(".")]
    if not places:
        raise ValueError(f"{folder} has no class folders, expected {folder}/CLASS/IMAGE")
    places.sort(key=lambda place: natural(_text(place.name)))
    classes = {canonical(_text(place.name)): place for place in places}
    if len(classes) < len(places):
        twice = next(place.name for place in places if place not in classes.values())
        raise ValueError(
            f"{folder} has two folders {_text(twice)}, a name that Unicode spells in two ways ({_text(twice)!a} is one): move "
            "their images into one of them."
        )
    return classes


def natural(name: str) -> tuple[list[str | int], str]:
    """The key by which timm sorts class folders: without regard to case, and 2 before 10. Equal ones are sorted as they are."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name.lower())], name


def canonical(name: str) -> str:
    """The composed form (NFC) of a name. Unicode has two ways to spell letters with accents, and macOS stores the other one."""
    return unicodedata.normalize("NFC", name)


def _text(name: str) -> str:
    """A file name as text, whatever the locale says: UTF-8, with bytes that are none as \\xNN."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _image_files(folder: Path) -> Iterator[Path]:
    def fail(error: OSError) -> None:  # os.walk passes over unreadable folders unless told otherwise
        raise error

    for parent, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if name.startswith("."):
                continue
            if not name.lower().endswith(IMG_EXTENSIONS):
                known = " ".join(IMG_EXTENSIONS)
                raise ValueError(f"{Path(parent, name)} is no image (suffixes: {known}); remove it")
            yield Path(parent, name)


# ---- Parquet -------------------------------------------------------------------------------------


def _read_parquet(folder: Path, split: str, name: str) -> Source:
    """A split in Parquet files, see `advcl_hub.data.parquet`."""
    _check_folder(folder)
    found = read_parquet(folder, split)
    return Source(found.images, found.names, found.labels, found.classes, name)
