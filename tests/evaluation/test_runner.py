"""Accuracies that are known beforehand, and the probe against scikit-learn."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from advcl_hub.attacks import seeded_start
from advcl_hub.data import ImageData, load_data
from advcl_hub.evaluation import Protocol, evaluate, robustness
from advcl_hub.evaluation.borrowing import _exact_backends
from advcl_hub.models.pixel_space import PixelSpace
from advcl_hub.records import load_record
from tests.support.tiny_classifiers import TinyNet, labelled_by

EPS = 8 / 255


class TwoClasses(nn.Module):
    """Class 1 if the mean pixel is above one half: robust exactly where it is further than eps from that."""

    def forward(self, images: Tensor) -> Tensor:
        margin = images.mean((1, 2, 3)) - 0.5
        return torch.stack([-margin, margin], 1)


def grey(values: list[int]) -> ImageData:
    levels = torch.tensor(values, dtype=torch.uint8)
    images = levels[:, None, None, None].expand(-1, 3, 4, 4).contiguous()
    n = len(values)
    return ImageData(images, (levels > 127).long(), torch.arange(n), ("dark", "light"), "grey")


def test_robust_accuracy_of_a_known_classifier() -> None:
    data = grey([0, 100, 118, 121, 126, 129, 134, 137, 200, 255])  # 127.5 -+ 8 lies between 118 and 121, 134 and 137
    result = robustness(TwoClasses(), data, steps=20, batch_size=3)
    assert (result.standard, result.robust, result.images) == (1.0, 0.6, 10)
    assert robustness(TwoClasses(), data, eps=0.0, steps=2).robust == 1.0


class Hyperplane(nn.Module):
    """Class 1 where w . x > threshold, x being what the model sees: (image - mean) / std."""

    def __init__(self, weight: Tensor, threshold: float, mean: float = 0.0, std: float = 1.0) -> None:
        super().__init__()
        self.weight, self.threshold = weight, threshold
        self.pretrained_cfg = {"mean": (mean,) * 3, "std": (std,) * 3}

    def forward(self, images: Tensor) -> Tensor:
        margin = images.flatten(1) @ self.weight - self.threshold
        return torch.stack([-margin, margin], 1)


@pytest.mark.parametrize("eps", [0.0, 4 / 255, 8 / 255])
def test_a_hyperplane_is_robust_where_the_margin_exceeds_eps_times_the_l1_norm(eps: float) -> None:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(40, 216, (80, 3, 4, 4), generator=generator, dtype=torch.uint8)  # far from the bounds of [0, 1]
    weight = torch.randn(48, generator=generator)
    score = (pixels / 255).flatten(1) @ weight
    threshold = score.median().item() + 1e-4
    labels = (score > threshold).long()
    labels[:8] = 1 - labels[:8]  # some are wrong from the start
    data = ImageData(pixels, labels, torch.arange(80), ("below", "above"), "noise")
    margin = (score - threshold) * (2 * labels - 1)
    result = robustness(Hyperplane(weight, threshold), data, eps=eps, steps=20)
    assert result.standard == 0.9 and result.robust == (margin > eps * weight.abs().sum()).double().mean().item()
    assert (result.robust < result.standard) == (eps > 0)

    # (x - 1/2) / (1/4) seen through the weight w/4 and a shifted threshold is the same function of pixels
    normalised = Hyperplane(weight / 4, threshold - weight.sum().item() / 2, mean=0.5, std=0.25)
    assert robustness(normalised, data, eps=eps, steps=20) == result
    assert robustness(Hyperplane(weight, threshold), data, eps=eps, steps=0, batch_size=7).standard == result.standard


def test_the_preprocessing_of_the_model_is_inside_the_attack() -> None:
    torch.manual_seed(0)
    model = timm.create_model("resnet8_cifar", num_classes=2).eval()
    model.pretrained_cfg = dict(model.pretrained_cfg, mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.5))  # type: ignore[assignment]
    images = torch.rand(2, 3, 32, 32)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.5, 0.4, 0.3), (0.2, 0.25, 0.5)))
    torch.testing.assert_close(PixelSpace(model)(images), model((images - mean) / std))


def test_the_seed_decides_the_random_start() -> None:
    data = grey([127, 128] * 100)  # so near the boundary that the start alone decides
    results: list[float] = []
    for seed in (1, 2, 1):
        torch.manual_seed(len(results))
        results.append(robustness(TwoClasses(), data, steps=0, seed=seed).robust)
    assert results[0] == results[2] != results[1]


def test_repeatable_by_seed_and_empty_data_refused() -> None:
    data = load_data("fake:60", "test", size=16)
    torch.manual_seed(0)
    model = timm.create_model("resnet8_cifar", num_classes=len(data.classes))
    first = robustness(model, data, steps=3, seed=1)
    torch.manual_seed(9)
    assert robustness(model, data, steps=3, seed=1) == first
    with pytest.raises(ValueError, match="No images"):
        robustness(model, data.subset(torch.arange(0)))


def test_the_model_comes_back_as_it_was() -> None:
    data = load_data("fake:20", "test", size=16)
    network = timm.create_model("resnet8_cifar", num_classes=len(data.classes)).train()
    robustness(network, data, steps=1)
    assert network.training and all(p.requires_grad and p.grad is None for p in network.parameters())


@pytest.mark.parametrize("eps", [0.05, 0.2])
def test_a_hyperplane_is_robust_in_l2_where_the_margin_exceeds_eps_times_the_l2_norm(eps: float) -> None:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(40, 216, (80, 3, 4, 4), generator=generator, dtype=torch.uint8)
    weight = torch.randn(48, generator=generator)
    score = (pixels / 255).flatten(1) @ weight
    threshold = score.median().item() + 1e-4
    labels = (score > threshold).long()
    data = ImageData(pixels, labels, torch.arange(80), ("below", "above"), "noise")
    expected = ((score - threshold).abs() > eps * weight.norm()).double().mean().item()
    for loss in ("ce", "margin"):
        found = evaluate(Hyperplane(weight, threshold), data, Protocol(norm="L2", eps=eps, loss=loss, check_images=0))
        assert found.robust == expected < 1


def test_random_starts_belong_to_images_not_to_batches_or_their_order() -> None:
    model = TinyNet()
    data = labelled_by(model, 30)
    protocol = Protocol(eps=0.2, steps=1, step_size=1e-12, seed=4, check_images=0)  # the start decides
    whole = evaluate(model, data, protocol).images
    assert 0 < sum(whole["pgd"]) < 30
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    shuffled = evaluate(model, data.subset(order), replace(protocol, batch_size=4)).images
    assert shuffled["pgd"] == [whole["pgd"][p] for p in order.tolist()]
    assert evaluate(model, data, replace(protocol, seed=5)).images["pgd"] != whole["pgd"]


def test_pgd_equals_a_slow_loop_over_images_and_restarts() -> None:
    model = TinyNet()
    data = labelled_by(model, 12, wrong=2)
    assert isinstance(data.images, Tensor)
    protocol = Protocol(eps=0.006, step_size=0.002, steps=3, restarts=3, seed=1, loss="margin", check_images=0)
    found = evaluate(model, data, protocol)
    for i in range(12):
        x, y = data.images[i : i + 1] / 255, data.labels[i : i + 1]
        survives = bool((model(x).argmax(1) == y).item())
        for restart in range(3):
            z = seeded_start(x, 0.006, "Linf", [(1, restart, 1000 + i)])
            for _ in range(3):
                z = z.detach().requires_grad_()
                logits = model(z)[0]
                others = [logits[j] for j in range(10) if j != y.item()]
                (max(others, key=lambda v: v.item()) - logits[y.item()]).backward()
                assert z.grad is not None
                moved = z.detach() + 0.002 * z.grad.sign()
                z = torch.min(torch.max(moved, x - 0.006), x + 0.006).clamp(0, 1)
            survives &= bool((model(z).argmax(1) == y).item())
        assert found.images["pgd"][i] == survives, i
    assert found.robust < found.standard


def test_more_restarts_only_break_more() -> None:
    model = TinyNet()
    data = labelled_by(model, 40)
    one, five = (evaluate(model, data, Protocol(eps=0.1, steps=1, step_size=1e-12, restarts=r, check_images=0)) for r in (1, 5))
    assert all(a >= b for a, b in zip(one.images["pgd"], five.images["pgd"], strict=True))
    assert five.robust is not None and one.robust is not None and five.robust < one.robust


def test_an_image_that_is_broken_is_not_attacked_again() -> None:
    batches: dict[int, list[int]] = {}
    for restarts in (1, 3):
        model, sizes = TwoClasses(), batches.setdefault(restarts, [])
        model.register_forward_pre_hook(lambda module, inputs, sizes=sizes: sizes.append(len(inputs[0])))  # type: ignore[misc]
        data, protocol = grey([127, 128, 126]), Protocol(eps=0.5, steps=2, restarts=restarts, check_images=0)
        assert evaluate(model, data, protocol, progress=False).images["pgd"] == [False] * 3  # by the first start
    assert batches[1] == batches[3] and batches[1].count(1) == 1, "one image alone is tried before"


def test_bfloat16_is_computed_in_bfloat16() -> None:
    model = TinyNet()
    data = labelled_by(model, 10)
    types: set[torch.dtype] = set()
    model.layers[0].register_forward_hook(lambda module, inputs, output: types.add(output.dtype))
    evaluate(model, data, Protocol(steps=1, precision="bfloat16", check_images=0))
    assert types == {torch.bfloat16}
    types.clear()
    evaluate(model, data, Protocol(steps=1, check_images=0))
    assert types == {torch.float32}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"norm": "L1"}, "norm is 'L1', expected one of Linf, L2"),
        ({"loss": "mse"}, "loss is 'mse', expected one of ce, margin, dlr"),
        ({"eps": 8}, "did you mean 8/255"),
        ({"eps": -0.1}, "expected a distance of pixels"),
        ({"step_size": float("nan")}, "step_size is nan"),
        ({"restarts": 0}, "restarts is 0, expected at least 1"),
        ({"autoattack": "plus"}, "autoattack is 'plus', expected one of standard, rand"),
    ],
)
def test_a_protocol_out_of_range_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Protocol(**settings)


def test_quick_figures_are_those_of_evaluate() -> None:
    model = TinyNet()
    data = labelled_by(model, 30, wrong=3)
    quick = robustness(model, data, eps=0.004, step_size=0.001, steps=3, seed=2)
    whole = evaluate(model, data, Protocol(eps=0.004, step_size=0.001, steps=3, seed=2))
    assert (quick.standard, quick.robust) == (whole.standard, whole.robust) and 0 < quick.robust < quick.standard == 0.9


class Stubborn(TinyNet):
    """Its batch norm stays in training mode, whatever it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def train(self, mode: bool = True) -> "Stubborn":
        super().train(mode)
        self.norm.train()
        return self

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(self.norm(images))


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_the_random_state_and_the_backends_come_back_as_they_were(fails: bool) -> None:
    model = Stubborn().train()
    model.layers[0].eval()
    model.layers[3].weight.requires_grad_(False)
    data = labelled_by(TinyNet(), 10)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    calls = 0

    def fail_late(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        nonlocal calls
        calls += 1
        if fails and calls > 8:
            raise RuntimeError("late")

    model.register_forward_pre_hook(fail_late)
    torch.backends.cudnn.benchmark = True
    torch.manual_seed(3)
    try:
        if fails:
            with pytest.raises(RuntimeError, match="late"):
                evaluate(model, data, Protocol(steps=5, check_images=5))
        else:
            evaluate(model, data, Protocol(steps=5, check_images=5))
        assert torch.backends.cudnn.benchmark
    finally:
        torch.backends.cudnn.benchmark = False
    after = torch.rand(3)
    torch.manual_seed(3)
    assert torch.equal(after, torch.rand(3))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert [p.requires_grad for p in model.layers[3].parameters()] == [False, True]
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("strict", [False, True])
def test_a_gpu_computes_by_fixed_algorithms_and_what_was_set_comes_back(strict: bool) -> None:
    def deterministic() -> tuple[bool, bool]:
        return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()

    torch.use_deterministic_algorithms(strict)
    try:
        with _exact_backends(cuda=True):
            assert deterministic() == (True, not strict)  # who wants errors gets them
        assert deterministic() == (strict, False)
        with _exact_backends(cuda=False):
            assert deterministic() == (strict, False)
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_picture_that_fails_loses_no_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("advcl_hub.evaluation.pictures.save_curves", lambda *_: 1 / 0)
    data = labelled_by(TinyNet(), 10)
    with pytest.warns(UserWarning, match="A picture or the report could not be made"):
        found = evaluate(TinyNet(), data, Protocol(steps=2), output=tmp_path)
    assert load_record(tmp_path) == found.record
    assert {path.name for path in tmp_path.iterdir()} == {"results.json", "images.csv", "report.md", "per_class.png"}
