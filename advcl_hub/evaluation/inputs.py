"""What an evaluation measures on besides the images: corrupted copies of them, and a batch size that fits the memory."""

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from advcl_hub.data import ImageData, batches
from advcl_hub.data.corruptions import CORRUPTIONS, SEVERITIES, corrupt, corruption_names, read_corrupted
from advcl_hub.data.matching import some_of
from advcl_hub.errors import reason_of
from advcl_hub.evaluation.protocol import Protocol

GENERATED = "generated"  # the corruptions of advcl_hub.data.corruptions, in place of a folder's


# The four corruptions that the published sets keep for tuning: the usual mean is over the other fifteen.
_FOR_TUNING = {"gaussian_blur", "saturate", "spatter", "speckle_noise"}


class Corrupted:
    """The corrupted copies of some images, read or made one set at a time.

    Args:
        source: a folder in the layout of CIFAR-10-C, or `generated`.
        data: the clean images in memory, with the source's labels; `indices` are their positions in the clean test split.

    Raises:
        ValueError: the folder does not have that layout, does not belong to these images, or the images are streamed from disk.
        OSError: it cannot be read.
    """

    def __init__(self, source: str | Path, data: ImageData) -> None:
        self.generated = str(source) == GENERATED
        if not isinstance(data.images, Tensor):
            raise ValueError(f"Corruptions need images in memory, {data.name} is too large for that.")
        self.folder, self.clean, self.indices = Path(source), data.images.cpu(), data.indices.cpu()
        self.names = list(CORRUPTIONS) if self.generated else list(corruption_names(self.folder))
        self.averaged = [name for name in self.names if name not in _FOR_TUNING] or self.names
        if self.generated:
            self.facts = {"set": "advcl-hub's own set, not CIFAR-10-C", "names": self.names, "averaged": self.averaged}
            return
        digest = hashlib.sha256()
        for name in self.names:
            images, labels = read_corrupted(self.folder, name, SEVERITIES[-1], self.indices)
            digest.update(images.numpy().data)
        if not torch.equal(labels, data.labels.cpu()) or images.shape != self.clean.shape:
            raise ValueError(f"{source} does not hold corrupted copies of the images of {data.name} (other labels or shape).")
        self.facts = {
            "set": self.folder.name,
            "names": self.names,
            "averaged": self.averaged,
            "sha256_at_severity_5": digest.hexdigest(),
        }

    def load(self, name: str, severity: int) -> Tensor:
        """The images, uint8 (N, C, H, W)."""
        if self.generated:
            return corrupt(self.clean, name, severity, self.indices)
        return read_corrupted(self.folder, name, severity, self.indices)[0]


def first_images(data: ImageData, count: int, device: torch.device) -> Tensor:
    """The first `count` images, or all there are, on the device: (N, C, H, W), from 0 to 255."""
    count = min(count, len(data))
    ((images, _),) = batches(data, count, device=device, order=torch.arange(count))
    return images


def try_classifier(classifier: nn.Module, data: ImageData, protocol: Protocol, device: torch.device) -> int:
    """The protocol's batch size, halved until a forward and backward pass fits the device's memory.

    Raises:
        ValueError: not even a single image fits, or the outputs are no float logits for all classes.
    """
    size = min(protocol.batch_size, len(data))
    while True:
        images = first_images(data, size, device)
        try:
            with torch.enable_grad():
                x = (images / 255).requires_grad_()
                logits = classifier(x)
                _check_logits(logits, size, f"{size} images of {data.name}", data, protocol)
                attacked = protocol.attacks_with_pgd or protocol.autoattack is not None
                gradient = torch.autograd.grad(logits.sum(), x, allow_unused=True)[0] if logits.requires_grad else None
                if attacked and gradient is None:
                    raise ValueError("The model's outputs carry no gradient with respect to the images: it cannot be attacked.")
            if attacked or protocol.check_images or len(data) % size == 1:  # of a batch, one image alone may be left
                with torch.no_grad():
                    _check_logits(_of_one(classifier, x[:1]), 1, "one image alone", data, protocol)
            return size
        except torch.OutOfMemoryError:
            if size == 1:
                raise ValueError(f"Not even one image of {tuple(data.shape)} fits the memory of {device}.") from None
            size //= 2
            if device.type == "cuda":
                torch.cuda.empty_cache()
        except RuntimeError as error:
            raise ValueError(f"The model fails on images {tuple(images.shape)} of {data.name}: {error}") from error


def _of_one(classifier: nn.Module, image: Tensor) -> Any:
    """What the model gives for one image (1, C, H, W); ValueError if it fails."""
    try:
        return classifier(image)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # foreign code may raise anything
        message = "The model cannot take one image alone"
        norms = [name for name, m in classifier.named_modules() if isinstance(m, _BatchNorm) and m.running_mean is None]
        if norms:
            message += f": {', '.join(norms[:3])} normalise over the batch"
        if norms or "Expected more than 1 value per channel" in str(error):
            message += ". To be evaluated it needs batch norms with running statistics, in evaluation mode"
        raise ValueError(f"{message} ({reason_of(error)}).") from error


def _check_logits(logits: Any, size: int, images: str, data: ImageData, protocol: Protocol) -> None:
    """Raises ValueError for outputs for so many images that cannot be measured, with words for what would fail in the middle of
    the work."""
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != size or not logits.is_floating_point():
        given = f"{logits.dtype} {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"The model gives {given} for {images}, expected float logits ({size}, classes).")
    if not logits.isfinite().all():
        raise ValueError(f"The model gives outputs that are not finite for {images}: there is nothing to measure.")
    classes, largest = logits.shape[1], int(data.labels.max())
    if largest >= classes:
        raise ValueError(f"The model gives {classes} logits, {data.name} has labels up to {largest}.")
    if classes != len(data.classes):
        raise ValueError(
            f"The model gives {classes} logits and does not name its classes, {data.name} has {len(data.classes)}"
            f"{some_of(data.classes)}: which logits are theirs? Pass the timm model itself, or data that names all classes."
        )
    if protocol.loss == "dlr" and classes < 3:
        raise ValueError(f"The DLR loss needs at least 3 classes, the model has {classes}: use ce or margin.")
