"""Checkpoints of pretraining: a training state (see `advcl_hub.training.state`), its recipe and its provenance."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from advcl_hub.models.branch_norm import branch_state_dict
from advcl_hub.training.state import FILE, group, load_state, save_state
from train.recipe import Recipe, from_dict


@dataclass
class Checkpoint:
    """A training state on the CPU.

    Attributes:
        step: optimizer steps done.
        seconds: time spent training, over all starts.
        recipe: what is being trained.
        provenance: data, pseudo-labels, versions, hardware.
        tensors: see `advcl_hub.training.state`.
        finished: whether all epochs are done.
    """

    step: int
    seconds: float
    recipe: Recipe
    provenance: dict[str, Any]
    tensors: dict[str, Tensor]
    finished: bool = False

    def encoder_state(self, branch: str | None = None, ema: bool | None = None) -> dict[str, Tensor]:
        """The plain timm state dict of the encoder.

        Args:
            branch: batch-norm branch; by default the one that the objective exports (`adv` for AdvCL).
            ema: the averaged weights; by default if there are any.

        Raises:
            ValueError: no such branch, or averaged weights asked for that the run did not keep.
        """
        weights = self._weights(ema)
        branches = self.recipe.objective.branches
        if branch is not None and branch not in branches:  # of a network without batch norm, none would be missing
            raise ValueError(f"No batch-norm branch {branch!r}: this run's objective has {', '.join(branches)}.")
        encoder = group(self.tensors, f"{weights}.encoder")
        return branch_state_dict(encoder, branch or self.recipe.objective.export_branch)

    def projector_state(self, ema: bool | None = None) -> dict[str, Tensor]:
        """The state dict of the projection head.

        Args:
            ema: see `encoder_state`.

        Raises:
            ValueError: the run has none, or averaged weights asked for that the run did not keep.
        """
        state = group(self.tensors, f"{self._weights(ema)}.projector")
        if not state:
            raise ValueError("This run has no projection head, its method trains none: export it without --keep-projector.")
        return state

    def _weights(self, ema: bool | None) -> str:
        """Where the weights stand in the file: `ema` for the averaged ones, or `model`."""
        averaged = bool(self.recipe.ema_decay) if ema is None else ema
        if averaged and not self.recipe.ema_decay:
            raise ValueError("This run kept no averaged weights (ema_decay is 0).")
        return "ema" if averaged else "model"


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    """Replaces the folder's checkpoint. Raises OSError if that fails (a full disk); the earlier one stays."""
    info = {
        "step": checkpoint.step,
        "seconds": checkpoint.seconds,
        "recipe": checkpoint.recipe.to_dict(),
        "provenance": checkpoint.provenance,
        "finished": checkpoint.finished,
    }
    save_state(folder, info, checkpoint.tensors)


def load_checkpoint(folder: Path) -> Checkpoint:
    """Reads the checkpoint in a run's folder.

    Raises:
        FileNotFoundError: there is none.
        ValueError: the file is corrupt or not one of ours.
    """
    info, tensors = load_state(folder)
    try:
        recipe = from_dict(_with_method(info["recipe"]))
        return Checkpoint(info["step"], info["seconds"], recipe, info["provenance"], tensors, info["finished"])
    except ValueError as error:
        raise ValueError(
            f"{folder / FILE} is of another version of advcl-hub ({error}): continue it with that version, or start over in "
            "another folder."
        ) from None
    except (KeyError, TypeError) as error:
        raise ValueError(f"{folder / FILE} is no checkpoint of pretraining ({error!r}). Remove it to start over.") from error


def _with_method(recipe: dict[str, Any]) -> dict[str, Any]:
    """A stored recipe, also one from the time when SimCLR and ACL were settings of AdvCL's objective."""
    objective = dict(recipe["objective"])
    if "pairing" not in objective:
        return recipe
    clean, attacked, pairing = (objective.pop(key) for key in ("clean_views", "adversarial_views", "pairing"))
    pair = ["strong1", "strong2"]
    known = {
        "advcl": ([*pair, "high_frequency"], ["weak"], "joint"),
        "simclr": (pair, [], "joint"),
        "acl": (pair, pair, "separate"),
    }
    method = next((name for name, views in known.items() if views == (clean, attacked, pairing)), None)
    if method is None:
        raise ValueError(f"no method contrasts {clean} with {attacked}")
    if method != "advcl":
        del objective["pseudo_label_weight"]
    return {**recipe, "method": method, "objective": objective}
