"""Models whose robustness is false are told from honest ones, each by the checks that are meant for it."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from advcl_hub.attacks import iterates
from advcl_hub.evaluation import Protocol, checks, measure
from tests.support.clear_net import (
    EPS,
    OF_THE_MODEL,
    ClearNet,
    detail,
    downhill,
    failed,
    measured,
    names,
    saturated,
    with_gradient,
)
from tests.support.tiny_classifiers import TinyNet, labelled_by

OF_THE_BUDGET = ["perturbations within eps", "finite outputs", "inputs in [0, 1]"]
OF_PGD = [
    "gradients",
    "gradients lead uphill",
    "steps reach eps",
    "eps 0 equals clean",
    "robust is not above clean",
    "a larger eps is not weaker",
    "very large eps leaves nothing",
    "more steps are not weaker",
    "enough steps",
    "more restarts find little more",
    "other losses find little more",
    "random noise is weaker than PGD",
]
OF_AUTOATTACK = ["PGD is close to AutoAttack", "all of AutoAttack", "Square finds nothing new"]


def rounded(images: Tensor) -> Tensor:
    return (images * 32).round() / 32


def shattered(images: Tensor) -> Tensor:
    return images + 0.003 * torch.sin(3000 * images)


def noisy(images: Tensor) -> Tensor:
    return images + 0.01 * torch.randn_like(images)


# ---- honest models ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"norm": "L2", "eps": 0.07}, {"loss": "margin"}, {"batch_size": 7}])
def test_an_honest_model_passes_every_check(changes: dict[str, Any]) -> None:
    found = measured(ClearNet(), **changes)
    assert found.robust is not None and 0 < found.robust < found.standard == 0.9
    assert names(found) == OF_THE_MODEL + OF_THE_BUDGET + OF_PGD and found.warnings == []


@pytest.mark.usefixtures("short_autoattack")
def test_an_honest_model_passes_every_check_of_autoattack() -> None:
    found = measured(ClearNet(), autoattack="standard")
    assert names(found) == OF_THE_MODEL + OF_THE_BUDGET + OF_PGD + OF_AUTOATTACK
    assert found.autoattack is not None and 0 < found.autoattack < 0.9 and found.warnings == []


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(8), nn.GroupNorm(2, 8), nn.InstanceNorm2d(8)])
def test_norms_that_treat_every_image_alone_are_in_evaluation_mode(norm: nn.Module) -> None:
    model = TinyNet()
    model.layers.insert(1, norm)
    assert not failed(measured(model, labelled_by(model, 10), steps=1)) & {"evaluation mode", "deterministic"}


# ---- masked gradients ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (ClearNet(after=saturated), {"gradients", "gradients lead uphill", "other losses find little more"}),
        (ClearNet(rounded), {"gradients", "gradients lead uphill", "random noise is weaker than PGD"}),
        (ClearNet(downhill), {"gradients lead uphill", "very large eps leaves nothing"}),
        (ClearNet(shattered), {"gradients lead uphill", "random noise is weaker than PGD"}),
    ],
    ids=["saturated softmax", "rounded input", "turned gradient", "shattered input"],
)
def test_masked_gradients_look_robust_under_pgd_and_are_caught(model: nn.Module, expected: set[str]) -> None:
    eps = 2 * EPS
    honest, masked = measured(ClearNet(), eps=eps), measured(model, eps=eps)
    assert honest.robust is not None and masked.robust is not None
    assert masked.robust > honest.robust + 0.5
    assert expected <= failed(masked)


def test_zero_gradients_are_counted() -> None:
    assert detail(measured(ClearNet(after=saturated)), "gradients") == "zero or not finite on 27 of 27 images"
    assert detail(measured(ClearNet()), "gradients") == "zero or not finite on 0 of 27 images"


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 0.0])
def test_gradients_that_are_not_usable_are_seen(value: float) -> None:
    found = measured(ClearNet(with_gradient(lambda gradient: torch.full_like(gradient, value))))
    assert "gradients" in failed(found) and found.standard == 0.9


def test_a_gradient_has_to_lead_uphill_only_near_the_image() -> None:
    model = ClearNet(lambda images: torch.sin(20 * images) / 20)
    assert "gradients lead uphill" not in failed(measured(model, labelled_by(model, 30), eps=4 * EPS, steps=1))


@pytest.mark.usefixtures("short_autoattack")
def test_where_gradients_are_zero_the_black_box_attack_finds_something_new() -> None:
    found = measured(ClearNet(rounded), eps=2 * EPS, autoattack="standard")
    columns = found.record["autoattack_columns"]
    assert columns["square"]["value"] < columns["fab-t"]["value"] - 0.1
    assert {"Square finds nothing new", "PGD is close to AutoAttack"} <= failed(found)


def test_a_moderately_large_scale_of_the_logits_is_seen_by_the_other_losses() -> None:
    model = ClearNet(after=lambda logits: 100 * logits)
    found = measured(model, eps=2 * EPS)
    losses = found.record["curves"]["losses"]
    assert found.robust is not None and set(losses) == {"margin", "dlr"} and losses["margin"] != losses["dlr"]
    best = min(losses, key=lambda name: losses[name])
    said = f"{found.robust:.1%} under ce, {losses[best]:.1%} under {best} too"
    assert "other losses find little more" in failed(found) and detail(found, "other losses find little more") == said
    other = measured(model, loss="margin")
    assert "other losses find little more" not in failed(other)
    assert other.record["curves"]["losses"]["ce"] <= (other.robust or 0), "it counts what also survives the protocol's own loss"


# ---- attacks that are too weak ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{"steps": 1, "step_size": EPS / 4}, {"steps": 10, "step_size": EPS / 100}])
def test_too_few_or_too_short_steps_are_not_enough(changes: dict[str, Any]) -> None:
    assert "enough steps" in failed(measured(ClearNet(), **changes))


def test_steps_so_short_that_noise_does_better() -> None:
    found = measured(ClearNet(), eps=4 * EPS, step_size=1e-6)
    assert "random noise is weaker than PGD" in failed(found)
    said = detail(found, "random noise is weaker than PGD")
    broken, survivors = (int(number) for number in re.findall(r"(\d+) (?:of|images)", said))
    assert survivors == round(30 * (found.robust or 0)) and broken > survivors / 3, "one draw alone breaks a sixth"


def test_where_the_start_decides_more_restarts_find_more() -> None:
    one, three, five = (measured(ClearNet(rounded), eps=4 * EPS, restarts=r) for r in (1, 3, 5))  # each is one more draw
    curve = one.record["curves"]["restarts"]
    assert [restarts for restarts, _ in curve] == [1, 2, 3, 4, 5]
    assert [curve[0][1], curve[2][1], curve[4][1]] == [one.robust, three.robust, five.robust]
    assert curve[0][1] > curve[2][1] > curve[4][1] and "more restarts find little more" in failed(one)
    assert [restarts for restarts, _ in three.record["curves"]["restarts"]] == [3, 4, 5, 6, 7]
    assert three.record["curves"]["restarts"][2] == curve[4]
    assert three.record["curves"]["eps"] == one.record["curves"]["eps"], "the other curves have one start each"


def attack_with(monkeypatch: pytest.MonkeyPatch, changes: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    monkeypatch.setattr(measure, "iterates", lambda *args, **settings: iterates(*args, **{**settings, **changes(settings)}))


def test_an_attack_that_leaves_the_ball_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    attack_with(monkeypatch, lambda settings: {"eps": settings["eps"] + EPS / 50})
    found = measured(ClearNet())
    assert "perturbations within eps" in failed(found)
    assert detail(found, "perturbations within eps") == f"largest {1.02 * EPS * 255:.3g}/255"


def test_an_attack_that_makes_no_images_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "iterates", lambda *args, **settings: (x - 0.004 for x in iterates(*args, **settings)))
    found = measured(ClearNet())
    assert "inputs in [0, 1]" in failed(found)
    assert detail(found, "inputs in [0, 1]") == "adversarial pixels leave [0, 1] by 0.004 at most"


def test_an_attack_that_takes_no_heed_of_eps_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    attack_with(monkeypatch, lambda settings: {"eps": EPS, "step_size": EPS / 4, "start": None})
    found = measured(ClearNet())
    assert {"eps 0 equals clean", "very large eps leaves nothing"} <= failed(found)


def test_an_attack_that_is_weaker_in_a_larger_ball_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    attack_with(monkeypatch, lambda settings: {"eps": EPS / 4} if settings["eps"] > EPS else {})
    assert {"a larger eps is not weaker"} <= failed(measured(ClearNet()))


def test_an_attack_that_loses_what_it_had_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "iterates", lambda *args, **settings: reversed(list(iterates(*args, **settings))))
    assert "more steps are not weaker" in failed(measured(ClearNet()))


@pytest.mark.parametrize("curve", ["eps", "steps"])
def test_any_point_above_the_clean_accuracy_is_suspicious(curve: str) -> None:
    curves: dict[str, list[tuple[float, float]]] = {"eps": [(0, 0.5), (1, 0.4), (9, 0)], "steps": [(1, 0.4), (2, 0.4)]}
    for above, passed in ((0.6, True), (0.75, False)):  # one image of ten may tip
        curves[curve][1] = (curves[curve][1][0], above)
        made = checks.Curves(10, curves["eps"], curves["steps"], [(1, 0.4), (2, 0.4)], {"dlr": 0.4})  # type: ignore[arg-type]
        found = checks.curve_checks(made, torch.arange(10), 0.5, Protocol(steps=1), 10)
        assert {check.name: check.passed for check in found}["robust is not above clean"] == passed


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_adversarial_images_that_are_no_numbers_are_beyond_every_budget(value: float) -> None:
    assert [check.passed for check in checks.budget_checks([0.001, value], [0.0, value], [True], Protocol())] == [
        False,
        True,
        False,
    ]
    assert [check.passed for check in checks.budget_checks([0.001], [0.0], [True, False], Protocol())] == [True, False, True]


@pytest.mark.parametrize(
    ("pgd", "columns", "expected"),
    [
        (0.5, {"apgd-ce": 0.49, "apgd-t": 0.45, "square": 0.45}, set()),
        (0.5, {"apgd-ce": 0.4, "apgd-t": 0.38, "square": 0.38}, {"PGD is close to AutoAttack"}),
        (0.4, {"apgd-ce": 0.5, "apgd-t": 0.45, "square": 0.45}, {"PGD is close to AutoAttack"}),
        (0.5, {"apgd-ce": 0.49, "apgd-t": 0.45, "square": 0.44}, {"Square finds nothing new"}),
        (None, {"apgd-ce": 0.49, "apgd-t": 0.1, "square": 0.1}, set()),
    ],
    ids=["as it should be", "PGD finds less", "PGD finds more", "Square finds more", "no PGD"],
)
def test_the_columns_of_autoattack_are_compared(pgd: float | None, columns: dict[str, float], expected: set[str]) -> None:
    found = checks.autoattack_checks(columns, pgd, 10, "standard")
    assert {check.name for check in found if not check.passed} == expected
    assert [check.name for check in found] == OF_AUTOATTACK[0 if pgd else 1 :]


def test_a_part_of_autoattack_does_not_pass_for_the_whole() -> None:
    why = {"square": "Square cannot attack 24x24 images in L2 (no)"}
    found = {c.name: c for c in checks.autoattack_checks({"apgd-ce": 0.5, "fab-t": 0.4}, None, 5, "standard", why)}
    assert list(found) == ["all of AutoAttack"] and not found["all of AutoAttack"].passed
    assert found["all of AutoAttack"].detail == (
        "only 5 classes: apgd-ce, fab-t with 4 targets; Square cannot attack 24x24 images in L2 (no): the figure is that of "
        "apgd-ce, fab-t alone"
    )
    none = checks.autoattack_checks({}, 0.5, 10, "standard", {"square": "Square cannot"})
    assert [(check.name, check.passed) for check in none] == [("all of AutoAttack", False)]


@pytest.mark.usefixtures("short_autoattack")
def test_without_pgd_autoattack_is_not_compared_with_it() -> None:
    assert names(measured(ClearNet(), steps=0, autoattack="standard")) == OF_THE_MODEL + OF_THE_BUDGET + OF_AUTOATTACK[1:]


@pytest.mark.parametrize(("norm", "far"), [("Linf", "128/255"), ("L2", "6.93")])  # 0.5 for each of 192 pixels
def test_half_of_the_range_is_a_very_large_eps(norm: Any, far: str) -> None:
    found = measured(ClearNet(downhill), norm=norm)
    assert detail(found, "very large eps leaves nothing") == f"100.0% at eps {far}, one answer for all gives 16.7%"


def test_images_of_one_class_make_no_large_eps_suspicious() -> None:
    model = ClearNet(after=lambda logits: logits + 1000 * F.one_hot(torch.tensor(2), 10))  # always the same answer, rightly
    found = measured(model, labelled_by(model, 10))
    assert found.robust == 1 and "very large eps leaves nothing" not in failed(found)


# ---- random models ---------------------------------------------------------------------------------------------------


class StuckDropout(nn.Dropout):
    """Does not leave training mode."""

    def train(self, mode: bool = True) -> "StuckDropout":
        return super().train(True)


@pytest.mark.parametrize(
    ("before", "expected"),
    [
        (noisy, {"deterministic"}),
        (lambda images: F.dropout(images, 0.1, training=True), {"deterministic"}),
        (StuckDropout(0.1), {"deterministic", "evaluation mode"}),
    ],
    ids=["noise", "dropout function", "dropout module"],
)
def test_random_models_are_not_deterministic(before: Callable[[Tensor], Tensor], expected: set[str]) -> None:
    assert failed(measured(ClearNet(before), steps=1)) & {"deterministic", "evaluation mode"} == expected


@pytest.mark.usefixtures("short_autoattack")
def test_a_random_model_gets_the_same_figures_twice() -> None:
    model = ClearNet(noisy)
    data = labelled_by(model, 30, wrong=3)
    first = measured(model, data, autoattack="rand")
    torch.manual_seed(5)
    second = measured(model, data, autoattack="rand")
    assert "all of AutoAttack" not in names(first)
    assert list(first.record["autoattack_columns"]) == ["apgd-ce", "apgd-dlr"]
    assert first.autoattack is not None and first.autoattack < first.standard and "deterministic" in failed(first)
    assert first.images == second.images
    for key in ("accuracy", "autoattack_columns", "per_class", "curves"):
        assert first.record[key] == second.record[key], key


# ---- modes and outputs -----------------------------------------------------------------------------------------------


class Stuck(nn.BatchNorm2d):
    """Does not leave training mode."""

    def train(self, mode: bool = True) -> "Stuck":
        return super().train(True)


class StuckNet(TinyNet):
    """All of it does not."""

    def train(self, mode: bool = True) -> "StuckNet":
        return super().train(True)


@pytest.mark.parametrize(
    ("model", "norm", "named"),
    [
        (TinyNet, nn.BatchNorm2d(8, track_running_stats=False), "model.layers.1"),
        (TinyNet, Stuck(8), "model.layers.1"),
        (StuckNet, nn.BatchNorm2d(8), "model, model.layers, model.layers.0"),
    ],
    ids=["no running statistics", "one stuck layer", "stuck model"],
)
def test_batch_statistics_are_no_evaluation_mode(model: type[TinyNet], norm: nn.Module, named: str) -> None:
    network = model()
    network.layers.insert(1, norm)
    found = measured(network, labelled_by(network, 10), steps=1)
    said = detail(found, "evaluation mode")
    assert "evaluation mode" in failed(found) and "differ by 0.0" not in said
    assert said.endswith(f"in training mode or without running statistics: {named}")


def test_images_that_see_each_other_are_no_evaluation_mode() -> None:
    assert "evaluation mode" in failed(measured(ClearNet(lambda images: images - images.mean(0)), steps=1))


@pytest.mark.parametrize(
    ("after", "caught"),
    [
        (lambda logits: logits.softmax(1), True),
        (lambda logits: logits.log_softmax(1), False),
        (lambda logits: logits.sigmoid(), False),
        (lambda logits: 0.1 + 0.05 * (logits - logits.mean(1, keepdim=True)), False),
    ],
    ids=["softmax", "log-softmax", "sigmoid", "a sum of 1"],
)
def test_probabilities_are_no_logits(after: Callable[[Tensor], Tensor], caught: bool) -> None:
    assert ("logits" in failed(measured(ClearNet(after=after), steps=1))) == caught
