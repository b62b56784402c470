"""What an evaluation reads: images and labels as the model wants them, corrupted copies, a batch that fits the memory."""

import hashlib
import math
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import Tensor, nn

from advcl_hub.corruptions import CORRUPTIONS, SEVERITIES, corrupt, corruption_names, read_corrupted
from advcl_hub.data import ImageData, batches, load_data
from advcl_hub.decoding import MixedSizesError
from advcl_hub.evaluation.classifier import pretrained_cfg
from advcl_hub.evaluation.protocol import Protocol

GENERATED = "generated"  # the corruptions of advcl_hub.corruptions, in place of a folder's


def input_size(model: nn.Module) -> tuple[int, int, int] | None:
    """(C, H, W) of the pretrained cfg, None for a module that has none."""
    cfg = pretrained_cfg(model)
    return tuple(cfg["input_size"]) if cfg.get("input_size") else None


def scaled_size(model: nn.Module, size: int) -> int:
    """The height and width to which timm scales images of which the model sees the centre of this size."""
    return max(size, math.floor(size / (pretrained_cfg(model).get("crop_pct") or 1)))


def load_images(source: str, split: str, root: str | Path | None, model: nn.Module) -> ImageData:
    """A data set at its own size; where it is larger than the model's input, or of different sizes, as timm evaluates.

    Then the shorter edge is scaled to the input size / `crop_pct` and the centre square taken, of which `PixelSpace` takes the
    centre.

    Raises:
        ValueError, OSError: see `load_data`.
    """
    shape = input_size(model)
    if shape is None:
        return load_data(source, split, root=root)
    channels, size = shape[0], max(shape[1:])
    try:
        data = load_data(source, split, root=root, channels=channels)
    except MixedSizesError:
        data = None
    if data is None or max(data.shape[1:]) > size:
        data = load_data(source, split, root=root, channels=channels, size=scaled_size(model, size))
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
    if shape is not None:
        if shape[0] != data.shape[0]:
            raise ValueError(f"The model takes {shape[0]} channels, the images of {data.name} have {data.shape[0]}.")
        scaled = scaled_size(model, max(shape[1:]))
        if max(data.shape[1:]) > scaled:
            size = "x".join(map(str, data.shape[1:]))
            raise ValueError(
                f"The images of {data.name} are {size}, the model takes {shape[1]}x{shape[2]}: load_data(size={scaled})."
            )
    if (data.labels < 0).any():
        raise ValueError(f"{data.name} has images without a label.")


def class_names(model: nn.Module) -> tuple[str, ...]:
    """The model's classes by name: those of its config, or the synsets (n01440764 ...) of an ImageNet; () if unknown."""
    if named := pretrained_cfg(model).get("label_names"):
        return tuple(named)
    subset = infer_imagenet_subset(model)  # a guess from the number of classes
    return tuple(ImageNetInfo(subset).label_names()) if subset else ()


def fitted(model: nn.Module, data: ImageData) -> str | None:
    """What the attacked function has to do to images of another size than the model's input: `enlarged` or `cropped`."""
    shape = input_size(model)
    if shape is None or data.shape[1:] == shape[1:]:
        return None
    return "enlarged" if data.shape[1] < shape[1] or data.shape[2] < shape[2] else "cropped"


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


# The four corruptions that the published sets keep for tuning: the usual mean is over the other fifteen.
_FOR_TUNING = {"gaussian_blur", "saturate", "spatter", "speckle_noise"}


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
            raise ValueError(f"Corruptions need images in memory, {data.name} is too large for that.")
        self.folder, self.clean, self.indices = Path(source), data.images.cpu(), data.indices.cpu()
        self.names = list(CORRUPTIONS) if self.generated else list(corruption_names(self.folder))
        self.averaged = [name for name in self.names if name not in _FOR_TUNING] or self.names
        if self.generated:
            self.facts = {"set": "advcl-hub's own set, not CIFAR-10-C", "names": self.names, "averaged": self.averaged}
            return
        digest = hashlib.sha256()
        for name in self.names:
            images, labels = read_corrupted(self.folder, name, SEVERITIES[-1], self.indices)
            digest.update(images.numpy().data)
        if not torch.equal(labels, data.labels.cpu()) or images.shape != self.clean.shape:
            raise ValueError(f"{source} does not hold corrupted copies of the images of {data.name} (other labels or shape).")
        self.facts = {
            "set": self.folder.name,
            "names": self.names,
            "averaged": self.averaged,
            "sha256_at_severity_5": digest.hexdigest(),
        }

    def load(self, name: str, severity: int) -> Tensor:
        """The images, uint8 (N, C, H, W)."""
        if self.generated:
            return corrupt(self.clean, name, severity, self.indices)
        return read_corrupted(self.folder, name, severity, self.indices)[0]


def first_images(data: ImageData, count: int, device: torch.device) -> Tensor:
    """The first `count` images, or all there are, on the device: (N, C, H, W), from 0 to 255."""
    count = min(count, len(data))
    ((images, _),) = batches(data, count, device=device, order=torch.arange(count))
    return images


def try_classifier(classifier: nn.Module, data: ImageData, protocol: Protocol, device: torch.device) -> int:
    """The protocol's batch size, halved until a forward and backward pass fits the device's memory.

    Raises:
        ValueError: not even a single image fits, or the outputs are no float logits for all classes.
    """
    size = min(protocol.batch_size, len(data))
    while True:
        images = first_images(data, size, device)
        try:
            with torch.enable_grad():
                x = (images / 255).requires_grad_()
                logits = classifier(x)
                _check_logits(logits, size, data, protocol)
                attacked = protocol.attacks_with_pgd or protocol.autoattack is not None
                gradient = torch.autograd.grad(logits.sum(), x, allow_unused=True)[0] if logits.requires_grad else None
                if attacked and gradient is None:
                    raise ValueError("The model's outputs carry no gradient with respect to the images: it cannot be attacked.")
            return size
        except torch.OutOfMemoryError:
            if size == 1:
                raise ValueError(f"Not even one image of {tuple(data.shape)} fits the memory of {device}.") from None
            size //= 2
            if device.type == "cuda":
                torch.cuda.empty_cache()
        except RuntimeError as error:
            raise ValueError(f"The model fails on images {tuple(images.shape)} of {data.name}: {error}") from error


def _check_logits(logits: Any, size: int, data: ImageData, protocol: Protocol) -> None:
    """Raises ValueError for outputs that cannot be measured, with words for what would fail in the middle of the work."""
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != size or not logits.is_floating_point():
        given = f"{logits.dtype} {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"The model gives {given} for {size} images, expected float logits ({size}, classes).")
    if not logits.isfinite().all():
        raise ValueError(f"The model gives outputs that are not finite for images of {data.name}: there is nothing to measure.")
    classes, largest = logits.shape[1], int(data.labels.max())
    if largest >= classes:
        raise ValueError(f"The model gives {classes} logits, {data.name} has labels up to {largest}.")
    if protocol.loss == "dlr" and classes < 3:
        raise ValueError(f"The DLR loss needs at least 3 classes, the model has {classes}: use ce or margin.")
