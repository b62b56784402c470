"""Accuracies that are known beforehand, and the probe against scikit-learn."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from advcl_hub.attacks import seeded_start
from advcl_hub.corruptions import CORRUPTIONS
from advcl_hub.data import ImageData, load_data
from advcl_hub.evaluation import PixelSpace, Protocol, evaluate, load_record, robustness
from tests.image_files import encode, pixels, write
from tests.tiny_classifiers import TinyNet, labelled_by
from train.probe import extract_features, fit_linear, linear_probe

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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_linear_fit_equals_scikit_learn(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(200, 5, generator=generator, dtype=torch.float64) * torch.tensor([1, 10, 0.1, 3, 1]) + 2
    labels = (features[:, 0] > 2).long() + (features[:, 1] > 0).long()
    weight, bias = fit_linear(features.to(dtype), labels, 3)
    standardised = ((features - features.mean(0)) / features.std(0)).numpy()
    reference = LogisticRegression(C=1 / (200 * 1e-3), tol=1e-8, max_iter=1000).fit(standardised, labels.numpy())
    ours = torch.softmax(features.to(dtype) @ weight.T + bias, 1).double()
    torch.testing.assert_close(ours, torch.from_numpy(reference.predict_proba(standardised)), rtol=0, atol=5e-3)


def test_linear_probe_is_a_timm_classifier_that_learns() -> None:
    data = load_data("digits", "train", size=16)
    torch.manual_seed(0)
    encoder = timm.create_model("resnet8_cifar", num_classes=0)
    probe = linear_probe(encoder, data.subset(torch.arange(600)), "cpu")
    assert encoder.num_classes == 0 and probe.num_classes == 10
    assert robustness(probe, data.subset(torch.arange(600)), steps=0).standard > 0.6


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "convnext_atto", "mobilenetv3_small_050"])
def test_the_probe_is_the_fit_on_the_features(name: str) -> None:
    kwargs: dict[str, int] = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 1} if "vit" in name else {}
    data = load_data("fake:40", "train", size=32)
    torch.manual_seed(0)
    encoder = timm.create_model(name, num_classes=0, **kwargs)
    features = extract_features(encoder, data, "cpu")
    weight, bias = fit_linear(features, data.labels, len(data.classes))
    assert isinstance(data.images, Tensor)
    with torch.no_grad():
        probe = linear_probe(encoder, data, "cpu")
        logits = PixelSpace(probe)(data.images / 255)  # as `evaluate` judges it: under the encoder's normalisation
    assert torch.equal(logits.argmax(1), (features @ weight.T + bias).argmax(1))
    torch.testing.assert_close(logits, features @ weight.T + bias, rtol=1e-3, atol=1e-3)
    assert robustness(probe, data, steps=0).standard == (logits.argmax(1) == data.labels).double().mean()


def test_a_head_that_is_not_linear_is_refused() -> None:
    with pytest.raises(ValueError, match="one Linear layer"):
        linear_probe(timm.create_model("levit_128s", num_classes=0), load_data("fake:20", "train", size=224), "cpu")


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


class Enlarged(TinyNet):
    """Wants 16x16 images, normalised; pools them back to 8x8."""

    def __init__(self) -> None:
        super().__init__()
        self.pretrained_cfg = {
            "input_size": (3, 16, 16),
            "mean": (0.5,) * 3,
            "std": (0.5,) * 3,
            "interpolation": "bilinear",
            "crop_pct": 0.875,
        }
        self.seen: list[tuple[int, ...]] = []

    def forward(self, images: Tensor) -> Tensor:
        self.seen.append(tuple(images.shape[1:]))
        return self.layers(nn.functional.avg_pool2d(images, 2))


def test_small_images_are_attacked_at_their_own_size_and_enlarged_inside() -> None:
    model = Enlarged()
    data = labelled_by(TinyNet(), 10)
    found = evaluate(model, data, Protocol(eps=0.1, check_images=5))
    assert set(model.seen) == {(3, 16, 16)}, "the model sees its own size"
    assert found.record["model"]["attacked_at"] == [3, 8, 8] and found.record["model"]["fitted_inside"] == "enlarged"
    assert next(c for c in found.record["checks"] if c["name"] == "perturbations within eps")["passed"]


def test_a_part_of_imagenet_is_judged_among_all_of_its_classes(tmp_path: Path) -> None:
    for name in ("n01443537", "n03000684"):  # the model's classes 1 and 491
        for number in range(2):
            write(tmp_path / "test" / name / f"{number}.png", encode(pixels(24, 24)))
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", pretrained_cfg_overlay={"input_size": (3, 24, 24)}).eval()
    with torch.no_grad():
        model.get_classifier().bias[491] = 100  # type: ignore[operator, union-attr, index]
    found = evaluate(model, f"folder:{tmp_path}", Protocol(steps=0))
    assert found.images["label"] == [1, 1, 491, 491] and found.images["prediction"] == [491] * 4
    assert found.standard == 0.5 and list(found.record["per_class"]) == ["n01443537", "n03000684"]


@pytest.mark.parametrize("sizes", [[(20, 20)], [(9, 30), (24, 20)], [(8, 8)]])
def test_large_or_uneven_images_are_brought_to_the_models_size(tmp_path: Path, sizes: list[tuple[int, int]]) -> None:
    for number, (height, width) in enumerate(sizes * 2):
        for name in ("cat", "dog"):
            write(tmp_path / "test" / name / f"{number}.png", encode(pixels(height, width)))
    model = Enlarged()
    model.num_classes, model.layers[3] = 2, nn.Linear(72, 2)
    found = evaluate(model, f"folder:{tmp_path}", Protocol(check_images=0)).record["model"]
    expected = ([3, 8, 8], "enlarged") if sizes == [(8, 8)] else ([3, 18, 18], "cropped")  # 16 / 0.875, as timm scales
    assert (found["attacked_at"], found["fitted_inside"]) == expected and set(model.seen) == {(3, 16, 16)}


def test_labels_follow_the_names_that_the_model_gives_its_classes() -> None:
    model = TinyNet(3)
    data = labelled_by(model, 20)
    model.pretrained_cfg = {"label_names": ["class2", "class0", "class1"]}  # type: ignore[assignment]
    order = torch.tensor([1, 2, 0])  # class0 is the model's 1 ...
    named = replace(data, labels=order.argsort()[data.labels])
    assert evaluate(model, named, Protocol(steps=0)).standard == 1.0
    assert evaluate(model, data, Protocol(steps=0)).standard < 1.0
    model.pretrained_cfg = {"label_names": ["a", "b", "c"]}  # type: ignore[assignment]
    with pytest.warns(UserWarning, match=r"The model's classes are a, b, c \.\.\., those of random class0"):
        assert evaluate(model, data, Protocol(steps=0)).standard == 1.0


def test_models_and_data_that_do_not_fit_are_refused() -> None:
    data = labelled_by(TinyNet(), 10)
    with pytest.raises(ValueError, match="tells 5 classes apart, random has 10, and their names differ"):
        evaluate(TinyNet(5), data)
    grey = replace(data, images=torch.zeros(10, 1, 8, 8, dtype=torch.uint8))
    with pytest.raises(ValueError, match="takes 3 channels, the images of random have 1"):
        evaluate(Enlarged(), grey)
    with pytest.raises(ValueError, match="images without a label"):
        evaluate(TinyNet(), replace(data, labels=data.labels - 10))


def test_a_batch_that_does_not_fit_the_memory_is_halved() -> None:
    model = TinyNet()
    data = labelled_by(model, 40)
    limit = 12

    def full(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if len(inputs[0]) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")

    model.register_forward_pre_hook(full)
    found = evaluate(model, data, Protocol(steps=1, batch_size=100))
    assert found.record["batch_size"] == 10 and found.record["protocol"]["batch_size"] == 100
    limit = 0
    with pytest.raises(ValueError, match="Not even one image"):
        evaluate(model, data, Protocol(steps=1))


def test_the_balanced_subset_is_fixed_and_balanced() -> None:
    data = labelled_by(TinyNet(3, seed=1), 60)
    data = replace(data, labels=torch.tensor([0] * 40 + [1] * 15 + [2] * 5))
    positions = data.balanced_positions(12)
    assert positions.tolist() == data.balanced_positions(12).tolist() == sorted(positions.tolist())
    assert data.labels[positions].bincount().tolist() == [4, 4, 4]
    assert data.labels[data.balanced_positions(14)].bincount().tolist() == [5, 5, 4]
    assert data.labels[data.balanced_positions(30)].bincount().tolist() == [13, 12, 5], "a class that is short is filled up"
    assert set(positions.tolist()) <= set(data.balanced_positions(30).tolist()), "a larger subset holds the smaller ones"
    assert data.balanced_positions(60).tolist() == list(range(60))
    first = evaluate(TinyNet(3), data, Protocol(steps=0), n=7, first=True)
    assert first.images["index"] == list(range(1000, 1007)) and first.record["data"]["selection"] == "the first"


def test_corruptions_keep_the_selection_and_average_over_all(tmp_path: Path) -> None:
    model = TinyNet()
    data = labelled_by(model, 30)
    record = evaluate(model, data, Protocol(steps=0), n=20, corruptions="generated").record
    found = record["corruptions"]
    assert set(found["by_severity"]) == set(CORRUPTIONS) and all(len(row) == 5 for row in found["by_severity"].values())
    assert found["mean"] == pytest.approx(sum(map(sum, found["by_severity"].values())) / 40)
    assert "not CIFAR-10-C" in record["corrupted"]["set"]

    # The published layout, with a corruption that does nothing and one that swaps all images for others.
    plain = replace(data, indices=torch.arange(30))
    assert isinstance(plain.images, Tensor)
    stored = plain.images.permute(0, 2, 3, 1).numpy()
    np.save(tmp_path / "labels.npy", np.tile(plain.labels.numpy(), 5))
    np.save(tmp_path / "none.npy", np.concatenate([stored] * 5))
    np.save(tmp_path / "other.npy", np.concatenate([stored[::-1]] * 5))
    table = evaluate(model, plain, Protocol(steps=0), n=20, corruptions=tmp_path).record["corruptions"]["by_severity"]
    swapped = (plain.labels == plain.labels.flip(0))[plain.balanced_positions(20)].double().mean().item()
    assert table == {"none": [1.0] * 5, "other": [pytest.approx(swapped)] * 5}
    other = replace(plain, labels=plain.labels.flip(0))
    with pytest.raises(ValueError, match="does not hold corrupted copies of the images of random"):
        evaluate(model, other, Protocol(steps=0), corruptions=tmp_path)


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


def test_what_cannot_be_measured_is_refused_before_work_starts(tmp_path: Path) -> None:
    data = labelled_by(TinyNet(), 10)
    assert isinstance(data.images, Tensor)
    for model, protocol, message in (
        (TinyNet(2), Protocol(loss="dlr"), "DLR loss needs at least 3 classes"),
        (TinyNet().half(), Protocol(), "The model fails on images"),
        (nn.Flatten(), Protocol(norm="L2"), None),
        (nn.Conv2d(3, 10, 3), Protocol(), r"expected float logits \(10, classes\)"),
    ):
        few = replace(data, labels=data.labels.clamp(max=1), classes=("a", "b")) if message and "DLR" in message else data
        if message is None:
            assert evaluate(model, few, protocol).standard >= 0  # any function of images to logits will do
            continue
        with pytest.raises(ValueError, match=message):
            evaluate(model, few, protocol, output=tmp_path / "e")
        assert not (tmp_path / "e").exists()
    for n, first in ((0, False), (-3, True), (11, True), (11, False)):
        with pytest.raises(ValueError, match=f"{n} images were asked for, random has 10"):
            evaluate(TinyNet(), data, n=n, first=first)
    with pytest.raises(ValueError, match="without saying how many"):
        evaluate(TinyNet(), data, first=True)
    with pytest.raises(ValueError, match="No images"):
        evaluate(TinyNet(), data.subset(torch.arange(0)))
    large = replace(data, images=torch.zeros(10, 3, 40, 40, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"are 40x40, the model takes 16x16: load_data\(size=18\)"):
        evaluate(Enlarged(), large)


def test_a_picture_that_fails_loses_no_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("advcl_hub.evaluation.pictures.save_curves", lambda *_: 1 / 0)
    data = labelled_by(TinyNet(), 10)
    with pytest.warns(UserWarning, match="A picture or the report could not be made"):
        found = evaluate(TinyNet(), data, Protocol(steps=2), output=tmp_path)
    assert load_record(tmp_path) == found.record
    assert {path.name for path in tmp_path.iterdir()} == {"results.json", "images.csv", "report.md", "per_class.png"}


def test_published_sets_are_averaged_over_their_fifteen_corruptions(tmp_path: Path) -> None:
    model = TinyNet()
    data = replace(labelled_by(model, 10), indices=torch.arange(10))
    assert isinstance(data.images, Tensor)
    stored = np.concatenate([data.images.permute(0, 2, 3, 1).numpy()] * 5)
    np.save(tmp_path / "labels.npy", np.tile(data.labels.numpy(), 5))
    for name in ("fog", "snow", "spatter"):
        np.save(tmp_path / f"{name}.npy", stored if name == "spatter" else 255 - stored)
    record = evaluate(model, data, Protocol(steps=0), corruptions=tmp_path).record
    table = record["corruptions"]["by_severity"]
    assert table["spatter"] == [1.0] * 5 and record["corrupted"]["averaged"] == ["fog", "snow"]
    assert record["corruptions"]["mean"] == pytest.approx((table["fog"][0] + table["snow"][0]) / 2)
