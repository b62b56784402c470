"""ProFeAT: DeACL with the teacher's projection head in the student ("ProFeAT: Projected Feature Adversarial Training for
Self-Supervised Learning of Robust Representations", arXiv 2406.05796).
"""

import copy
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torchvision.transforms import v2

from advcl_hub.attacks import uniform_start
from advcl_hub.models.companion import Companion
from advcl_hub.models.folding import FoldedCopy
from advcl_hub.pretraining.losses import cosine_similarity
from advcl_hub.pretraining.method import Attack, Method, Objective
from advcl_hub.pretraining.views import ViewConfig, weak_view_of


@dataclass(frozen=True)
class ProFeATObjective(Objective):
    """Settings of ProFeAT's loss.

    Attributes:
        robust_weight: weight beta of the robust terms (8 in the published recipe).
        projector_weight: share of the terms on projections, in [0, 1]; those on features have the rest.
        autoaugment: whether the student's view is changed by AutoAugment's policy for CIFAR-10 (arXiv 1805.09501) before crop
            and flip, as published; the teacher's never is.
    """

    robust_weight: float = 8.0
    projector_weight: float = 0.5
    autoaugment: bool = True

    needs_start = True
    needs_projector = True
    attacks_in_evaluation = True

    def __post_init__(self) -> None:
        if not 0 <= self.robust_weight < float("inf"):
            raise ValueError(f"robust_weight must not be negative or infinite, got {self.robust_weight}")
        if not 0 <= self.projector_weight <= 1:
            raise ValueError(f"projector_weight must be in [0, 1], got {self.projector_weight}")


class ProFeATLosses(NamedTuple):
    """Scalars of one step, both terms weighted negative cosines; `total = distillation + robust_weight * robustness`."""

    total: Tensor
    distillation: Tensor
    robustness: Tensor


class ProFeATViews(NamedTuple):
    """Images (N, C, H, W) in [0, 1] that the student and the teacher see."""

    student: Tensor
    teacher: Tensor


class Representations(NamedTuple):
    """Features (N, dim) and their projections (N, D)."""

    features: Tensor
    projections: Tensor


class ProFeAT(Method):
    """A robust student that starts from a clean teacher, compared with it on features and through its projection head.

        from advcl_hub.hub.projector import load_projector

        teacher = timm.create_model("local-dir:runs/simclr/export", pretrained=True, num_classes=0)
        network = ProFeAT(teacher, load_projector("runs/simclr/export"))
        network(images).total.backward()  # uint8 (N, 3, 32, 32)

    With features and projections written as one, s of the student and t of the teacher, x the student's view, y the teacher's:

        loss = -cos(s(x), t(y)) - robust_weight * cos(s(x'), s(x))

    x' moves away from the student's own clean features and from the teacher's clean projections; the attack sees a copy of the
    student in evaluation mode with folded batch norms. Clean and adversarial images pass through the student as two batches, as
    in the published code. The projection head is the teacher's and does not change. The published head has no batch norm; a
    head with one computes with its running averages.

    AutoAugment is torchvision's, one call an image: on a GPU the step waits for it.

    Args:
        encoder: a clean encoder, a timm model. A copy of it stays as the teacher; the encoder itself is trained, as the
            student.
        projector: the teacher's projection head: features (N, dim) to (N, D).
        objective, attack, views, memory_format: see `Method`. Of the views ProFeAT takes the weak one.

    Raises:
        ValueError: the encoder has a classifier, or the projection head is missing or takes features of another width.
    """

    Objective, Losses = ProFeATObjective, ProFeATLosses

    def __init__(
        self,
        encoder: nn.Module,
        projector: nn.Module | None = None,
        objective: ProFeATObjective = ProFeATObjective(),
        attack: Attack = Attack(),
        views: ViewConfig = ViewConfig(),
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> None:
        if projector is None:
            raise ValueError("ProFeAT needs the teacher's projection head: `load_projector(...)` of an export that kept it.")
        teacher = copy.deepcopy(encoder)
        super().__init__(encoder, objective, attack, views, memory_format)
        first = next(projector.parameters(), torch.empty(0, self.dim))
        if first.shape[-1] != self.dim:
            raise ValueError(f"The projection head takes {first.shape[-1]} features, the encoder has {self.dim}.")
        self.teacher = Companion(teacher)
        self.projector = Companion(copy.deepcopy(projector))
        self.attack_copy = FoldedCopy(self.encoder, "adv")
        self.autoaugment = v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10) if objective.autoaugment else None

    def augment(self, images: Tensor) -> ProFeATViews:
        """The student's and the teacher's view, each with crops and flips of its own."""
        teacher = weak_view_of(images, self.views)
        if self.autoaugment is not None:
            images = torch.stack([self.autoaugment(image) for image in images])  # torchvision draws one policy a call
        return ProFeATViews(weak_view_of(images, self.views), teacher)

    def losses(self, views: ProFeATViews, labels: Tensor | None = None) -> ProFeATLosses:
        """The step after the augmentations."""
        clean = self.represent(self.features(views.student, "adv"))
        with torch.no_grad():
            target = self.represent(self.teacher(self.inputs(views.teacher)))
        adversarial = self.perturb(views.student, Representations(clean.features.detach(), target.projections))
        robust = self.represent(self.features(adversarial, "adv"))
        distillation, robustness = -self.agreement(clean, target), -self.agreement(robust, clean)
        total = distillation + self.objective.robust_weight * robustness
        return ProFeATLosses(total, distillation.detach(), robustness.detach())

    def represent(self, features: Tensor) -> Representations:
        """Features and their projections."""
        return Representations(features, self.projector(features))

    def agreement(self, ours: Representations, others: Representations) -> Tensor:
        """The weighted mean cosine of features and of projections."""
        on_features, on_projections = (cosine_similarity(a, b).mean() for a, b in zip(ours, others, strict=True))
        weight = self.objective.projector_weight
        return (1 - weight) * on_features + weight * on_projections

    def perturb(self, images: Tensor, avoided: Representations) -> Tensor:
        """Adversarial images, whose features and projections in evaluation mode move away from those given."""
        self.attack_copy.refresh(self.encoder)

        def loss(x: Tensor) -> Tensor:
            made = self.represent(self.attack_copy(self.inputs(x)))
            return -torch.stack([cosine_similarity(a, b).sum() for a, b in zip(made, avoided, strict=True)]).sum()

        return self.attack.run(loss, images, uniform_start(images, self.attack.eps))

    def pictures(self, images: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        """Both views and the adversarial one."""
        views = self.augment(images)
        with torch.no_grad():
            target = self.represent(self.teacher(self.inputs(views.teacher)))
            clean = self.features(views.student, "adv")
        adversarial = self.perturb(views.student, Representations(clean, target.projections))
        return {**views._asdict(), "adversarial": adversarial}
