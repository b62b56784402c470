"""The trained encoder that a run starts from: a teacher, or weights to go on with."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.models import is_model
from torch import nn

from advcl_hub.errors import reason_of
from advcl_hub.hub.export import CONFIG
from advcl_hub.hub.projector import load_projector
from advcl_hub.models.preprocessing import pretrained_cfg
from advcl_hub.opening import load_model, weights_sha256
from advcl_hub.pretraining.method import normalisation
from advcl_hub.training.state import FILE
from train.recipe import Recipe


@dataclass(frozen=True)
class Start:
    """A trained encoder.

    Attributes:
        source: what was opened.
        encoder: the timm model without its classifier.
        arguments: of `timm.create_model`, that its architecture needs.
        projector: its projection head, if the recipe's method needs that.
        facts: for the record: name, architecture, sha256 of the weights and of the head's, `mean` and `std` of its images, and
            its own record.
    """

    source: str
    encoder: nn.Module
    arguments: dict[str, Any]
    projector: nn.Module | None
    facts: dict[str, Any]


def open_start(recipe: Recipe) -> Start | None:
    """The encoder that a recipe starts from, None if it names none.

    Raises:
        ValueError, OSError: see `load_model` and `load_projector`; or it is of another architecture than the recipe's.
        FileNotFoundError: there is no such folder, the run in it is not exported yet, or a projection head is missing.
    """
    if recipe.start_from is None:
        return None
    source, exported = recipe.start_from, Path(recipe.start_from.removeprefix("local-dir:"), "export")
    if (exported / CONFIG).is_file():  # the folder of a run
        source = f"local-dir:{exported}"
    elif (exported.parent / FILE).is_file():
        raise FileNotFoundError(
            f"start_from is {exported.parent}, a run without export: finish it, or `python -m train.export {exported.parent}`."
        )
    named = source.partition(".")[0]
    if is_model(named):  # of a timm name the architecture is known before anything is fetched
        _check_architecture(source, named, recipe)
    try:
        loaded = load_model(source)
    except (ValueError, OSError) as error:
        raise type(error)(f"start_from: {error}") from error
    model, architecture = loaded.model, pretrained_cfg(loaded.model).get("architecture")
    arguments = {key: value for key, value in loaded.arguments.items() if key != "num_classes"}
    _check_architecture(source, architecture, recipe, arguments)
    model.reset_classifier(0)  # type: ignore[operator]  # every timm model has it
    projector = load_projector(source) if recipe.objective.needs_projector else None
    facts = {
        "name": loaded.name,
        "architecture": architecture,
        "weights_sha256": weights_sha256(model),
        "projector_sha256": weights_sha256(projector) if projector else None,
        **{name: list(values) for name, values in normalisation(model).items()},
        "provenance": loaded.provenance,
    }
    return Start(source, model, arguments, projector, facts)


def _check_architecture(source: str, architecture: str | None, recipe: Recipe, arguments: dict[str, Any] | None = None) -> None:
    """Raises ValueError unless this is the recipe's architecture."""
    if architecture != recipe.model.partition(".")[0]:
        more = f' and model_kwargs="{arguments}"' if arguments else ""
        raise ValueError(
            f"start_from is {source}, a {architecture}; the recipe trains a {recipe.model}: set model={architecture}{more}."
        )


@torch.no_grad()
def take_weights(encoder: nn.Module, start: Start, shape: tuple[int, int, int]) -> None:
    """Gives an encoder the weights that a run starts from, all of them.

    Args:
        encoder: the recipe's.
        start: where they are from.
        shape: of the images (C, H, W) that both take.

    Raises:
        ValueError: they do not fit, or the encoder computes something else with them: its arguments are not those of the start.
    """
    wanted = f'set model_kwargs="{start.arguments}", as it was made' if start.arguments else "it was made without model_kwargs"
    try:
        encoder.load_state_dict(start.encoder.state_dict())
    except RuntimeError as error:
        raise ValueError(
            f"start_from is {start.source}, whose weights are not those of the recipe's network: {wanted} ({reason_of(error)})."
        ) from error
    images = torch.linspace(0, 1, 2 * math.prod(shape)).reshape(2, *shape)
    training = encoder.training
    ours, theirs = encoder.eval()(images), start.encoder(images)
    encoder.train(training)
    if not torch.allclose(ours, theirs, rtol=1e-3, atol=1e-4 * float(theirs.abs().max())):
        raise ValueError(
            f"start_from is {start.source}, and the recipe's network computes something else with its weights: {wanted}."
        )
