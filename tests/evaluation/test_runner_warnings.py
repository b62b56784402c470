"""What an evaluation measures and says of itself: curves, what was left out, and what speaks against the figures."""

import warnings
from typing import Any

import pytest
import torch

from advcl_hub.data import matching
from advcl_hub.evaluation import Protocol, checks, evaluate
from advcl_hub.evaluation.acceleration import TRIAL
from tests.support.clear_net import EPS, OF_THE_MODEL, ClearNet, detail, downhill, failed, measured, names, saturated
from tests.support.tiny_classifiers import labelled_by


def test_without_checks_the_report_says_so() -> None:
    found = measured(ClearNet(downhill), check_images=0)
    assert found.warnings == ["Not checked for false robustness (check_images=0)."]
    assert found.record["checks"] == [] and "curves" not in found.record


def test_lower_precision_is_for_screening_and_says_so_first() -> None:
    found = measured(ClearNet(after=saturated), precision="bfloat16")
    assert found.warnings[0].startswith("Screening only: measured in bfloat16.") and "gradients" in failed(found)


@pytest.mark.parametrize("changes", [{"steps": 0}, {"eps": 0.0}])
def test_without_an_attack_there_is_nothing_robust_to_show(changes: dict[str, Any]) -> None:
    found = measured(ClearNet(), **changes)
    assert found.robust is None and found.worst_case == found.standard
    assert "curves" not in found.record and not {"pgd", "pgd_prediction"} & set(found.images)
    assert names(found) == OF_THE_MODEL


def test_an_image_that_is_wrong_when_clean_is_not_attacked_and_stays_wrong() -> None:
    model = ClearNet(downhill)  # under attack it gets better, so that wrong images would become right
    data = labelled_by(model, 20, wrong=4)
    attacked: list[int] = []
    model.register_forward_pre_hook(lambda module, inputs: attacked.append(len(inputs[0])) if inputs[0].requires_grad else None)
    found = measured(model, data, eps=0.2, check_images=0)
    assert attacked == [TRIAL, 20] + [16] * 10  # first those that try the faster copy and the memory
    assert "robust is not above clean" in failed(measured(model, data, eps=0.2)), "the checks attack every image"
    assert found.robust == found.standard == 0.8
    assert found.images["pgd"] == found.images["standard"] == [False] * 4 + [True] * 16
    assert found.images["pgd_prediction"][:4] == found.images["prediction"][:4]


def test_the_curves_meet_the_figures_that_they_belong_to() -> None:
    found = measured(ClearNet())
    curves, eps = found.record["curves"], dict(found.record["curves"]["eps"])
    assert curves["images"] == 30 and eps[0.0] == found.standard and eps[EPS] == found.robust
    assert dict(curves["steps"])[10] == found.robust == curves["restarts"][0][1]
    assert list(eps) == [0.0, *(factor * EPS for factor in checks.CURVE_EPS), 0.5]
    assert list(eps.values()) == sorted(eps.values(), reverse=True) and eps[2 * EPS] < found.robust < eps[EPS / 2]
    assert dict(curves["steps"])[2] == measured(ClearNet(), steps=2, step_size=EPS / 4, check_images=0).robust


def test_steps_grow_with_eps() -> None:
    eps = dict(measured(ClearNet(), steps=2).record["curves"]["eps"])
    for factor in (0.5, 2, 4):
        assert eps[factor * EPS] == measured(ClearNet(), steps=2, eps=factor * EPS, check_images=0).robust


def test_the_steps_go_far_beyond_those_of_the_protocol() -> None:
    found = measured(ClearNet(), labelled_by(ClearNet(), 5), steps=30, eps=0.4)  # and four times eps is beyond 1
    assert [count for count, _ in found.record["curves"]["steps"]] == [1, 2, 5, 10, 20, 30, 50, 100, 150]


def test_the_checks_take_as_many_images_as_the_protocol_says() -> None:
    found = measured(ClearNet(after=saturated), labelled_by(ClearNet(), 30), check_images=10)
    assert found.record["curves"]["images"] == 10 and "of 10 images" in detail(found, "gradients")
    assert found.record["data"]["images"] == 30


def test_steps_too_short_to_cross_the_ball_are_told() -> None:
    with pytest.raises(ValueError, match="step_size is 0: PGD would stand still"):
        Protocol(step_size=0)
    net = ClearNet()
    found = evaluate(net, labelled_by(net, 30), Protocol(eps=EPS, step_size=EPS / 100, steps=5), progress=False)
    assert "steps reach eps: no. 5 steps of 0.0204/255 for eps 2.04/255." in found.warnings


def test_outputs_that_are_not_finite_are_told() -> None:
    net = ClearNet()
    data = labelled_by(net, 30)
    whole = 255 * torch.ones(1)
    off_grid = ClearNet(
        before=lambda x: torch.where(((x * whole).round() - x * whole).abs().amax((1, 2, 3), True) > 1e-3, torch.nan, x)
    )
    found = evaluate(off_grid, data, Protocol(eps=EPS), progress=False)
    assert any(warning.startswith("finite outputs: no. not finite on") for warning in found.warnings)
    with pytest.raises(ValueError, match="outputs that are not finite"):
        evaluate(ClearNet(after=lambda logits: logits * torch.nan), data, progress=False)


def test_few_images_and_what_was_said_about_the_data_are_warnings_of_the_result() -> None:
    net = ClearNet()
    data = labelled_by(net, 30)
    few = evaluate(net, data, Protocol(eps=EPS, check_images=5), progress=False)
    assert "Only 5 images were checked for false robustness, which shows little." in few.warnings
    net.pretrained_cfg = {"label_names": [f"other{i}" for i in range(10)]}  # type: ignore[assignment]
    with pytest.warns(UserWarning, match="their order is taken to be the same"):
        named = evaluate(net, data, Protocol(eps=EPS), progress=False)
    assert any("their order is taken to be the same" in warning for warning in named.warnings)


def test_a_caller_without_gradients_is_no_hindrance_but_a_model_without_is() -> None:
    net = ClearNet()
    data = labelled_by(net, 30)
    expected = evaluate(net, data, Protocol(eps=EPS, check_images=0), progress=False).images
    with torch.no_grad():
        assert evaluate(net, data, Protocol(eps=EPS, check_images=0), progress=False).images == expected
    with pytest.raises(ValueError, match="carry no gradient"):
        evaluate(ClearNet(before=lambda images: images.detach()), data, progress=False)


def test_what_is_said_while_the_data_are_matched_is_passed_on_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def check_fits(model: Any, data: Any) -> None:
        for _ in range(2):
            warnings.warn("the same twice", stacklevel=2)
        warnings.warn("an old name", DeprecationWarning, stacklevel=1)

    monkeypatch.setattr(matching, "check_fits", check_fits)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = evaluate(ClearNet(), labelled_by(ClearNet(), 5), Protocol(steps=0), progress=False)
    said = [(entry.category, str(entry.message), entry.filename) for entry in caught]
    assert said == [(UserWarning, "the same twice", __file__), (DeprecationWarning, "an old name", __file__)]
    assert found.warnings.count("the same twice") == 1 and "an old name" not in found.warnings
