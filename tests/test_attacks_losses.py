"""The losses that an attack raises, against slow ones row by row and against pyautoattack."""

import math
from collections.abc import Callable

import pytest
import torch
from pyautoattack.autopgd_base import APGDAttack
from torch import Tensor, nn

from advcl_hub.attacks import (
    LOSSES,
    cross_entropy,
    dlr,
    margin,
)


def slow_cross_entropy(row: list[float], label: int) -> float:
    top = max(row)
    return top + math.log(sum(math.exp(z - top) for z in row)) - row[label]


def slow_margin(row: list[float], label: int) -> float:
    return max(z for k, z in enumerate(row) if k != label) - row[label]


def slow_dlr(row: list[float], label: int) -> float:
    best = sorted(row, reverse=True)
    return slow_margin(row, label) / (best[0] - best[2] + 1e-12)


SLOW: dict[str, Callable[[list[float], int], float]] = {"ce": slow_cross_entropy, "margin": slow_margin, "dlr": slow_dlr}


TIES = [[2, 2, 1, 0, -1], [2, 1, 1, 1, 0], [1, 3, 2, 0, 2], [2, 2, 2, 1, 0], [0, 0, 0, 0, 0], [-900, 900, 0, 5, 5]]


def rows(ties: bool = True) -> tuple[Tensor, Tensor]:
    """Logits (N, 5), some with ties, each row once with each label."""
    logits = 3 * torch.randn(20, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logits = torch.cat([logits, torch.tensor(TIES, dtype=torch.float64)]) if ties else logits
    return logits.repeat_interleave(5, 0), torch.arange(5).repeat(len(logits))


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_equals_a_slow_one_row_by_row(name: str) -> None:
    logits, labels = rows()
    slow = [SLOW[name](row, label) for row, label in zip(logits.tolist(), labels.tolist(), strict=True)]
    assert LOSSES[name](logits, labels).tolist() == pytest.approx(slow, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("loss", [margin, dlr])
def test_margin_and_dlr_are_positive_just_where_misclassified(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    logits, labels = rows(ties=False)
    assert torch.equal(loss(logits, labels) > 0, logits.argmax(1) != labels)


def test_cross_entropy_and_margin_of_two_classes_agree() -> None:
    logits, labels = torch.tensor([[2.0, -1.0], [2.0, -1.0]]), torch.tensor([0, 1])
    torch.testing.assert_close(margin(logits, labels), torch.tensor([-3.0, 3.0]))
    torch.testing.assert_close(cross_entropy(logits, labels), nn.functional.softplus(margin(logits, labels)))


@pytest.mark.parametrize(("scale", "shift"), [(1.0, 50.0), (1e-3, 0.0), (1e4, 0.0), (20.0, -7.0)])
def test_dlr_does_not_change_with_shift_and_scale(scale: float, shift: float) -> None:
    logits, labels = rows(ties=False)
    torch.testing.assert_close(dlr(scale * logits + shift, labels), dlr(logits, labels), rtol=1e-6, atol=0)


def test_dlr_of_two_classes_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 3 classes, the model has 2"):
        dlr(torch.zeros(4, 2), torch.zeros(4, dtype=torch.long))
    assert dlr(torch.tensor([[3.0, 2.0, 1.0]]), torch.tensor([0])).item() == pytest.approx(-0.5)


def test_dlr_and_its_gradient_equal_those_of_pyautoattack() -> None:
    theirs = APGDAttack(None, eps=8 / 255).dlr_loss
    logits, labels = rows()
    torch.testing.assert_close(dlr(logits, labels), theirs(logits, labels), rtol=1e-12, atol=0)
    logits, labels = rows(ties=False)
    logits.requires_grad_()
    ours, expected = (torch.autograd.grad(loss(logits, labels).sum(), logits)[0] for loss in (dlr, theirs))
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-14)
