"""Data as a model wants them: its size, its channels, and its order of classes."""

import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import Tensor, nn

from advcl_hub.data.decoding import MixedSizesError, decode_image
from advcl_hub.data.image_data import ImageData, load_data
from advcl_hub.data.sources import canonical, natural
from advcl_hub.models.preprocessing import Fit, data_config, pretrained_cfg


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
            "--data DATA writes a classifier."
        )
    if classes not in (None, len(data.classes)) and not names_all_classes(model, data):
        raise ValueError(
            f"The model tells {classes} classes apart{some_of(class_names(model))}, {data.name} has {len(data.classes)}"
            f"{some_of(data.classes)}: train a new head for them (advcl-hub finetune), or choose other data."
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


def some_of(names: Sequence[str]) -> str:
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
