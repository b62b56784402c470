"""Classifiers so small that attacks on them take seconds, images that they get right, and AutoAttack in few steps."""

from typing import Any

import torch
from torch import Tensor, nn

from advcl_hub.data import ImageData
from advcl_hub.evaluation import autoattack

SIZE = 8


class TinyNet(nn.Module):
    """Two layers on (3, 8, 8), with random weights."""

    def __init__(self, classes: int = 10, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(72, classes))
        self.num_classes = classes

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


def labelled_by(model: nn.Module, n: int, wrong: int = 0, seed: int = 0, size: int = SIZE) -> ImageData:
    """Random images whose labels are the model's predictions, but for the first `wrong` ones; indices do not start at 0."""
    images = torch.randint(0, 256, (n, 3, size, size), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    with torch.no_grad():
        logits = model.eval()(images / 255)
    labels = logits.argmax(1)
    labels[:wrong] = logits[:wrong].argmin(1)
    names = tuple(f"class{i}" for i in range(logits.shape[1]))
    return ImageData(images, labels, torch.arange(n) + 1000, names, "random")


def shortened(attack: Any) -> Any:
    """An `AutoAttack` of the package, with fewer steps."""
    attack.apgd.n_iter = attack.apgd_targeted.n_iter = attack.fab.n_iter = 20
    attack.apgd.eot_iter = min(attack.apgd.eot_iter, 4)
    attack.square.n_queries = 200
    return attack


def shorten() -> None:
    """From now on this process runs AutoAttack with fewer steps."""
    build = autoattack.build
    autoattack.build = lambda measurement: shortened(build(measurement))
