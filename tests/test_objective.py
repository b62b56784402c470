"""The losses against slow loops and known values."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from train.objective import contrastive_loss, pseudo_label_loss


def slow_contrastive(views: Tensor, temperature: float, base_temperature: float) -> float:
    """Every anchor, every positive, one by one."""
    v, n, _ = views.shape
    total = 0.0
    for a in range(v):
        for i in range(n):
            similarity = {
                (b, j): float(views[a, i] @ views[b, j]) / temperature for b in range(v) for j in range(n) if (b, j) != (a, i)
            }
            denominator = sum(math.exp(s) for s in similarity.values())
            log_probabilities = [similarity[b, i] - math.log(denominator) for b in range(v) if b != a]
            total -= sum(log_probabilities) / len(log_probabilities)
    return total / (v * n) * temperature / base_temperature


@pytest.mark.parametrize(("v", "n", "temperature", "base"), [(2, 3, 0.5, 0.07), (3, 4, 0.2, 0.2), (4, 2, 1.0, 0.07)])
def test_contrastive_loss_equals_the_slow_loop(v: int, n: int, temperature: float, base: float) -> None:
    views = F.normalize(torch.randn(v, n, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64), dim=-1)
    loss = contrastive_loss(views, temperature, base)
    assert loss.item() == pytest.approx(slow_contrastive(views, temperature, base), rel=1e-12)


def test_contrastive_loss_of_equal_vectors_is_the_logarithm_of_the_others() -> None:
    views = torch.ones(4, 8, 1)
    assert contrastive_loss(views, 0.5, 0.5).item() == pytest.approx(math.log(31), rel=1e-6)


def test_contrastive_loss_needs_two_views() -> None:
    with pytest.raises(ValueError, match="at least 2 views, got 1"):
        contrastive_loss(torch.ones(1, 4, 2))


def test_losses_stay_in_float32_under_autocast() -> None:
    views = F.normalize(torch.randn(2, 64, 32, generator=torch.Generator().manual_seed(0)), dim=-1)
    labels = torch.arange(64)[:, None] % 5
    logits = [views[0, :, :5]]
    expected = contrastive_loss(views), pseudo_label_loss(logits, labels)
    with torch.autocast("cpu", torch.bfloat16):
        ours = contrastive_loss(views), pseudo_label_loss(logits, labels)
    assert torch.equal(torch.stack(ours), torch.stack(expected))


def test_pseudo_label_loss_averages_over_clusterings() -> None:
    logits = [torch.randn(6, k, generator=torch.Generator().manual_seed(k)) for k in (2, 5)]
    labels = torch.stack([torch.arange(6) % 2, torch.arange(6) % 5], 1)
    each = [F.cross_entropy(z, labels[:, i], reduction="none") for i, z in enumerate(logits)]
    torch.testing.assert_close(pseudo_label_loss(logits, labels), (each[0].mean() + each[1].mean()) / 2)
    torch.testing.assert_close(pseudo_label_loss(logits, labels, "sum"), (each[0].sum() + each[1].sum()) / 2)
