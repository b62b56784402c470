"""PGD where the best perturbation is known, against slow loops, and against foolbox and pyautoattack; losses and starts."""

import itertools
import math
from collections.abc import Sequence

import foolbox
import pytest
import torch
from foolbox.models.pytorch import PyTorchModel
from pyautoattack.autopgd_base import APGDAttack
from torch import Tensor, nn

from advcl_hub.attacks import (
    LOSSES,
    NORMS,
    Norm,
    ascend,
    distance,
    iterates,
    pgd,
    project,
    seeded_start,
    uniform_start,
)
from tests.support.tiny_classifiers import TinyNet, labelled_by

EPS, STEP = 8 / 255, 2 / 255
both_norms = pytest.mark.parametrize("norm", NORMS)


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


# The l2 norm, and what holds in both norms.


def at_the_bounds(n: int = 3) -> Tensor:
    """Images of which about 40 % of the pixels are 0 or 1."""
    x = images(n)
    return torch.where(x < 0.2, 0.0, torch.where(x > 0.8, 1.0, x))


def direction(seed: int = 1) -> Tensor:
    w = torch.randn(1, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return w / w.square().sum().sqrt()


def test_distance_is_that_of_each_image() -> None:
    x = torch.rand(2, 3, 2, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    delta = torch.tensor([[3, 0, 0, -4, 0, 0], [0, 2, -1, 0, 0, 2]]).view(x.shape)
    torch.testing.assert_close(distance(x + delta, x, "Linf"), torch.tensor([4.0, 2.0], dtype=x.dtype))
    torch.testing.assert_close(distance(x + delta, x, "L2"), torch.tensor([5.0, 3.0], dtype=x.dtype))
    torch.testing.assert_close(distance(x, x + delta), torch.tensor([4.0, 2.0], dtype=x.dtype))


@pytest.mark.parametrize("scale", [1e-15, 1.0, 1e15])
def test_an_l2_step_goes_along_the_gradient_whatever_its_length(scale: float) -> None:
    x = images().float()
    gradient = scale * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    gradient[1] *= 1000
    step = ascend(x, gradient, STEP, "L2") - x
    for moved, g in zip(step.double(), gradient.double(), strict=True):
        torch.testing.assert_close(moved, STEP * g / g.square().sum().sqrt(), rtol=0, atol=1e-7)


def test_l2_project_goes_to_the_ball_and_then_to_the_box() -> None:
    x = torch.tensor([[0.5, 0.5], [0.5, 1.0], [0.0, 0.5]], dtype=torch.float64).view(3, 1, 1, 2)
    far = x + torch.tensor([[3.0, -4.0], [3.0, 4.0], [-0.4, 0.3]], dtype=torch.float64).view(3, 1, 1, 2)
    expected = torch.tensor([[0.8, 0.1], [0.8, 1.0], [0.0, 0.8]], dtype=torch.float64).view(3, 1, 1, 2)
    torch.testing.assert_close(project(far, x, 0.5, "L2"), expected, rtol=0, atol=1e-12)


@both_norms
def test_project_keeps_points_that_are_inside(norm: Norm) -> None:
    x = 0.2 + 0.6 * images()
    for part in (0, 0.5, 0.999):
        inside = x + part * 0.1 * (direction() if norm == "L2" else direction().sign())
        torch.testing.assert_close(project(inside, x, 0.1, norm), inside, rtol=0, atol=1e-15)


@pytest.mark.parametrize("from_the_image", [True, False])
def test_linear_loss_reaches_the_optimum_of_the_l2_ball(from_the_image: bool) -> None:
    x, w, eps = 0.3 + 0.4 * images(), direction(), 0.25
    start, steps, step = (x, 4, eps / 4) if from_the_image else (None, 60, eps)
    adversarial = pgd(lambda z: (7 * z * w).sum(), x, eps=eps, step_size=step, steps=steps, norm="L2", start=start)
    torch.testing.assert_close(adversarial, x + eps * w, rtol=0, atol=1e-12)


@pytest.mark.parametrize("steps", [0, 1, 3, 8])
def test_l2_equals_a_slow_loop_image_by_image(steps: int) -> None:
    x, eps, step = at_the_bounds(), 0.3, 0.11
    ours = pgd(lambda z: z.sin().pow(3).sum() - z.sum() / 2, x, eps=eps, step_size=step, steps=steps, norm="L2", start=x)
    for centre, found in zip(x.flatten(1).tolist(), ours.flatten(1).tolist(), strict=True):
        slow = list(centre)
        for _ in range(steps):
            slope = [3 * math.sin(v) ** 2 * math.cos(v) - 0.5 for v in slow]
            length = math.sqrt(sum(s * s for s in slope))
            delta = [v + step * s / length - c for v, s, c in zip(slow, slope, centre, strict=True)]
            far = math.sqrt(sum(d * d for d in delta))
            shrink = eps / far if far > eps else 1.0
            slow = [min(max(c + shrink * d, 0.0), 1.0) for c, d in zip(centre, delta, strict=True)]
        assert found == pytest.approx(slow, rel=0, abs=1e-12)


@both_norms
@pytest.mark.parametrize("given", [True, False])
def test_every_iterate_is_in_the_ball_and_in_range_where_the_bounds_bind(norm: Norm, given: bool) -> None:
    x, eps, w = at_the_bounds(20), 0.2, direction()
    torch.manual_seed(0)
    found = list(iterates(lambda z: (z * w).sum(), x, eps=eps, step_size=0.15, steps=6, norm=norm, start=x if given else None))
    for adversarial in found:
        assert distance(adversarial, x, norm).max() <= eps + 1e-12 and adversarial.min() >= 0 and adversarial.max() <= 1
    assert distance(found[-1], x, norm).max() > 0.9 * eps
    assert (found[-1] == x)[((x == 0) & (w < 0)) | ((x == 1) & (w > 0))].sum() > 20 or not given, "no bound binds"


@both_norms
def test_iterates_are_the_start_and_each_step_and_pgd_returns_the_last(norm: Norm) -> None:
    x = at_the_bounds()
    start = seeded_start(x, EPS, norm, [(i,) for i in range(3)])

    def loss(z: Tensor) -> Tensor:
        return z.sin().pow(3).sum()

    found = list(iterates(loss, x, eps=EPS, step_size=STEP, steps=4, norm=norm, start=start))
    assert len(found) == 5 and torch.equal(found[0], start) and not any(f.requires_grad for f in found)
    for steps, iterate in enumerate(found):
        assert torch.equal(iterate, pgd(loss, x, eps=EPS, step_size=STEP, steps=steps, norm=norm, start=start))
    assert all(distance(a, b, norm).min() > 0 for a, b in itertools.pairwise(found))


@both_norms
def test_a_ball_of_radius_0_is_the_image(norm: Norm) -> None:
    x = at_the_bounds()
    assert torch.equal(seeded_start(x, 0, norm, [(i,) for i in range(3)]), x)
    for start in (x, None):
        assert torch.equal(pgd(lambda z: z.square().sum(), x, eps=0, step_size=STEP, steps=2, norm=norm, start=start), x)


@both_norms
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_image_without_gradient_stays_and_the_others_move(norm: Norm, dtype: torch.dtype) -> None:
    x = images().to(dtype)
    used = torch.tensor([1, 0, 1], dtype=dtype).view(3, 1, 1, 1)
    adversarial = pgd(lambda z: (used * z.square()).sum(), x, eps=EPS, step_size=STEP, steps=6, norm=norm, start=x)
    assert torch.equal(adversarial[1], x[1])
    assert distance(adversarial, x, norm)[[0, 2]].min() > 0.9 * EPS
    assert torch.equal(pgd(lambda z: 0 * z.sum(), x, eps=EPS, step_size=STEP, steps=3, norm=norm, start=x), x)


@both_norms
def test_each_image_is_attacked_on_its_own_whatever_the_leading_dimensions(norm: Norm) -> None:
    x = at_the_bounds(6)
    start = seeded_start(x, EPS, norm, [(i,) for i in range(6)])
    weight = torch.tensor([1e-3, 1, 1e3, 1, 1, 10], dtype=x.dtype).view(6, 1, 1, 1)

    def attack(x: Tensor, start: Tensor, weight: Tensor) -> Tensor:
        return pgd(lambda z: (weight * z.sin().pow(3)).sum(), x, eps=EPS, step_size=STEP, steps=6, norm=norm, start=start)

    together = attack(x, start, weight)
    alone = torch.stack([attack(*image) for image in zip(x, start, weight, strict=True)])
    views = attack(*(t.unflatten(0, (2, 3)) for t in (x, start, weight))).flatten(0, 1)
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-14)
    torch.testing.assert_close(together, views, rtol=0, atol=1e-14)


# Losses.


# Random starts.


def noise(shape: Sequence[int], n: int, norm: Norm) -> Tensor:
    """The noise of n keys in a ball of radius 1, where the pixel bounds are far."""
    x = torch.full((n, *shape), 0.5, dtype=torch.float64)
    return (seeded_start(x, 0.1, norm, [(0, i) for i in range(n)]) - x) / 0.1


@both_norms
def test_the_start_of_an_image_depends_on_its_key_alone(norm: Norm) -> None:
    x, keys = at_the_bounds(5), [(3, 0, 1000 + i) for i in range(5)]
    starts = seeded_start(x, 0.1, norm, keys)
    state = torch.get_rng_state()
    torch.manual_seed(99)
    order = [4, 2, 0]
    assert torch.equal(seeded_start(x[order], 0.1, norm, [keys[i] for i in order]), starts[order])
    assert torch.equal(seeded_start(x[1:2], 0.1, norm, [keys[1]]), starts[1:2])
    torch.testing.assert_close(seeded_start(x.float(), 0.1, norm, keys), starts.float(), rtol=0, atol=1e-7)
    torch.set_rng_state(state)
    seeded_start(x, 0.1, norm, keys)
    assert torch.equal(torch.get_rng_state(), state), "it drew from the generator of the training"


@both_norms
def test_other_keys_give_other_starts(norm: Norm) -> None:
    x = torch.full((27, 1, 4, 4), 0.5)
    starts = seeded_start(x, 0.1, norm, list(itertools.product((0, 1, 65536), repeat=3)))
    for a, b in itertools.combinations(starts, 2):
        assert (a - b).abs().gt(1e-6).double().mean() > 0.9


@both_norms
def test_starts_are_in_the_ball_and_in_range_where_the_bounds_bind(norm: Norm) -> None:
    x = at_the_bounds(50)
    starts = seeded_start(x, 0.5, norm, [(i,) for i in range(50)])
    assert starts.dtype == x.dtype and starts.min() == 0 and starts.max() == 1
    assert 0.3 < distance(starts, x, norm).max() <= 0.5


def test_linf_starts_are_uniform_in_the_cube() -> None:
    z = noise((3, 8, 8), 200, "Linf")
    assert z.abs().max() <= 1 + 1e-12 and abs(z.mean()) < 0.02
    assert z.std() == pytest.approx(1 / 3**0.5, rel=0.01)
    assert (z.abs() < 0.5).double().mean() == pytest.approx(0.5, abs=0.01)
    assert abs(torch.corrcoef(z.flatten(1))).fill_diagonal_(0).max() < 0.4, "images share noise"


@pytest.mark.parametrize("shape", [(1, 1, 2), (3, 1, 1), (2, 2, 2)])
def test_l2_starts_are_uniform_in_the_ball(shape: Sequence[int]) -> None:
    z = noise(shape, 4000, "L2").flatten(1)
    d = z.shape[1]
    radius = z.norm(dim=1)
    volume = radius**d  # within the radius; uniform in [0, 1]
    assert volume.mean() == pytest.approx(1 / 2, abs=0.02)
    assert volume.square().mean() == pytest.approx(1 / 3, abs=0.02)
    u = z / radius[:, None]
    assert u.mean(0).abs().max() < 0.05
    torch.testing.assert_close(u.T @ u / len(u), torch.eye(d, dtype=u.dtype) / d, rtol=0, atol=0.03)
    assert u.pow(4).mean() == pytest.approx(3 / (d * (d + 2)), rel=0.03)


# Against other packages, on a network.


def network(n: int = 30) -> tuple[TinyNet, Tensor, Tensor]:
    """A classifier, images (N, 3, 8, 8) in [0, 1], of which some pixels are 0 or 1, and labels."""
    model = TinyNet().eval()
    data = labelled_by(model, n, wrong=5)
    assert isinstance(data.images, Tensor)
    return model, data.images / 255, data.labels


def attack(
    model: nn.Module, x: Tensor, y: Tensor, norm: Norm, loss: str, *, eps: float, step_size: float, steps: int
) -> Tensor:
    return pgd(lambda z: LOSSES[loss](model(z), y).sum(), x, eps=eps, step_size=step_size, steps=steps, norm=norm, start=x)


RADII: list[tuple[Norm, float]] = [("Linf", 0.004), ("Linf", 8 / 255), ("Linf", 0.3), ("L2", 0.05), ("L2", 0.5), ("L2", 3.0)]


@pytest.mark.parametrize(("norm", "eps"), RADII)
def test_equals_foolbox(norm: Norm, eps: float) -> None:
    model, x, y = network()
    bare = {"Linf": foolbox.attacks.LinfPGD, "L2": foolbox.attacks.L2PGD}[norm]
    theirs, _, _ = bare(abs_stepsize=eps / 3, steps=7, random_start=False)(
        PyTorchModel(model, bounds=(0, 1), device="cpu"), x, y, epsilons=eps
    )
    ours = attack(model, x, y, norm, "ce", eps=eps, step_size=eps / 3, steps=7)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    assert 0.9 * eps < distance(ours, x, norm).max() <= eps + 1e-6


@pytest.mark.parametrize(("norm", "eps"), RADII)
@pytest.mark.parametrize("loss", ["ce", "dlr"])
def test_one_step_equals_the_first_of_apgd_where_it_raises_the_loss(norm: Norm, eps: float, loss: str) -> None:
    model, x, y = network()
    bare = APGDAttack(model, n_iter=1, norm=norm, eps=eps, loss=loss, device="cpu")
    bare.init_hyperparam(x)
    theirs = bare.attack_single_run(x, y, x_init=x)[0]
    ours = attack(model, x, y, norm, loss, eps=eps, step_size=2 * eps, steps=1)
    with torch.no_grad():
        rose = LOSSES[loss](model(ours), y) > LOSSES[loss](model(x), y)
    torch.testing.assert_close(theirs, torch.where(rose[:, None, None, None], ours, x), rtol=0, atol=1e-6)
    assert rose.sum() >= 15


@both_norms
@pytest.mark.parametrize("loss", LOSSES)
def test_an_attack_raises_the_loss_of_every_image_within_its_radius(norm: Norm, loss: str) -> None:
    model, x, y = network()
    eps = {"Linf": 0.004, "L2": 0.04}[norm]
    adversarial = attack(model, x, y, norm, loss, eps=eps, step_size=eps / 4, steps=10)
    far = distance(adversarial, x, norm)
    assert far.max() <= eps + 1e-6 and far.min() > eps / 2
    with torch.no_grad():
        assert (LOSSES[loss](model(adversarial), y) > LOSSES[loss](model(x), y)).all()
