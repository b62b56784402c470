"""AutoAttack image by image against the bare package, and which attacks a model of few classes gets."""

from collections.abc import Callable
from typing import Any

import pytest
from pyautoattack import AutoAttack
from torch import Tensor

from advcl_hub.data import ImageData
from advcl_hub.evaluation import Evaluation, Protocol, evaluate
from tests.tiny_classifiers import TinyNet, labelled_by, shortened

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


def test_every_image_ends_as_in_the_bare_package() -> None:
    assert_every_image_ends_alike("Linf", "standard", lambda attack: attack)


@pytest.mark.usefixtures("short_autoattack")
@pytest.mark.parametrize(("norm", "version"), [("L2", "standard"), ("Linf", "rand"), ("L2", "rand")])
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
