"""Features of a frozen encoder, computed once for all images, by all processes together."""

import torch
from torch import Tensor, nn

from advcl_hub.data import ImageData, batches
from advcl_hub.finetuning.encoder import Headless, linear_head
from advcl_hub.models.pixel_space import PixelSpace
from advcl_hub.training.processes import ALONE, Processes
from advcl_hub.training.progress import progress_bar


@torch.no_grad()
def extract_features(
    encoder: nn.Module,
    data: ImageData,
    device: torch.device | str,
    *,
    batch_size: int = 500,
    fit: bool = False,
    precision: str = "float32",
    processes: Processes = ALONE,
    workers: int = 0,
    progress: bool = False,
) -> Tensor:
    """Features (N, D) of all images under the encoder's own preprocessing, in evaluation mode, without augmentation.

    Args:
        encoder: a timm model without classifier, or `Headless`.
        data: N images.
        device: where to compute, and where the features lie.
        batch_size: images at a time.
        fit, precision: see `PixelSpace`.
        processes: who shares the work; each gets all features.
        workers: processes that decode lazy images.
        progress: show a bar with the time left.
    """
    network = PixelSpace(encoder, fit=fit, precision=precision).to(device).eval()
    mine = torch.arange(len(data)).tensor_split(processes.count)[processes.rank]
    bar = progress_bar(total=len(mine), unit="image", desc="features", disable=not (progress and processes.rank == 0))
    found = []
    for images, _ in batches(data, batch_size, device=device, order=mine, workers=workers):
        found.append(network(images / 255))
        bar.update(len(images))
    bar.close()
    part = torch.cat(found) if found else None
    parts = [p for p in processes.gather(part if part is None or processes.count == 1 else part.cpu()) if p is not None]
    return torch.cat(parts).to(device)


@torch.no_grad()
def check_separable(model: nn.Module, images: Tensor, *, fit: bool) -> None:
    """Raises ValueError unless a classifier is its head on its features, as cached features assume.

    Args:
        model: in evaluation mode, its head not zero.
        images: float (N, C, H, W) in [0, 1].
        fit: see `PixelSpace`.
    """
    logits, features = (PixelSpace(m, fit=fit).to(images.device).eval()(images) for m in (model, Headless(model)))
    alone = linear_head(model)(features)
    if alone.shape != logits.shape or not torch.allclose(alone, logits, rtol=1e-4, atol=1e-5 * float(logits.abs().max())):
        raise ValueError(
            "This architecture is more than a linear head on its features, so these cannot be computed once: "
            "use augment=crop-flip or another augmentation than none."
        )
