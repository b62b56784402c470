"""A linear probe: how good an encoder's features are, decided by a convex fit that leaves nothing to tune."""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from advcl_hub.data import ImageData
from advcl_hub.finetuning.encoder import linear_head
from advcl_hub.finetuning.features import extract_features

_L2 = 1e-3  # on weights of standardised features; one value for every encoder and data set


def fit_linear(features: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Multinomial logistic regression with a small l2 penalty, by full-batch L-BFGS: deterministic, to the optimum.

    Args:
        features: float (N, D).
        labels: int64 (N,) below `num_classes`.
        num_classes: number of classes C.

    Returns:
        Weight (C, D) and bias (C,) for the features as given.
    """
    mean, std = features.mean(0), features.std(0).clamp_min(1e-6)
    x = (features - mean) / std
    weight = torch.zeros(num_classes, x.shape[1], device=x.device, dtype=x.dtype, requires_grad=True)
    bias = torch.zeros(num_classes, device=x.device, dtype=x.dtype, requires_grad=True)
    solver = torch.optim.LBFGS([weight, bias], max_iter=300, history_size=20, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        solver.zero_grad()
        loss = F.cross_entropy(F.linear(x, weight, bias), labels) + 0.5 * _L2 * weight.square().sum()
        loss.backward()
        return loss

    solver.step(closure)
    scaled = weight.detach() / std
    return scaled, bias.detach() - scaled @ mean


def with_linear_head(encoder: nn.Module, num_classes: int) -> tuple[nn.Module, nn.Linear]:
    """A copy of a timm encoder with a new classifier, and that classifier.

    Raises:
        ValueError: the model's classifier is not one linear layer.
    """
    classifier = copy.deepcopy(encoder)
    classifier.reset_classifier(num_classes)  # type: ignore[operator]
    try:
        return classifier, linear_head(classifier)
    except ValueError as error:
        raise ValueError(f"{error} To train without probes, set judge.every=0.") from None


def linear_probe(encoder: nn.Module, data: ImageData, device: torch.device | str) -> nn.Module:
    """A timm classifier: a copy of `encoder` whose new linear head is fitted to its fixed features of `data`.

    Raises:
        ValueError: the model's classifier is not one linear layer.
    """
    classifier, head = with_linear_head(encoder, len(data.classes))
    weight, bias = fit_linear(extract_features(encoder, data, device), data.labels.to(device), len(data.classes))
    with torch.no_grad():
        head.weight.copy_(weight)
        head.bias.copy_(bias)
    return classifier.to(device).eval()
