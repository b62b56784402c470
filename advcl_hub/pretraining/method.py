"""What all pretraining methods share: the encoder with its batch-norm branches, the attack, and the way out as a timm model."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from advcl_hub.attacks import pgd
from advcl_hub.models.branch_norm import add_branches, without_branches
from advcl_hub.models.companion import Companion
from advcl_hub.models.preprocessing import data_config
from advcl_hub.pretraining.views import ViewConfig


@dataclass(frozen=True)
class Attack:
    """The perturbations made in a step, l_inf; `eps` and `step_size` in the unit of images in [0, 1].

    The defaults are those of AdvCL (arXiv 2111.01124, section 4), ACL and DeACL.
    """

    eps: float = 8 / 255
    step_size: float = 2 / 255
    steps: int = 5

    def __post_init__(self) -> None:
        if not all(0 <= value < float("inf") for value in (self.eps, self.step_size, self.steps)):
            raise ValueError(
                f"eps, step_size and steps must not be negative or infinite, got {self.eps}, {self.step_size}, {self.steps}"
            )

    def run(self, loss: Callable[[Tensor], Tensor], images: Tensor, start: Tensor) -> Tensor:
        """PGD from `start` around `images` (..., C, H, W); `loss` is a sum over the images. See `advcl_hub.attacks.pgd`."""
        return pgd(loss, images, eps=self.eps, step_size=self.step_size, steps=self.steps, start=start)


@dataclass(frozen=True)
class Objective:
    """Settings of a method's loss; each method has a subclass of its own. These are facts about the method:

    Attributes:
        branches: names of the batch-norm branches.
        export_branch: the one that is finetuned and exported.
        uses_labels: whether the step takes pseudo-labels.
        needs_start: whether the encoder must start from trained weights.
        needs_projector: whether the method takes the projection head that belongs to these.
        attacks_in_evaluation: whether the running averages of the batch norms decide the attack. Then several processes have to
            begin each step with the same.
    """

    branches: ClassVar[tuple[str, ...]] = ("adv",)
    export_branch: ClassVar[str] = "adv"
    uses_labels: ClassVar[bool] = False
    needs_start: ClassVar[bool] = False
    needs_projector: ClassVar[bool] = False
    attacks_in_evaluation: ClassVar[bool] = False


class Method(nn.Module, ABC):
    """A pretraining method: an encoder, what the method adds to it, and a forward that is the whole training step.

    One forward and one backward pass of the module a step mean one gradient all-reduce a step under DistributedDataParallel,
    however often the encoder runs inside. A loop needs to know no more of a method than this:

        losses = method(images, labels)     # uint8 (N, C, H, W); int64 (N, len(ks)), or None where no labels are used
        losses.total.backward()

    A subclass has an `Objective` with its settings, `Losses`, a NamedTuple of scalars whose first is `total`, and perhaps
    another `default_attack`; it writes `augment`, `losses` and `pictures`. Networks beside the encoder, such as a teacher, are
    Companions, which are in no state dict: to continue, open the weights that the method started from again, make the method
    from them, then load the state.

    Args:
        encoder: a timm model without classifier (`num_classes=0`). It is trained itself, not a copy: its batch norms get
            branches in place, and it comes into training mode.
        objective: the method's settings.
        attack: the perturbations of the step.
        views: strengths of the augmentations.
        memory_format: layout of the images inside (the caller moves the encoder).

    Raises:
        ValueError: the encoder has a classifier.
    """

    Objective: ClassVar[Any]  # a subclass of `Objective` above
    Losses: ClassVar[Any]
    objective: Any
    default_attack: ClassVar[Attack] = Attack()
    mean: Tensor | None
    std: Tensor | None

    def __init__(
        self, encoder: nn.Module, objective: Any, attack: Attack, views: ViewConfig, memory_format: torch.memory_format
    ) -> None:
        super().__init__()
        check_headless(encoder)
        if type(objective) is not self.Objective:
            raise ValueError(f"{type(self).__name__} takes a {self.Objective.__name__}, got {objective!r}.")
        self.objective, self.attack, self.views = objective, attack, views
        self._channels_last = memory_format is torch.channels_last  # a memory_format itself cannot be pickled by torch.save
        for name, values in normalisation(encoder).items():
            plain = all(value == (name == "std") for value in values)
            self.register_buffer(name, None if plain else torch.tensor(values).reshape(-1, 1, 1), persistent=False)
        self.encoder = encoder.train()  # one that was opened to be used is in evaluation mode
        self.dim: int = getattr(encoder, "head_hidden_size", None) or encoder.num_features  # type: ignore[assignment]
        self.branch = add_branches(encoder, objective.branches)

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Any:
        """One step's losses: augments the images, then `losses`.

        Args:
            images: uint8 (N, C, H, W), as `advcl_hub.data.batches` yields them.
            labels: pseudo-labels, int64 (N, len(ks)); None if the method has no use for them.

        Raises:
            ValueError: images or labels of another type or shape, or a batch that is too small.
        """
        return self.losses(self.augment(images), labels)

    @abstractmethod
    def augment(self, images: Tensor) -> Any:
        """The float views of uint8 images (N, C, H, W) that the step takes. Raises ValueError for other images."""

    @abstractmethod
    def losses(self, views: Any, labels: Tensor | None = None) -> Any:
        """The step after the augmentations. Random starts come from torch's global generator."""

    @abstractmethod
    def pictures(self, images: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        """What the network is trained on, to look at: views of uint8 images by name, each (N, C, H, W) in [0, 1]."""

    @property
    def memory_format(self) -> torch.memory_format:
        """Layout of the images inside."""
        return torch.channels_last if self._channels_last else torch.contiguous_format

    @property
    def networks(self) -> list[nn.Module]:
        """The networks of a step: the encoder and those beside it. To compile, for example."""
        return [self.encoder, *(module for module in self.modules() if isinstance(module, Companion))]

    def inputs(self, images: Tensor) -> Tensor:
        """Images (N, C, H, W) in [0, 1] as the encoder takes them: normalised by its pretrained cfg, in `memory_format`."""
        if self.mean is not None:
            images = images - self.mean
        if self.std is not None:
            images = images / self.std
        return images.contiguous(memory_format=self.memory_format)

    def features(self, images: Tensor, branch: str) -> Tensor:
        """Pooled features (N, dim) of images in [0, 1] (N, C, H, W) through one branch."""
        with self.branch.use(branch):
            return self.encoder(self.inputs(images))

    def plain_encoder(self, branch: str | None = None) -> nn.Module:
        """A copy of the encoder as the timm model that it was, in evaluation mode, to finetune or to export.

        Args:
            branch: whose batch norms it gets; by default those that are finetuned, `objective.export_branch`.

        Raises:
            ValueError: the method has no such branch.
        """
        return without_branches(self.encoder, branch or self.objective.export_branch).eval()


def check_headless(encoder: nn.Module) -> None:
    """Raises ValueError if the encoder has a classifier."""
    if classes := getattr(encoder, "num_classes", 0):
        raise ValueError(f"The encoder has a classifier of {classes} classes: timm.create_model(..., num_classes=0).")


def normalisation(encoder: nn.Module) -> dict[str, tuple[float, ...]]:
    """`mean` and `std` of a timm model's pretrained cfg, one value a channel; 0 and 1 if it names none."""
    config = data_config(encoder)
    return {name: tuple(config.get(name, (default,))) for name, default in (("mean", 0.0), ("std", 1.0))}


@contextmanager
def constant_parameters(module: nn.Module) -> Iterator[None]:
    """Without parameter gradients the attack keeps no activations for them, and a compiled backward does not compute them."""
    trainable = [p for p in module.parameters() if p.requires_grad]
    for p in trainable:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in trainable:
            p.requires_grad_(True)
