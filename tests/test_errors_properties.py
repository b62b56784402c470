"""Properties of how errors of others are told: one printable sentence of a limited length."""

from hypothesis import example, given
from hypothesis import strategies as st

from advcl_hub.errors import reason_of, visible
from tests.support.properties import odd_text

keys = st.lists(odd_text.map("  Missing key(s) in state_dict: {}. ".format), max_size=3)
SHAPES = (
    "\tsize mismatch for {}: copying a param with shape torch.Size([2]) from checkpoint, "
    "the shape in current model is torch.Size([3])."
)
refused = st.tuples(keys, st.lists(odd_text.map(SHAPES.format), max_size=4)).map(
    lambda lines: "\n".join(["Error(s) in loading state_dict for Net:", *lines[0], *lines[1]])
)


@example("\x08", 20)
@given(odd_text | refused | st.lists(odd_text, max_size=60).map("\n".join), st.sampled_from([20, 300]))
def test_a_reason_is_one_printable_line(text: str, limit: int) -> None:
    for error in (RuntimeError(text), KeyError(text), ValueError()):
        reason = reason_of(error, limit)
        assert reason and len(reason) <= limit and reason.isprintable()


@given(odd_text)
def test_visible_text_loses_nothing_and_moves_no_cursor(text: str) -> None:
    shown = visible(text)
    assert shown.replace("\n", "").isprintable() and shown.count("\n") == text.count("\n")
    assert visible(shown) == shown and (shown == text or not text.replace("\n", "").isprintable())
    assert visible("a" + text + "b") == f"a{shown}b"
