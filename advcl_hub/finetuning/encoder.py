"""From a name to the classifier that is finetuned: the encoder's weights and a new head, or the head that it has."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from advcl_hub.data import ImageData
from advcl_hub.data.matching import class_names, input_size
from advcl_hub.errors import reason_of
from advcl_hub.finetuning.presets import Settings
from advcl_hub.models.preprocessing import pretrained_cfg
from advcl_hub.opening import load_model, weights_sha256

_PREPROCESSING = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")
RANDOM = "random:"  # before a name: the same architecture with new weights, the baseline without pretraining


@dataclass(frozen=True)
class Encoder:
    """A timm model to finetune.

    Attributes:
        model: in evaluation mode; it may have a classifier.
        source: what `timm.create_model` opens.
        arguments: of `timm.create_model`, that its architecture needs.
        facts: for the record: name, architecture, sha256 of the weights, and results.json of an exported folder.
    """

    model: nn.Module
    source: str
    arguments: dict[str, Any]
    facts: dict[str, Any]


def open_encoder(name: str | Path, *, size: int | None = None, seed: int = 0) -> Encoder:
    """Opens what `load_model` opens; with `random:` before the name the weights are drawn anew.

    Args:
        name: a registered name, `hf-hub:ORG/NAME`, `local-dir:FOLDER` or a folder.
        size: side of the images, in pixels, if it is not the encoder's own.
        seed: of random weights.

    Raises:
        ValueError, OSError: see `load_model`; or the architecture does not take images of this size.
    """
    if size is not None and size < 1:
        raise ValueError(f"size is {size}, expected a positive number of pixels")
    text = str(name)
    wanted, pretrained = text.removeprefix(RANDOM), not text.startswith(RANDOM)
    if not pretrained and timm.is_model(wanted) and not Path(wanted).is_dir():
        source, said, provenance = wanted, wanted, None  # an architecture needs no weights for that
        try:
            arguments, model = dict[str, Any](), timm.create_model(wanted)
        except RuntimeError as error:  # of a tag that timm does not know
            raise ValueError(f"{text} cannot be opened: {reason_of(error)}") from error
    else:
        loaded = load_model(wanted if not pretrained else name)
        source, said, provenance = loaded.source, loaded.name, loaded.provenance
        arguments, model = loaded.arguments, loaded.model
    arguments = {key: value for key, value in arguments.items() if key != "num_classes"}  # that of the head to come
    overlay: dict[str, Any] = {}
    shape = input_size(model)
    if size is not None and shape is not None and shape[1:] != (size, size):
        overlay |= {"input_size": (shape[0], size, size), "crop_pct": 1.0}  # images of that size are taken whole
        if "img_size" in arguments:
            arguments = {**arguments, "img_size": size}
    if overlay or not pretrained:
        cfg = pretrained_cfg(model)
        kept = {key: cfg[key] for key in _PREPROCESSING if key in cfg}
        torch.manual_seed(seed)
        try:
            model = timm.create_model(
                source if pretrained else cfg.get("architecture") or source,
                pretrained=pretrained,
                pretrained_cfg_overlay=kept | overlay,
                **arguments,
            )
            if shape is not None:
                with torch.no_grad():  # some architectures notice only now
                    model.eval()(torch.zeros(1, *(input_size(model) or shape)))
        except (RuntimeError, AssertionError, ValueError, TypeError) as error:
            what = f" for images of {size}x{size}" if size else ""
            raise ValueError(f"{text} cannot be opened{what}: {reason_of(error)}") from error
    facts = {
        "name": said if pretrained else RANDOM + said,
        "architecture": pretrained_cfg(model).get("architecture"),
        "weights_sha256": weights_sha256(model),
        "provenance": provenance if pretrained else None,
    }
    return Encoder(model.eval(), source, arguments, facts)


def set_head(model: nn.Module, data: ImageData, settings: Settings, *, keep: bool = False) -> None:
    """Gives a model a classifier for the classes of the data, in place, drawn with the settings' seed; `zero_head` comes later.

    Args:
        model: a timm model.
        data: what it will classify.
        settings: protocol and seed.
        keep: leave the classifier that it has.

    Raises:
        ValueError: the model has no classifier that can be replaced, no linear one where the protocol needs that, or, with
            `keep`, one for other classes.
    """
    name = pretrained_cfg(model).get("architecture") or type(model).__name__
    if keep:
        count, names = getattr(model, "num_classes", 0), class_names(model)
        if count != len(data.classes) or (names and names != data.classes):  # `in_model_order` has matched them
            told = f"{count} classes" + (f" ({', '.join(names[:5])} ...)" if names else "")
            raise ValueError(
                f"The head of {name} tells {told} apart, {data.name} has {len(data.classes)} ({', '.join(data.classes[:5])} "
                "...): it cannot be kept. Without keep_head (--keep-head) a new one is trained."
            )
    else:
        torch.manual_seed(settings.seed)
        if not hasattr(model, "reset_classifier"):
            raise ValueError(f"{name} has no classifier to replace (no reset_classifier): it is no timm image model.")
        model.reset_classifier(len(data.classes))  # type: ignore[operator]
    if settings.frozen:
        linear_head(model)


def linear_head(model: nn.Module) -> nn.Linear:
    """The classifier of a timm model.

    Raises:
        ValueError: it is not one linear layer.
    """
    head = model.get_classifier()  # type: ignore[operator]
    if not isinstance(head, nn.Linear):
        raise ValueError(f"A linear head needs a model whose classifier is one Linear layer, got {head}.")
    return head


def zero_head(model: nn.Module) -> None:
    """Sets the output layers of a timm model's classifier, one or several, to zero.

    A norm before an output layer (LeViT, RepViT) stays as it is: with both at zero neither would get a gradient.
    """
    head = model.get_classifier()  # type: ignore[operator]
    for part in head if isinstance(head, tuple) else (head,):
        outputs = [module for module in part.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
        for parameter in (outputs[-1] if outputs else part).parameters():
            nn.init.zeros_(parameter)


class Headless(nn.Module):
    """A timm classifier up to its head: images to features (N, D), whatever its head is."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.pretrained_cfg = pretrained_cfg(model)

    def forward(self, images: Tensor) -> Tensor:
        return self.model.forward_head(self.model.forward_features(images), pre_logits=True)  # type: ignore[operator]
