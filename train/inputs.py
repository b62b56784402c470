"""What a run reads: images, pseudo-labels, and whether they are those that its checkpoint was made from."""

import platform
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import accelerate
import timm
import torch
from accelerate import Accelerator

import advcl_hub
from advcl_hub.data import ImageData, load_data, train_val_split
from advcl_hub.pretraining.pseudo_labels import PseudoLabels, load_pseudo_labels, make_pseudo_labels
from advcl_hub.training.state import FREE, differences
from train.recipe import Recipe, require


def load_training_data(recipe: Recipe) -> tuple[ImageData, ImageData | None]:
    """The recipe's training images, and those held out to judge the run. Raises as `advcl_hub.data.load_data` does."""
    c = recipe.data
    channels = recipe.model_kwargs.get("in_chans", 3)
    data = load_data(c.source, "train", root=c.root, size=c.size, channels=channels, download=c.download)
    if not c.val_fraction:
        return data, None
    return train_val_split(data, c.val_fraction)


def load_labels(recipe: Recipe, data: ImageData, device: torch.device) -> PseudoLabels | None:
    """The recipe's pseudo-labels for these images, or None if its objective has no use for them."""
    c = recipe.pseudo_labels
    if not recipe.objective.uses_labels:
        return None
    if c.path:
        return load_pseudo_labels(c.path, data, "train", c.ks)
    assert c.encoder is not None  # the recipe made sure
    return make_pseudo_labels(data, c.encoder, c.ks, recipe.seed, cache_dir=c.cache, device=device, workers=recipe.data.workers)


def provenance(
    data: ImageData, labels: PseudoLabels | None, start: Mapping[str, Any] | None, accelerator: Accelerator
) -> dict[str, Any]:
    """What a result has to name besides its recipe: data, labels, the encoder that it started from, versions, hardware."""
    kind = accelerator.device.type
    name = torch.cuda.get_device_name() if kind == "cuda" else f"{platform.machine()} {kind}"
    return {
        "data": {
            "name": data.name,
            "images": len(data),
            "shape": list(data.shape),
            "classes": list(data.classes),
            "sha256": data.fingerprint(),
        },
        "pseudo_labels": {**labels.provenance, "sha256": labels.fingerprint()} if labels else None,
        "start_from": start,
        "versions": {
            "advcl_hub": advcl_hub.__version__,
            "torch": torch.__version__,
            "timm": timm.__version__,
            "accelerate": accelerate.__version__,
            "python": platform.python_version(),
        },
        "hardware": {
            "device": f"{name}, {torch.get_num_threads()} threads" if kind == "cpu" else name,
            "processes": accelerator.num_processes,
        },
    }


def check_same_recipe(earlier: Recipe, recipe: Recipe, folder: Path) -> None:
    """Raises ValueError, listing what differs, unless a checkpoint's recipe computes the same; what is `FREE` may change."""
    found = differences(earlier.to_dict(), recipe.to_dict())
    differing = [sentence for key, sentence in found.items() if not key.startswith(FREE)]
    require(
        not differing,
        f"{folder} holds a run of another recipe; choose another --output, or undo:\n  " + "\n  ".join(differing),
    )


def continue_provenance(earlier: dict[str, Any], now: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The provenance of a run that goes on: as before, and where else it was continued.

    Raises:
        ValueError: the checkpoint saw other images or other pseudo-labels, or started from other weights.
    """
    start = ("weights_sha256", "projector_sha256", "mean", "std")
    for key, what, identity in (
        ("data", "was trained on other data", ("sha256",)),
        ("pseudo_labels", "was trained on other pseudo-labels", ("sha256",)),
        ("start_from", "started from another encoder", start),
    ):
        before, here = ([(p.get(key) or {}).get(part) for part in identity] for p in (earlier, now))
        there = _named(earlier.get(key))
        require(before == here, f"{folder} {what}: {there}, now {_named(now[key])}. Choose another --output.")
    places = [{k: p[k] for k in ("versions", "hardware")} for p in (earlier, *earlier.get("continued_on", []), now)]
    if places[-1] == places[-2]:
        return earlier
    print("Note: other hardware or versions than before; the run continues, but not bit by bit as one run.", file=sys.stderr)
    return {**earlier, "continued_on": places[1:]}


def _named(facts: Mapping[str, Any] | None) -> str:
    """What a record is of, in a few words."""
    if not facts:
        return "none"
    name = facts.get("name") or facts.get("file") or facts.get("encoder")
    sums = [f"{key} {str(value)[:16]}" for key, value in facts.items() if key.endswith("sha256") and value]
    pixels = [f"{key} {facts[key]}" for key in ("mean", "std") if key in facts]
    return f"{name} ({', '.join([*sums, *pixels])})"
