"""Accuracies that are known beforehand, and the probe against scikit-learn."""

import pytest
import timm
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from advcl_hub.data import ImageData, load_data
from advcl_hub.evaluation import PixelSpace, evaluate
from train.probe import fit_linear, linear_probe

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
    result = evaluate(TwoClasses(), data, steps=20, batch_size=3)
    assert (result.standard, result.robust, result.images) == (1.0, 0.6, 10)
    assert evaluate(TwoClasses(), data, eps=0.0, steps=2).robust == 1.0


def test_the_preprocessing_of_the_model_is_inside_the_attack() -> None:
    torch.manual_seed(0)
    model = timm.create_model("resnet8_cifar", num_classes=2).eval()
    model.pretrained_cfg = dict(model.pretrained_cfg, mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.5))  # type: ignore[assignment]
    images = torch.rand(2, 3, 32, 32)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.5, 0.4, 0.3), (0.2, 0.25, 0.5)))
    torch.testing.assert_close(PixelSpace(model)(images), model((images - mean) / std))


def test_repeatable_by_seed_and_empty_data_refused() -> None:
    data = load_data("fake:60", "test", size=16)
    torch.manual_seed(0)
    model = timm.create_model("resnet8_cifar", num_classes=len(data.classes))
    first = evaluate(model, data, steps=3, seed=1)
    torch.manual_seed(9)
    assert evaluate(model, data, steps=3, seed=1) == first
    with pytest.raises(ValueError, match="No images"):
        evaluate(model, data.subset(torch.arange(0)))


def test_linear_fit_equals_scikit_learn() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(200, 5, generator=generator, dtype=torch.float64) * torch.tensor([1, 10, 0.1, 3, 1]) + 2
    labels = (features[:, 0] > 2).long() + (features[:, 1] > 0).long()
    weight, bias = fit_linear(features.float(), labels, 3)
    standardised = ((features - features.mean(0)) / features.std(0)).numpy()
    reference = LogisticRegression(C=1 / (200 * 1e-3), tol=1e-8, max_iter=1000).fit(standardised, labels.numpy())
    ours = torch.softmax(features.float() @ weight.T + bias, 1).double()
    torch.testing.assert_close(ours, torch.from_numpy(reference.predict_proba(standardised)), rtol=0, atol=5e-3)


def test_linear_probe_is_a_timm_classifier_that_learns() -> None:
    data = load_data("digits", "train", size=16)
    torch.manual_seed(0)
    encoder = timm.create_model("resnet8_cifar", num_classes=0)
    probe = linear_probe(encoder, data.subset(torch.arange(600)), "cpu")
    assert encoder.num_classes == 0 and probe.num_classes == 10
    assert evaluate(probe, data.subset(torch.arange(600)), steps=0).standard > 0.6


def test_a_head_that_is_not_linear_is_refused() -> None:
    with pytest.raises(ValueError, match="one Linear layer"):
        linear_probe(timm.create_model("levit_128s", num_classes=0), load_data("fake:20", "train", size=224), "cpu")
