"""Accuracies that are known beforehand, and the probe against scikit-learn."""

import pytest
import timm
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from advcl_hub.data import ImageData, load_data
from advcl_hub.evaluation import PixelSpace, robustness
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
