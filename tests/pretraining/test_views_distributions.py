"""The random choices of the views are distributed as torchvision draws them."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torchvision import transforms

from advcl_hub.data.augmentation import draw_weak
from advcl_hub.pretraining import views
from advcl_hub.pretraining.views import make_views
from tests.pretraining.test_views import PUBLISHED, random_images, seed  # noqa: F401 (a fixture of every test)


def assert_same_distribution(ours: Tensor, theirs: Tensor) -> None:
    """Two-sample Kolmogorov-Smirnov test at a level of 1e-6 (less for discrete values)."""
    points = torch.cat([ours, theirs]).unique()
    cdfs = [torch.searchsorted(s.sort().values, points, right=True) / len(s) for s in (ours, theirs)]
    distance = (cdfs[0] - cdfs[1]).abs().max()
    limit = math.sqrt(-math.log(1e-6 / 2) / 2) * math.sqrt(1 / len(ours) + 1 / len(theirs))
    assert distance < limit, f"KS distance {distance:.4f}, limit {limit:.4f}"


def assert_same_table(ours: Tensor, theirs: Tensor) -> None:
    """Two-sample chi-square test on the joint distribution of rows of whole numbers, rare rows pooled."""
    rows, inverse = torch.cat([ours, theirs]).unique(dim=0, return_inverse=True)
    parts = inverse.split([len(ours), len(theirs)])
    counts = torch.stack([part.bincount(minlength=len(rows)) for part in parts])
    common = counts.sum(0) >= 10
    counts = torch.cat([counts[:, common], counts[:, ~common].sum(1, keepdim=True)], dim=1).double()
    counts = counts[:, counts.sum(0) > 0]
    expected = counts.sum(0) * counts.sum(1, keepdim=True) / counts.sum()
    statistic, freedom = ((counts - expected) ** 2 / expected).sum(), counts.shape[1] - 1
    assert freedom > 0, "the test has a single cell"
    # Wilson-Hilferty: the cube root of chi-square is about normal; 5 standard deviations are 3e-7.
    z = ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))
    assert z < 5, f"chi-square {statistic:.1f} with {freedom} degrees of freedom, z = {z:.1f}"


def assert_frequency(events: Tensor, probability: float) -> None:
    deviation = math.sqrt(probability * (1 - probability) / len(events))
    assert abs(events.double().mean() - probability) < 5 * deviation


def torchvision_crops(count: int, size: tuple[int, int], scale: tuple[float, float]) -> Tensor:
    image = torch.empty(1, *size)
    draw = transforms.RandomResizedCrop.get_params
    return torch.tensor([draw(image, list(scale), [3 / 4, 4 / 3]) for _ in range(count)], dtype=torch.float32)


def our_crops(count: int, size: tuple[int, int], scale: tuple[float, float]) -> Tensor:
    params = views.draw_strong(torch.empty(count, 1, *size), replace(PUBLISHED, crop_scale=scale))
    return torch.stack(params[:4], dim=1)


def test_crop_boxes_are_distributed_as_torchvision_draws_them() -> None:
    ours, theirs = our_crops(50_000, (32, 32), (0.2, 1.0)), torchvision_crops(5_000, (32, 32), (0.2, 1.0))
    for column in range(4):
        assert_same_distribution(ours[:, column], theirs[:, column])
    assert_same_distribution(ours[:, 2] * ours[:, 3], theirs[:, 2] * theirs[:, 3])
    assert_same_distribution(ours[:, 2] / ours[:, 3], theirs[:, 2] / theirs[:, 3])
    assert_same_table(ours // 4, theirs // 4)


@pytest.mark.parametrize(
    ("size", "scale"),
    [
        ((5, 6), (0.2, 1.0)),
        ((6, 11), (0.55, 0.8)),  # some fall back to the centre of a wide image
        ((11, 6), (0.55, 0.8)),  # ... of a tall one
        ((12, 12), (0.97, 1.0)),  # ... to all of a square one
    ],
)
def test_crop_boxes_have_the_joint_distribution_of_torchvision(size: tuple[int, int], scale: tuple[float, float]) -> None:
    assert_same_table(our_crops(40_000, size, scale), torchvision_crops(6_000, size, scale))


@pytest.mark.parametrize(("size", "box"), [((6, 30), (0, 11, 6, 8)), ((30, 6), (11, 0, 8, 6)), ((7, 7), (0, 0, 7, 7))])
def test_crops_that_never_fit_become_the_central_box(size: tuple[int, int], box: tuple[int, ...]) -> None:
    assert torchvision_crops(1, size, (1.0, 1.0)).tolist() == [list(box)]
    assert our_crops(1000, size, (1.0, 1.0)).unique(dim=0).tolist() == [list(box)]


def test_jitter_is_distributed_as_torchvision_draws_it() -> None:
    params = views.draw_strong(torch.empty(50_000, 3, 1, 1), replace(PUBLISHED, jitter=(0.4, 0.3, 1.5, 0.1)))
    jittered = params.factors[:, views.BRIGHTNESS] != 1
    assert_frequency(jittered, 0.8)
    assert torch.equal(params.factors[~jittered].unique(dim=0), torch.tensor([[1.0, 1.0, 1.0, 0.0]]))

    jitter = transforms.ColorJitter(0.4, 0.3, 1.5, 0.1)
    ranges = (jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue)
    draws = [jitter.get_params(*ranges) for _ in range(5_000)]
    theirs = torch.tensor([factors for _, *factors in draws])
    for operation, (low, high) in enumerate(ranges):
        ours = params.factors[jittered, operation]
        assert_same_distribution(ours, theirs[:, operation])
        assert low <= ours.min() and ours.max() <= high
    orders = torch.stack([order for order, *_ in draws])
    assert_same_table(params.order[jittered], orders)
    assert len(params.order.unique(dim=0)) == 24
    assert torch.equal(params.order.sort(dim=1).values.unique(dim=0), torch.arange(4)[None])


def test_flip_grayscale_and_jitter_have_their_probabilities_independently() -> None:
    config = replace(PUBLISHED, jitter_p=0.7, grayscale_p=0.3)
    strong = views.draw_strong(torch.empty(50_000, 3, 1, 1), config)
    jittered = strong.factors[:, views.BRIGHTNESS] != 1
    for events, probability in ((strong.flip, 0.5), (strong.grayscale, 0.3), (jittered, 0.7)):
        assert_frequency(events, probability)
    assert_frequency(strong.flip & strong.grayscale & jittered, 0.5 * 0.3 * 0.7)
    assert_frequency(strong.flip & ~strong.grayscale & jittered, 0.5 * 0.7 * 0.7)


def test_weak_offsets_are_distributed_as_torchvision_draws_them() -> None:
    weak = draw_weak(50_000, PUBLISHED.padding, PUBLISHED.flip)
    ours = torch.stack([weak.top + 4, weak.left + 4, weak.flip], dim=1)
    padded = torch.empty(1, 40, 40)
    offsets = torch.tensor([transforms.RandomCrop.get_params(padded, (32, 32))[:2] for _ in range(8_000)])
    flips = torch.randint(0, 2, (8_000, 1))
    assert_same_table(ours, torch.cat([offsets, flips], dim=1))
    assert_frequency(weak.flip, 0.5)


def correlation(a: Tensor, b: Tensor) -> float:
    return torch.corrcoef(torch.stack([a, b]))[0, 1].item()


def test_choices_of_one_strong_view_are_independent() -> None:
    count = 50_000
    params = views.draw_strong(torch.empty(count, 3, 32, 32), PUBLISHED)
    position = params.order.argsort(dim=1)
    choices = [params.height * params.width, params.height / params.width, params.flip, params.grayscale]
    choices += [*params.factors.T, *position[:, :3].T]
    table = torch.corrcoef(torch.stack([c.float() for c in choices]))
    table[-3:, -3:] = 0  # positions in one permutation exclude each other
    assert table.fill_diagonal_(0).abs().max() < 5 / math.sqrt(count)


def test_images_and_views_are_augmented_independently() -> None:
    """The same image many times over: no view tells anything of its neighbour or of another view."""
    count = 4_000
    images = random_images(1, size=(16, 16)).expand(count, -1, -1, -1)
    made = make_views(images, PUBLISHED)
    limit = 5 / math.sqrt(count)
    for region in ((..., slice(None)), (..., slice(8)), (..., 0, 0)):
        strong1, strong2, weak = (view[region].flatten(1).mean(1) for view in made[:3])
        for a, b in itertools.combinations((strong1, strong2, weak), 2):
            assert abs(correlation(a, b)) < limit
        for one in (strong1, strong2, weak):
            assert one.std() > 0.01
            assert abs(correlation(one[1:], one[:-1])) < limit
            assert abs(correlation(one[count // 2 :], one[: count // 2])) < limit * math.sqrt(2)
