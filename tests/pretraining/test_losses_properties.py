"""Properties of the losses: equal to slow ones, whatever the shapes, and blind to what must not matter."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from advcl_hub.pretraining import losses
from advcl_hub.pretraining.losses import contrastive_loss, cosine_similarity, pseudo_label_loss
from tests.support import properties  # noqa: F401

shapes = st.tuples(st.integers(2, 4), st.integers(1, 4), st.integers(1, 5))
seeds, temperatures = st.integers(0, 2**32 - 1), st.floats(0.05, 2)


def units(shape: tuple[int, ...], seed: int) -> Tensor:
    return F.normalize(torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=-1)


def slow(views: Tensor, temperature: float, base: float) -> Tensor:
    """The mean over all anchors and their positives of -log softmax, written out."""
    v, n, _ = views.shape
    flat = [(view, image, views[view, image]) for view in range(v) for image in range(n)]
    terms = []
    for view, image, anchor in flat:
        others = {(w, i): anchor @ key / temperature for w, i, key in flat if (w, i) != (view, image)}
        total = torch.stack(list(others.values())).logsumexp(0)
        terms += [total - others[w, image] for w in range(v) if w != view]
    return torch.stack(terms).mean() * temperature / base


@given(shapes, seeds, temperatures, st.sampled_from([1, 7, 2**22]))
def test_the_contrastive_loss_and_its_gradient_equal_the_slow_ones(
    shape: tuple[int, int, int], seed: int, temperature: float, chunk: int
) -> None:
    views = units(shape, seed).requires_grad_()
    reference = slow(views, temperature, 0.07)
    (wanted,) = torch.autograd.grad(reference, views)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(losses, "CHUNK", chunk)
        found = contrastive_loss(views, temperature)
        (gradient,) = torch.autograd.grad(found, views)
    torch.testing.assert_close(found, reference, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(gradient, wanted, rtol=1e-7, atol=1e-9)


@given(shapes, seeds)
def test_the_order_of_views_and_images_and_a_rotation_do_not_matter(shape: tuple[int, int, int], seed: int) -> None:
    views = units(shape, seed)
    found = contrastive_loss(views)
    flipped = views.flip(0, 1)
    rotation = torch.linalg.qr(units((shape[2], shape[2]), seed + 1)).Q
    torch.testing.assert_close(contrastive_loss(flipped), found, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(contrastive_loss(views @ rotation), found, rtol=1e-9, atol=1e-9)


@given(st.lists(st.integers(2, 6), min_size=1, max_size=3), st.integers(1, 5), seeds, st.sampled_from(["mean", "sum"]))
def test_the_pseudo_label_loss_equals_the_slow_one(ks: list[int], count: int, seed: int, reduction: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = [3 * torch.randn(count, k, generator=generator, dtype=torch.float64) for k in ks]
    labels = torch.stack([torch.randint(k, (count,), generator=generator) for k in ks], dim=1)
    terms = []
    for z, column in zip(logits, labels.T.tolist(), strict=True):
        rows = [math.log(sum(map(math.exp, row))) - row[label] for row, label in zip(z.tolist(), column, strict=True)]
        terms.append(sum(rows) / (count if reduction == "mean" else 1))
    assert pseudo_label_loss(logits, labels, reduction).item() == pytest.approx(sum(terms) / len(terms), rel=1e-9, abs=1e-12)


@given(st.integers(1, 5), st.integers(1, 6), seeds, st.floats(0.1, 100), st.sampled_from([torch.float64, torch.bfloat16]))
def test_a_cosine_does_not_see_lengths(count: int, width: int, seed: int, scale: float, dtype: torch.dtype) -> None:
    first, second = units((2, count, width), seed).to(dtype)
    found = cosine_similarity(first, second)
    assert found.dtype == torch.promote_types(dtype, torch.float32) and found.abs().max() <= 1 + 1e-6
    expected = (F.normalize(first.double(), dim=1) * F.normalize(second.double(), dim=1)).sum(1)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(cosine_similarity(first.double() * scale, second.double()), expected, rtol=0, atol=1e-7)
