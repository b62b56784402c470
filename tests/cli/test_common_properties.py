"""Properties of what the command line reads and tells."""

import math

import click
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from advcl_hub.cli.common import length, numbers, sentence, words
from tests.support.properties import odd_text


@given(st.integers(0, 10**6), st.integers(1, 10**6), st.floats(-1e300, 1e300))
def test_a_length_is_a_number_or_a_fraction(above: int, below: int, value: float) -> None:
    assert length(f"{above}/{below}") == above / below
    assert length(repr(value)) == value


@given(odd_text | st.text(st.sampled_from("0123456789e./-+"), max_size=10))
@example("1e400")
@example("1e999999999")
@example("9" * 400 + "/1")
@example("nan")
@example("-inf")
@example("1/0")
@example("")
def test_any_other_text_is_refused(text: str) -> None:
    try:
        assert math.isfinite(length(text))
    except click.BadParameter as error:
        assert repr(text) in error.message


@given(st.lists(st.floats(-1e300, 1e300)), st.lists(st.text(st.sampled_from("ab 1"), min_size=1)))
def test_lists_have_commas_between_them(values: list[float], names: list[str]) -> None:
    assert numbers(",".join(map(repr, values))) == tuple(values)
    assert words(",".join(names)) == tuple(names)


@given(odd_text, st.sampled_from([ValueError, OSError, RuntimeError, KeyError, MemoryError, click.ClickException]))
def test_an_error_of_any_kind_moves_no_cursor(text: str, kind: type[Exception]) -> None:
    told = sentence(kind(text))
    assert told and told.replace("\n", "").isprintable()


def test_what_is_no_number_in_a_list_is_named() -> None:
    with pytest.raises(click.BadParameter, match="'x'"):
        numbers("1,x")
