"""SimCLR (arXiv 2002.05709): two strong views of every image, no attack. The clean teacher of DeACL."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from advcl_hub.pretraining.contrastive import ContrastiveMethod, ContrastiveObjective, check_pairs
from advcl_hub.pretraining.method import Attack
from advcl_hub.pretraining.views import ViewConfig, strong_views


@dataclass(frozen=True)
class SimCLRObjective(ContrastiveObjective):
    """Settings of SimCLR. The loss keeps AdvCL's scale, temperature / base_temperature, to compare at one learning rate."""

    branches = ("clean",)
    export_branch = "clean"


class SimCLRLosses(NamedTuple):
    """Scalars of one step: `total` is the contrastive loss."""

    total: Tensor


class SimCLR(ContrastiveMethod):
    """Plain contrastive pretraining; see `Method` for the arguments, but there is no attack.

        network = SimCLR(timm.create_model("resnet18_cifar", num_classes=0))
        network(images).total.backward()  # uint8 (N, 3, 32, 32)

    Raises:
        ValueError: the encoder has a classifier, or wants normalised images.
    """

    Objective, Losses = SimCLRObjective, SimCLRLosses

    def __init__(
        self,
        encoder: nn.Module,
        objective: SimCLRObjective = SimCLRObjective(),
        views: ViewConfig = ViewConfig(),
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> None:
        super().__init__(encoder, objective, Attack(steps=0), views, memory_format)

    def augment(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Two strong views."""
        return strong_views(check_pairs(images), self.views)

    def losses(self, views: tuple[Tensor, Tensor], labels: Tensor | None = None) -> SimCLRLosses:
        """The step after the augmentations."""
        return SimCLRLosses(self.contrast(self.project(views, "clean")))

    def pictures(self, images: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        """Both views."""
        return dict(zip(("strong1", "strong2"), self.augment(images), strict=True))
