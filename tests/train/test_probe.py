"""The linear probe: scikit-learn's optimum, and a timm classifier that is the fit on the features."""

import pytest
import timm
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from advcl_hub.data import load_data
from advcl_hub.evaluation import robustness
from advcl_hub.finetuning.features import extract_features
from advcl_hub.models.pixel_space import PixelSpace
from train.probe import fit_linear, linear_probe


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
