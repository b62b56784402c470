"""Properties of projections, steps and starts: in the ball and in [0, 1], whatever shape, eps and dtype."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from advcl_hub.attacks import NORMS, Norm, ascend, distance, dlr, excess, iterates, margin, project, seeded_start
from tests.support import properties  # noqa: F401

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
norms, dtypes, seeds = st.sampled_from(NORMS), st.sampled_from(DTYPES), st.integers(0, 2**32 - 1)
radii = st.sampled_from([0.0, 1e-6, 8 / 255, 0.5, 1.0]) | st.floats(0, 1)
shapes = st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.integers(1, 4))


def pixels(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Images in [0, 1], of which a part lies at the ends."""
    values = 1.5 * torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) - 0.25
    return values.clamp(0, 1).to(dtype)


def rounding(dtype: torch.dtype, values: int = 1) -> float:
    """How far sums of values up to 1 may be off, of a norm over so many of them."""
    return 4 * torch.finfo(dtype).eps * math.sqrt(values)


@given(shapes, seeds, radii, norms, dtypes, st.sampled_from([1e-8, 0.05, 1.0, 100.0, 3e4]))
def test_a_projection_is_in_the_ball_and_in_the_range(
    shape: tuple[int, ...], seed: int, eps: float, norm: Norm, dtype: torch.dtype, scale: float
) -> None:
    images = pixels(shape, seed, dtype)
    moved = images + (scale * (pixels(shape, seed + 1) - 0.5)).to(dtype)
    found = project(moved, images, eps, norm)
    assert found.dtype == dtype and found.shape == images.shape and found.isfinite().all()
    assert not excess(found).any()
    assert distance(found.double(), images.double(), norm).max() <= eps + rounding(dtype, images[0].numel())
    torch.testing.assert_close(project(found, images, eps, norm), found, rtol=0, atol=rounding(dtype))


@given(shapes, seeds, radii, norms, st.sampled_from([0.01, 0.3, 2.0]))
def test_a_projection_equals_the_slow_one(shape: tuple[int, ...], seed: int, eps: float, norm: Norm, scale: float) -> None:
    images = pixels(shape, seed)
    moved = images + scale * (pixels(shape, seed + 1) - 0.5)
    found = project(moved, images, eps, norm)
    for ours, there, centre in zip(found, moved, images, strict=True):
        pairs = list(zip(there.flatten().tolist(), centre.flatten().tolist(), strict=True))
        length = math.sqrt(sum((a - b) ** 2 for a, b in pairs))
        if norm == "Linf":
            slow = [min(max(a, b - eps, 0.0), b + eps, 1.0) for a, b in pairs]
        else:
            slow = [min(max(b + (a - b) * (eps / length if length > eps else 1), 0.0), 1.0) for a, b in pairs]
        torch.testing.assert_close(ours.flatten(), torch.tensor(slow, dtype=torch.float64), rtol=0, atol=1e-12)


@given(shapes, seeds, radii, norms)
def test_what_is_inside_stays_where_it_is(shape: tuple[int, ...], seed: int, eps: float, norm: Norm) -> None:
    images = pixels(shape, seed)
    share = eps / (1 if norm == "Linf" else math.sqrt(images[0].numel()))
    inside = (images + 0.999 * share * (2 * pixels(shape, seed + 1) - 1)).clamp(0, 1)
    torch.testing.assert_close(project(inside, images, eps, norm), inside, rtol=0, atol=1e-15)


@given(shapes, seeds, norms, dtypes, st.sampled_from([0.0, 1e-200, 1e-30, 1.0, 1e4, 1e200]), st.floats(0, 1))
def test_a_step_has_its_length_and_goes_up(
    shape: tuple[int, ...], seed: int, norm: Norm, dtype: torch.dtype, scale: float, length: float
) -> None:
    images = torch.zeros(shape, dtype=dtype)
    gradient = (scale * (pixels(shape, seed) - 0.5)).to(dtype)
    gradient[0, 0, 0, 0] = math.nan
    step = ascend(images, gradient, length, norm)
    assert step.isfinite().all() and step[0, 0, 0, 0] == 0
    assert (step * gradient.nan_to_num().sign() >= 0).all()
    steep = torch.stack([each.nan_to_num().any() for each in gradient])
    expected = torch.where(steep, length, 0.0).double()
    torch.testing.assert_close(distance(step.double(), images.double(), norm), expected, rtol=rounding(dtype), atol=1e-4)


@given(shapes, seeds, radii, norms, st.integers(0, 4))
def test_every_iterate_is_in_the_ball(shape: tuple[int, ...], seed: int, eps: float, norm: Norm, steps: int) -> None:
    images, weights = pixels(shape, seed), pixels(shape, seed + 1) - 0.5
    start = seeded_start(images, eps, norm, [(seed, row) for row in range(len(images))])
    run = list(iterates(lambda z: (z * weights).sum(), images, eps=eps, step_size=eps / 2, steps=steps, norm=norm, start=start))
    assert len(run) == steps + 1
    for earlier, found in itertools.pairwise(run):
        assert distance(found, images, norm).max() <= eps + 1e-12 and not excess(found).any() and not found.requires_grad
        assert norm == "L2" or ((found - earlier) * weights).sum() >= -1e-12  # of a linear loss every step is a gain


@given(shapes, seeds, radii, norms, st.permutations(range(3)))
def test_a_start_is_its_own_key_s_and_in_the_ball(
    shape: tuple[int, ...], seed: int, eps: float, norm: Norm, order: list[int]
) -> None:
    images = pixels((3, *shape[1:]), seed)
    keys = [(seed, 0, row) for row in range(3)]
    found = seeded_start(images, eps, norm, keys)
    assert distance(found, images, norm).max() <= eps + 1e-12 and not excess(found).any()
    assert torch.equal(seeded_start(images[order], eps, norm, [keys[row] for row in order]), found[order])


@given(st.integers(1, 4), st.integers(3, 6), seeds, st.floats(0.1, 10), st.floats(-5, 5))
def test_margin_and_dlr_equal_the_slow_ones(count: int, classes: int, seed: int, scale: float, shift: float) -> None:
    logits = 4 * pixels((count, classes), seed) + torch.arange(classes) / 100  # no ties
    labels = torch.randint(classes, (count,), generator=torch.Generator().manual_seed(seed))
    margins, ratios = margin(logits, labels), dlr(logits, labels)
    for row, (values, label) in enumerate(zip(logits.tolist(), labels.tolist(), strict=True)):
        best = max(value for place, value in enumerate(values) if place != label)
        first, _, third = sorted(values, reverse=True)[:3]
        assert margins[row] == pytest.approx(best - values[label], abs=1e-9)
        assert ratios[row] == pytest.approx((best - values[label]) / (first - third), rel=1e-6, abs=1e-9)
    assert np.allclose(dlr(scale * logits + shift, labels), ratios, atol=1e-6)
    assert torch.equal(margins > 0, logits.argmax(1) != labels)
