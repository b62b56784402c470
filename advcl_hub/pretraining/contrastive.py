"""What SimCLR, ACL and AdvCL share: a projection head, and images without normalisation."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from advcl_hub.pretraining.losses import contrastive_loss
from advcl_hub.pretraining.method import Attack, Method, Objective, check_headless, normalisation
from advcl_hub.pretraining.views import ViewConfig


@dataclass(frozen=True)
class ContrastiveObjective(Objective):
    """Settings of a contrastive loss.

    Attributes:
        temperature, base_temperature: see `contrastive_loss`.
        projection_dim: width of the projection head's output.
    """

    temperature: float = 0.5
    base_temperature: float = 0.07
    projection_dim: int = 128

    def __post_init__(self) -> None:
        if not (self.temperature > 0 and self.base_temperature > 0 and self.projection_dim > 0):
            raise ValueError("temperature, base_temperature and projection_dim must be positive")


class ContrastiveMethod(Method):
    """A method whose images meet in the space of a projection head.

    Args:
        encoder, objective, attack, views, memory_format: see `Method`.

    Raises:
        ValueError: the encoder has a classifier, or wants normalised images.
    """

    def __init__(
        self, encoder: nn.Module, objective: Any, attack: Attack, views: ViewConfig, memory_format: torch.memory_format
    ) -> None:
        check_headless(encoder)
        mean, std = normalisation(encoder).values()
        if any(mean) or any(value != 1 for value in std):
            raise ValueError(
                f"The encoder's pretrained_cfg asks for images normalised with mean {mean} and std {std}; "
                f"{type(self).__name__} trains on images in [0, 1] as they are. Start from an encoder of such images, or from "
                "new weights: timm.create_model(..., "
                "pretrained_cfg_overlay={'mean': (0, 0, 0), 'std': (1, 1, 1), 'input_size': (3, H, W), 'crop_pct': 1.0})."
            )
        super().__init__(encoder, objective, attack, views, memory_format)
        self.projector = nn.Sequential(  # its one batch norm is shared by all branches, as published
            nn.Linear(self.dim, self.dim), nn.BatchNorm1d(self.dim), nn.ReLU(), nn.Linear(self.dim, objective.projection_dim)
        )

    def project(self, views: Sequence[Tensor] | Tensor, branch: str) -> Tensor:
        """Unit projections (V, N, D). Each view is a pass of its own: batch statistics are those of one view, as published."""
        projections = torch.stack([self.projector(self.features(v, branch)) for v in views])
        # Under autocast they are bfloat16: too coarse for unit length.
        return F.normalize(projections.to(torch.promote_types(projections.dtype, torch.float32)), dim=2)

    def contrast(self, projections: Sequence[Tensor] | Tensor) -> Tensor:
        """The contrastive loss of unit projections (V, N, D), at the objective's temperature."""
        return contrastive_loss(projections, self.objective.temperature, self.objective.base_temperature)


def check_pairs(images: Tensor) -> Tensor:
    """The images. Raises ValueError for a batch of one: there is nothing to contrast it with."""
    if len(images) == 1:
        raise ValueError("A batch of one image has nothing to contrast it with: leave out the last, incomplete batch.")
    return images
