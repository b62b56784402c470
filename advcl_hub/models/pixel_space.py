"""A timm model as the function that is attacked: from images in [0, 1] to logits."""

import warnings
from collections.abc import Iterator

import torch
from timm.utils import ModelEmaV2, ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from advcl_hub.models.preprocessing import Fit, data_config, pretrained_cfg

_WRAPPERS = (DataParallel, DistributedDataParallel, AveragedModel, ModelEmaV2, ModelEmaV3)


class PixelSpace(nn.Module):
    """A classifier of images in [0, 1]: the preprocessing of a timm model's pretrained cfg becomes part of the function.

    The perturbation budget then always counts in pixels, whatever mean and standard deviation the model wants.

    Args:
        model: a timm model, also one in a wrapper that `unwrapped` knows.
        fit: scale and crop the images as timm's evaluation does, see `Fit`; else they are of the model's size already.
        precision: `float32`, or `bfloat16` to compute under autocast.

    Warns:
        UserWarning: the module does not say how its images are normalised, but holds a timm model that does, or is a traced
            copy; or accelerate made it compute in lower precision.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, *, fit: bool = False, precision: str = "float32") -> None:
        super().__init__()
        self.model = model = unwrapped(model)
        for doubt in _doubts(model):
            warnings.warn(doubt, stacklevel=2)
        config = data_config(model)
        for name, default in (("mean", (0.0,)), ("std", (1.0,))):
            self.register_buffer(name, torch.tensor(config.get(name, default)).reshape(-1, 1, 1))
        self.fit = Fit(config) if fit and "input_size" in config else None
        self.precision = precision

    def forward(self, images: Tensor) -> Tensor:
        """Logits of images (N, C, H, W) in [0, 1]."""
        if self.fit is not None:
            images = self.fit(images)
        images = (images - self.mean) / self.std
        if self.precision == "float32":
            return self.model(images)
        with torch.autocast(images.device.type, torch.bfloat16):
            return self.model(images).float()


def unwrapped(model: nn.Module) -> nn.Module:
    """The model within wrappers that compute the same: (Distributed)DataParallel, averaged and compiled models, `PixelSpace`.

    What timm knows of a model lies on the model object, and a wrapper hides it.
    """
    while True:
        if isinstance(model, _WRAPPERS) and _computes_alike(model):
            model = model.module
        elif isinstance(model, PixelSpace):
            model = model.model
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):  # torch.compile's
            model = inner
        else:
            return model


def _computes_alike(wrapper: nn.Module) -> bool:
    """Whether a wrapper does nothing of its own to images or logits: no forward of a subclass, no hooks."""
    own = any(type(wrapper).forward is kind.forward for kind in _WRAPPERS)
    return own and not (wrapper._forward_hooks or wrapper._forward_pre_hooks)


def _doubts(model: nn.Module) -> Iterator[str]:
    """Sentences on why a model's preprocessing may not be what its cfg says, or what it does not say."""
    name = type(model).__name__
    if "_original_forward" in vars(model):
        yield (
            f"accelerate has made this {name} compute in mixed precision, whatever the settings say: pass "
            "accelerator.unwrap_model(model, keep_fp32_wrapper=False)."
        )
    inner = next((m for m in model.modules() if m is not model and "pretrained_cfg" in vars(m)), None)
    cfg = pretrained_cfg(model)
    own = "pretrained_cfg" in vars(model) or hasattr(type(model), "pretrained_cfg")
    if inner is not None and not own:
        kind, config = type(inner).__name__, data_config(inner)
        values = f"mean {config.get('mean', 0)} and std {config.get('std', 1)}"
        if not cfg:
            yield (
                f"{name} hides what the {kind} in it says of its images ({values}) and classes: it gets images in [0, 1] as "
                f"they are. Unless {name} expects that, pass the {kind} alone."
            )
        elif _normalises(inner):
            yield f"{name} gets images normalised with {values}. If {name} normalises them itself, pass its {kind} alone."
    elif not cfg and isinstance(model, torch.jit.ScriptModule | torch.fx.GraphModule):
        yield (
            f"A traced model ({name}) does not say which mean and std it expects: it is attacked on images in [0, 1]. If it "
            "does not normalise by itself, pass the timm model that it was made from."
        )


def _normalises(module: nn.Module) -> bool:
    """Whether a module's cfg asks for a mean or a standard deviation."""
    cfg = pretrained_cfg(module)
    return any(cfg.get("mean") or ()) or any(value != 1 for value in cfg.get("std") or ())
