"""The trained encoder that a run starts from: a teacher, or weights to go on with."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from advcl_hub.errors import reason_of
from advcl_hub.hub.export import CONFIG
from advcl_hub.models.preprocessing import pretrained_cfg
from advcl_hub.opening import load_model, weights_sha256
from advcl_hub.pretraining.method import normalisation
from train.recipe import Recipe


@dataclass(frozen=True)
class Start:
    """A trained encoder.

    Attributes:
        source: what was opened.
        encoder: the timm model without its classifier.
        facts: for the record: name, architecture, sha256 of the weights, `mean` and `std` of its images, and its own record.
    """

    source: str
    encoder: nn.Module
    facts: dict[str, Any]


def open_start(recipe: Recipe) -> Start | None:
    """The encoder that a recipe starts from, None if it names none.

    Raises:
        ValueError, OSError: see `load_model`; or it is of another architecture than the recipe's.
    """
    if recipe.start_from is None:
        return None
    source, exported = recipe.start_from, Path(recipe.start_from.removeprefix("local-dir:"), "export")
    if (exported / CONFIG).is_file():  # the folder of a run
        source = f"local-dir:{exported}"
    loaded = load_model(source)
    model, architecture = loaded.model, pretrained_cfg(loaded.model).get("architecture")
    if architecture != recipe.model.partition(".")[0]:
        arguments = {key: value for key, value in loaded.arguments.items() if key != "num_classes"}
        more = f" and model_kwargs='{arguments}'" if arguments else ""
        raise ValueError(
            f"start_from is {source}, a {architecture}; the recipe trains a {recipe.model}: set model={architecture}{more}."
        )
    model.reset_classifier(0)  # type: ignore[operator]  # every timm model has it
    facts = {
        "name": loaded.name,
        "architecture": architecture,
        "weights_sha256": weights_sha256(model),
        **{name: list(values) for name, values in normalisation(model).items()},
        "provenance": loaded.provenance,
    }
    return Start(source, model, facts)


def take_weights(encoder: nn.Module, start: Start) -> None:
    """Gives an encoder the weights that a run starts from, all of them.

    Raises:
        ValueError: they do not fit; the first difference is named.
    """
    try:
        encoder.load_state_dict(start.encoder.state_dict())
    except RuntimeError as error:
        raise ValueError(
            f"start_from is {start.source}, whose weights are not those of the recipe's network ({reason_of(error)}): set "
            "model_kwargs as it was made."
        ) from error
