"""What an evaluation reads: images and labels as the model wants them, corrupted copies, a batch that fits the memory."""

import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import Tensor, nn

from advcl_hub.corruptions import CORRUPTIONS, SEVERITIES, corrupt, corruption_names, read_corrupted
from advcl_hub.data import ImageData, batches, load_data
from advcl_hub.decoding import MixedSizesError

GENERATED = "generated"  # the corruptions of advcl_hub.corruptions, in place of a folder's


def input_size(model: nn.Module) -> tuple[int, int, int] | None:
    """(C, H, W) of the pretrained cfg, None for a module that has none."""
    cfg = cast(dict[str, Any], getattr(model, "pretrained_cfg", None) or {})
    return tuple(cfg["input_size"]) if cfg.get("input_size") else None


def load_images(source: str, split: str, root: str | Path | None, model: nn.Module) -> ImageData:
    """A data set at its own size, or at the model's where it is larger, or has images of different sizes.

    Raises:
        ValueError, OSError: see `load_data`.
    """
    shape = input_size(model)
    if shape is None:
        return load_data(source, split, root=root)
    channels, size = shape[0], shape[-1]
    try:
        data = load_data(source, split, root=root, channels=channels)
    except MixedSizesError:
        data = None
    if data is None or max(data.shape[1:]) > size:
        data = load_data(source, split, root=root, channels=channels, size=size)
    return data


def check_fits(model: nn.Module, data: ImageData) -> None:
    """Raises ValueError unless the model has a class for every class of the data, and the data's channels."""
    classes = getattr(model, "num_classes", None)
    if classes == 0:
        raise ValueError(
            "The model is an encoder without a classifier. Fit a head first; for a run of ours: "
            "python -m train.export RUN --linear-head --output FOLDER."
        )
    if classes not in (None, len(data.classes)) and not set(data.classes) <= set(class_names(model)):
        raise ValueError(
            f"The model tells {classes} classes apart, {data.name} has {len(data.classes)}, and their names differ."
        )
    shape = input_size(model)
    if shape is not None and shape[0] != data.shape[0]:
        raise ValueError(f"The model takes {shape[0]} channels, the images of {data.name} have {data.shape[0]}.")
    if (data.labels < 0).any():
        raise ValueError(f"{data.name} has images without a label.")


def class_names(model: nn.Module) -> tuple[str, ...]:
    """The model's classes by name: those of its config, or the synsets (n01440764 ...) of an ImageNet; () if unknown."""
    cfg = cast(dict[str, Any], getattr(model, "pretrained_cfg", None) or {})
    if cfg.get("label_names"):
        return tuple(cfg["label_names"])
    subset = infer_imagenet_subset(model)
    return tuple(ImageNetInfo(subset).label_names()) if subset else ()


def enlarges(model: nn.Module, data: ImageData) -> bool:
    """Whether the images are smaller than the model's input, so that the attacked function has to enlarge them."""
    shape = input_size(model)
    return shape is not None and data.shape[1:] != shape[1:]


def in_model_order(model: nn.Module, data: ImageData) -> ImageData:
    """The data with labels and class names as the model has them, if its names are known; they may be more than the data's.

    Warns:
        UserWarning: the model names other classes than the data.
    """
    names = class_names(model)
    if not names or names == data.classes:
        return data
    if not set(data.classes) <= set(names):
        warnings.warn(
            f"The model's classes are {', '.join(names[:3])} ..., those of {data.name} {', '.join(data.classes[:3])} ...: "
            "their order is taken to be the same.",
            stacklevel=3,
        )
        return data
    order = torch.tensor([names.index(name) for name in data.classes], device=data.labels.device)
    return replace(data, labels=order[data.labels], classes=names)


class Corrupted:
    """The corrupted copies of some images, read or made one set at a time.

    Args:
        source: a folder in the layout of CIFAR-10-C, or `generated`.
        data: the clean images in memory, with the source's labels; `indices` are their positions in the clean test split.

    Raises:
        ValueError: the folder does not have that layout, does not belong to these images, or the images are streamed from disk.
        OSError: it cannot be read.
    """

    def __init__(self, source: str | Path, data: ImageData) -> None:
        self.generated = str(source) == GENERATED
        if not isinstance(data.images, Tensor):
            raise ValueError(f"Corruptions need images in memory, {data.name} is too large for that: choose fewer with n.")
        self.folder, self.data, self.clean = Path(source), data, data.images
        self.names = list(CORRUPTIONS) if self.generated else corruption_names(self.folder)
        self.title = "advcl-hub's own set, not CIFAR-10-C" if self.generated else self.folder.name
        if not self.generated:
            images, labels = read_corrupted(self.folder, self.names[0], 1, data.indices.cpu())
            if not torch.equal(labels, data.labels.cpu()) or images.shape != self.clean.shape:
                raise ValueError(
                    f"{source} does not hold corrupted copies of the images of {data.name} (other labels or shape)."
                )

    def sets(self) -> Iterator[tuple[str, int]]:
        """Name and severity of each."""
        return ((name, severity) for name in self.names for severity in SEVERITIES)

    def load(self, name: str, severity: int) -> Tensor:
        """The images, uint8 (N, C, H, W)."""
        if self.generated:
            return corrupt(self.clean, name, severity, self.data.indices)
        return read_corrupted(self.folder, name, severity, self.data.indices.cpu())[0]


def fitting_batch_size(classifier: nn.Module, data: ImageData, wanted: int, device: torch.device) -> int:
    """`wanted`, halved until a forward and backward pass fits the device's memory.

    Raises:
        ValueError: not even a single image fits.
    """
    wanted = min(wanted, len(data))
    size = wanted
    while True:
        ((images, _),) = batches(data, size, device=device, order=torch.arange(size))
        try:
            with torch.enable_grad():
                x = (images / 255).requires_grad_()
                torch.autograd.grad(classifier(x).sum(), x)
            return size
        except torch.OutOfMemoryError:
            if size == 1:
                raise ValueError(f"Not even one image of {tuple(data.shape)} fits the memory of {device}.") from None
            size //= 2
