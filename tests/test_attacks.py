"""PGD where the best perturbation is known, and against a slow loop."""

import pytest
import torch
from torch import Tensor

from advcl_hub.attacks import pgd, project, uniform_start

EPS, STEP = 8 / 255, 2 / 255


def images(n: int = 3) -> Tensor:
    return torch.rand(n, 1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_linear_loss_reaches_the_optimal_corner() -> None:
    x = images()
    w = torch.randn(1, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    adversarial = pgd(lambda z: (z * w).sum(), x, eps=EPS, step_size=STEP, steps=10)
    assert adversarial.dtype == torch.float64 and not adversarial.requires_grad
    torch.testing.assert_close(adversarial, (x + EPS * w.sign()).clamp(0, 1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_equals_a_slow_loop_from_an_unclamped_start(steps: int) -> None:
    x = images()
    start = x + 0.9 * EPS * (2 * torch.rand(x.shape, generator=torch.Generator().manual_seed(2), dtype=x.dtype) - 1)
    ours = pgd(lambda z: z.sin().pow(3).sum(), x, eps=EPS, step_size=STEP, steps=steps, start=start)
    slow = start.clone().flatten()
    for _ in range(steps):
        for i, (value, centre) in enumerate(zip(slow.tolist(), x.flatten().tolist(), strict=True)):
            v = torch.tensor(value, dtype=x.dtype)
            slope = 3 * v.sin() ** 2 * v.cos()
            moved = value + STEP * float(slope.sign())
            slow[i] = min(max(moved, centre - EPS, 0.0), centre + EPS, 1.0)
    torch.testing.assert_close(ours.flatten(), slow, rtol=0, atol=1e-12)


def test_the_start_is_taken_as_it_is_and_every_step_projected() -> None:
    x = torch.tensor([0.0, 0.01, 0.5, 0.99, 1.0], dtype=torch.float64).expand(1, 1, 4, 5)
    start = x + 3 * EPS  # outside the ball, and partly outside [0, 1]
    seen: list[Tensor] = []

    def loss(z: Tensor) -> Tensor:
        seen.append(z.detach())
        return z.square().sum()

    assert torch.equal(pgd(loss, x, eps=EPS, step_size=STEP, steps=0, start=start), start) and not seen
    last = pgd(loss, x, eps=EPS, step_size=STEP, steps=3, start=start)
    assert len(seen) == 3 and torch.equal(seen[0], start)
    for iterate in [*seen[1:], last]:
        assert (iterate - x).abs().max() <= EPS + 1e-15 and iterate.min() >= 0 and iterate.max() <= 1


def test_uniform_start_leaves_the_range_of_pixels() -> None:
    torch.manual_seed(0)
    assert uniform_start(torch.zeros(100), EPS).min() < 0 and uniform_start(torch.ones(100), EPS).max() > 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_step_is_a_step_along_the_sign_also_under_no_grad(dtype: torch.dtype) -> None:
    x = images().to(dtype)
    w = torch.randn(1, 4, 4, generator=torch.Generator().manual_seed(1)).to(dtype)
    with torch.no_grad():
        adversarial = pgd(lambda z: (z * w).sum(), x, eps=EPS, step_size=STEP, steps=1, start=x)
    assert adversarial.dtype == dtype
    torch.testing.assert_close(adversarial, (x + STEP * w.sign()).clamp(0, 1), rtol=0, atol=1e-7)


def test_default_start_stays_in_the_ball_and_in_range() -> None:
    x = images(50)
    torch.manual_seed(0)
    start = pgd(lambda z: z.sum(), x, eps=EPS, step_size=STEP, steps=0)
    assert (start - x).abs().max() <= EPS and start.min() >= 0 and start.max() <= 1
    assert (start != x).double().mean() > 0.99
    noise = uniform_start(x, EPS) - x
    assert (
        noise.abs().max() <= EPS + 1e-15
        and abs(noise.mean()) < EPS / 10
        and noise.std() == pytest.approx(EPS / 3**0.5, rel=0.1)
    )


def test_project_prefers_the_box_where_both_bind() -> None:
    x = torch.tensor([0.0, 0.5, 1.0])
    torch.testing.assert_close(project(x + 1, x, 0.1), torch.tensor([0.1, 0.6, 1.0]))
    torch.testing.assert_close(project(x - 1, x, 0.1), torch.tensor([0.0, 0.4, 0.9]))


def test_parameters_gather_no_gradient() -> None:
    layer = torch.nn.Linear(16, 2).double()
    pgd(lambda z: layer(z.flatten(1)).sum(), images(), eps=EPS, step_size=STEP, steps=2)
    assert all(p.grad is None for p in layer.parameters())
