"""ACL's dual stream (arXiv 2010.13337): one contrastive loss of two clean views, one of their adversarial versions.

The published run has another optimizer, projection head and crop, and attacks in evaluation mode: see the recipe.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from advcl_hub.attacks import uniform_start
from advcl_hub.pretraining.contrastive import ContrastiveMethod, ContrastiveObjective, check_pairs
from advcl_hub.pretraining.method import Attack, constant_parameters
from advcl_hub.pretraining.views import ViewConfig, strong_views


@dataclass(frozen=True)
class ACLObjective(ContrastiveObjective):
    """Settings of ACL."""

    branches = ("clean", "adv")
    export_branch = "adv"


class ACLLosses(NamedTuple):
    """Scalars of one step; `total` is the mean of the other two."""

    total: Tensor
    clean: Tensor
    adversarial: Tensor


class ACL(ContrastiveMethod):
    """Adversarial contrastive learning; see `Method` for the arguments.

        network = ACL(timm.create_model("resnet18_cifar", num_classes=0))
        network(images).total.backward()  # uint8 (N, 3, 32, 32)

    Raises:
        ValueError: the encoder has a classifier, or wants normalised images.
    """

    Objective, Losses = ACLObjective, ACLLosses

    def __init__(
        self,
        encoder: nn.Module,
        objective: ACLObjective = ACLObjective(),
        attack: Attack = Attack(),
        views: ViewConfig = ViewConfig(),
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> None:
        super().__init__(encoder, objective, attack, views, memory_format)

    def augment(self, images: Tensor) -> Tensor:
        """Two strong views (2, N, C, H, W)."""
        return torch.stack(strong_views(check_pairs(images), self.views))

    def losses(self, views: Tensor, labels: Tensor | None = None) -> ACLLosses:
        """The step after the augmentations, of views (2, N, C, H, W)."""
        clean = self.contrast(self.project(views, "clean"))
        adversarial = self.contrast(self.project(self.perturb(views), "adv"))
        return ACLLosses((clean + adversarial) / 2, clean.detach(), adversarial.detach())

    def perturb(self, views: Tensor) -> Tensor:
        """Both views (2, N, C, H, W) attacked together, to part them. The network stays in training mode."""
        with constant_parameters(self):
            start = uniform_start(views, self.attack.eps)
            return self.attack.run(lambda x: self.contrast(self.project(x, "adv")), views, start)

    def pictures(self, images: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        """Both views, and the adversarial ones."""
        views = self.augment(images)
        names = ("strong1", "strong2", "adversarial strong1", "adversarial strong2")
        return dict(zip(names, [*views, *self.perturb(views)], strict=True))
