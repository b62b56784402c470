"""Training states: one safetensors file, replaced atomically, so that the last complete one is always there.

The file holds tensors `model.*`, `ema.*`, `optimizer.{parameter}.{slot}`, and `optimizer_groups.{group}.{name}` for what an
optimizer counts in its groups of parameters; its metadata everything else as JSON. Parameters are numbered in the optimizer's
order. No random state is stored (see `advcl_hub.training.seeds`).
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from advcl_hub.files import parse_json, read_safetensors, replacing
from advcl_hub.training.tensors import separate

FILE = "checkpoint.safetensors"


def pack_state(model: nn.Module, optimizer: torch.optim.Optimizer, ema: nn.Module | None) -> dict[str, Tensor]:
    """All tensors of a training state under the names of the file.

    Raises:
        ValueError: the optimizer keeps something for a parameter that is no tensor, so that it could not go on exactly.
    """
    tensors = {f"model.{k}": v for k, v in model.state_dict().items()}
    if ema is not None:
        tensors |= {f"ema.{k}": v for k, v in ema.state_dict().items()}
    for index, slots in optimizer.state_dict()["state"].items():
        for slot, value in slots.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{index}.{slot}"] = value
            elif value is not None:
                kind = type(value).__name__
                raise ValueError(f"{type(optimizer).__name__} keeps {slot} as {kind}; only tensors can be stored.")
    for index, entries in enumerate(optimizer.param_groups):
        counted = _counted(optimizer, entries)
        tensors |= {f"optimizer_groups.{index}.{name}": _as_tensor(value) for name, value in counted.items()}
    return separate(tensors)


def unpack_state(
    tensors: Mapping[str, Tensor], model: nn.Module, optimizer: torch.optim.Optimizer, ema: nn.Module | None
) -> None:
    """Puts the tensors of `pack_state` back; strict.

    Raises:
        RuntimeError: of another model.
        ValueError: of an optimizer of other parameters.
    """
    model.load_state_dict(group(tensors, "model"))
    if ema is not None:
        ema.load_state_dict(group(tensors, "ema"))
    groups = [
        {name: value for name, value in entries.items() if name not in _counted(optimizer, entries)}
        for entries in optimizer.state_dict()["param_groups"]
    ]
    parameters = [parameter for entries in optimizer.param_groups for parameter in entries["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in group(tensors, "optimizer").items():
        index, slot = key.split(".")
        parameter = parameters[int(index)] if int(index) < len(parameters) else None
        if parameter is None or (value.ndim and value.shape != parameter.shape):
            expected = "there is no such parameter" if parameter is None else f"the parameter is {tuple(parameter.shape)}"
            raise ValueError(
                f"The state of another optimizer: {slot} of parameter {index} is {tuple(value.shape)}, {expected}."
            )
        if value.ndim:  # as the parameter lies in memory: a norm adds in that order, and LAMB's would be rounded otherwise
            value = torch.empty_like(parameter, dtype=value.dtype, device=value.device, requires_grad=False).copy_(value)
        state.setdefault(int(index), {})[slot] = value
    for key, value in group(tensors, "optimizer_groups").items():
        index, name = key.split(".")
        if int(index) >= len(groups):
            raise ValueError(f"The state of another optimizer: it has a group {index}, of {len(groups)} here.")
        groups[int(index)][name] = _as_counted(value)
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _counted(optimizer: torch.optim.Optimizer, entries: Mapping[str, Any]) -> dict[str, Tensor | float]:
    """What an optimizer changes in a group of parameters while it runs.

    That is its tensors, and the numbers that are none of its settings: timm's LAMB counts its steps there, in a tensor, or in
    older versions as a number. (The learning rate is set before every step; it need not be kept.)
    """
    settings = {*optimizer.defaults, "params", "initial_lr"}
    return {
        name: value
        for name, value in entries.items()
        if isinstance(value, Tensor) or (name not in settings and type(value) in (int, float))
    }


def _as_tensor(value: Tensor | float) -> Tensor:
    """A number as int64 or float64, which `_as_counted` takes for a number."""
    if isinstance(value, Tensor):
        return value
    return torch.tensor(value, dtype=torch.int64 if isinstance(value, int) else torch.float64)


def _as_counted(value: Tensor) -> Tensor | float:
    return value.item() if value.dtype in (torch.int64, torch.float64) else value


def group(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors below `prefix.`, without it."""
    return {k.removeprefix(f"{prefix}."): v for k, v in tensors.items() if k.startswith(f"{prefix}.")}


def save_state(folder: Path, info: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Replaces the folder's training state. Raises OSError if that fails (a full disk); the earlier one stays."""
    with replacing(folder / FILE) as draft:
        save_file(separate(tensors), draft, metadata={"advcl": json.dumps(info)})


def load_state(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Reads what `save_state` wrote, also while a run replaces it.

    Raises:
        FileNotFoundError: there is none.
        ValueError: the file is corrupt or not one of ours.
    """
    path = folder / FILE
    try:
        file = read_safetensors(path)
        info = parse_json(file.metadata["advcl"])
        if not isinstance(info, dict):
            raise ValueError(f"its record is a {type(info).__name__}")
        return info, file.tensors
    except FileNotFoundError:
        raise FileNotFoundError(f"No checkpoint in {folder} (expected {FILE}).") from None
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"{path} is not a readable training checkpoint ({error}). Remove it to start over.") from None


# Of a pretraining recipe, what decides how a run is watched and where its files lie, not what it computes.
FREE = (
    "checkpoint_minutes",
    "judge",
    "data.root",
    "data.download",
    "data.workers",
    "start_from",
    "pseudo_labels.path",
    "pseudo_labels.cache",
)


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str]:
    """What differs between two nested records: by dotted key, a sentence."""
    earlier, later = _flat(before), _flat(now)
    return {
        key: f"{key}: {earlier.get(key)!r} there, {later.get(key)!r} now"
        for key in sorted(earlier.keys() | later.keys())
        if earlier.get(key) != later.get(key)
    }


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
