"""What timm does to an image before a model sees it, taken from the model's pretrained cfg and from timm's own code."""

from typing import Any, TypeVar, cast

import torch.nn.functional as F
from PIL import Image
from timm.data import create_transform, resolve_data_config
from torch import Tensor, nn

_INSIDE = ("bilinear", "bicubic", "nearest")  # interpolations that torch computes as PIL does, with gradients
_Picture = TypeVar("_Picture", Image.Image, Tensor)


def pretrained_cfg(model: nn.Module) -> dict[str, Any]:
    """What timm knows of a model's input and classes; empty for a module that is not timm's."""
    return cast(dict[str, Any], getattr(model, "pretrained_cfg", None) or {})


def data_config(model: nn.Module) -> dict[str, Any]:
    """`timm.data.resolve_model_data_config`, with the channels that the model really has.

    It has `input_size` (C, H, W), `mean` and `std` (one value a channel), `interpolation`, `crop_pct` and `crop_mode`. The size
    is that of training, as there, and not `test_input_size`. For a module that is not timm's it has mean and std of its cfg.
    """
    cfg = pretrained_cfg(model)
    if not cfg.get("input_size") and not cfg.get("architecture"):
        return {key: cfg[key] for key in ("mean", "std") if cfg.get(key)}
    config: dict[str, Any] = resolve_data_config(pretrained_cfg=cfg)
    channels = _channels(model, cfg) or config["input_size"][0]
    config["input_size"] = (channels, *config["input_size"][1:])
    for key in ("mean", "std"):
        values = tuple(config[key])
        # timm's loader takes the average, too: of a model made with in_chans=1 the cfg has the values of three channels.
        config[key] = values if len(values) == channels else (sum(values) / len(values),) * channels
    return config


def _channels(model: nn.Module, cfg: dict[str, Any]) -> int | None:
    """The channels that a model takes, which its cfg does not tell after `timm.create_model(..., in_chans=1)`."""
    if isinstance(channels := getattr(model, "in_chans", None), int):
        return channels
    first = cfg.get("first_conv")
    weight = dict(model.named_parameters()).get(f"{first}.weight") if isinstance(first, str) else None
    return weight.shape[1] if weight is not None and weight.ndim == 4 else None


class Fit:
    """timm's evaluation transform up to the normalisation: scale by the shorter edge, crop the centre, as the cfg says.

    Args:
        config: of `data_config`, of a timm model.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        self.resize, self.crop, _ = create_transform(**config, normalize=False).transforms
        self.size: tuple[int, int] = config["input_size"][1:]
        self.bicubic = config["interpolation"] == "bicubic"
        self._known: dict[tuple[int, int], tuple[int, int]] = {}  # sizes by size: the attacked function asks in every pass
        # The mode "border" fills with a colour from 0 to 255, which is wrong for images in [0, 1].
        self.differentiable = config["interpolation"] in _INSIDE and config["crop_mode"] != "border"

    def __call__(self, picture: _Picture) -> _Picture:
        """A PIL image, or images (N, C, H, W) in [0, 1], at the model's size.

        Both give the same up to the rounding of 8 bits; tensors keep their gradients.
        """
        if not isinstance(picture, Tensor) or not self.bicubic:
            return self.crop(self.resize(picture))
        # A bicubic kernel overshoots. PIL scales the rows, then the columns, and its 8 bits hold no more than [0, 1].
        height, width = self._scaled(*picture.shape[-2:])
        for size in ((picture.shape[-2], width), (height, width)):
            if size != picture.shape[-2:]:
                picture = F.interpolate(picture, size, mode="bicubic", align_corners=False, antialias=True).clamp(0, 1)
        return self.crop(picture)

    def _scaled(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) to which images of this size are scaled, before the crop."""
        if (height, width) not in self._known:
            scaled = self.resize(Image.new("1", (width, height)))  # PIL knows all interpolations, torch only some
            self._known[height, width] = scaled.height, scaled.width
        return self._known[height, width]

    def enlarges(self, height: int, width: int) -> bool:
        """Whether images of this size lose no detail here, so that they can be attacked as they are and fitted inside."""
        scaled = self._scaled(height, width)
        if (height, width) == scaled == self.size:
            return True  # they are not changed at all
        return self.differentiable and scaled[0] >= height and scaled[1] >= width

    def change(self, height: int, width: int) -> str | None:
        """What becomes of images of this size: `enlarged` (and perhaps cropped), `cropped`, `scaled down`, or nothing."""
        if self._scaled(height, width) != (height, width):
            return "enlarged" if self.enlarges(height, width) else "scaled down"
        return None if (height, width) == self.size else "cropped"
