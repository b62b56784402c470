"""The faster copy that attacks see: the same function, where that is certain, and figures that stay what they were."""

import json
import logging
import threading
import types
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch._inductor.config
import torch.nn.functional as F
from click.testing import CliRunner
from pyautoattack import AutoAttack
from timm.models.resnet import BasicBlock
from torch import Tensor, nn
from torch._dynamo.utils import counters

import advcl_hub
from advcl_hub.cli import main
from advcl_hub.data import ImageData, load_data
from advcl_hub.evaluation import Protocol, evaluate, robustness
from advcl_hub.evaluation.acceleration import accelerated
from advcl_hub.evaluation.results import folder_name
from advcl_hub.models.pixel_space import PixelSpace
from advcl_hub.opening import weights_sha256
from advcl_hub.records.tables import report
from tests.support.speed import needs_compiler
from tests.support.tiny_classifiers import TinyNet, labelled_by, shortened

PROTOCOL = Protocol()
SMALL = {"channels": (8, 16, 32)}


def network(name: str = "resnet8_cifar", **arguments: Any) -> nn.Module:
    """In evaluation mode, with batch norms that do something."""
    torch.manual_seed(0)
    model = timm.create_model(name, **arguments).eval()
    for norm in batch_norms(model):
        nn.init.normal_(norm.running_mean, std=0.3)
        nn.init.uniform_(norm.running_var, 0.5, 2)
        nn.init.uniform_(norm.weight, 0.5, 2)
        nn.init.normal_(norm.bias, std=0.3)
    return model


def batch_norms(model: nn.Module) -> list[nn.BatchNorm2d]:
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


def images_of(size: int = 16, n: int = 3) -> Tensor:
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(1))


def logits_and_gradient(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    images = images.clone().requires_grad_()
    logits = model(images)
    (gradient,) = torch.autograd.grad(F.cross_entropy(logits, torch.arange(len(images))), images)
    return logits.detach(), gradient


@pytest.mark.parametrize(
    ("name", "arguments", "size", "left"),
    [
        ("resnet8_cifar", {}, 16, 0),
        ("resnet50", {"layers": (1, 1, 1, 1), "num_classes": 10}, 32, 0),
        ("resnet18", {"layers": (1, 1, 1, 1), "num_classes": 10, "norm_layer": nn.SyncBatchNorm}, 32, None),
        ("resnet26d", {"layers": (1, 1, 1, 1), "num_classes": 10}, 32, 3),  # those of its deep stem
        ("resnetaa50", {"layers": (1, 1, 1, 1), "num_classes": 10, "drop_block_rate": 0.1}, 32, 0),
        ("seresnet18", {"layers": (1, 1, 1, 1), "num_classes": 10}, 32, 0),
        ("preact_resnet18_cifar", {"layers": (1, 1, 1), "channels": (8, 16, 32)}, 16, None),
        ("vit_tiny_patch16_224", {"img_size": 16, "patch_size": 4, "depth": 2, "num_classes": 10}, 16, None),
        ("convnext_atto", {"depths": (1, 1, 1, 1), "num_classes": 10}, 32, None),
    ],
)
def test_the_copy_is_the_same_function_and_the_original_stays(
    name: str, arguments: dict[str, Any], size: int, left: int | None
) -> None:
    model = network(name, **arguments).double()
    if name == "convnext_atto":
        for block in (module for module in model.modules() if hasattr(module, "gamma")):
            nn.init.ones_(block.gamma)  # at 1e-6 a block would do nothing
    images = images_of(size).double()
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    strides = [parameter.stride() for parameter in model.parameters()]
    before = logits_and_gradient(model, images)

    copied = accelerated(model, images, PROTOCOL)
    assert copied is not model and not copied.training
    if left is not None:
        assert len(batch_norms(copied)) == left < len(batch_norms(model))
    assert not any(parameter.requires_grad for parameter in copied.parameters())
    assert not any(module.training for module in copied.modules())
    weights = [m.weight for m in copied.modules() if isinstance(m, nn.Conv2d) and m.weight[0].numel() > 1]
    assert weights and all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)
    logits, gradient = logits_and_gradient(copied, images)
    torch.testing.assert_close(logits, before[0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(gradient, before[1], rtol=1e-9, atol=1e-9)
    assert before[1].abs().max() > 1e-6
    assert gradient.is_contiguous(), "attacks view gradients"

    after = logits_and_gradient(model, images)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
    assert [parameter.stride() for parameter in model.parameters()] == strides
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not model._forward_pre_hooks


class OwnBlock(BasicBlock):
    """What a subclass does between its modules is its own affair."""


class OwnStem(advcl_hub.models.resnet_cifar.ResNetCifar):
    """A stem that leaves its norm out for dark images."""

    def forward_features(self, x: Tensor) -> Tensor:
        x = self.conv1(x) if x.mean() < 0 else self.bn1(self.conv1(x))
        return self.layer3(self.layer2(self.layer1(self.act1(x))))


def train_for_ever(norm: nn.Module) -> None:
    norm.train = types.MethodType(lambda self, mode=True: nn.Module.train(self, True), norm)  # type: ignore[method-assign]
    norm.train()


REASONS: dict[str, Callable[[nn.Module], Any]] = {
    "training mode": train_for_ever,
    "no running statistics": lambda norm: norm.__dict__["_buffers"].update(running_mean=None, running_var=None),
    "forward hook": lambda norm: norm.register_forward_hook(lambda module, inputs, output: 2 * output),
    "forward pre-hook": lambda norm: norm.register_forward_pre_hook(lambda module, inputs: inputs[0] + 1),
    "backward hook": lambda norm: norm.register_full_backward_hook(lambda module, inputs, outputs: None),
    "own forward": lambda norm: setattr(norm, "forward", lambda x: 2 * x),
}


@pytest.mark.parametrize("reason", REASONS)
def test_a_norm_that_is_more_than_a_scale_is_not_folded(reason: str) -> None:
    model = network()
    norm = model.layer2[0].downsample[1]
    REASONS[reason](norm)
    images = images_of(n=16)
    copied = accelerated(model, images, PROTOCOL)
    assert copied is not model
    (left,) = batch_norms(copied)
    assert left is copied.layer2[0].downsample[1] and left.training == norm.training
    torch.testing.assert_close(copied(images), model(images), rtol=1e-4, atol=1e-4)


def test_a_hook_on_the_convolution_sees_what_it_saw() -> None:
    model = network()
    model.layer2[0].downsample[0].register_forward_hook(lambda module, inputs, output: output.abs())
    copied = accelerated(model, images_of(), PROTOCOL)
    assert batch_norms(copied) == [copied.layer2[0].downsample[1]]


def test_a_block_whose_forward_was_replaced_keeps_its_norms() -> None:
    model = network()
    model.layer1[0].forward = types.MethodType(lambda block, x: block.bn1(block.conv2(x)), model.layer1[0])
    copied = accelerated(model, images_of(), PROTOCOL)
    assert copied is not model and batch_norms(copied) == [copied.layer1[0].bn1, copied.layer1[0].bn2]


def test_subclasses_of_blocks_and_networks_keep_their_norms() -> None:
    blocks = network(block=OwnBlock)
    copied = accelerated(blocks, images_of(), PROTOCOL)
    assert copied is not blocks and len(batch_norms(copied)) == len(batch_norms(blocks)) - 1  # the stem is timm's
    stem = OwnStem(BasicBlock, (1, 1, 1), (8, 16, 32)).eval()
    copied = accelerated(stem, images_of(), PROTOCOL)
    assert copied is not stem and batch_norms(copied) == [copied.bn1]


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = network()

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images + 0.1 * torch.randn_like(images))


class Viewing(nn.Module):
    """Takes the memory format for granted."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.fc = nn.Conv2d(3, 8, 3, 2), nn.Linear(72, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.conv(images).view(len(images), -1))


class Locked(TinyNet):
    """Cannot be copied."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()


class WrongCopy(TinyNet):
    """Its copy is another function."""

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        return TinyNet(seed=1)


@pytest.mark.parametrize("kind", [Noisy, Viewing, Locked, WrongCopy])
def test_where_there_is_no_faster_copy_the_classifier_itself_is_attacked(kind: type[nn.Module]) -> None:
    model = kind().eval()
    images = images_of(8)
    assert accelerated(model, images, PROTOCOL) is model
    with pytest.raises(ValueError, match="cannot be compiled, so leave out --compile"):
        accelerated(model, images, replace(PROTOCOL, compile=True))
    found = evaluate(model, labelled_by(kind(), 25), Protocol(steps=0, check_images=25), progress=False)
    failed = {check["name"] for check in found.record["checks"] if not check["passed"]}
    assert ("deterministic" in failed) == (kind is Noisy)


def test_a_classifier_that_fails_comes_back_for_others_to_explain() -> None:
    broken = TinyNet().half()
    assert accelerated(broken, images_of(8), replace(PROTOCOL, compile=True)) is broken


def test_images_that_do_not_fit_the_memory_are_a_reason_against_compiling() -> None:
    def full(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    model = TinyNet()
    model.register_forward_pre_hook(full)
    assert accelerated(model, images_of(8), PROTOCOL) is model  # smaller batches may fit
    with pytest.raises(ValueError, match=r"^3 images do not fit the memory: leave out --compile \(compile=True\)\.$"):
        accelerated(model, images_of(8), replace(PROTOCOL, compile=True))


@pytest.fixture
def norm_calls() -> Iterator[list[str]]:
    """A list that gets an entry whenever any batch norm computes."""
    calls: list[str] = []
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, inputs, output: calls.append("") if isinstance(module, nn.BatchNorm2d) else None
    )
    yield calls
    handle.remove()


def test_evaluations_attack_the_copy_and_record_the_original(norm_calls: list[str]) -> None:
    model = network(**SMALL)
    data = labelled_by(model, 20)
    digest = weights_sha256(model)
    norms = len(batch_norms(model))
    norm_calls.clear()
    found = evaluate(model, data, Protocol(steps=2), progress=False)
    assert len(norm_calls) == norms, "one pass of the original, to compare with"
    assert found.record["model"]["weights_sha256"] == digest
    assert found.record["model"]["parameters"] == sum(p.numel() for p in model.parameters())
    norm_calls.clear()
    assert robustness(model, data, steps=2, fit=True).robust == found.robust
    assert len(norm_calls) == norms


def test_a_norm_that_stays_in_training_mode_is_still_found() -> None:
    model = network(**SMALL)
    train_for_ever(model.layer1[0].bn1)
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    found = evaluate(model, labelled_by(network(**SMALL), 20), Protocol(steps=1), progress=False)
    assert any("in training mode or without running statistics: model.layer1.0.bn1" in text for text in found.warnings)
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Module, ImageData]:
    """A small residual network that tells digits of 8x8 pixels apart, and images that it gets right or wrong."""
    torch.manual_seed(0)
    data = load_data("digits", "train", size=8)
    model = timm.create_model("resnet8_cifar", num_classes=10, in_chans=data.shape[0], **SMALL).train()
    model.pretrained_cfg = dict(model.pretrained_cfg, input_size=data.shape)  # type: ignore[assignment]
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(40):
        rows = torch.randint(len(data), (128,))
        loss = F.cross_entropy(model(data.images[rows] / 255), data.labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval(), load_data("digits", "test", size=8).subset(torch.arange(12))


EPS = 0.03  # some images break, some survive


@pytest.mark.slow
@pytest.mark.usefixtures("short_autoattack")
def test_autoattack_ends_as_in_the_bare_package(trained: tuple[nn.Module, ImageData], caplog: pytest.LogCaptureFixture) -> None:
    model, data = trained
    protocol = Protocol(eps=EPS, autoattack="standard", seed=3, batch_size=7, steps=0, check_images=0)
    ours = evaluate(model, data, protocol, progress=False)

    bare = shortened(AutoAttack(model, norm="Linf", eps=EPS, seed=3, version="standard", device="cpu"))
    with caplog.at_level(logging.DEBUG, "auto-attack"):
        _, predictions = bare.run_standard_evaluation(data.images / 255, data.labels, batch_size=7)
    said = [m for m in caplog.messages if m.startswith("robust accuracy after")]
    columns = ours.record["autoattack_columns"]
    assert [m.split(":")[1].split()[0] for m in said] == [f"{column['value']:.2%}" for column in columns.values()]
    assert len(said) == len(columns) == 4
    assert ours.images["autoattack_prediction"] == predictions.tolist()
    assert 0 < sum(ours.images["autoattack"]) < sum(ours.images["standard"])


@pytest.mark.slow
@needs_compiler
def test_compiled_it_leaves_the_same_survivors(trained: tuple[nn.Module, ImageData]) -> None:
    model, data = trained
    protocol = Protocol(eps=EPS, steps=5, restarts=2, batch_size=7, check_images=0)
    plain, compiled = (evaluate(model, data, replace(protocol, compile=c), progress=False) for c in (False, True))
    assert compiled.images == plain.images and 0 < sum(plain.images["pgd"]) < sum(plain.images["standard"])
    assert compiled.record["protocol"] == {**plain.record["protocol"], "compile": True}
    assert "compiled." in report([compiled.record])
    assert "compiled" not in report([plain.record])


@needs_compiler
def test_a_graph_serves_any_number_of_survivors(trained: tuple[nn.Module, ImageData]) -> None:
    model, data = trained
    original = PixelSpace(model)
    images = data.images.repeat(4, 1, 1, 1) / 255
    counters.clear()
    compiled = accelerated(original, images[:16], Protocol(compile=True))
    assert compiled is not original and counters["stats"]["unique_graphs"] == 1
    for n in (17, 23, 40, 31):
        x = images[:n].clone().requires_grad_()
        (gradient,) = torch.autograd.grad(compiled(x).sum(), x)
        y = images[:n].clone().requires_grad_()
        (expected,) = torch.autograd.grad(original(y).sum(), y)
        torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-4)
        assert gradient.is_contiguous()
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.slow
def test_without_a_compiler_nothing_is_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))  # what an earlier test compiled
    model = TinyNet()
    no_compiler = torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)})  # monkeypatch would delete it
    with no_compiler, pytest.raises(ValueError, match=r"leave out --compile .*No working C\+\+ compiler"):
        evaluate(model, labelled_by(model, 5), Protocol(steps=1, compile=True), output=tmp_path / "out", device="cpu")
    assert not (tmp_path / "out").exists()


def test_records_from_before_it_could_compile_stand(tmp_path: Path) -> None:
    assert "compile" not in Protocol().to_dict() and Protocol(compile=True).to_dict()["compile"] is True
    model = TinyNet()
    data, protocol = labelled_by(model, 5), Protocol(steps=1, check_images=0)
    first = evaluate(model, data, protocol, output=tmp_path, progress=False)
    assert "compile" not in json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))["protocol"]  # as it was then
    with pytest.warns(UserWarning, match="nothing was measured again"):
        assert evaluate(model, data, protocol, output=tmp_path) == first
    with pytest.raises(ValueError, match="another protocol"):
        evaluate(model, data, replace(protocol, compile=True), output=tmp_path)

    options = {"n": None, "first": False}
    plain, compiled = (folder_name("digits", replace(protocol, compile=c), options) for c in (False, True))
    assert compiled == plain.replace("-pgd1-", "-pgd1-compiled-") != plain
    assert plain.endswith("-51955f"), "the same command finds the folder of an earlier version"


def test_the_command_takes_the_option(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Protocol] = []

    def evaluate(model: str, data: str, protocol: Protocol, **options: Any) -> None:
        asked.append(protocol)
        raise ValueError("enough")

    monkeypatch.setattr(advcl_hub, "evaluate", evaluate)
    for arguments in ([], ["--compile"]):
        CliRunner().invoke(main, ["evaluate", "MODEL", "--data", "fake:10", *arguments])
    assert [protocol.compile for protocol in asked] == [False, True]
