"""A model in the state in which it is evaluated, and afterwards as it was."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter

from advcl_hub.modes import as_usual


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
    mkldnn: Any = torch.backends.mkldnn  # of CPUs
    settings: list[tuple[Any, str, Any]]
    settings = [(place, "fp32_precision", "ieee") for place in (cudnn.conv, matmul, mkldnn.conv, mkldnn.matmul)]
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
