"""The methods that make encoders, for a training loop of your own: README.md beside this file has one in ten lines."""

import difflib
import inspect
from typing import Any

from torch import nn

from advcl_hub.pretraining.acl import ACL
from advcl_hub.pretraining.advcl import AdvCL
from advcl_hub.pretraining.deacl import DeACL
from advcl_hub.pretraining.losses import contrastive_loss, cosine_similarity, pseudo_label_loss
from advcl_hub.pretraining.method import Attack, Method
from advcl_hub.pretraining.profeat import ProFeAT
from advcl_hub.pretraining.pseudo_label_at import PseudoLabelAT
from advcl_hub.pretraining.pseudo_labels import PseudoLabels, load_pseudo_labels, make_pseudo_labels
from advcl_hub.pretraining.simclr import SimCLR
from advcl_hub.pretraining.views import ViewConfig, Views, make_views

METHODS: dict[str, type[Method]] = {
    "advcl": AdvCL,
    "simclr": SimCLR,
    "acl": ACL,
    "deacl": DeACL,
    "profeat": ProFeAT,
    "pseudo_label_at": PseudoLabelAT,
}


def create_method(name: str, encoder: nn.Module, **settings: Any) -> Method:
    """A method by its name, with those of the settings that it takes: one call for all of them.

        network = create_method("deacl", encoder, attack=Attack(steps=3), ks=(2, 10))   # DeACL has no use for ks

    Args:
        name: a key of `METHODS`.
        encoder: see `Method`.
        settings: arguments of the methods by name, such as `objective`, `attack`, `views`, `ks`, `projector`.

    Raises:
        ValueError: an unknown name or setting, or what the method raises.
    """
    if name not in METHODS:
        raise ValueError(f"No pretraining method {name!r}: known are {', '.join(METHODS)}.")
    takes = {method: inspect.signature(kind).parameters for method, kind in METHODS.items()}
    known = dict.fromkeys(key for parameters in takes.values() for key in parameters if key != "encoder")
    for key in settings:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1, 0.0)[0]
            raise ValueError(f"Unknown setting {key!r}. Did you mean {near!r}? Known: {', '.join(known)}")
    return METHODS[name](encoder, **{key: value for key, value in settings.items() if key in takes[name]})


__all__ = [
    "ACL",
    "METHODS",
    "AdvCL",
    "Attack",
    "DeACL",
    "Method",
    "ProFeAT",
    "PseudoLabelAT",
    "PseudoLabels",
    "SimCLR",
    "ViewConfig",
    "Views",
    "contrastive_loss",
    "cosine_similarity",
    "create_method",
    "load_pseudo_labels",
    "make_pseudo_labels",
    "make_views",
    "pseudo_label_loss",
]
