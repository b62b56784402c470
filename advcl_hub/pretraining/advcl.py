"""The AdvCL training step: views -> clean pass -> attack -> objective (arXiv 2111.01124)."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from advcl_hub.attacks import pgd, uniform_start
from advcl_hub.models.branch_norm import add_branches, without_branches
from advcl_hub.models.preprocessing import data_config
from advcl_hub.pretraining.losses import contrastive_loss, pseudo_label_loss
from advcl_hub.pretraining.pseudo_labels import PAPER_KS
from advcl_hub.pretraining.views import ViewConfig, Views, make_views


@dataclass(frozen=True)
class Attack:
    """The perturbations made in the step (AdvCL section 4); `eps` and `step_size` in the unit of images in [0, 1]."""

    eps: float = 8 / 255
    step_size: float = 2 / 255
    steps: int = 5

    def __post_init__(self) -> None:
        if min(self.eps, self.step_size, self.steps) < 0:
            raise ValueError(f"eps, step_size and steps must not be negative, got {self.eps}, {self.step_size}, {self.steps}")


@dataclass(frozen=True)
class Objective:
    """Which views meet in which loss.

    Attributes:
        clean_views: the views encoded as they are, through batch-norm branch `clean`.
        adversarial_views: the views each of which gives one adversarial view, through branch `adv`; none for plain SimCLR.
        pairing: `joint` puts clean and adversarial views into one contrastive loss (AdvCL); `separate` averages the loss of the
            clean views among themselves and the loss of the adversarial views among themselves (ACL's dual stream).
        temperature, base_temperature: see `contrastive_loss`.
        pseudo_label_weight: weight of the pseudo-label cross-entropy on an adversarial view of its own, made from the weak view
            against that loss, through branch `adv_ce`; 0 leaves it out.
        projection_dim: width of the projection head's output.
    """

    clean_views: tuple[str, ...] = ("strong1", "strong2", "high_frequency")
    adversarial_views: tuple[str, ...] = ("weak",)
    pairing: str = "joint"
    temperature: float = 0.5
    base_temperature: float = 0.07
    pseudo_label_weight: float = 0.2
    projection_dim: int = 128

    def __post_init__(self) -> None:
        for views in (self.clean_views, self.adversarial_views):
            if unknown := sorted(set(views) - set(Views._fields)):
                raise ValueError(f"no view {unknown[0]!r}; the views are {', '.join(Views._fields)}")
            if len(set(views)) < len(views):
                raise ValueError(f"every view once in a group, got {views}")
        if "high_frequency" in self.adversarial_views:
            raise ValueError("high_frequency cannot be attacked: it is signed, and the attack clamps images to [0, 1]")
        if not (self.temperature > 0 and self.base_temperature > 0 and self.projection_dim > 0):
            raise ValueError("temperature, base_temperature and projection_dim must be positive")
        if self.pseudo_label_weight < 0:
            raise ValueError(f"pseudo_label_weight must not be negative, got {self.pseudo_label_weight}")
        groups = {"joint": [self.clean_views + self.adversarial_views], "separate": [self.clean_views, self.adversarial_views]}
        if self.pairing not in groups:
            raise ValueError(f"pairing must be joint or separate, got {self.pairing!r}")
        if not self.clean_views or min(len(views) for views in groups[self.pairing]) < 2:
            raise ValueError(
                f"every contrastive loss needs at least two views, a clean one among them; got {groups[self.pairing]}"
            )

    @property
    def branches(self) -> tuple[str, ...]:
        """The batch-norm branches that this objective needs."""
        adversarial = ("adv",) if self.adversarial_views else ()
        return ("clean", *adversarial, *(("adv_ce",) if self.pseudo_label_weight else ()))

    @property
    def export_branch(self) -> str:
        """The branch to export: `adv` as the paper finetunes, or `clean` where there is no other."""
        return "adv" if self.adversarial_views else "clean"


class Losses(NamedTuple):
    """Scalars of one step; `total = contrastive + pseudo_label_weight * pseudo_label`."""

    total: Tensor
    contrastive: Tensor
    pseudo_label: Tensor


class AdvCL(nn.Module):
    """An encoder with what pretraining adds: batch-norm branches, a projection head and pseudo-label heads.

    `forward` is the whole training step up to the loss. One forward and one backward pass of this module a step means one
    gradient all-reduce a step under DistributedDataParallel, however often the encoder runs inside.

        network = AdvCL(timm.create_model("resnet18_cifar", num_classes=0))
        losses = network(images, labels)  # uint8 (N, 3, 32, 32), int64 (N, 5)
        losses.total.backward()

    Args:
        encoder: a timm model without classifier (`num_classes=0`) for images in [0, 1]; its batch norms get branches in place.
        objective, attack, views: what to do with the images; by default as the paper does.
        ks: numbers of clusters of the pseudo-labels, one linear head each; unused if `objective.pseudo_label_weight` is 0.
        memory_format: layout of the views (the caller moves the encoder).

    Raises:
        ValueError: the encoder has a classifier or wants normalised images, or the objective wants pseudo-labels and `ks` is
            empty.
    """

    def __init__(
        self,
        encoder: nn.Module,
        objective: Objective = Objective(),
        attack: Attack = Attack(),
        views: ViewConfig = ViewConfig(),
        ks: tuple[int, ...] = PAPER_KS,
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> None:
        super().__init__()
        _check(encoder, objective, ks)
        self.objective, self.attack, self.views = objective, attack, views
        self._channels_last = memory_format is torch.channels_last  # a memory_format itself cannot be pickled by torch.save
        self.encoder = encoder
        self.branch = add_branches(encoder, objective.branches)
        dim: int = getattr(encoder, "head_hidden_size", None) or encoder.num_features  # type: ignore[assignment]
        self.projector = nn.Sequential(  # its one batch norm is shared by all branches, as published
            nn.Linear(dim, dim), nn.BatchNorm1d(dim), nn.ReLU(), nn.Linear(dim, objective.projection_dim)
        )
        heads = ks if objective.pseudo_label_weight else ()
        self.heads = nn.ModuleDict({str(k): nn.Linear(dim, k) for k in heads})

    @property
    def memory_format(self) -> torch.memory_format:
        """Layout of the views."""
        return torch.channels_last if self._channels_last else torch.contiguous_format

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Losses:
        """One step's losses.

        Args:
            images: uint8 (N, C, H, W), as `advcl_hub.data.batches` yields them.
            labels: pseudo-labels, int64 (N, len(ks)); None if the objective has no use for them.

        Raises:
            ValueError: images or labels of another type or shape.
        """
        views = make_views(images, self.views)
        if len(images) < 2:
            raise ValueError("A batch of one image has nothing to contrast it with: leave out the last, incomplete batch.")
        if self.heads and labels is not None:
            expected = (len(images), len(self.heads))
            if labels.shape != expected or labels.dtype != torch.int64:
                raise ValueError(
                    f"labels are {labels.dtype} {tuple(labels.shape)}, expected torch.int64 {expected}: a pseudo-label of "
                    f"every image for each of ks = {', '.join(self.heads)}."
                )
        return self.losses(views, labels)

    def plain_encoder(self, branch: str | None = None) -> nn.Module:
        """A copy of the encoder as the timm model that it was, in evaluation mode, to finetune or to export.

        Args:
            branch: whose batch norms it gets; by default those that the paper finetunes, `objective.export_branch`.

        Raises:
            ValueError: the objective has no such branch.
        """
        return without_branches(self.encoder, branch or self.objective.export_branch).eval()

    def losses(self, views: Views, labels: Tensor | None = None) -> Losses:
        """The step after the augmentations. The random starts come from torch's global generator."""
        sources = self.sources(views)
        clean = self.clean_projections(views)  # once: constant in the attack
        adversarial = self.perturb(sources, uniform_start(sources, self.attack.eps), clean.detach(), labels)
        contrastive, pseudo_label = self.objective_terms(adversarial, clean, labels)
        total = contrastive + self.objective.pseudo_label_weight * pseudo_label
        return Losses(total, contrastive.detach(), pseudo_label.detach())

    def adversarial_views(self, views: Views, labels: Tensor | None = None) -> dict[str, Tensor]:
        """The perturbed views (N, C, H, W) by name, for pictures."""
        with torch.no_grad():
            clean = self.clean_projections(views)
        sources = self.sources(views)
        perturbed = self.perturb(sources, uniform_start(sources, self.attack.eps), clean, labels)
        names = [f"adversarial {name}" for name in self.objective.adversarial_views]
        return dict(zip([*names, *(["adversarial (labels)"] if self.heads else [])], perturbed, strict=True))

    def clean_projections(self, views: Views) -> Tensor:
        """Unit projections (V, N, D) of the clean views."""
        return self.project([getattr(views, name) for name in self.objective.clean_views], "clean")

    def sources(self, views: Views) -> Tensor:
        """The views to be perturbed, stacked (S, N, C, H, W); the last one is for the pseudo-labels, if they are used."""
        names = [*self.objective.adversarial_views, *(["weak"] if self.heads else [])]
        return torch.stack([getattr(views, name) for name in names]) if names else views.weak.new_empty(0)

    def perturb(self, sources: Tensor, start: Tensor, clean: Tensor, labels: Tensor | None) -> Tensor:
        """Attacks all sources at once: the terms share no image, so each follows its own gradient. The network trains on.

        Args:
            sources: images in [0, 1] (S, N, C, H, W), see `sources`.
            start: the first iterate, of the same shape.
            clean: unit projections (V, N, D) of the clean views, detached.
            labels: pseudo-labels (N, len(ks)).

        Returns:
            Perturbed images (S, N, C, H, W), within `attack.eps` of the sources and in [0, 1].
        """
        if not len(sources):
            return sources

        def loss(adversarial: Tensor) -> Tensor:
            return sum(self.objective_terms(adversarial, clean, labels, reduction="sum"))  # type: ignore[return-value]

        with _constant_parameters(self):
            return pgd(
                loss,
                sources,
                eps=self.attack.eps,
                step_size=self.attack.step_size,
                steps=self.attack.steps,
                start=start,
            )

    def objective_terms(
        self, adversarial: Tensor, clean: Tensor, labels: Tensor | None, reduction: str = "mean"
    ) -> tuple[Tensor, Tensor]:
        """The contrastive and the pseudo-label term of stacked adversarial views and clean projections (V, N, D)."""
        count = len(self.objective.adversarial_views)
        attacked: Tensor | list[Tensor] = self.project(adversarial[:count], "adv") if count else []
        groups = [[*clean, *attacked]] if self.objective.pairing == "joint" else [[*clean], [*attacked]]
        contrastive = torch.stack(
            [contrastive_loss(g, self.objective.temperature, self.objective.base_temperature) for g in groups]
        ).mean()
        if not self.heads:
            return contrastive, contrastive.new_zeros(())
        if labels is None:
            raise ValueError("The objective has a pseudo-label term: pass the labels of the batch.")
        return contrastive, pseudo_label_loss(self.classify(adversarial[-1], "adv_ce"), labels, reduction)

    def features(self, images: Tensor, branch: str) -> Tensor:
        """Pooled features (N, dim) of float images (N, C, H, W) through one branch."""
        with self.branch.use(branch):
            return self.encoder(images.contiguous(memory_format=self.memory_format))

    def project(self, views: list[Tensor] | Tensor, branch: str) -> Tensor:
        """Unit projections (V, N, D). Each view is a pass of its own: batch statistics are those of one view, as published."""
        projections = torch.stack([self.projector(self.features(v, branch)) for v in views])
        # Under autocast they are bfloat16: too coarse for unit length.
        return F.normalize(projections.to(torch.promote_types(projections.dtype, torch.float32)), dim=2)

    def classify(self, images: Tensor, branch: str) -> list[Tensor]:
        """Logits (N, K) of every pseudo-label head."""
        features = self.features(images, branch)
        return [head(features) for head in self.heads.values()]


def _check(encoder: nn.Module, objective: Objective, ks: tuple[int, ...]) -> None:
    """Raises ValueError for what `AdvCL` would train wrongly, or only refuse at the first step."""
    if classes := getattr(encoder, "num_classes", 0):
        raise ValueError(f"The encoder has a classifier of {classes} classes: timm.create_model(..., num_classes=0).")
    config = data_config(encoder)
    mean, std = config.get("mean", (0.0,)), config.get("std", (1.0,))
    if any(mean) or any(value != 1 for value in std):
        raise ValueError(
            f"The encoder's pretrained_cfg asks for images normalised with mean {tuple(mean)} and std {tuple(std)}; AdvCL "
            "trains on images in [0, 1], without that: timm.create_model(..., pretrained_cfg_overlay={'mean': (0, 0, 0), "
            "'std': (1, 1, 1), 'input_size': (3, H, W), 'crop_pct': 1.0})."
        )
    if not objective.pseudo_label_weight:
        return
    if not ks:
        raise ValueError("ks is empty, but the objective has a pseudo-label term: give ks, or set pseudo_label_weight to 0.")
    if len(set(ks)) < len(ks) or not all(isinstance(k, int) and k >= 2 for k in ks):
        raise ValueError(f"ks are {ks}, expected distinct numbers of clusters, each at least 2.")


@contextmanager
def _constant_parameters(module: nn.Module) -> Iterator[None]:
    """Without parameter gradients the attack keeps no activations for them, and a compiled backward does not compute them."""
    trainable = [p for p in module.parameters() if p.requires_grad]
    for p in trainable:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in trainable:
            p.requires_grad_(True)
