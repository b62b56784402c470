"""Adversarial training on pseudo-labels alone: AdvCL's second term by itself, attacked as in supervised adversarial training.

No contrastive term, one batch norm, few attack steps, the network in evaluation mode during the attack ("Bag of Tricks for
Adversarial Training", arXiv 2010.00467). The trainer's averaged weights (`ema_decay`) belong to it.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from advcl_hub.attacks import uniform_start
from advcl_hub.models.folding import FoldedCopy
from advcl_hub.pretraining.heads import PseudoLabelHeads
from advcl_hub.pretraining.losses import pseudo_label_loss
from advcl_hub.pretraining.method import Attack, Method, Objective, constant_parameters
from advcl_hub.pretraining.pseudo_labels import PAPER_KS
from advcl_hub.pretraining.views import ViewConfig, weak_view_of


@dataclass(frozen=True)
class PseudoLabelATObjective(Objective):
    """Adversarial training on pseudo-labels has no settings of its own."""

    uses_labels = True
    attacks_in_evaluation = True


class PseudoLabelATLosses(NamedTuple):
    """Scalars of one step: `total` is the cross-entropy, averaged over the clusterings."""

    total: Tensor


class PseudoLabelAT(Method):
    """PGD adversarial training (arXiv 1706.06083) on the pseudo-labels of several clusterings, from any weights.

        network = PseudoLabelAT(timm.create_model("resnet18_cifar", num_classes=0))
        network(images, labels).total.backward()  # uint8 (N, 3, 32, 32), int64 (N, 5)

    Args:
        encoder, objective, attack, views, memory_format: see `Method`. The attack has two steps of 5/255 by default; of the
            views only the weak one is made.
        ks: numbers of clusters of the pseudo-labels, one linear head each.

    Raises:
        ValueError: the encoder has a classifier, or `ks` are no numbers of clusters.
    """

    Objective, Losses = PseudoLabelATObjective, PseudoLabelATLosses
    default_attack = Attack(step_size=5 / 255, steps=2)

    def __init__(
        self,
        encoder: nn.Module,
        objective: PseudoLabelATObjective = PseudoLabelATObjective(),
        attack: Attack = default_attack,
        views: ViewConfig = ViewConfig(),
        ks: tuple[int, ...] = PAPER_KS,
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> None:
        super().__init__(encoder, objective, attack, views, memory_format)
        self.heads = PseudoLabelHeads(self.dim, ks)
        self.attack_copy = FoldedCopy(self.encoder, "adv")

    def augment(self, images: Tensor) -> Tensor:
        """The weak view."""
        return weak_view_of(images, self.views)

    def losses(self, views: Tensor, labels: Tensor | None = None) -> PseudoLabelATLosses:
        """The step after the augmentation, of weak views (N, C, H, W)."""
        labels = self.heads.check(labels, len(views))
        logits = self.heads(self.features(self.perturb(views, labels), "adv"))
        return PseudoLabelATLosses(pseudo_label_loss(logits, labels))

    def perturb(self, images: Tensor, labels: Tensor) -> Tensor:
        """Adversarial images, which raise the loss as the network computes it in evaluation mode."""
        self.attack_copy.refresh(self.encoder)

        def loss(x: Tensor) -> Tensor:
            return pseudo_label_loss(self.heads(self.attack_copy(self.inputs(x))), labels, reduction="sum")

        with constant_parameters(self.heads):
            return self.attack.run(loss, images, uniform_start(images, self.attack.eps))

    def pictures(self, images: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        """The weak view and the adversarial one."""
        weak = self.augment(images)
        return {"weak": weak, "adversarial": self.perturb(weak, self.heads.check(labels, len(images)))}
