"""Checkpoints of the usual CIFAR ResNets (`shortcut`, `linear`): the same outputs in our networks, or a refusal that says why.

The AdvCL layout is tested in test_golden.py.
"""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import advcl_hub  # noqa: F401
from advcl_hub.converters import convert, convert_advcl, convert_kuangliu
from advcl_hub.export import load_folder
from train.step import AdvCL, Attack, Objective
from train.views import ViewConfig

CLASSES = 7
DEPTHS = {"resnet18_cifar": (2, 2, 2, 2), "resnet34_cifar": (3, 4, 6, 3), "resnet50_cifar": (3, 4, 6, 3)}


class PublishedBlock(nn.Module):
    """A residual block with the published names: (kernel, width, stride) of each convolution, and the shortcut."""

    def __init__(self, inputs: int, convs: list[tuple[int, int, int]]):
        super().__init__()
        outputs, stride = convs[-1][1], max(stride for *_, stride in convs)
        self.depth = len(convs)
        width = inputs
        for i, (kernel, channels, step) in enumerate(convs, 1):
            self.add_module(f"conv{i}", nn.Conv2d(width, channels, kernel, step, padding=kernel // 2, bias=False))
            self.add_module(f"bn{i}", nn.BatchNorm2d(channels))
            width = channels
        self.shortcut = nn.Sequential()
        if stride > 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        out = x
        for i in range(1, self.depth + 1):
            out = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(out))
            if i < self.depth:
                out = F.relu(out)
        return F.relu(out + self.shortcut(x))


def basic(inputs: int, width: int, stride: int) -> PublishedBlock:
    return PublishedBlock(inputs, [(3, width, stride), (3, width, 1)])


def bottleneck(inputs: int, width: int, stride: int) -> PublishedBlock:
    return PublishedBlock(inputs, [(1, width, 1), (3, width, stride), (1, 4 * width, 1)])


class Published(nn.Module):
    """The published network: stem, four stages, average over the last 4x4 pixels, `linear`."""

    def __init__(self, name: str):
        super().__init__()
        block, expansion = (bottleneck, 4) if name == "resnet50_cifar" else (basic, 1)
        self.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        inputs = 64
        for stage, depth in enumerate(DEPTHS[name]):
            blocks = []
            for i in range(depth):
                blocks.append(block(inputs, 64 * 2**stage, 2 if stage and not i else 1))
                inputs = 64 * 2**stage * expansion
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        self.linear = nn.Linear(inputs, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        for stage in range(1, 5):
            x = getattr(self, f"layer{stage}")(x)
        return self.linear(F.avg_pool2d(x, 4).flatten(1))


def published(name: str) -> Published:
    """With a value of its own in every weight, statistic and counter: fresh norms would hide a misplaced one."""
    generator = torch.Generator().manual_seed(0)
    model = Published(name)
    for i, (key, value) in enumerate(model.state_dict().items()):
        noise = torch.randn(value.shape, generator=generator)
        if key.endswith("num_batches_tracked"):
            value.fill_(1000 + i)
        elif key.endswith("running_var"):
            value.copy_(1 + 0.5 * noise.tanh())
        elif value.ndim > 1:
            value.copy_(noise * (2 / value[0].numel()) ** 0.5)
        else:
            value.copy_(0.1 * noise + (0.7 if key.endswith("weight") else 0))
    return model.eval()


def images(count: int = 3) -> Tensor:
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def check_same_outputs(theirs: nn.Module, ours: nn.Module, count: int = 3) -> None:
    """In float64, where only an error is larger than rounding."""
    with torch.no_grad():
        expected = theirs.double().eval()(images(count).double())
        torch.testing.assert_close(ours.double().eval()(images(count).double()), expected, rtol=1e-9, atol=1e-9)
    assert expected.std(0).min() > 1e-3, "the outputs have to depend on the image"


def problems(state: dict[str, Tensor], model: nn.Module) -> list[str]:
    """What the converter has against a checkpoint, line by line."""
    with pytest.raises(ValueError, match=r"^Not a checkpoint of this CIFAR ResNet:\n") as refusal:
        convert_kuangliu(state, model)
    return [line.strip() for line in str(refusal.value).splitlines()[1:]]


def ours(name: str, num_classes: int = CLASSES) -> nn.Module:
    return timm.create_model(name, num_classes=num_classes)


@pytest.fixture(scope="module")
def state18() -> dict[str, Tensor]:
    return published("resnet18_cifar").state_dict()


@pytest.fixture(scope="module")
def resnet18() -> nn.Module:
    return ours("resnet18_cifar")


@pytest.mark.parametrize(("name", "prefix"), [("resnet18_cifar", "module."), *((name, "") for name in DEPTHS)])
def test_same_outputs(name: str, prefix: str) -> None:
    theirs, model = published(name), ours(name)
    state = {prefix + key: value for key, value in theirs.state_dict().items()}
    keys = list(state)
    model.load_state_dict(convert_kuangliu(state, model))
    assert list(state) == keys
    counter = model.state_dict()["layer2.0.downsample.1.num_batches_tracked"]
    assert counter == theirs.state_dict()["layer2.0.shortcut.1.num_batches_tracked"]  # does not show in the outputs
    check_same_outputs(theirs, model)


def test_wrong_depth_is_refused_with_every_key(resnet18: nn.Module) -> None:
    state = published("resnet34_cifar").state_dict()
    surplus = ("layer1.2.", "layer2.2.", "layer2.3.", "layer3.2.", "layer3.3.", "layer3.4.", "layer3.5.", "layer4.2.")
    assert problems(state, resnet18) == [f"unknown key {key}" for key in state if key.startswith(surplus)]


def test_shallower_checkpoint_is_refused_with_every_key(state18: dict[str, Tensor]) -> None:
    model = ours("resnet34_cifar")
    absent = [k for k in model.state_dict() if k not in state18 and "downsample" not in k and not k.startswith("fc.")]
    assert len(absent) == 8 * 12
    assert problems(state18, model) == [f"missing key {k}" for k in absent]


def test_other_blocks_are_refused(resnet18: nn.Module) -> None:
    found = problems(published("resnet50_cifar").state_dict(), resnet18)
    assert "unknown key layer1.0.conv3.weight" in found
    assert "unknown key layer1.0.shortcut.0.weight" in found
    assert "shape of layer1.0.conv1.weight: (64, 64, 1, 1), the model has (64, 64, 3, 3)" in found
    assert f"shape of linear.weight: ({CLASSES}, 2048), the model has ({CLASSES}, 512)" in found


def test_wrong_class_count_is_refused(state18: dict[str, Tensor]) -> None:
    assert problems(state18, ours("resnet18_cifar", num_classes=10)) == [
        f"shape of linear.weight: ({CLASSES}, 512), the model has (10, 512)",
        f"shape of linear.bias: ({CLASSES},), the model has (10,)",
    ]
    assert problems(state18, ours("resnet18_cifar", num_classes=0)) == ["unknown key linear.weight", "unknown key linear.bias"]


def without(state: dict[str, Tensor], *keys: str) -> dict[str, Tensor]:
    assert set(keys) <= state.keys()
    return {k: v for k, v in state.items() if k not in keys}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda s: without(s, "layer3.0.shortcut.1.running_mean"), ["missing key layer3.0.downsample.1.running_mean"]),
        (lambda s: s | {"normalize.mean": torch.zeros(3)}, ["unknown key normalize.mean"]),
        (
            lambda s: (
                without(s, "linear.bias", "bn1.weight") | {"mu": torch.zeros(3), "conv1.weight": torch.zeros(64, 3, 7, 7)}
            ),
            [
                "unknown key mu",
                "missing key bn1.weight",
                "missing key fc.bias",
                "shape of conv1.weight: (64, 3, 7, 7), the model has (64, 3, 3, 3)",
            ],
        ),
        (lambda s: s | {"fc.bias": torch.zeros(CLASSES)}, ["linear.bias and fc.bias are one key"]),
        (lambda s: without(s, "bn1.num_batches_tracked"), ["missing key bn1.num_batches_tracked"]),
    ],
)
def test_what_cannot_be_accounted_for_is_refused(
    state18: dict[str, Tensor],
    resnet18: nn.Module,
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    expected: list[str],
) -> None:
    assert problems(change(dict(state18)), resnet18) == expected


def test_a_prefix_of_some_keys_is_not_removed(state18: dict[str, Tensor], resnet18: nn.Module) -> None:
    state = {f"module.{k}": v for k, v in state18.items()} | {"linear.bias": state18["linear.bias"]}
    assert "unknown key module.conv1.weight" in problems(state, resnet18)


def test_nested_checkpoints_are_not_unwrapped(state18: dict[str, Tensor], resnet18: nn.Module) -> None:
    nested: Any = {"net": state18, "acc": 95.0, "epoch": 199}
    found = problems(nested, resnet18)
    assert found[:3] == ["unknown key net", "unknown key acc", "unknown key epoch"]
    assert found[3:] == [f"missing key {k}" for k in resnet18.state_dict() if not k.endswith("num_batches_tracked")]


@pytest.mark.parametrize("prefix", ["", "module."])
def test_checkpoints_from_before_the_counters(state18: dict[str, Tensor], prefix: str) -> None:
    model = ours("resnet18_cifar")
    for key, value in model.state_dict().items():
        if key.endswith("num_batches_tracked"):
            value.fill_(5)
    old = {prefix + k: v for k, v in state18.items() if not k.endswith("num_batches_tracked")}
    converted = convert_kuangliu(old, model)
    model.load_state_dict(converted)
    assert model.state_dict()["bn1.num_batches_tracked"] == 5
    model.state_dict()["bn1.num_batches_tracked"].fill_(6)
    assert converted["bn1.num_batches_tracked"] == 5, "training the model must not change the converted checkpoint"
    check_same_outputs(published("resnet18_cifar"), model)


def test_two_spellings_of_one_advcl_head_are_refused() -> None:
    encoder = timm.create_model("resnet18_cifar", num_classes=0)
    network = AdvCL(encoder, Objective(), Attack(), ViewConfig(), (2,))
    two: dict[str, Tensor] = {"fc_002.bias": torch.zeros(2), "fc_2.bias": torch.ones(2)}
    with pytest.raises(ValueError, match=r"fc_002\.bias and fc_2\.bias are one key"):
        convert_advcl(two, network)


def test_heads_that_the_published_advcl_step_never_uses_are_left_out() -> None:
    encoder = timm.create_model("resnet18_cifar", num_classes=0)
    network = AdvCL(encoder, Objective(), Attack(), ViewConfig(), (2,))
    unused = {"module.head_pred.0.weight": torch.zeros(128, 128), "module.head_ce.3.bias": torch.zeros(1000)}
    with pytest.raises(ValueError, match=r"^Not a checkpoint of this AdvCL network:\n  missing key") as refusal:
        convert_advcl(unused, network)
    assert "head_" not in str(refusal.value)


def load_module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"published_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_real_checkpoint(tmp_path: Path) -> None:
    """The ResNet-18 that AutoAttack's example attacks, and the network that it is published with."""
    spec = importlib.util.find_spec("pyautoattack")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    examples = Path(spec.submodule_search_locations[0]) / "examples"
    state = torch.load(examples / "model_test.pt", map_location="cpu", weights_only=True)
    theirs: nn.Module = load_module(examples / "resnet.py").ResNet18()
    theirs.load_state_dict(state)
    model = ours("resnet18_cifar", num_classes=10)
    model.load_state_dict(convert_kuangliu(state, model))
    check_same_outputs(theirs, model, count=8)
    done = convert(examples / "model_test.pt", tmp_path / "folder", mean=0, std=1)
    assert (done.layout, done.record["outputs"]) == ("kuangliu", 10)
    check_same_outputs(theirs, load_folder(done.folder))
