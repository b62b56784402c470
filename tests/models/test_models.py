"""The architectures: sizes and outputs of the literature, and everything a timm user does with a model."""

import importlib.util
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.data.config import resolve_data_config
from timm.layers.drop import DropPath
from timm.models import model_entrypoint, save_for_hf
from torch import Tensor, nn

import advcl_hub.models

PARAMETERS = {
    "resnet8_cifar": 78_042,
    "resnet20_cifar": 272_474,
    "resnet10_cifar": 1_228_970,
    "resnet18_cifar": 11_173_962,
    "resnet34_cifar": 21_282_122,
    "resnet50_cifar": 23_520_842,
    "preact_resnet18_cifar": 11_171_146,
    "wrn28_10_cifar": 36_479_194,
    "wrn34_10_cifar": 46_160_474,
}
NAMES = list(PARAMETERS)
STEM_STRIDE = dict.fromkeys(NAMES, 1) | {"resnet10_cifar": 2}
# One small network of each class and of each number of stages.
SMALL: dict[str, dict[str, Any]] = {
    "resnet8_cifar": {},
    "resnet10_cifar": {"layers": (1, 1, 1, 1), "channels": (8, 16, 24, 32)},
    "resnet18_cifar": {"layers": (1, 1, 1, 2), "channels": (8, 16, 24, 32)},
    "preact_resnet18_cifar": {"layers": (1, 1, 1, 2), "channels": (8, 16, 24, 32), "stem_chs": 8},
    "wrn28_10_cifar": {"layers": (2, 1, 1), "channels": (16, 32, 48)},
}
small_networks = pytest.mark.parametrize("name", list(SMALL))


def create(name: str, **kwargs: Any) -> Any:
    """`timm.create_model`; to a type checker, a model that has more than `nn.Module`."""
    return timm.create_model(name, **kwargs)


def create_small(name: str, **kwargs: Any) -> Any:
    return create(name, **{**SMALL[name], **kwargs})


def randomise(model: nn.Module) -> dict[str, Tensor]:
    """Gives every weight and statistic its own value, in float64: fresh norms would hide a misplaced one."""
    generator = torch.Generator().manual_seed(0)
    model.double()
    for key, value in model.state_dict().items():
        noise = torch.randn(value.shape, generator=generator, dtype=torch.float64)
        if key.endswith("running_var"):
            value.copy_(1 + 0.5 * noise.tanh())
        elif value.ndim > 1:
            value.copy_(noise / math.sqrt(value[0].numel()))
        elif value.is_floating_point():
            value.copy_(1 + 0.3 * noise if key.endswith("weight") else 0.3 * noise)
    return {key: value.clone() for key, value in model.state_dict().items()}


class Reference:
    """The networks of the literature on plain torch functions, from timm's state dict."""

    def __init__(self, weights: dict[str, Tensor], training: bool, stem_stride: int):
        self.weights, self.training, self.stem_stride = weights, training, stem_stride

    def conv(self, x: Tensor, key: str, stride: int = 1) -> Tensor:
        weight = self.weights[f"{key}.weight"]
        return F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)

    def norm(self, x: Tensor, key: str) -> Tensor:
        mean, var, weight, bias = (self.weights[f"{key}.{leaf}"] for leaf in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(x, mean.clone(), var.clone(), weight, bias, self.training)

    def linear(self, x: Tensor, key: str) -> Tensor:
        return x.mean((2, 3)) @ self.weights[f"{key}.weight"].T + self.weights[f"{key}.bias"]

    def blocks(self, layers: tuple[int, ...], block: Callable[..., Tensor], name: str, x: Tensor) -> Tensor:
        for stage, depth in enumerate(layers):
            for index in range(depth):
                stride = 2 if stage > 0 and index == 0 else 1
                x = block(x, name.format(stage, stage + 1, index), stride)
        return x

    def post_activation(self, x: Tensor, layers: tuple[int, ...]) -> Tensor:
        """He et al. 2016 (arXiv 1512.03385), with the projection shortcuts of torchvision."""

        def block(x: Tensor, key: str, stride: int) -> Tensor:
            out = F.relu(self.norm(self.conv(x, f"{key}.conv1", stride), f"{key}.bn1"))
            out = self.norm(self.conv(out, f"{key}.conv2"), f"{key}.bn2")
            if f"{key}.downsample.0.weight" in self.weights:
                x = self.norm(self.conv(x, f"{key}.downsample.0", stride), f"{key}.downsample.1")
            return F.relu(out + x)

        x = F.relu(self.norm(self.conv(x, "conv1", self.stem_stride), "bn1"))
        return self.linear(self.blocks(layers, block, "layer{1}.{2}", x), "fc")

    def pre_activation(self, x: Tensor, layers: tuple[int, ...]) -> Tensor:
        """kuangliu's PreActResNet-18 without, Zagoruyko's Wide ResNet with a norm after the last block."""

        def block(x: Tensor, key: str, stride: int) -> Tensor:
            active = F.relu(self.norm(x, f"{key}.norm1"))
            out = F.relu(self.norm(self.conv(active, f"{key}.conv1", stride), f"{key}.norm2"))
            if f"{key}.downsample.conv.weight" in self.weights:
                x = self.conv(active, f"{key}.downsample.conv", stride)
            return self.conv(out, f"{key}.conv2") + x

        x = self.blocks(layers, block, "stages.{0}.blocks.{2}", self.conv(x, "stem.conv"))
        if "norm.weight" in self.weights:
            x = F.relu(self.norm(x, "norm"))
        return self.linear(x, "head.fc")


@pytest.mark.parametrize("name", NAMES)
def test_parameter_count_of_the_literature(name: str) -> None:
    with torch.device("meta"):
        model = create(name)
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    ("name", "model_args", "layers", "method"),
    [
        ("resnet20_cifar", {}, (3, 3, 3), "post_activation"),
        ("resnet10_cifar", {}, (1, 1, 1, 1), "post_activation"),
        ("resnet18_cifar", {}, (2, 2, 2, 2), "post_activation"),
        ("preact_resnet18_cifar", {}, (2, 2, 2, 2), "pre_activation"),
        ("preact_resnet18_cifar", {"final_norm": True}, (2, 2, 2, 2), "pre_activation"),
        ("wrn28_10_cifar", {"channels": (32, 64, 128)}, (4, 4, 4), "pre_activation"),
    ],
)
def test_outputs_of_the_literature(
    name: str, model_args: dict[str, Any], layers: tuple[int, ...], method: str, training: bool
) -> None:
    model = create(name, **model_args).train(training)
    weights = randomise(model)
    images = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    expected = getattr(Reference(weights, training, STEM_STRIDE[name]), method)(images, layers)
    torch.testing.assert_close(model(images), expected, rtol=1e-9, atol=1e-9)


def test_resnet18_has_the_state_dict_keys_of_timm_and_torchvision() -> None:
    with torch.device("meta"):
        ours = create("resnet18_cifar").state_dict()
        stock = create("resnet18").state_dict()
    assert ours.keys() == stock.keys()
    differing = {key for key in ours if ours[key].shape != stock[key].shape}
    assert differing == {"conv1.weight", "fc.weight", "fc.bias"}


def test_timm_lists_them_in_families_of_their_own() -> None:
    assert set(timm.list_models("*_cifar")) == set(NAMES)
    for name in NAMES:
        assert name in advcl_hub.models.__all__
        family = model_entrypoint(name).__module__.rsplit(".", 1)[-1]
        assert importlib.util.find_spec(f"timm.models.{family}") is None, f"timm has a family {family} too"
        assert name in timm.list_models(module=family)


@pytest.mark.parametrize("name", NAMES)
def test_configuration_is_that_of_unnormalised_cifar(name: str) -> None:
    with torch.device("meta"):
        model = create(name)
    data = resolve_data_config(model=model)
    assert (data["input_size"], data["mean"], data["std"]) == ((3, 32, 32), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    assert data["crop_pct"] == 1.0
    reduction = model.feature_info[-1]["reduction"]
    assert model.pretrained_cfg["pool_size"] == (32 // reduction, 32 // reduction)
    assert len(model.feature_info) == (5 if reduction == 8 * STEM_STRIDE[name] else 4)
    assert model.num_classes == model.pretrained_cfg["num_classes"] == 10
    assert isinstance(model.get_classifier(), nn.Linear)
    assert model.get_submodule(model.pretrained_cfg["classifier"]) is model.get_classifier()
    stem = model.get_submodule(model.pretrained_cfg["first_conv"])
    assert (stem.kernel_size, stem.stride, stem.padding) == ((3, 3), (STEM_STRIDE[name],) * 2, (1, 1))


@pytest.mark.parametrize("size", [(32, 32), (64, 48)])
@pytest.mark.parametrize("name", NAMES)
def test_feature_info_describes_the_features(name: str, size: tuple[int, int]) -> None:
    with torch.device("meta"):
        model = create(name, features_only=True)
        features = model(torch.empty(2, 3, *size))
    info = list(zip(model.feature_info.channels(), model.feature_info.reduction(), strict=True))
    assert [reduction for _, reduction in info] == [STEM_STRIDE[name] * r for r in (1, 1, 2, 4, 8)][: len(info)]
    expected = [(2, channels, size[0] // reduction, size[1] // reduction) for channels, reduction in info]
    assert [tuple(feature.shape) for feature in features] == expected


@pytest.mark.parametrize("multiple", [2, 4, 8])
@small_networks
def test_output_stride_is_counted_from_the_image(name: str, multiple: int) -> None:
    output_stride = multiple * STEM_STRIDE[name]
    model = create_small(name, features_only=True, output_stride=output_stride)
    full = create_small(name, features_only=True).feature_info.reduction()
    assert model.feature_info.reduction() == [min(reduction, output_stride) for reduction in full]
    features = model(torch.rand(1, 3, 32, 32))
    assert [32 // feature.shape[-1] for feature in features] == model.feature_info.reduction()


@pytest.mark.parametrize("wrapper", ["list", "dict", "hook", "getter"])
@small_networks
def test_every_feature_wrapper_gives_the_levels_asked_for(name: str, wrapper: str) -> None:
    images = torch.rand(2, 3, 32, 32)
    torch.manual_seed(0)
    levels = create_small(name).eval().forward_intermediates(images, intermediates_only=True)
    torch.manual_seed(0)  # the same weights again
    wrapped = create_small(name, features_only=True, feature_cls=wrapper, out_indices=(1, -1)).eval()
    features = wrapped(images)
    features = list(features.values()) if isinstance(features, dict) else features
    torch.testing.assert_close(features, [levels[1], levels[-1]])


@small_networks
def test_forward_intermediates_indices(name: str) -> None:
    images = torch.rand(2, 3, 32, 32)
    model = create_small(name).eval()
    final, levels = model.forward_intermediates(images)
    assert len(levels) == len(model.feature_info)
    torch.testing.assert_close(final, model.forward_features(images))
    for indices, expected in [(2, levels[-2:]), ([0, -1], [levels[0], levels[-1]]), ([1], levels[1:2])]:
        for stop_early in (False, True):
            taken = model.forward_intermediates(images, indices=indices, stop_early=stop_early, intermediates_only=True)
            torch.testing.assert_close(taken, expected)
    normed = model.forward_intermediates(images, indices=[-1], norm=True, intermediates_only=True)
    torch.testing.assert_close(normed, [final])


@small_networks
def test_pruning_keeps_the_levels_and_the_head(name: str) -> None:
    images = torch.rand(2, 3, 32, 32)
    reference = create_small(name).eval()
    levels = reference.forward_intermediates(images, intermediates_only=True)
    for index in range(len(levels)):
        model = create_small(name).eval()
        model.load_state_dict(reference.state_dict())
        assert model.prune_intermediate_layers([index - len(levels)], prune_norm=True) == [index]
        assert model.num_classes == 0
        torch.testing.assert_close(model.forward_features(images), levels[index])
        torch.testing.assert_close(
            model.forward_intermediates(images, indices=[index], intermediates_only=True), [levels[index]]
        )
    model = create_small(name).eval()
    model.load_state_dict(reference.state_dict())
    model.prune_intermediate_layers([-1], prune_head=False)
    torch.testing.assert_close(model(images), reference(images))


@pytest.mark.parametrize("global_pool", ["avg", "max", "avgmax", "catavgmax"])
@small_networks
def test_pooling_and_classifier(name: str, global_pool: str) -> None:
    images = torch.rand(2, 3, 32, 32)
    model = create_small(name, global_pool=global_pool).eval()
    features = model.forward_features(images)
    average, maximum = features.mean((2, 3)), features.amax((2, 3))
    pooled = {
        "avg": average,
        "max": maximum,
        "avgmax": (average + maximum) / 2,
        "catavgmax": torch.cat([average, maximum], dim=1),
    }[global_pool]
    classifier = model.get_classifier()
    torch.testing.assert_close(model(images), pooled @ classifier.weight.T + classifier.bias)
    model.reset_classifier(7, global_pool)
    assert model(images).shape == (2, 7)
    model.reset_classifier(0, global_pool)
    torch.testing.assert_close(model(images), pooled)
    model.reset_classifier(0, "")
    torch.testing.assert_close(model(images), features)
    assert create_small(name, num_classes=0, global_pool=global_pool)(images).shape == pooled.shape


@pytest.mark.parametrize("size", [(32, 32), (28, 28), (96, 64), (33, 47)])
@small_networks
def test_other_channels_and_image_sizes(name: str, size: tuple[int, int]) -> None:
    model = create_small(name, in_chans=1, num_classes=4)
    logits = model(torch.rand(2, 1, *size))
    assert logits.shape == (2, 4)
    assert logits.isfinite().all()


@small_networks
def test_drop_path_grows_with_depth_up_to_its_rate(name: str) -> None:
    model = create_small(name, drop_path_rate=0.3)
    rates = [module.drop_prob for module in model.modules() if isinstance(module, DropPath)]
    depth = sum(SMALL[name].get("layers", (1, 1, 1)))
    torch.testing.assert_close(rates, [0.3 * block / (depth - 1) for block in range(1, depth)])


@small_networks
def test_replaced_layers_are_initialised_as_timm_initialises_them(name: str) -> None:
    model = create_small(name, num_classes=100)
    stem = model.get_submodule(model.pretrained_cfg["first_conv"]).weight
    fan_out = stem.shape[0] * stem.shape[2] * stem.shape[3]
    assert stem.std().item() == pytest.approx(math.sqrt(2 / fan_out), rel=0.2)
    classifier = model.get_classifier()
    if isinstance(model, advcl_hub.models.PreActResNetCifar):
        assert classifier.weight.std().item() == pytest.approx(0.01, rel=0.1)
        assert not classifier.bias.any()


@pytest.mark.parametrize("name", ["resnet8_cifar", "preact_resnet18_cifar"])
def test_reload_from_a_local_folder(name: str, tmp_path: Path) -> None:
    images = torch.rand(2, 3, 32, 32)
    model = create_small(name, num_classes=7)
    randomise(model)
    model.float().eval()
    save_for_hf(model, str(tmp_path), safe_serialization=True)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors"}
    assert json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))["architecture"] == name

    source = f"local-dir:{tmp_path}"
    model_args = {**SMALL[name], "pretrained": True}
    torch.testing.assert_close(create(source, **model_args).eval()(images), model(images))
    other_head = create(source, num_classes=3, **model_args).eval()
    torch.testing.assert_close(other_head.forward_features(images), model.forward_features(images))
    grey = create(source, in_chans=1, **model_args).eval()
    torch.testing.assert_close(grey(images[:, :1]), model(images[:, :1].expand(-1, 3, -1, -1)))
    features = create(source, features_only=True, **model_args).eval()
    torch.testing.assert_close(features(images)[-1], model.forward_intermediates(images)[1][-1])


@small_networks
def test_export_and_script_give_the_same_logits(name: str) -> None:
    model = create_small(name).eval()
    example, images = torch.rand(2, 3, 32, 32), torch.rand(5, 3, 32, 32)
    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(model, (example,), dynamic_shapes={"x": {0: batch}}).module()
    torch.testing.assert_close(exported(images), model(images))
    torch.testing.assert_close(torch.jit.script(model)(images), model(images))


@pytest.mark.parametrize("name", ["resnet18_cifar", "wrn28_10_cifar"])
def test_bad_arguments_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"got 2 depths .* and 3 widths"):
        create(name, layers=(1, 1), channels=(16, 32, 64))
    with pytest.raises(ValueError, match="three or four stages"):
        create(name, layers=(1, 1), channels=(16, 32))
    with pytest.raises(ValueError, match="output_stride=16"):
        create(name, output_stride=16)
    with pytest.raises(TypeError, match="not_an_argument"):
        create(name, not_an_argument=1)
    with pytest.raises(AssertionError, match="out of range"):
        create_small(name).forward_intermediates(torch.rand(1, 3, 32, 32), indices=[5])


def test_a_convolutional_network_has_no_other_layout_of_features() -> None:
    with pytest.raises(ValueError, match=r"^output_fmt='NLC': only 'NCHW' is available$"):
        create_small("wrn28_10_cifar").forward_intermediates(torch.rand(1, 3, 32, 32), output_fmt="NLC")
