"""Features that are computed once, by several processes together."""

from dataclasses import dataclass
from typing import Any

import pytest
import timm
import torch

from advcl_hub.data import load_data
from advcl_hub.finetuning.features import check_separable, extract_features
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


@pytest.mark.parametrize(("factor", "alike"), [(1.0, True), (1.01, False), (-1.0, False)])
def test_features_are_only_cached_of_a_classifier_that_is_its_head_on_them(factor: float, alike: bool) -> None:
    model, images = timm.create_model("resnet8_cifar", num_classes=3).eval(), torch.rand(2, 3, 16, 16)
    model.register_forward_hook(lambda module, inputs, logits: factor * logits)
    if alike:
        check_separable(model, images, fit=False)
    else:
        with pytest.raises(ValueError, match=r"more than a linear head on its features, .* use augment=crop-flip or another"):
            check_separable(model, images, fit=False)
