"""AutoAttack image by image against the bare package, and which attacks a model of few classes gets."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pyautoattack import AutoAttack
from pyautoattack.square import SquareAttack
from torch import Tensor, nn

from advcl_hub.data import ImageData
from advcl_hub.evaluation import Evaluation, Protocol, autoattack, evaluate
from tests.support.slow import slow
from tests.support.tiny_classifiers import TinyNet, labelled_by, shortened

# At these radii some images break under each attack and some survive all.
EPS: dict[Any, float] = {"Linf": 0.004, "L2": 0.035}


def measured(model: TinyNet, data: ImageData, **settings: Any) -> Evaluation:
    protocol = Protocol(**{"autoattack": "standard", "batch_size": 7, "seed": 3, "steps": 2, "check_images": 0, **settings})
    return evaluate(model, data, protocol, progress=False)


def assert_every_image_ends_alike(norm: Any, version: Any, steps: Callable[[AutoAttack], AutoAttack]) -> None:
    """As in the bare package, whose attacks get these steps."""
    model = TinyNet()
    data = labelled_by(model, 13, wrong=2)
    assert isinstance(data.images, Tensor)
    ours = measured(model, data, norm=norm, eps=EPS[norm], autoattack=version)

    bare = steps(AutoAttack(model, norm=norm, eps=EPS[norm], seed=3, version=version, device="cpu"))
    _, predictions = bare.run_standard_evaluation(data.images / 255, data.labels, batch_size=7)
    survives = (predictions == data.labels).tolist()
    assert ours.images["autoattack"] == survives and 0 < sum(survives) < 11
    assert ours.images["autoattack_prediction"] == predictions.tolist()
    assert ours.autoattack == sum(survives) / 13


@pytest.mark.slow
def test_every_image_ends_as_in_the_bare_package() -> None:
    assert_every_image_ends_alike("Linf", "standard", lambda attack: attack)


@pytest.mark.usefixtures("short_autoattack")
@pytest.mark.parametrize(("norm", "version"), [slow("L2", "standard"), ("Linf", "rand"), slow("L2", "rand")])
def test_every_image_ends_as_in_the_bare_package_with_fewer_steps(norm: Any, version: Any) -> None:
    assert_every_image_ends_alike(norm, version, shortened)


@pytest.mark.usefixtures("short_autoattack")
def test_columns_fall_and_broken_images_are_not_attacked_again() -> None:
    model = TinyNet()
    data = labelled_by(model, 13, wrong=2)
    seen: list[int] = []
    model.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    ours = measured(model, data, eps=EPS["Linf"])
    columns = ours.record["autoattack_columns"]
    assert list(columns) == ["apgd-ce", "apgd-t", "fab-t", "square"]
    counts = [11, *(c["correct"] for c in columns.values())]
    assert counts == sorted(counts, reverse=True) and counts[1] < 11
    assert max(seen[-200:]) <= counts[3], "Square saw more images than FAB-T left"
    for earlier, later in zip(columns, list(columns)[1:], strict=False):
        assert all(a >= b for a, b in zip(ours.images[earlier], ours.images[later], strict=True))


@pytest.mark.usefixtures("short_autoattack")
@pytest.mark.parametrize(
    ("classes", "attacks", "said"),
    [
        (10, ["apgd-ce", "apgd-t", "fab-t", "square"], None),
        (5, ["apgd-ce", "apgd-t", "fab-t", "square"], "only 5 classes: apgd-ce, apgd-t, fab-t, square with 4 targets"),
        (3, ["apgd-ce", "fab-t", "square"], "only 3 classes: apgd-ce, fab-t, square with 2 targets"),
        (2, ["apgd-ce", "fab-t", "square"], "only 2 classes: apgd-ce, fab-t, square with 1 targets"),
    ],
)
def test_few_classes_get_what_can_be_run_and_a_warning(classes: int, attacks: list[str], said: str | None) -> None:
    model = TinyNet(classes)
    ours = measured(model, labelled_by(model, 6), eps=0.001, check_images=6, steps=0)
    assert list(ours.record["autoattack_columns"]) == attacks
    assert any(said in warning for warning in ours.warnings) if said else not any("classes:" in w for w in ours.warnings)


def test_nothing_left_to_attack() -> None:
    model = TinyNet()
    ours = measured(model, labelled_by(model, 5, wrong=5))
    assert (ours.standard, ours.robust, ours.autoattack) == (0, 0, 0)


def test_without_the_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'needs the package pyautoattack: pip install "advcl-hub\[eval\]"'):
        measured(TinyNet(), labelled_by(TinyNet(), 5))


# ---- attacks that cannot be run --------------------------------------------------------------------------------------


def small_net(classes: int = 10) -> nn.Module:
    """For images of any size from 2x2 on."""
    torch.manual_seed(0)
    return nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, classes)).eval()


def answered_by(model: nn.Module, height: int, width: int) -> ImageData:
    """Four random images (3, height, width) whose labels are the model's predictions."""
    images = torch.randint(0, 256, (4, 3, height, width), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    with torch.no_grad():
        logits = model(images / 255)
    names = tuple(f"class{i}" for i in range(logits.shape[1]))
    return ImageData(images, logits.argmax(1), torch.arange(4), names, "random")


def left_out(norm: Any, shape: tuple[int, int, int], classes: int = 10, version: str = "standard") -> set[str]:
    return set(autoattack.left_out(Protocol(norm, autoattack=version), shape, classes))


# Where tiles of a fifth of the height fit, and where they do not.
SIZES = [(1, 1), (4, 4), (5, 5), (6, 1), (1, 6), (9, 9), (10, 10), (12, 12), (14, 14), (16, 16), (18, 18), (19, 19), (20, 20)]
SIZES += [(24, 24), (25, 3), (24, 32), (32, 24), (28, 28), (32, 32)]


@pytest.mark.parametrize("norm", ["Linf", slow("L2")])
def test_square_is_left_out_where_the_real_one_fails_and_only_there(norm: Any) -> None:
    def sure(images: Tensor) -> Tensor:
        return torch.eye(10)[:1] * 10 + images.mean((1, 2, 3))[:, None] * torch.linspace(0, 0.1, 10)

    failing = set()
    for height, width in SIZES:
        square = SquareAttack(sure, norm=norm, eps=0.1, n_queries=60, resc_schedule=False)  # 60: three sizes of squares
        try:
            square.perturb(torch.rand(1, 1, height, width), torch.zeros(1, dtype=torch.int64))
        except (RuntimeError, ZeroDivisionError):
            failing.add((height, width))
    assert {size: left_out(norm, (1, *size)) for size in SIZES} == {
        size: {"square"} if size in failing else set() for size in SIZES
    }
    expected = {(1, 1), (4, 4), (1, 6), (12, 12), (14, 14), (18, 18), (19, 19), (24, 24), (24, 32), (32, 24)}
    assert failing == (expected if norm == "L2" else set())


@pytest.mark.parametrize("version", ["standard", "rand"])
@pytest.mark.parametrize("classes", [1, 2, 3, 4, 5, 12])
def test_all_other_attacks_take_any_shape_and_number_of_classes(classes: int, version: str) -> None:
    for shape in ((1, 1, 1), (3, 1, 2), (1, 5, 7), (4, 8, 8)):
        assert left_out("Linf", shape, classes, version) == set()
        assert left_out("L2", shape, classes, version) <= {"square"}


def test_the_rehearsal_draws_no_random_numbers() -> None:
    before = torch.random.get_rng_state()
    left_out("L2", (3, 24, 24))
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.usefixtures("short_autoattack")
@pytest.mark.parametrize(
    ("size", "check_images"),
    [((24, 24), 0), ((24, 32), 4), slow((24, 24), 4), slow((24, 32), 0), slow((14, 14), 0), slow((14, 14), 4)],
)
def test_where_square_fails_the_other_figures_are_reported_with_a_warning(size: tuple[int, int], check_images: int) -> None:
    model = small_net()
    ours = measured(model, answered_by(model, *size), norm="L2", eps=0.01, check_images=check_images)
    assert ours.autoattack is not None and list(ours.record["autoattack_columns"]) == ["apgd-ce", "apgd-t", "fab-t"]
    assert list(ours.record["autoattack_left_out"]) == ["square"]
    said = f"all of AutoAttack: no. Square cannot attack {size[0]}x{size[1]} images in L2 ("
    (warning,) = [warning for warning in ours.warnings if warning.startswith(said)]
    assert warning.endswith("): the figure is that of apgd-ce, apgd-t, fab-t alone.")


@pytest.mark.usefixtures("short_autoattack")
@pytest.mark.parametrize(
    ("classes", "version", "said"),
    [
        (2, "rand", "only 2 classes: apgd-ce"),
        (2, "standard", "only 2 classes: apgd-ce, fab-t, square with 1 targets"),
        (1, "standard", "only 1 classes: no attack with 0 targets"),
    ],
)
def test_few_classes_are_told_in_every_version_and_without_checks(classes: int, version: str, said: str) -> None:
    model = small_net(classes)
    ours = measured(model, answered_by(model, 8, 8), eps=0.001, autoattack=version)
    assert f"all of AutoAttack: no. {said}." in ours.warnings
    assert (ours.autoattack is None) is (classes == 1), "no attack, no figure"


@pytest.mark.usefixtures("short_autoattack")
def test_an_attack_that_comes_to_fail_is_left_out_whatever_it_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> Tensor:
        raise AssertionError

    monkeypatch.setattr("pyautoattack.fab_pt.FABAttack_PT.perturb", fail)
    model = small_net()
    ours = measured(model, answered_by(model, 8, 8), eps=0.001)
    assert list(ours.record["autoattack_columns"]) == ["apgd-ce", "apgd-t", "square"]
    assert any("FAB-T cannot attack 8x8 images in Linf (AssertionError())" in warning for warning in ours.warnings)
