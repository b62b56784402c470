"""The methods that make encoders, for a training loop of your own: README.md beside this file has one in ten lines."""

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
    "load_pseudo_labels",
    "make_pseudo_labels",
    "make_views",
    "pseudo_label_loss",
]
