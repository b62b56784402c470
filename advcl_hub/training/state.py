"""Training states: one safetensors file, replaced atomically, so that the last complete one is always there.

The file holds tensors `model.*`, `ema.*` and `optimizer.{parameter}.{slot}`; its metadata everything else as JSON. No random
state is stored (see `advcl_hub.training.seeds`).
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from advcl_hub.files import replacing
from advcl_hub.training.tensors import separate

FILE = "checkpoint.safetensors"


def pack_state(model: nn.Module, optimizer: torch.optim.Optimizer, ema: nn.Module | None) -> dict[str, Tensor]:
    """All tensors of a training state under the names of the file."""
    tensors = {f"model.{k}": v for k, v in model.state_dict().items()}
    if ema is not None:
        tensors |= {f"ema.{k}": v for k, v in ema.state_dict().items()}
    for index, slots in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{slot}": v for slot, v in slots.items() if isinstance(v, Tensor)}
    return separate(tensors)


def unpack_state(
    tensors: Mapping[str, Tensor], model: nn.Module, optimizer: torch.optim.Optimizer, ema: nn.Module | None
) -> None:
    """Puts the tensors of `pack_state` back; strict."""
    model.load_state_dict(group(tensors, "model"))
    if ema is not None:
        ema.load_state_dict(group(tensors, "ema"))
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in group(tensors, "optimizer").items():
        index, slot = key.split(".")
        state.setdefault(int(index), {})[slot] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def group(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors below `prefix.`, without it."""
    return {k.removeprefix(f"{prefix}."): v for k, v in tensors.items() if k.startswith(f"{prefix}.")}


def save_state(folder: Path, info: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Replaces the folder's training state. Raises OSError if that fails (a full disk); the earlier one stays."""
    with replacing(folder / FILE) as draft:
        save_file(separate(tensors), draft, metadata={"advcl": json.dumps(info)})


def load_state(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Reads what `save_state` wrote.

    Raises:
        FileNotFoundError: there is none.
        ValueError: the file is corrupt or not one of ours.
    """
    path = folder / FILE
    if not path.is_file():
        raise FileNotFoundError(f"No checkpoint in {folder} (expected {FILE}).")
    try:
        with safe_open(path, "pt") as file:
            info = json.loads((file.metadata() or {})["advcl"])
            return info, {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not a readable training checkpoint ({error}). Remove it to start over.") from None


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
