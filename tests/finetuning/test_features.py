"""Features that are computed once, by several processes together."""

from dataclasses import dataclass
from typing import Any

import timm
import torch

from advcl_hub.data import load_data
from advcl_hub.finetuning.features import extract_features
from advcl_hub.training.processes import Processes


@dataclass(frozen=True)
class Apart(Processes):
    """A process that hears nothing of the others."""

    def gather(self, part: Any) -> list[Any]:
        return [part]


def test_parts_of_all_processes_in_their_order_are_the_features_of_all_images() -> None:
    data = load_data("fake:13")
    encoder = timm.create_model("resnet8_cifar", num_classes=0).eval()
    parts = [extract_features(encoder, data, "cpu", processes=Apart(rank, 3)) for rank in range(3)]
    assert torch.allclose(torch.cat(parts), extract_features(encoder, data, "cpu"), atol=1e-5)
    assert [len(part) for part in parts] == [5, 4, 4]
