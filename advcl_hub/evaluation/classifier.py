"""A timm model as the function that is attacked: from images in [0, 1] to logits."""

import hashlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from timm.utils import ModelEmaV2, ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.parameter import UninitializedParameter
from torch.optim.swa_utils import AveragedModel

from advcl_hub.evaluation.preprocessing import Fit, data_config, pretrained_cfg
from advcl_hub.modes import as_usual

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


def weights_sha256(model: nn.Module) -> str:
    """sha256 in hex over names, types, shapes and bytes of a state dict, whatever file it came from."""
    digest = hashlib.sha256()
    for key, value in sorted(model.state_dict().items()):
        if not isinstance(value, Tensor):  # what get_extra_state returns, or a quantized layer
            digest.update(f"{key} {value!r}\n".encode())
            continue
        tensor = (value.to_dense() if value.layout != torch.strided else value).detach().cpu().contiguous()
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def check_computes(model: nn.Module) -> None:
    """Raises ValueError unless a model's weights are float32 and can be differentiated through."""
    if any(p.is_meta or isinstance(p, UninitializedParameter) for p in model.parameters()):
        raise ValueError("The model has weights without values (on the device meta, or of lazy layers): load them first.")
    others = {str(p.dtype).removeprefix("torch.") for p in model.parameters() if p.is_floating_point()} - {"float32"}
    if others:
        raise ValueError(
            f"The model's weights are {', '.join(sorted(others))}; evaluation computes in float32: pass model.float(). (For "
            "bfloat16 autocast: precision='bfloat16'.)"
        )
    if any(p.is_inference() for p in model.parameters()):
        raise ValueError("The model was made inside torch.inference_mode(), so it has no gradients: make it outside.")


@contextmanager
def borrowed(model: nn.Module, device: torch.device) -> Iterator[None]:
    """The model on `device` in evaluation mode, without parameter gradients, computing in true float32 by fixed algorithms.

    Afterwards the model is where and as it was, and so are the global random state and the backends' settings. (FAB calls
    backward(), which would otherwise compute and keep the gradient of every weight.)
    """
    tensors = [*model.parameters(), *model.buffers()]
    home = tensors[0].device if tensors else device
    modes = {module: module.training for module in model.modules()}
    wanted = [p for p in model.parameters() if p.requires_grad]
    # A batch norm that stays in training mode moves its own.
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    cuda = device.type == "cuda"
    devices = [device] if cuda else []
    with torch.random.fork_rng(devices), as_usual(), _exact_backends(cuda):
        try:
            model.to(device).eval()
            for parameter in wanted:
                parameter.requires_grad_(False)
            yield
        finally:
            model.to(home)
            with torch.no_grad():
                for name, buffer in model.named_buffers():
                    buffer.copy_(buffers[name])
            for parameter in wanted:
                parameter.requires_grad_(True)
            for module, training in modes.items():
                module.training = training


@contextmanager
def _exact_backends(cuda: bool) -> Iterator[None]:
    """True float32 everywhere, and on a GPU deterministic kernels wherever there are any (torch warns where there are none)."""
    cudnn: Any = torch.backends.cudnn
    matmul: Any = torch.backends.cuda.matmul
    settings: list[tuple[Any, str, Any]]
    if hasattr(matmul, "fp32_precision"):  # torch 2.9; it refuses to mix these with the older allow_tf32
        mkldnn: Any = torch.backends.mkldnn  # of CPUs
        settings = [(place, "fp32_precision", "ieee") for place in (cudnn.conv, matmul, mkldnn.conv, mkldnn.matmul)]
    else:
        settings = [(cudnn, "allow_tf32", False), (matmul, "allow_tf32", False)]
    settings += [(cudnn, "benchmark", False), (cudnn, "deterministic", True)]
    earlier = [(module, name, getattr(module, name)) for module, name, _ in settings]
    strict, warn_only = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    try:
        for module, name, value in settings:
            setattr(module, name, value)
        if cuda and not strict:
            torch.use_deterministic_algorithms(True, warn_only=True)
        yield
    finally:
        for module, name, value in earlier:
            setattr(module, name, value)
        torch.use_deterministic_algorithms(strict, warn_only=warn_only)
