"""The losses against slow loops, a dense reference and known values; what the contrastive loss costs."""

import math
from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from advcl_hub.pretraining import losses
from advcl_hub.pretraining.losses import contrastive_loss, pseudo_label_loss


def unit_vectors(v: int, n: int, d: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return F.normalize(torch.randn(v, n, d, generator=torch.Generator().manual_seed(0), dtype=torch.float64), dim=-1).to(dtype)


def dense_contrastive(views: Tensor, temperature: float, base_temperature: float) -> Tensor:
    """All similarities at once, and autograd."""
    v, n, _ = views.shape
    s = views.flatten(0, 1) @ views.flatten(0, 1).T / temperature
    s = s.masked_fill(torch.eye(v * n, dtype=torch.bool), -torch.inf)
    image = torch.arange(n).repeat(v)
    positive = (image[:, None] == image) & ~torch.eye(v * n, dtype=torch.bool)
    mean = s.log_softmax(1)[positive].view(v * n, v - 1).mean(1)
    return -mean.mean() * temperature / base_temperature


class Operations(TorchDispatchMode):
    """Counts the operations inside a `with` block, and keeps the entries of the largest tensor that one of them made."""

    def __init__(self) -> None:
        super().__init__()
        self.count = Counter[str]()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        self.count[func.overloadpacket.__name__] += 1
        self.largest = max([self.largest, *(t.numel() for t in tree_leaves(made) if isinstance(t, Tensor))])
        return made


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
    views = unit_vectors(v, n, 6)
    loss = contrastive_loss(views, temperature, base)
    assert loss.item() == pytest.approx(slow_contrastive(views, temperature, base), rel=1e-12)


def test_contrastive_loss_of_equal_vectors_is_the_logarithm_of_the_others() -> None:
    views = torch.ones(4, 8, 1)
    assert contrastive_loss(views, 0.5, 0.5).item() == pytest.approx(math.log(31), rel=1e-6)


def test_contrastive_loss_needs_two_views() -> None:
    with pytest.raises(ValueError, match="at least 2 views, got 1"):
        contrastive_loss(torch.ones(1, 4, 2))


@pytest.mark.parametrize("rows", [None, 1, 3, 0], ids=["all rows at once", "one row", "three rows", "less than a row"])
@pytest.mark.parametrize("n", [1, 2, 5, 6])
@pytest.mark.parametrize("v", [2, 3, 4])
def test_contrastive_loss_and_gradient_equal_autograd(
    v: int, n: int, rows: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The closed form, whatever number of rows is made at a time; most of these numbers do not divide."""
    if rows is not None:
        monkeypatch.setattr(losses, "CHUNK", max(1, rows * v * n + v * n - 1 if rows else 0))
    data = unit_vectors(v, n, 6)
    ours, reference = data.clone().requires_grad_(), data.clone().requires_grad_()
    loss, expected = contrastive_loss(ours, 0.2, 0.07), dense_contrastive(reference, 0.2, 0.07)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-13)
    (3 * loss).backward()
    (3 * expected).backward()
    assert ours.grad is not None and reference.grad is not None
    torch.testing.assert_close(ours.grad, reference.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("chunk", [2**24, 7 * 12])
def test_contrastive_gradient_equals_finite_differences(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "CHUNK", chunk)
    views = [v.clone().requires_grad_() for v in unit_vectors(3, 4, 3)]
    assert torch.autograd.gradcheck(lambda *v: contrastive_loss(v, 0.3, 0.1), views)


@pytest.mark.parametrize("wanted", [(0,), (3,), (1, 3), (0, 1, 2, 3)])
def test_only_the_views_that_want_a_gradient_cost_one(wanted: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """In the attack the clean views are constant: they get None, and no matrix product is made for them."""
    v, n, rows = 4, 5, 2
    monkeypatch.setattr(losses, "CHUNK", rows * v * n)
    data = unit_vectors(v, n, 6)
    views = [x.clone().requires_grad_(i in wanted) for i, x in enumerate(data)]
    with Operations() as forward:
        loss = contrastive_loss(views)
    with Operations() as backward:
        loss.backward()
    assert forward.count["mm"] == math.ceil(v * n / rows)
    assert backward.count["mm"] == len(wanted) * 2 * math.ceil(n / rows)
    whole = data.clone().requires_grad_()
    dense_contrastive(whole, 0.5, 0.07).backward()
    assert whole.grad is not None
    for i, view in enumerate(views):
        if i in wanted:
            torch.testing.assert_close(view.grad, whole.grad[i], rtol=1e-10, atol=1e-12)
        else:
            assert view.grad is None


def test_contrastive_gradient_cannot_be_differentiated_again() -> None:
    """Better an error than the gradient of a constant."""
    views = unit_vectors(2, 3, 4).requires_grad_()
    for loss, said in ((contrastive_loss(views), "does not require grad"), (contrastive_loss(views).square(), "once_diff")):
        (gradient,) = torch.autograd.grad(loss, views, create_graph=True)
        with pytest.raises(RuntimeError, match=said):
            gradient.square().sum().backward()


@pytest.mark.parametrize("n", [64, 128, 256])
def test_contrastive_memory_is_linear_in_the_batch(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor is larger than a chunk, or than the projections: all similarities together are 65 to 1024 thousand."""
    v, d, chunk = 4, 32, 2**12
    monkeypatch.setattr(losses, "CHUNK", chunk)
    views = unit_vectors(v, n, d, torch.float32).requires_grad_()
    with Operations() as operations:
        contrastive_loss(views).backward()
    assert views.grad is not None
    assert operations.largest <= max(chunk, v * n * d)
    rows = chunk // (v * n)  # and the chunk is used: no more products than needed
    assert operations.count["mm"] == math.ceil(v * n / rows) + 2 * v * math.ceil(n / rows)


def test_losses_stay_in_float32_under_autocast() -> None:
    """In backward too, which may run inside autocast or outside."""
    data = unit_vectors(2, 64, 32, torch.float32)
    labels = torch.arange(64)[:, None] % 5

    def losses_and_gradient(forward: bool, backward: bool) -> Tensor:
        views = data.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=forward):
            contrastive, pseudo_label = contrastive_loss(views), pseudo_label_loss([views[0, :, :5]], labels)
            total = contrastive + pseudo_label
        with torch.autocast("cpu", torch.bfloat16, enabled=backward):
            total.backward()
        assert views.grad is not None and contrastive.dtype == pseudo_label.dtype == views.grad.dtype == torch.float32
        return torch.cat([torch.stack([contrastive, pseudo_label]).detach(), views.grad.flatten()])

    expected = losses_and_gradient(False, False)
    assert torch.equal(losses_and_gradient(True, False), expected)
    assert torch.equal(losses_and_gradient(True, True), expected)


def test_contrastive_loss_of_bfloat16_is_computed_in_float32() -> None:
    views = unit_vectors(3, 16, 8).bfloat16().requires_grad_()
    wide = views.detach().float().requires_grad_()
    loss, expected = contrastive_loss(views), contrastive_loss(wide)
    assert loss.dtype == torch.float32 and torch.equal(loss, expected)
    loss.backward()
    expected.backward()
    assert views.grad is not None and wide.grad is not None
    assert torch.equal(views.grad, wide.grad.bfloat16())


def test_pseudo_label_loss_averages_over_clusterings() -> None:
    logits = [torch.randn(6, k, generator=torch.Generator().manual_seed(k)) for k in (2, 5)]
    labels = torch.stack([torch.arange(6) % 2, torch.arange(6) % 5], 1)
    each = [F.cross_entropy(z, labels[:, i], reduction="none") for i, z in enumerate(logits)]
    torch.testing.assert_close(pseudo_label_loss(logits, labels), (each[0].mean() + each[1].mean()) / 2)
    torch.testing.assert_close(pseudo_label_loss(logits, labels, "sum"), (each[0].sum() + each[1].sum()) / 2)
