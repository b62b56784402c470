"""ResNets with other stems: padded by 2 pixels, as in solo-learn and DeACL, and of stride 2."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import nn

import advcl_hub  # noqa: F401
from advcl_hub.hub.export import export_folder
from tests.models.test_models import randomise

NARROW = (8, 16, 24, 32)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18_cifar", "resnet50_cifar"])
def test_stem_padding_gives_the_networks_of_solo_learn(name: str) -> None:
    """torchvision's ResNet with the stem that solo-learn puts into it; by default the padding stays 1."""
    theirs = getattr(torchvision.models, name.removesuffix("_cifar"))(num_classes=10)
    theirs.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=2, bias=False)
    theirs.maxpool = nn.Identity()
    theirs.eval().double()
    images = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    ours, usual = timm.create_model(name, stem_padding=2).eval(), timm.create_model(name).eval()
    weights = randomise(ours)
    theirs.load_state_dict(weights)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(images), rtol=1e-9, atol=1e-9)
        usual.double().load_state_dict(weights)
        assert not torch.allclose(usual(images), theirs(images), rtol=0.01)


@pytest.mark.parametrize("size", [(32, 32), (64, 48)])
def test_feature_maps_behind_a_padded_stem(size: tuple[int, int]) -> None:
    """Those of an image that is 2 pixels larger, at the reductions that `feature_info` tells."""
    name, images = "resnet18_cifar", torch.rand(2, 3, *size)
    torch.manual_seed(0)
    features = timm.create_model(name, stem_padding=2, channels=NARROW, features_only=True).eval()
    levels = features(images)
    assert features.feature_info.reduction() == [1, 1, 2, 4, 8]
    expected = [tuple(math.ceil((side + 2) / reduction) for side in size) for reduction in features.feature_info.reduction()]
    assert [tuple(level.shape[-2:]) for level in levels] == expected
    assert [level.shape[1] for level in levels] == features.feature_info.channels()
    torch.manual_seed(0)  # the same weights again
    model = timm.create_model(name, stem_padding=2, channels=NARROW).eval()
    final, intermediates = model.forward_intermediates(images)
    torch.testing.assert_close(intermediates, levels)
    torch.testing.assert_close(final, model.forward_features(images))


@pytest.mark.parametrize("size", [(32, 32), (64, 48), (33, 31)])
@pytest.mark.parametrize(
    ("name", "channels", "reductions"),
    [("resnet8_cifar", NARROW[:3], [2, 2, 4, 8]), ("resnet18_cifar", NARROW, [2, 2, 4, 8, 16])],
)
def test_a_stem_of_stride_2_is_the_same_network_on_half_as_many_rows(
    name: str, channels: tuple[int, ...], reductions: list[int], size: tuple[int, int]
) -> None:
    """Its stem takes every second output of the stem of stride 1, and `feature_info` counts from there."""
    model, usual = (timm.create_model(name, channels=channels, stem_stride=stride).eval() for stride in (2, 1))
    usual.double().load_state_dict(randomise(model))
    images = torch.rand(2, 3, *size, dtype=torch.float64)
    with torch.no_grad():
        stem = usual.act1(usual.bn1(usual.conv1(images)))[..., ::2, ::2]
        expected = usual.fc(usual.global_pool(usual.layer4(usual.layer3(usual.layer2(usual.layer1(stem))))))
        torch.testing.assert_close(model(images), expected)
    features = timm.create_model(name, channels=channels, stem_stride=2, features_only=True).eval()
    assert features.feature_info.reduction() == reductions
    maps = [tuple(level.shape[-2:]) for level in features(images.float())]
    assert maps == [tuple(math.ceil(side / reduction) for side in size) for reduction in reductions]
    dilated = timm.create_model(name, channels=channels, stem_stride=2, features_only=True, output_stride=4)
    assert max(dilated.feature_info.reduction()) == 4 and dilated(images.float())[-1].shape[-1] == math.ceil(size[1] / 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"stem_stride": 3}, "stem_stride=3: expected 1 or 2"),
        ({"stem_stride": True}, "stem_stride=True: expected 1 or 2"),
        ({"stem_stride": 2, "output_stride": 2}, r"output_stride=2: expected 4, 8 or 16 \(the stem has stride 2\)"),
        ({"output_stride": 16}, r"output_stride=16: expected 2, 4 or 8 \(the stem has stride 1\)"),
    ],
)
def test_other_strides_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        timm.create_model("resnet8_cifar", **arguments)


@pytest.mark.parametrize("padding", [0, 3, -1, True, 2.0, "2"])
def test_other_stem_paddings_are_refused(padding: Any) -> None:
    with pytest.raises(ValueError, match=r"stem_padding=.*: expected 1 \(most codes\) or 2 \(solo-learn, DeACL\)"):
        timm.create_model("resnet8_cifar", stem_padding=padding)


def test_an_export_keeps_the_padding_of_the_stem(tmp_path: Path) -> None:
    model_args = {"stem_padding": 2, "channels": NARROW}
    model = timm.create_model("resnet18_cifar", **model_args)
    randomise(model)
    model.float().eval()
    export_folder(model, tmp_path / "export", results={}, model_args=model_args)
    config = json.loads((tmp_path / "export" / "config.json").read_text(encoding="utf-8"))
    assert config["model_args"]["stem_padding"] == 2
    assert config["pretrained_cfg"]["pool_size"] == [5, 5]
    reloaded = timm.create_model(f"local-dir:{tmp_path / 'export'}", pretrained=True).eval()
    images = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(reloaded(images), model(images))
