"""The methods that make encoders, for a training loop of your own: README.md beside this file has one in ten lines."""

from advcl_hub.pretraining.advcl import AdvCL, Attack, Losses, Objective
from advcl_hub.pretraining.losses import contrastive_loss, pseudo_label_loss
from advcl_hub.pretraining.pseudo_labels import PseudoLabels, load_pseudo_labels, make_pseudo_labels
from advcl_hub.pretraining.views import ViewConfig, Views, make_views

__all__ = [
    "AdvCL",
    "Attack",
    "Losses",
    "Objective",
    "PseudoLabels",
    "ViewConfig",
    "Views",
    "contrastive_loss",
    "load_pseudo_labels",
    "make_pseudo_labels",
    "make_views",
    "pseudo_label_loss",
]
