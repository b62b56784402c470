"""Parts of the step: views against transforms image by image, the contrastive loss against its dense form."""

import os
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import to_pil_image

from advcl_hub.pretraining.losses import contrastive_loss
from advcl_hub.pretraining.views import ViewConfig, high_frequency, make_views
from train.benchmark.published import supervised_contrastive_loss
from train.benchmark.report import Row, Section
from train.benchmark.timing import peak_memory, race

_DENSE_COPIES = 6  # of the matrix of all pairs, that the dense loss holds at once


class PerImage(Dataset[list[Tensor]]):
    """The four views by torchvision's transforms, image by image, as the published code makes them."""

    def __init__(self, images: Tensor, config: ViewConfig) -> None:
        self.images, self.config = [to_pil_image(image) for image in images], config
        size = images.shape[-2:]
        to_float = [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)]
        self.strong = v2.Compose(
            [
                v2.RandomResizedCrop(size, config.crop_scale),
                v2.RandomHorizontalFlip(),
                v2.RandomApply([v2.ColorJitter(*config.jitter)], config.jitter_p),
                v2.RandomGrayscale(config.grayscale_p),
                *to_float,
            ]
        )
        self.weak = v2.Compose([v2.RandomCrop(size, padding=config.padding), v2.RandomHorizontalFlip(), *to_float])

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> list[Tensor]:
        image = self.images[index]
        weak = self.weak(image)
        return [self.strong(image), self.strong(image), weak, high_frequency(weak[None], self.config.hfc_radius)[0]]


def measure_views(
    images: Tensor, batch_size: int, rounds: int, workers: Sequence[int] = (0, 2), tell: Callable[[str], None] = print
) -> Section:
    """The four views of uint8 images (N, 3, H, W): in a DataLoader on the CPU, and batch by batch where the images are."""
    config, device = ViewConfig(), images.device
    data = PerImage(images.cpu(), config)

    def per_image(count: int) -> Callable[[], None]:
        loader = DataLoader(data, batch_size, num_workers=count, persistent_workers=count > 0, pin_memory=device.type == "cuda")

        def run() -> None:
            for views in loader:
                [view.to(device, non_blocking=True) for view in views]

        return run

    def batched() -> None:
        for batch in images.split(batch_size):
            make_views(batch, config)

    contestants = {f"torchvision, {count} workers": per_image(count) for count in workers}
    times = race(contestants | {f"ours, on the {device.type}": batched}, device, rounds, tell=tell)
    rows = [Row(name, timing, len(images)) for name, timing in times.items()]
    note = f"{len(images):,} images of {images.shape[-2]}x{images.shape[-1]}, four views each, batches of {batch_size}."
    return Section("views", "Making the views", rows, note=note)


def measure_contrastive(
    sizes: Sequence[int], device: torch.device, rounds: int, tell: Callable[[str], None] = print
) -> Section:
    """Loss and gradient of four views at global batches of these sizes; the dense form as long as its matrices fit."""
    rows = []
    for n in sizes:
        views = F.normalize(torch.randn(4, n, 128, device=device), dim=2).requires_grad_()
        runs: dict[str, Callable[[], object]] = {}
        if _DENSE_COPIES * 4 * (4 * n) ** 2 < _free_memory(device) / 2:
            runs["dense"] = partial(_there_and_back, lambda v: supervised_contrastive_loss(v.transpose(0, 1)), views)
        runs["ours"] = partial(_there_and_back, contrastive_loss, views)
        tell(f"batch {n:,}")
        large = n > 2048 and device.type == "cpu"
        times = race(runs, device, 1 if large else rounds, warm_up=0 if large else 1)
        for name, run in runs.items():
            memory = peak_memory(run, device)
            rows.append(Row(f"batch {n:,}, {name}", times[name], 0, {"memory, MB": "" if memory is None else memory / 1e6}))
    note = (
        "Forward and backward, 4 views, 128 dimensions, float32; above 2,048 one measurement on a CPU. Memory: the most that "
        "is held besides the views. The dense form is left out where it would take more than half of the free memory."
    )
    return Section("contrastive", "Contrastive loss", rows, note=note, compare=False)


def _there_and_back(loss: Callable[[Tensor], Tensor], views: Tensor) -> None:
    torch.autograd.grad(loss(views), views)


def _free_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
