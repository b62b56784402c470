"""Properties of finetuning's settings: what is accepted lies in its range, and a preset keeps what is not overridden."""

import math
from typing import Any

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from advcl_hub.finetuning.presets import PRESETS, PROTOCOLS, Settings, choose_settings
from tests.support import properties  # noqa: F401

floats = st.sampled_from([0.0, 0.5, 1.0, 8 / 255, 8.0, -1.0, math.inf, math.nan]) | st.floats()
whole = st.integers(-1, 300)
NUMBERS = ("lr", "momentum", "weight_decay", "eps", "step_size", "beta", "ema_decay", "val_fraction")
overrides = st.fixed_dictionaries(
    {},
    optional={
        **dict.fromkeys(NUMBERS, floats),
        **dict.fromkeys(("epochs", "batch_size", "steps", "accumulate", "seed"), whole),
        "milestones": st.lists(floats, max_size=3).map(tuple),
        "objective": st.sampled_from(["ce", "pgd", "trades", "x"]),
        "augment": st.sampled_from(["crop-flip", "none", "x"]),
    },
)


@given(st.sampled_from(sorted(PRESETS)), overrides)
@example(("advcl", "aff"), {"weight_decay": math.inf})
@example(("advcl", "aff"), {"beta": math.inf})
@example(("advcl", "alf"), {"eps": math.nan})
@example(("advcl", "alf"), {"eps": 8.0})
@example(("advcl", "alf"), {"step_size": 2.0})
def test_settings_are_in_their_range_or_refused(pair: tuple[str, str], changes: dict[str, Any]) -> None:
    preset, protocol = pair
    try:
        found = choose_settings(protocol, preset, overrides=changes)
    except ValueError as error:
        assert changes and str(error)
        return
    assert all(math.isfinite(getattr(found, name)) for name in NUMBERS)
    assert 0 < found.eps <= 1 and 0 < found.step_size <= 1 and found.lr > 0 and found.weight_decay >= 0
    assert min(found.epochs, found.batch_size, found.steps, found.accumulate) >= 1 and found.seed >= 0
    assert all(getattr(found, name) == value for name, value in changes.items())
    plain = found.to_dict() | {"milestones": found.milestones, "branches": found.branches}
    assert Settings(**plain) == found


@given(st.sampled_from(sorted(PRESETS)), st.integers(1, 400))
def test_milestones_keep_their_place_when_the_epochs_change(pair: tuple[str, str], epochs: int) -> None:
    preset, protocol = pair
    usual, found = choose_settings(protocol, preset), choose_settings(protocol, preset, overrides={"epochs": epochs})
    shares = [milestone / usual.epochs for milestone in usual.milestones]
    assert [milestone / epochs for milestone in found.milestones] == pytest.approx(shares, rel=0.01)


@given(st.sampled_from(sorted(set(Settings.__dataclass_fields__) - {"protocol", "preset"})), st.sampled_from(sorted(PROTOCOLS)))
def test_an_unknown_setting_is_refused_with_the_nearest(name: str, protocol: str) -> None:
    assume(len(name) > 4)
    with pytest.raises(ValueError, match=f"Did you mean '{name}'"):
        choose_settings(protocol, "advcl", overrides={f"{name}x": 1})
