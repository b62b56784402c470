"""Clean and PGD accuracy for use while training: the figures of `evaluate` without checks, record and files."""

from dataclasses import dataclass

import torch
from torch import nn

from advcl_hub.data import ImageData
from advcl_hub.evaluation.acceleration import TRIAL, accelerated
from advcl_hub.evaluation.borrowing import borrowed, check_computes
from advcl_hub.evaluation.inputs import first_images
from advcl_hub.evaluation.journal import Journal
from advcl_hub.evaluation.measure import Measurement
from advcl_hub.evaluation.protocol import Protocol
from advcl_hub.models.pixel_space import PixelSpace
from advcl_hub.modes import as_usual
from advcl_hub.training.processes import ALONE


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


@as_usual()
def robustness(
    model: nn.Module,
    data: ImageData,
    *,
    eps: float = 8 / 255,
    step_size: float = 2 / 255,
    steps: int = 20,
    batch_size: int = 250,
    seed: int = 0,
    device: torch.device | str = "cpu",
    fit: bool = False,
) -> Robustness:
    """The figures that `evaluate` gives for clean images and PGD on the cross-entropy in l_inf, and nothing else.

    Args:
        model: a timm classifier; its mean and std are applied inside the attacked function. It comes back as and where it was.
        data: labelled images, all of which are used.
        eps, step_size, steps, seed: see `Protocol`.
        batch_size: images at a time; it does not change the result.
        device: where to compute.
        fit: see `PixelSpace`; `evaluate` does it.

    Raises:
        ValueError: no images.
    """
    if not len(data):
        raise ValueError("No images to evaluate on.")
    protocol = Protocol(eps=eps, step_size=step_size, steps=steps, batch_size=batch_size, seed=seed)
    original, device = PixelSpace(model, fit=fit), torch.device(device)
    check_computes(original.model)
    with borrowed(original, device):
        classifier = accelerated(original, first_images(data, min(TRIAL, batch_size), device) / 255, protocol)
        measurement = Measurement(classifier, data, protocol, Journal(None, {}, ALONE), device, progress=False)
        right = [p for p, correct in enumerate(measurement.clean()["correct"]) if correct]
        survive = sum(r < 0 for r in measurement.pgd("pgd", right, protocol).get("restart", []))
    n = len(data)
    return Robustness(len(right) / n, survive / n, n, eps, step_size, steps, seed)
