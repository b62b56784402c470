"""What an evaluation reads: images and labels as the model wants them, corrupted copies, a batch that fits the memory."""

import hashlib
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from advcl_hub.corruptions import CORRUPTIONS, SEVERITIES, corrupt, corruption_names, read_corrupted
from advcl_hub.data import ImageData, batches, load_data
from advcl_hub.decoding import MixedSizesError, decode_image
from advcl_hub.evaluation.preprocessing import Fit, data_config, pretrained_cfg
from advcl_hub.evaluation.protocol import Protocol
from advcl_hub.sources import canonical, natural

GENERATED = "generated"  # the corruptions of advcl_hub.corruptions, in place of a folder's


def input_size(model: nn.Module) -> tuple[int, int, int] | None:
    """(C, H, W) of a timm model, None for a module that is not timm's."""
    return data_config(model).get("input_size")


def load_images(source: str, split: str, root: str | Path | None, model: nn.Module) -> ImageData:
    """A data set as it is where `PixelSpace` can fit its images without loss; else fitted here, as timm evaluates.

    Images that are all of one size, and not larger than what timm would scale them to, stay as they are. Others are brought to
    the model's size by timm's own transform, in the integers of PIL.

    Raises:
        ValueError, OSError: see `load_data`.
    """
    config = data_config(model)
    if "input_size" not in config:
        return load_data(source, split, root=root)
    channels, fit = config["input_size"][0], Fit(config)
    try:
        data = load_data(source, split, root=root, channels=channels)
    except MixedSizesError:
        data = None
    if source == "digits" and data is not None and max(data.shape[1:]) > max(fit.size):
        return load_data(source, split, channels=channels, size=max(fit.size))  # it has no size of its own
    if data is None or not fit.enlarges(*data.shape[1:]):
        data = load_data(source, split, root=root, channels=channels, fit=fit)
    return data


def fit_images(model: nn.Module, data: ImageData) -> ImageData:
    """The data with images in memory that are larger than a model takes brought to its size, as timm does it."""
    config = data_config(model)
    if "input_size" not in config or data.fitted or not isinstance(data.images, Tensor):
        return data
    fit = Fit(config)
    if fit.enlarges(*data.shape[1:]) or data.shape[0] != config["input_size"][0]:
        return data
    pictures = data.images.cpu().permute(0, 2, 3, 1).squeeze(-1).numpy()
    images = torch.stack([decode_image(picture, data.shape[0], fit) for picture in pictures])
    return replace(data, images=images.to(data.images.device), fitted=True)


def check_fits(model: nn.Module, data: ImageData) -> None:
    """Raises ValueError unless the model has a class for every class of the data, and takes the data's channels and size."""
    classes = getattr(model, "num_classes", None)
    if classes == 0:
        raise ValueError(
            "The model is an encoder without a classifier (num_classes is 0). Train a head first: advcl-hub finetune MODEL "
            "--data DATA writes a classifier; for a run of train/: python -m train.export RUN --linear-head --output FOLDER."
        )
    if classes not in (None, len(data.classes)) and not names_all_classes(model, data):
        raise ValueError(
            f"The model tells {classes} classes apart{_some(class_names(model))}, {data.name} has {len(data.classes)}"
            f"{_some(data.classes)}: train a new head for them (advcl-hub finetune), or choose other data."
        )
    config = data_config(model)
    if "input_size" in config:
        channels, *size = config["input_size"]
        if channels != data.shape[0]:
            hint = f"load_data(channels={channels})"
            raise ValueError(f"The model takes {channels} channels, the images of {data.name} have {data.shape[0]}: {hint}.")
        if not (data.shape[1:] == tuple(size) if data.fitted else Fit(config).enlarges(*data.shape[1:])):
            raise ValueError(
                f"The images of {data.name} are {_size(data.shape)}, and have to be scaled to the model's {_size(size)} before "
                "they are attacked: give the data by name (folder:PATH), and that is done."
            )
    if (data.labels < 0).any():
        raise ValueError(f"{data.name} has images without a label.")


def _some(names: Sequence[str]) -> str:
    """The first names, in brackets; nothing if there are none."""
    return f" ({', '.join(names[:3])}{' ...' if len(names) > 3 else ''})" if names else ""


def _size(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape[-2:]))


def class_names(model: nn.Module) -> tuple[str, ...]:
    """The model's classes by name: those of its config, or the synsets (n01440764 ...) of an ImageNet; () if unknown."""
    if named := pretrained_cfg(model).get("label_names"):
        if not isinstance(named, Mapping):
            named = dict(enumerate(named))
        elif all(isinstance(label, int) for label in named.values()):
            named = {label: name for name, label in named.items()}
        by_label = {int(label): str(name) for label, name in named.items()}  # in timm's form some classes may have no name
        count = max(getattr(model, "num_classes", None) or 0, max(by_label) + 1)
        return tuple(by_label.get(label, f"class {label}") for label in range(count))
    subset = infer_imagenet_subset(model)  # a guess from the number of classes
    return tuple(ImageNetInfo(subset).label_names()) if subset else ()


def names_all_classes(model: nn.Module, data: ImageData) -> bool:
    """Whether the model names all classes of the data."""
    return set(map(canonical, data.classes)) <= set(map(canonical, class_names(model)))


def fitted(model: nn.Module, data: ImageData) -> str | None:
    """What the attacked function does to images of this size: `enlarged`, `cropped`, or nothing."""
    config = data_config(model)
    return Fit(config).change(*data.shape[1:]) if "input_size" in config and not data.fitted else None


# How folders are numbered, by name the key that sorts them: as timm's reader does, and as torchvision's ImageFolder.
CLASS_ORDERS: dict[str, Callable[[str], Any]] = {"natural": natural, "plain": str}


def in_model_order(model: nn.Module, data: ImageData, class_order: str | None = None) -> ImageData:
    """The data with labels and class names as the model has them, if its names are known; they may be more than the data's.

    Args:
        model: a classifier.
        data: labelled images.
        class_order: how a model numbers classes that it does not name, one of `CLASS_ORDERS`; None: in the order of the data.

    Warns:
        UserWarning: the model names other classes than the data; or it names none, and tools number these folders differently.

    Raises:
        ValueError: an unknown order.
    """
    if class_order is not None and class_order not in CLASS_ORDERS:
        raise ValueError(f"class_order is {class_order!r}, expected {' or '.join(CLASS_ORDERS)}.")
    names = class_names(model)
    if names_all_classes(model, data):
        return _renumbered(data, names)
    if names:
        warnings.warn(
            f"The model's classes are {', '.join(names[:3])} ..., those of {data.name} {', '.join(data.classes[:3])} ...: "
            "their order is taken to be the same.",
            stacklevel=3,
        )
    if class_order is not None:
        return _renumbered(data, sorted(data.classes, key=CLASS_ORDERS[class_order]))
    if data.name.startswith("folder:"):
        _warn_of_order(data)
    return data


def _warn_of_order(data: ImageData) -> None:
    natural_order, plain_order = (sorted(data.classes, key=key) for key in CLASS_ORDERS.values())
    for first, (ours, theirs) in enumerate(zip(natural_order, plain_order, strict=True)):
        if ours != theirs:
            warnings.warn(
                f"The model does not name its classes, and tools number the folders of {data.name} differently: class {first} "
                f"is {ours} for timm (natural order, taken here) and {theirs} for torchvision's ImageFolder (plain order). Say "
                "how the model was trained: --class-order (class_order) natural or plain.",
                stacklevel=4,
            )
            return


def _renumbered(data: ImageData, names: Sequence[str]) -> ImageData:
    """The data with these class names, which may be more than its own, and with the labels that follow."""
    if tuple(names) == data.classes:
        return data
    theirs = list(map(canonical, names))
    places, counts = {name: place for place, name in enumerate(theirs)}, Counter(theirs)
    ours = list(map(canonical, data.classes))
    if twice := [name for name in ours if counts[name] > 1]:
        raise ValueError(f"The model has several classes of the name {twice[0]}: which is that of {data.name}? Rename one.")
    order = torch.tensor([places[name] for name in ours], device=data.labels.device)
    return replace(data, labels=order[data.labels], classes=tuple(names))


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
            with torch.no_grad():  # of a batch, one image alone may be left to attack
                _try_one(classifier, x[:1])
            return size
        except torch.OutOfMemoryError:
            if size == 1:
                raise ValueError(f"Not even one image of {tuple(data.shape)} fits the memory of {device}.") from None
            size //= 2
            if device.type == "cuda":
                torch.cuda.empty_cache()
        except RuntimeError as error:
            raise ValueError(f"The model fails on images {tuple(images.shape)} of {data.name}: {error}") from error


def _try_one(classifier: nn.Module, image: Tensor) -> None:
    """Raises ValueError for batch norms that compute statistics, if they cannot do so of one image (1, C, H, W)."""
    norms = [name for name, m in classifier.named_modules() if isinstance(m, _BatchNorm) and m.running_mean is None]
    try:
        if norms:
            classifier(image)
    except ValueError as error:
        raise ValueError(
            f"The model cannot take one image alone: {', '.join(norms[:3])} normalise over the batch. To be evaluated it needs "
            f"batch norms with running statistics ({error})."
        ) from error


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
    if classes != len(data.classes):
        raise ValueError(
            f"The model gives {classes} logits and does not name its classes, {data.name} has {len(data.classes)}"
            f"{_some(data.classes)}: which logits are theirs? Pass the timm model itself, or data that names all classes."
        )
    if protocol.loss == "dlr" and classes < 3:
        raise ValueError(f"The DLR loss needs at least 3 classes, the model has {classes}: use ce or margin.")
