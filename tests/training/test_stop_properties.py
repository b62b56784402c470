"""Properties of durations such as 90s, 9m or 2h."""

import argparse
import math

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from advcl_hub.training.stop import duration
from tests.support.properties import odd_text


@given(st.integers(0, 10**6) | st.floats(0, 1e6), st.sampled_from([("s", 1), ("m", 60), ("h", 3600)]))
def test_a_duration_is_its_number_of_units(number: float, unit: tuple[str, int]) -> None:
    assert duration(f"{number}{unit[0]}") == float(number) * unit[1]


@given(odd_text | st.text(st.sampled_from("019e.+-smhd"), max_size=8))
@example("")
@example("m")
@example("nans")
@example("infh")
@example("1e308h")
@example("-1s")
def test_any_text_is_a_finite_time_or_refused(text: str) -> None:
    try:
        seconds = duration(text)
    except argparse.ArgumentTypeError as error:
        assert repr(text) in str(error)
        return
    assert 0 <= seconds < math.inf and text[-1] in "smh"


def test_a_number_alone_is_refused() -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="90s, 9m or 2h"):
        duration("90")
