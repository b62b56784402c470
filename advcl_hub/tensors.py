"""Tensors as a file of weights needs them."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

_UNKNOWN = (torch.complex128, torch.qint8, torch.quint8, torch.qint32)  # to safetensors


def tied(module: nn.Module) -> list[str]:
    """The second and further names of parameters that a module has under several names."""
    names = [name for name, _ in module.named_parameters(remove_duplicate=False)]
    once = {name for name, _ in module.named_parameters()}
    return [name for name in names if name not in once]


def check_averageable(module: nn.Module) -> None:
    """Raises ValueError for a module with tied weights: timm's moving average would take each of them twice a step."""
    if names := tied(module):
        raise ValueError(
            f"{type(module).__name__} has tied weights ({names[0]} is one), which cannot be averaged: set ema_decay to 0."
        )


def separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same values on the CPU, contiguous, each in memory of its own, as safetensors asks for.

    Tied weights (all `coat_*` of timm) are one tensor under several names, and every name has to be in the file: timm loads
    strictly. A tied model stays tied when it loads them. Tensors that stand alone are not copied.

    Raises:
        ValueError: a sparse or quantized tensor, or one of complex128, which safetensors does not know.
    """
    taken: set[int] = set()
    result: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.dtype in _UNKNOWN:
            kind = str(tensor.dtype if tensor.layout == torch.strided else tensor.layout).removeprefix("torch.")
            raise ValueError(f"{name} is of the type {kind}, which safetensors does not store: convert it.")
        tensor = tensor.detach().cpu().contiguous()
        memory = tensor.untyped_storage().data_ptr()
        result[name] = tensor.clone() if memory in taken else tensor
        taken.add(memory)
    return result
