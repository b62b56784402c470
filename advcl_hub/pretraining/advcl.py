"""AdvCL: views -> clean pass -> attack -> contrastive and pseudo-label loss (arXiv 2111.01124)."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from advcl_hub.attacks import uniform_start
from advcl_hub.pretraining.contrastive import ContrastiveMethod, ContrastiveObjective, check_pairs
from advcl_hub.pretraining.heads import PseudoLabelHeads
from advcl_hub.pretraining.losses import pseudo_label_loss
from advcl_hub.pretraining.method import Attack, constant_parameters
from advcl_hub.pretraining.pseudo_labels import PAPER_KS
from advcl_hub.pretraining.views import ViewConfig, Views, make_views


@dataclass(frozen=True)
class AdvCLObjective(ContrastiveObjective):
    """Settings of AdvCL's loss (section 4).

    Attributes:
        pseudo_label_weight: weight of the cross-entropy on pseudo-labels, of an adversarial view of its own; 0 leaves it out.
    """

    pseudo_label_weight: float = 0.2

    export_branch = "adv"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.pseudo_label_weight < float("inf"):
            raise ValueError(f"pseudo_label_weight must not be negative or infinite, got {self.pseudo_label_weight}")

    @property
    def uses_labels(self) -> bool:  # type: ignore[override]
        """Whether there is a pseudo-label term."""
        return self.pseudo_label_weight > 0

    @property
    def branches(self) -> tuple[str, ...]:  # type: ignore[override]
        """The batch-norm branches: clean images, and each kind of adversarial ones."""
        return ("clean", "adv", "adv_ce") if self.uses_labels else ("clean", "adv")


class AdvCLLosses(NamedTuple):
    """Scalars of one step; `total = contrastive + pseudo_label_weight * pseudo_label`."""

    total: Tensor
    contrastive: Tensor
    pseudo_label: Tensor


class AdvCL(ContrastiveMethod):
    """Four views in one contrastive loss, one of them adversarial, and pseudo-labels of a second adversarial view.

        network = AdvCL(timm.create_model("resnet18_cifar", num_classes=0))
        losses = network(images, labels)  # uint8 (N, 3, 32, 32), int64 (N, 5)
        losses.total.backward()

    Args:
        encoder, attack, views, memory_format: see `Method`.
        objective: by default the paper's.
        ks: numbers of clusters of the pseudo-labels, one linear head each; unused if `objective.pseudo_label_weight` is 0.

    Raises:
        ValueError: the encoder has a classifier or wants normalised images, or the objective wants pseudo-labels and `ks` is
            empty.
    """

    Objective, Losses = AdvCLObjective, AdvCLLosses

    def __init__(
        self,
        encoder: nn.Module,
        objective: AdvCLObjective = AdvCLObjective(),
        attack: Attack = Attack(),
        views: ViewConfig = ViewConfig(),
        ks: tuple[int, ...] = PAPER_KS,
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> None:
        super().__init__(encoder, objective, attack, views, memory_format)
        self.heads = PseudoLabelHeads(self.dim, ks) if objective.uses_labels else None

    def augment(self, images: Tensor) -> Views:
        """Two strong views, the weak and the high-frequency view."""
        return make_views(check_pairs(images), self.views)

    def losses(self, views: Views, labels: Tensor | None = None) -> AdvCLLosses:
        """The step after the augmentations."""
        if self.heads is not None:
            labels = self.heads.check(labels, len(views.weak))
        clean = self.project([views.strong1, views.strong2, views.high_frequency], "clean")  # once: constant in the attack
        sources = self.sources(views)
        adversarial = self.perturb(sources, uniform_start(sources, self.attack.eps), clean.detach(), labels)
        contrastive, pseudo_label = self.objective_terms(adversarial, clean, labels)
        total = contrastive + self.objective.pseudo_label_weight * pseudo_label
        return AdvCLLosses(total, contrastive.detach(), pseudo_label.detach())

    def sources(self, views: Views) -> Tensor:
        """The views to be perturbed (S, N, C, H, W): the weak one for each term of the loss."""
        return torch.stack([views.weak] * (1 if self.heads is None else 2))

    def perturb(self, sources: Tensor, start: Tensor, clean: Tensor, labels: Tensor | None) -> Tensor:
        """Attacks all sources at once: the terms share no image, so each follows its own gradient.

        Args:
            sources: images in [0, 1] (S, N, C, H, W), see `sources`.
            start: the first iterate, of the same shape.
            clean: unit projections (V, N, D) of the clean views, detached.
            labels: pseudo-labels (N, len(ks)).

        Returns:
            Perturbed images (S, N, C, H, W), within `attack.eps` of the sources and in [0, 1]. The network stays in training
            mode.
        """

        def loss(adversarial: Tensor) -> Tensor:
            return sum(self.objective_terms(adversarial, clean, labels, reduction="sum"))  # type: ignore[return-value]

        with constant_parameters(self):
            return self.attack.run(loss, sources, start)

    def objective_terms(
        self, adversarial: Tensor, clean: Tensor, labels: Tensor | None, reduction: str = "mean"
    ) -> tuple[Tensor, Tensor]:
        """The contrastive and the pseudo-label term of stacked adversarial views and clean projections (V, N, D)."""
        contrastive = self.contrast([*clean, *self.project(adversarial[:1], "adv")])
        if self.heads is None or labels is None:
            return contrastive, contrastive.new_zeros(())
        logits = self.heads(self.features(adversarial[1], "adv_ce"))
        return contrastive, pseudo_label_loss(logits, labels, reduction)

    def pictures(self, images: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        """All views (high frequencies around grey), and the adversarial ones."""
        views = self.augment(images)
        shown = views._asdict() | {"high_frequency": views.high_frequency + 0.5}
        with torch.no_grad():
            clean = self.project([views.strong1, views.strong2, views.high_frequency], "clean")
        sources = self.sources(views)
        perturbed = self.perturb(sources, uniform_start(sources, self.attack.eps), clean, labels)
        names = ("adversarial weak", "adversarial (labels)")[: len(sources)]
        return shown | dict(zip(names, perturbed, strict=True))
