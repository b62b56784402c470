"""One profile of hypothesis for all property tests, and what several of them draw from; tests/support/fixtures.py loads it.

The examples are few and always the same, without a time limit. To search for new failures among many random ones:
HYPOTHESIS_PROFILE=search make test PYTEST_ARGS=tests/test_files_properties.py
"""

import os
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.configuration import set_hypothesis_home_dir

from tests.support import ROOT

PROFILE = os.environ.get("HYPOTHESIS_PROFILE", "usual")
_SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]
settings.register_profile("usual", deadline=None, derandomize=True, database=None, max_examples=30, suppress_health_check=_SLOW)
settings.register_profile("search", deadline=None, database=None, max_examples=1000, suppress_health_check=_SLOW)
settings.load_profile(PROFILE)
set_hypothesis_home_dir(ROOT / ".cache" / "hypothesis")  # its tables of letters

# What breaks tables, HTML, terminals and encodings, among ordinary letters.
LETTERS = "ab 17.-_|`<>&$#%\\/\"'{}[]:=,@\n\r\t\0\x1b\x7f\x85\u2028\u202e\u0301é中\u0663\ud800"
odd_text = st.text(st.sampled_from(LETTERS), max_size=12)
if PROFILE == "search":  # two seconds for the tables of all letters
    odd_text |= st.text(max_size=12)
scalars = st.none() | st.booleans() | st.integers() | st.floats() | odd_text
json_values: st.SearchStrategy[Any] = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(odd_text, inner, max_size=3), max_leaves=6
)
DEEP = "[" * 100_000 + "]" * 100_000  # JSON and YAML that no recursive parser takes


@st.composite
def damaged(draw: st.DrawFn, record: Any) -> Any:
    """A record of JSON with one part of it replaced or missing."""
    if not isinstance(record, dict | list) or not record or not draw(st.integers(0, 4)):
        return draw(json_values)
    keys = list(record) if isinstance(record, dict) else list(range(len(record)))
    key = draw(st.sampled_from(keys))
    copy = record.copy()
    if draw(st.integers(0, 4)):
        copy[key] = draw(damaged(record[key]))
    else:
        del copy[key]
    return copy
