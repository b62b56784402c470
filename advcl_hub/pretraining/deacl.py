"""DeACL: a clean self-supervised teacher is distilled into a robust student ("Decoupled Adversarial Contrastive Learning for
Self-supervised Adversarial Robustness", ECCV 2022, arXiv 2207.10899).
"""

import copy
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from advcl_hub.attacks import uniform_start
from advcl_hub.models.companion import Companion
from advcl_hub.models.folding import FoldedCopy
from advcl_hub.pretraining.losses import cosine_similarity
from advcl_hub.pretraining.method import Attack, Method, Objective
from advcl_hub.pretraining.views import ViewConfig, weak_view_of


@dataclass(frozen=True)
class DeACLObjective(Objective):
    """Settings of DeACL's loss.

    Attributes:
        robust_weight: weight of the term that draws adversarial to clean features (2 in the published code).
    """

    robust_weight: float = 2.0

    needs_start = True
    attacks_in_evaluation = True

    def __post_init__(self) -> None:
        if not 0 <= self.robust_weight < float("inf"):
            raise ValueError(f"robust_weight must not be negative or infinite, got {self.robust_weight}")


class DeACLLosses(NamedTuple):
    """Scalars of one step, both terms negative cosines; `total = distillation + robust_weight * robustness`."""

    total: Tensor
    distillation: Tensor
    robustness: Tensor


class DeACL(Method):
    """A robust student that starts from the weights of a clean teacher, on backbone features, without projection head.

        network = DeACL(timm.create_model("local-dir:runs/simclr/export", pretrained=True, num_classes=0))
        losses = network(images)  # uint8 (N, 3, 32, 32)
        losses.total.backward()

    For student s, teacher t, a weak view x and its adversarial version x':

        loss = -cos(s(x), t(x)) - robust_weight * cos(s(x'), s(x)),    x' lowers cos(s(x'), t(x))

    Clean and adversarial images pass through the student as one batch, so that its batch norms see both. During the attack the
    student is in evaluation mode: `attack_copy`, with folded batch norms, refreshed in every step, the same up to rounding.

    Args:
        encoder: a clean encoder, a timm model. A copy of it stays as the teacher; the encoder itself is trained, as the
            student. It may want normalised images: the attack counts in pixels all the same.
        objective, attack, views, memory_format: see `Method`. Of the views DeACL takes the weak one only.

    Raises:
        ValueError: the encoder has a classifier.
    """

    Objective, Losses = DeACLObjective, DeACLLosses

    def __init__(
        self,
        encoder: nn.Module,
        objective: DeACLObjective = DeACLObjective(),
        attack: Attack = Attack(),
        views: ViewConfig = ViewConfig(),
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> None:
        teacher = copy.deepcopy(encoder)
        super().__init__(encoder, objective, attack, views, memory_format)
        self.teacher = Companion(teacher)
        self.attack_copy = FoldedCopy(self.encoder, "adv")

    def augment(self, images: Tensor) -> Tensor:
        """The weak view."""
        return weak_view_of(images, self.views)

    def losses(self, views: Tensor, labels: Tensor | None = None) -> DeACLLosses:
        """The step after the augmentation, of weak views (N, C, H, W)."""
        with torch.no_grad():
            target = self.teacher(self.inputs(views))
        adversarial = self.perturb(views, target)
        clean, robust = self.features(torch.cat([views, adversarial]), "adv").chunk(2)
        distillation = -cosine_similarity(clean, target).mean()
        robustness = -cosine_similarity(robust, clean).mean()
        total = distillation + self.objective.robust_weight * robustness
        return DeACLLosses(total, distillation.detach(), robustness.detach())

    def perturb(self, images: Tensor, target: Tensor) -> Tensor:
        """Adversarial images, whose features move away from the target (N, dim); the student is in evaluation mode."""
        self.attack_copy.refresh(self.encoder)

        def loss(x: Tensor) -> Tensor:
            return -cosine_similarity(self.attack_copy(self.inputs(x)), target).sum()

        return self.attack.run(loss, images, uniform_start(images, self.attack.eps))

    def pictures(self, images: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        """The weak view and the adversarial one."""
        weak = self.augment(images)
        with torch.no_grad():
            target = self.teacher(self.inputs(weak))
        return {"weak": weak, "adversarial": self.perturb(weak, target)}
