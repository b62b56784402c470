"""What `finetune` refuses, before anything is written."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from advcl_hub.data import ImageData, load_data
from advcl_hub.finetuning import Finetuned
from tests.support.small_encoders import SMALL_VIT, export_encoder, relabelled
from tests.support.tiny_classifiers import TinyNet


def grey(data: ImageData) -> ImageData:
    assert isinstance(data.images, Tensor)
    return ImageData(data.images[:, :1], data.labels, data.indices, data.classes, data.name)


@pytest.mark.parametrize(
    ("protocol", "options", "message"),
    [
        ("slf", {"data": relabelled(torch.zeros_like, 1)}, r"mine has one class only \(0\)"),
        ("slf", {"data": relabelled(lambda y: y + 1)}, "mine has labels from 1 to 10, its 10 classes go from 0"),
        ("slf", {"data": relabelled(lambda y: y - 1)}, "mine has labels from -1 to 8"),
        ("slf", {"data": grey(load_data("fake:80"))}, "The model takes 3 channels, the images of fake:80 have 1"),
        ("slf", {"batch_size": 100}, "A batch of 100 needs as many training images; there are 80"),
        ("aff", {"batch_size": 16, "accumulate": 3}, "batch_size 16 does not divide into accumulate=3 parts"),
        ("slf", {"model": "no/such/folder"}, "neither a folder nor a model that timm knows"),
        ("slf", {"model": "resnet20_cifar"}, "resnet20_cifar has no weights"),
        ("slf", {"model": "random:resnet99"}, "neither a folder nor a model that timm knows"),
        ("slf", {"model": "random:resnet10_cifar.no"}, r"random:resnet10_cifar\.no cannot be opened: Invalid pretrained tag"),
        ("slf", {"data": "cifar11"}, "unknown data source 'cifar11'"),
        ("slf", {"shots": 9}, "9 images of every class were asked for, fake:80 has 8 of 0"),
        ("slf", {"epoch": 3}, "Unknown setting 'epoch'. Did you mean 'epochs'"),
        ("slf", {"size": 0}, "size is 0, expected a positive number of pixels"),
        ("slf", {"model": TinyNet()}, r"model is a TinyNet, expected a name or a folder: timm\.models\.save_for_hf\(model, "),
        ("slf", {"val_fraction": 0.2, "shots": 1}, "label 0 has a single image"),
    ],
)
def test_refusals_come_before_anything_is_written(
    run: Callable[..., Finetuned], tmp_path: Path, protocol: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises((ValueError, OSError), match=message):
        run(protocol, **options)
    assert not list(tmp_path.glob("run/*"))


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("resnetv2_50", {"layers": [1, 1, 1, 1], "channels": [8, 8, 8, 8], "stem_chs": 8}),  # a convolution
        ("deit_tiny_distilled_patch16_224", SMALL_VIT),  # two layers
    ],
)
def test_only_full_protocols_take_a_head_that_is_not_one_linear_layer(
    run: Callable[..., Finetuned], tmp_path: Path, name: str, arguments: dict[str, Any]
) -> None:
    encoder = export_encoder(tmp_path / "encoder", name, **arguments)
    with pytest.raises(ValueError, match="needs a model whose classifier is one Linear layer"):
        run("slf", model=encoder)
    assert run("sff", model=encoder, epochs=1).load()(torch.rand(1, 3, 16, 16)).shape == (1, 10)
