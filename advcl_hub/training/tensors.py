"""Prepares tensors for a file of weights: contiguous, each in memory of its own."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

# What safetensors stores; complex64 from 0.5 on.
_KNOWN = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool, torch.complex64),
)


def tied(module: nn.Module) -> list[str]:
    """The second and further names of parameters that a module has under several names."""
    names = [name for name, _ in module.named_parameters(remove_duplicate=False)]
    once = {name for name, _ in module.named_parameters()}
    return [name for name in names if name not in once]


def check_averageable(module: nn.Module) -> None:
    """Raises ValueError for a module with tied weights, of which timm's moving average would take each step twice."""
    if names := tied(module):
        raise ValueError(
            f"{type(module).__name__} has tied weights ({names[0]} is one), which cannot be averaged: set ema_decay to 0."
        )


def separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same values on the CPU, contiguous, each in memory of its own, as safetensors asks for.

    Tied weights (all `coat_*` of timm) are one tensor under several names, and every name has to be in the file: timm loads
    strictly. A tied model stays tied when it loads them. Tensors that stand alone are not copied.

    Raises:
        ValueError: a tensor that is sparse, or of a type that safetensors does not store.
    """
    taken: set[int] = set()
    result: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.dtype not in _KNOWN:
            kind = str(tensor.dtype if tensor.layout == torch.strided else tensor.layout).removeprefix("torch.")
            raise ValueError(f"{name} is of the type {kind}, which safetensors does not store: convert it.")
        tensor = tensor.detach().cpu().contiguous()
        memory = tensor.untyped_storage().data_ptr()
        result[name] = tensor.clone() if memory in taken else tensor
        taken.add(memory)
    return result
