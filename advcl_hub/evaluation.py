"""Standard accuracy and accuracy under PGD, measured in pixel space."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from advcl_hub.attacks import pgd
from advcl_hub.data import ImageData, batches


@dataclass(frozen=True)
class Robustness:
    """Accuracies in [0, 1] and the protocol that gave them.

    Attributes:
        standard: accuracy on the images as they are.
        robust: accuracy under `steps` PGD steps of `step_size` within `eps` (l_inf, pixels in [0, 1]), one random start.
        images: number of images.
    """

    standard: float
    robust: float
    images: int
    eps: float
    step_size: float
    steps: int
    seed: int


class PixelSpace(nn.Module):
    """A classifier of images in [0, 1]: the preprocessing of a timm model's pretrained cfg becomes part of the function.

    The perturbation budget then always counts in pixels, whatever mean and standard deviation the model wants.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        cfg = getattr(model, "pretrained_cfg", None) or {}
        self.model = model
        for name, default in (("mean", 0.0), ("std", 1.0)):
            self.register_buffer(name, torch.tensor(cfg.get(name, default)).reshape(-1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        return self.model((images - self.mean) / self.std)


def evaluate(
    model: nn.Module,
    data: ImageData,
    *,
    eps: float = 8 / 255,
    step_size: float = 2 / 255,
    steps: int = 20,
    batch_size: int = 256,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Robustness:
    """Standard and PGD accuracy of a classifier in evaluation mode; training mode is restored if it came in it.

    Args:
        model: a timm classifier; its mean and std are applied inside the attacked function.
        data: labelled images, all of which are used.
        eps, step_size: in the unit of pixels in [0, 1].
        steps: PGD steps on the cross-entropy, from one random start.
        batch_size: images at a time.
        seed: of the random start; the global torch generator is set to it.
        device: where to compute.

    Raises:
        ValueError: no images.
    """
    if not len(data):
        raise ValueError("No images to evaluate on.")
    training = model.training
    classifier = PixelSpace(model).to(device).eval()
    torch.manual_seed(seed)
    standard = robust = torch.zeros((), dtype=torch.long, device=device)
    for images, rows in batches(data, batch_size, device=device):
        images, labels = images / 255, data.labels[rows.to(data.labels.device)].to(device)
        adversarial = pgd_cross_entropy(classifier, images, labels, eps=eps, step_size=step_size, steps=steps)
        with torch.no_grad():
            standard = standard + (classifier(images).argmax(1) == labels).sum()
            robust = robust + (classifier(adversarial).argmax(1) == labels).sum()
    model.train(training)
    n = len(data)
    return Robustness(standard.item() / n, robust.item() / n, n, eps, step_size, steps, seed)


def pgd_cross_entropy(
    classifier: nn.Module, images: Tensor, labels: Tensor, *, eps: float, step_size: float, steps: int
) -> Tensor:
    """Adversarial images (N, C, H, W) that raise the cross-entropy of a classifier of images in [0, 1]."""

    def loss(x: Tensor) -> Tensor:
        return F.cross_entropy(classifier(x), labels, reduction="sum")

    return pgd(loss, images, eps=eps, step_size=step_size, steps=steps)
