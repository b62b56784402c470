"""Clean and PGD accuracy, and the attacked images, without checks, record and files: for use while training."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from advcl_hub.data import ImageData
from advcl_hub.data.matching import check_fits
from advcl_hub.evaluation.acceleration import TRIAL, accelerated
from advcl_hub.evaluation.borrowing import borrowed, check_computes
from advcl_hub.evaluation.inputs import first_images
from advcl_hub.evaluation.journal import Journal
from advcl_hub.evaluation.measure import Measurement
from advcl_hub.evaluation.protocol import Protocol
from advcl_hub.models.pixel_space import PixelSpace, unwrapped
from advcl_hub.modes import as_usual
from advcl_hub.training.processes import ALONE, choose


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
    protocol = Protocol(eps=eps, step_size=step_size, steps=steps, batch_size=batch_size, seed=seed)
    with _measurement(model, data, protocol, device, fit) as measurement:
        right = [p for p, correct in enumerate(measurement.clean()["correct"]) if correct]
        survive = sum(r < 0 for r in measurement.pgd("pgd", right, protocol).get("restart", []))
    n = len(data)
    return Robustness(len(right) / n, survive / n, n, eps, step_size, steps, seed)


@as_usual()
def adversarial_images(
    model: nn.Module, data: ImageData, protocol: Protocol, *, device: torch.device | str = "cpu", fit: bool = False
) -> Tensor:
    """The images that PGD makes of the data when `robustness` or `evaluate` measures.

    The random starts belong to the seed and the image (`ImageData.indices`): a picture of some images shows what was measured
    on all of them. Attacked in other batches, an image differs by the rounding of float32. Labels are taken as they are, where
    `evaluate` numbers them as the model names its classes.

    Args:
        model, data, device, fit: see `robustness`.
        protocol: how to attack; of several restarts the first is made. Without steps or eps the images stay as they are.

    Returns:
        Images float (N, C, H, W) in [0, 1], on the CPU.

    Raises:
        ValueError: no images, images without a label, classes that the model does not have, or no such device.
    """
    check_fits(unwrapped(model), data)
    found = []
    with _measurement(model, data, protocol, choose(device), fit) as measurement:
        for start in range(0, len(data), protocol.batch_size):
            positions = list(range(start, min(start + protocol.batch_size, len(data))))
            images, labels = measurement.load(positions)
            indices = [measurement.indices[p] for p in positions]
            if protocol.attacks_with_pgd:
                images = measurement.adversarial(images, labels, indices, protocol, restart=0)
            found.append(images.cpu())
    return torch.cat(found)


@contextmanager
def _measurement(
    model: nn.Module, data: ImageData, protocol: Protocol, device: torch.device | str, fit: bool
) -> Iterator[Measurement]:
    """The model borrowed for measurements that leave no files."""
    if not len(data):
        raise ValueError("No images to evaluate on.")
    original, device = PixelSpace(model, fit=fit, precision=protocol.precision), torch.device(device)
    check_computes(original.model)
    with borrowed(original, device):
        classifier = accelerated(original, first_images(data, min(TRIAL, protocol.batch_size), device) / 255, protocol)
        yield Measurement(classifier, data, protocol, Journal(None, {}, ALONE), device, progress=False)
