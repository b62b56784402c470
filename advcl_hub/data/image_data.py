"""`ImageData`, the form that every data set gets, and what is done with it: loading, splitting, batches.

    data = load_data("cifar10", "train", root="data")
    train, val = train_val_split(data)
    for images, rows in batches(train.to(device), 512, device=device, order=torch.randperm(len(train))):
        labels = train.labels[rows]

Small sets are decoded at once into one tensor, large ones batch by batch; both give the same batches.
"""

import hashlib
import signal
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from advcl_hub.data.decoding import Fit, Item, LazyImages, Square, read_images
from advcl_hub.data.sources import Source, balanced_holdout, read_source
from advcl_hub.modes import as_usual


@dataclass(frozen=True, eq=False)
class ImageData:
    """One split of one dataset.

    Attributes:
        images: uint8 (N, C, H, W) in 0 to 255, or the same lazily decoded.
        labels: int64 (N,), -1 in an unlabeled split; other integers become int64.
        indices: int64 (N,), each image's position in the source's split. Label files and splits made for the
            whole split stay aligned after subsets and skipped images.
        classes: class names by label.
        name: the source, e.g. "digits" or "parquet:cifar10"; no absolute path.
        source_length: number of images in the source's whole split, if known.
        fitted: whether `fit` of `load_data` has brought the images to the size of a model, which then takes them as they are.
    """

    images: Tensor | LazyImages
    labels: Tensor
    indices: Tensor
    classes: tuple[str, ...]
    name: str
    source_length: int | None = None
    fitted: bool = False

    def __post_init__(self) -> None:
        for name in ("images", "labels", "indices"):
            value = getattr(self, name)
            if not isinstance(value, Tensor | LazyImages):
                hint = f": torch.from_numpy({name})" if isinstance(value, np.ndarray) else ""
                raise ValueError(f"{name} are {type(value).__name__}, expected a torch.Tensor{hint}")
        object.__setattr__(self, "labels", _whole_numbers("labels", self.labels))
        object.__setattr__(self, "indices", _whole_numbers("indices", self.indices))
        images, labels, indices = len(self.images), len(self.labels), len(self.indices)
        if not images == labels == indices:
            raise ValueError(f"{images} images, {labels} labels and {indices} indices, expected equal numbers")
        if isinstance(self.images, Tensor) and (self.images.dtype != torch.uint8 or self.images.ndim != 4):
            given = f"{self.images.dtype} {tuple(self.images.shape)}"
            hint = ": (images * 255).round().to(torch.uint8)" if self.images.is_floating_point() else ""
            raise ValueError(f"images are {given}, expected torch.uint8 (N, C, H, W){hint}")
        if isinstance(self.images, Tensor) and self.images.shape[-1] in (1, 3) and self.images.shape[1] not in (1, 3):
            raise ValueError(f"images are {tuple(self.images.shape)}, expected (N, C, H, W): images.permute(0, 3, 1, 2)")

    def __len__(self) -> int:
        return len(self.images)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of every image."""
        channels, height, width = self.images.shape[-3:]
        return channels, height, width

    def subset(self, positions: Tensor) -> "ImageData":
        """The images at these positions, int64 (M,), in this order.

        Raises:
            ValueError: positions are no vector of int64 or not all within the data.
        """
        _check_positions(positions, len(self))
        here = positions.to(self.labels.device)
        if isinstance(self.images, Tensor):
            images: Tensor | LazyImages = self.images[here]
        else:
            images = self.images.select(positions.tolist())
        return replace(self, images=images, labels=self.labels[here], indices=self.indices[here])

    def sample(self, count: int, seed: int = 0) -> "ImageData":
        """At most `count` images, drawn with a seed: of a set sorted by class, the first ones would be of one class."""
        return self.subset(torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))[:count])

    def balanced_positions(self, count: int) -> Tensor:
        """Positions int64 (count,), ascending, of as many images of every class as there can be: the same on every machine.

        Of each class those that come first in a permutation seeded with 0 and the class; what does not divide evenly, or what
        a class is short of, goes to the classes in their order.

        Raises:
            ValueError: count is not between 1 and the number of images.
        """
        if not 1 <= count <= len(self):
            raise ValueError(f"{count} images were asked for, {self.name} has {len(self)}")
        queues = []
        for label in range(len(self.classes)):
            members = (self.labels.cpu() == label).nonzero()[:, 0].numpy()
            queues.append(np.random.Generator(np.random.PCG64([0, label])).permutation(members).tolist())
        turns = [position for turn in zip_longest(*queues) for position in turn if position is not None]
        return torch.tensor(sorted(turns[:count]))

    def to(self, device: str | torch.device) -> "ImageData":
        """Moves the labels, the indices and images in memory; lazy images stay where they are stored."""
        images = self.images.to(device) if isinstance(self.images, Tensor) else self.images
        return replace(self, images=images, labels=self.labels.to(device), indices=self.indices.to(device))

    def fingerprint(self) -> str:
        """sha256 in hex over shape, images, labels and indices, the same on every device.

        Lazy images enter by their names below the source's folder and their sizes in bytes.
        """
        digest = hashlib.sha256(repr((len(self), *self.shape)).encode())
        if isinstance(self.images, Tensor):
            digest.update(self.images.cpu().contiguous().numpy().data)
        else:
            for name, item in zip(self.images.names, self.images.items, strict=True):
                digest.update(f"{name}\0{_stored_bytes(item)}\n".encode())
        digest.update(self.labels.cpu().contiguous().numpy().data)
        digest.update(self.indices.cpu().contiguous().numpy().data)
        return digest.hexdigest()


@as_usual()
def load_data(
    source: str,
    split: str = "train",
    *,
    root: str | Path | None = None,
    size: int | None = None,
    channels: int = 3,
    fit: Fit | None = None,
    download: bool = False,
    strict: bool = False,
) -> ImageData:
    """Loads one split of a dataset.

    - `digits`: scikit-learn's 1,797 grey 8x8 digits, scaled to 32x32 by default. The set has no test split:
      a fixed 20 % of every class is ours.
    - `cifar10`, `cifar100`, `stl10`: torchvision's files in root, or Parquet files in root or root/SOURCE
      (then the name says parquet:SOURCE, as such copies may be recompressed). STL-10 has a third split,
      unlabeled.
    - `fashion-mnist`: IDX files, plain or .gz, in root, in root/FashionMNIST/raw or of Debian's package
      dataset-fashion-mnist.
    - `folder:PATH`: PATH/SPLIT/CLASS/IMAGE with splits train, val and test, and the same classes in each.
    - `parquet:PATH`: the Hugging Face layouts, such as PATH/data/SPLIT-00000-of-00002.parquet (all are in
      `advcl_hub.data.parquet`), with columns img or image (struct of bytes and path) and label; class names are
      those in the Hugging Face metadata of the files.
    - `fake`, `fake:N`: 1,000 or N noisy 32x32 patterns of 10 classes, for trials without data.

    The order is that of the source, files sorted by name. Sets of encoded images that take more than
    2 GiB decoded (`decoding.IN_MEMORY_BYTES`) are checked file by file here and decoded in `batches`.

    Args:
        source: one of the above.
        split: one of the source's splits.
        root: folder that holds the set; relative PATHs start there (default: the current folder).
        size: height and width of the images, in pixels: the shorter edge is scaled to it (bicubic with
            antialiasing, torchvision's Resize on PIL images: integer arithmetic, equal on all machines),
            then the centre is cropped. None keeps the images as they are.
        fit: a transform of PIL images that gives them all one size, in place of `size`.
        channels: 3 (grey images repeated) or 1 (luma, ITU-R 601-2, as PIL's convert).
        download: let torchvision fetch cifar10, cifar100, stl10 or fashion-mnist into root if absent.
        strict: raise an error for images that cannot be read, instead of one warning that names them. The
            others keep their `indices`.

    Raises:
        ValueError: unknown source or split, wrong size or channels, damaged files, labels outside the
            classes, a class without images, images of different sizes without `size`.
        FileNotFoundError, NotADirectoryError, PermissionError: a folder or file that cannot be opened.
        ConnectionError: the download failed.
    """
    if channels not in (1, 3):
        raise ValueError(f"channels is {channels}, expected 3 (RGB) or 1 (grey)")
    if size is not None and size < 1:
        raise ValueError(f"size is {size}, expected a positive number of pixels")
    if size is not None and fit is not None:
        raise ValueError("size and fit were given: both decide the size of the images, leave one out")
    stored = read_source(source, split, root, download)
    side = size or stored.default_size
    to_size = fit or (Square(side) if side else None)
    title = f"{stored.name} ({split})"
    _check_labels(stored, title, unlabeled=split == "unlabeled")
    images, failures = read_images(stored.items, stored.names, channels, to_size)
    labels, indices = torch.from_numpy(stored.labels), torch.arange(len(stored.labels))
    data = ImageData(images, labels, indices, stored.classes, stored.name, len(labels), fit is not None)
    if failures:
        _report(failures, len(data), title, strict)
        data = data.subset(torch.tensor([row for row in range(len(data)) if row not in failures]))
    if split != "unlabeled":
        _check_classes(data.labels, data.classes, title)
    return data


def train_val_split(data: ImageData, fraction: float = 0.1, seed: int = 0) -> tuple[ImageData, ImageData]:
    """Splits training data for the choice of a model, so that the test set is never used for it.

    Args:
        data: (N images) as loaded from a training split.
        fraction: share of every class that goes to validation, rounded to whole images.
        seed: the same data, fraction and seed give the same split on every machine.

    Returns:
        (training, validation), disjoint, together all of data, each in the order of data.

    Raises:
        ValueError: fraction is not in (0, 1), or a class has a single image.
    """
    held_out = torch.from_numpy(balanced_holdout(data.labels.cpu().numpy(), fraction, seed))
    return data.subset((~held_out).nonzero()[:, 0]), data.subset(held_out.nonzero()[:, 0])


def few_shot(data: ImageData, shots: int, seed: int = 0) -> ImageData:
    """A subset with `shots` images of every class, in the order of data.

    The same data, shots and seed give the same subset on every machine, and fewer shots give a part of it.

    Raises:
        ValueError: shots is below 1, or a class has fewer images.
    """
    if shots < 1:
        raise ValueError(f"shots is {shots}, expected at least 1 image of every class")
    labels, chosen = data.labels.cpu().numpy(), []
    for label, name in enumerate(data.classes):
        members = np.flatnonzero(labels == label)
        if len(members) < shots:
            raise ValueError(f"{shots} images of every class were asked for, {data.name} has {len(members)} of {name}")
        chosen.append(np.random.Generator(np.random.PCG64([seed, label])).permutation(members)[:shots])
    return data.subset(torch.from_numpy(np.sort(np.concatenate(chosen))))


def batches(
    data: ImageData,
    batch_size: int,
    *,
    device: str | torch.device = "cpu",
    order: Tensor | None = None,
    workers: int = 0,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields the images batch by batch; draws nothing from the global random generators.

    An epoch cut short goes on with the rest of its order: `order=order[done * batch_size:]`.
    Images in memory are gathered where they are, without waiting for the device: move small sets there
    first with `data.to(device)`. Lazy images are decoded by `workers` processes.

    Args:
        data: N images.
        batch_size: images a batch, B; the last batch may have fewer.
        device: where the batches go.
        order: int64 (M,) positions in data in the order wanted; None for all in their order.
        workers: processes that decode lazy images; 0 decodes in this one.

    Yields:
        images uint8 (B, C, H, W) and rows int64 (B,), positions in data, both on device.

    Raises:
        ValueError: batch_size or order is out of range (at the call), or a lazy image that passed the
            check at loading cannot be decoded after all.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, expected at least 1")
    order = torch.arange(len(data)) if order is None else order
    _check_positions(order, len(data))
    device = torch.device(device)
    if isinstance(data.images, Tensor):
        return _gather(data.images, order, batch_size, device)
    return _stream(data.images, order, batch_size, device, workers)


def _gather(images: Tensor, order: Tensor, batch_size: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    home, target = order.to(images.device), order.to(device)
    for start in range(0, len(order), batch_size):
        part = slice(start, start + batch_size)
        yield images.index_select(0, home[part]).to(device), target[part]


def _stream(
    images: LazyImages, order: Tensor, batch_size: int, device: torch.device, workers: int
) -> Iterator[tuple[Tensor, Tensor]]:
    pinned = device.type == "cuda"
    loader = DataLoader(
        images,
        batch_size,
        sampler=order.tolist(),
        num_workers=workers,
        pin_memory=pinned,
        generator=torch.Generator(),  # else the loader takes a number from the global generator
        worker_init_fn=_ignore_sigterm,
    )
    target = order.to(device)
    for start, batch in zip(range(0, len(order), batch_size), loader, strict=True):
        yield batch.to(device, non_blocking=pinned), target[start : start + batch_size]


def _ignore_sigterm(worker: int) -> None:
    """Sent to the whole process group, SIGTERM is for the main process, which may still need batches to end well."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _whole_numbers(name: str, values: Tensor) -> Tensor:
    """Integers (N,) as int64."""
    if values.ndim == 1 and not values.is_floating_point() and not values.is_complex() and values.dtype != torch.bool:
        return values.to(torch.int64)
    hint = ""
    if name == "labels":
        hint = ": of one-hot labels take labels.argmax(1)" if values.ndim == 2 else ": labels.long(), if they are class numbers"
    raise ValueError(f"{name} are {values.dtype} {tuple(values.shape)}, expected torch.int64 (N,){hint}")


def _stored_bytes(item: Item) -> int:
    return item.stat().st_size if isinstance(item, Path) else len(item)


def _report(failures: dict[int, str], count: int, title: str, strict: bool) -> None:
    named = [failures[row] for row in sorted(failures)]
    listed = ", ".join(named[:10]) + (f" and {len(named) - 10} more" if len(named) > 10 else "")
    message = f"{title}: {len(named)} of {count} images cannot be read: {listed}"
    if strict or len(failures) == count:
        raise ValueError(f"{message}. Replace or remove them")
    warnings.warn(f"{message}. They are skipped", stacklevel=4)


def _check_labels(stored: Source, title: str, unlabeled: bool) -> None:
    if len(stored.labels) == 0:
        raise ValueError(f"{title} has no images")
    low, high, last = stored.labels.min(), stored.labels.max(), len(stored.classes) - 1
    if low < (-1 if unlabeled else 0) or high > last:
        raise ValueError(f"{title} has labels from {low} to {high}, its {last + 1} classes go from 0 to {last}")


def _check_classes(labels: Tensor, classes: tuple[str, ...], title: str) -> None:
    present = set(labels.tolist())
    if missing := [name for label, name in enumerate(classes) if label not in present]:
        raise ValueError(f"{title} has no readable image of the class {', '.join(missing)}; every class needs one")


def _check_positions(positions: Tensor, count: int) -> None:
    if positions.ndim != 1 or positions.dtype != torch.int64:
        given = f"{positions.dtype} {tuple(positions.shape)}"
        raise ValueError(f"positions are {given}, expected torch.int64 (M,)")
    if len(positions) == 0:
        return
    low, high = int(positions.min()), int(positions.max())
    if low < 0 or high >= count:
        raise ValueError(f"positions go from {low} to {high}, expected 0 to {count - 1}")
