"""Training checkpoints: one safetensors file, replaced atomically, so that the last complete one is always there.

The file holds tensors `model.*`, `ema.*` and `optimizer.{parameter}.{slot}`; its metadata holds the recipe, the step and the
provenance as JSON. No random state is stored: every step seeds its own generator (see `train.pretrain`).
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from advcl_hub.files import replacing
from advcl_hub.models.branch_norm import branch_state_dict
from train.recipe import Recipe, from_dict

FILE = "checkpoint.safetensors"


@dataclass
class Checkpoint:
    """A training state on the CPU.

    Attributes:
        step: optimizer steps done.
        seconds: time spent training, over all starts.
        recipe: what is being trained.
        provenance: data, pseudo-labels, versions, hardware.
        tensors: see the file layout above.
        finished: whether all epochs are done.
    """

    step: int
    seconds: float
    recipe: Recipe
    provenance: dict[str, Any]
    tensors: dict[str, Tensor]
    finished: bool = False

    def group(self, prefix: str) -> dict[str, Tensor]:
        """The tensors below `prefix.`, without it."""
        return {k.removeprefix(f"{prefix}."): v for k, v in self.tensors.items() if k.startswith(f"{prefix}.")}

    def encoder_state(self, branch: str | None = None, ema: bool | None = None) -> dict[str, Tensor]:
        """The plain timm state dict of the encoder.

        Args:
            branch: batch-norm branch; by default the one that the objective exports (`adv` for AdvCL).
            ema: the averaged weights; by default if there are any.

        Raises:
            ValueError: no such branch, or averaged weights asked for that the run did not keep.
        """
        averaged = bool(self.recipe.ema_decay) if ema is None else ema
        if averaged and not self.recipe.ema_decay:
            raise ValueError("This run kept no averaged weights (ema_decay is 0).")
        branches = self.recipe.objective.branches
        if branch is not None and branch not in branches:  # of a network without batch norm, none would be missing
            raise ValueError(f"No batch-norm branch {branch!r}: this run's objective has {', '.join(branches)}.")
        state = self.group("ema" if averaged else "model")
        encoder = {k.removeprefix("encoder."): v for k, v in state.items() if k.startswith("encoder.")}
        return branch_state_dict(encoder, branch or self.recipe.objective.export_branch)


def pack_state(model: nn.Module, optimizer: torch.optim.Optimizer, ema: nn.Module | None) -> dict[str, Tensor]:
    """All tensors of a training state under the names of the file."""
    tensors = {f"model.{k}": v for k, v in model.state_dict().items()}
    if ema is not None:
        tensors |= {f"ema.{k}": v for k, v in ema.state_dict().items()}
    for index, slots in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{slot}": v for slot, v in slots.items() if isinstance(v, Tensor)}
    return {k: v.detach().cpu().contiguous() for k, v in tensors.items()}


def unpack_state(checkpoint: Checkpoint, model: nn.Module, optimizer: torch.optim.Optimizer, ema: nn.Module | None) -> None:
    """Puts a checkpoint's tensors back; strict."""
    model.load_state_dict(checkpoint.group("model"))
    if ema is not None:
        ema.load_state_dict(checkpoint.group("ema"))
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in checkpoint.group("optimizer").items():
        index, slot = key.split(".")
        state.setdefault(int(index), {})[slot] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    """Replaces the folder's checkpoint. Raises OSError if that fails (a full disk); the earlier one stays."""
    info = {
        "step": checkpoint.step,
        "seconds": checkpoint.seconds,
        "recipe": checkpoint.recipe.to_dict(),
        "provenance": checkpoint.provenance,
        "finished": checkpoint.finished,
    }
    with replacing(folder / FILE) as draft:
        save_file(checkpoint.tensors, draft, metadata={"advcl": json.dumps(info)})


def load_checkpoint(folder: Path) -> Checkpoint:
    """Reads the checkpoint in a run's folder.

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
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not a readable training checkpoint ({error}). Remove it to start over.") from None
    return Checkpoint(info["step"], info["seconds"], from_dict(info["recipe"]), info["provenance"], tensors, info["finished"])
