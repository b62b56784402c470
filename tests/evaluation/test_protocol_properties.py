"""Properties of an evaluation's settings: what is accepted lies in its range."""

import math
from typing import Any

from hypothesis import example, given
from hypothesis import strategies as st

from advcl_hub.evaluation.protocol import Protocol
from tests.support import properties  # noqa: F401

numbers = st.sampled_from([0.0, -0.0, 8 / 255, 0.5, 1.0, 8.0, math.inf, -math.inf, math.nan]) | st.floats()
settings = st.fixed_dictionaries(
    {"norm": st.sampled_from(["Linf", "L2", "L1"])},
    optional={
        "eps": st.none() | numbers,
        "step_size": st.none() | numbers,
        **dict.fromkeys(("steps", "restarts", "seed", "batch_size", "check_images"), st.integers(-2, 3)),
        "loss": st.sampled_from(["ce", "dlr", "kl"]),
        "autoattack": st.sampled_from([None, "standard", "plus"]),
    },
)


@given(settings)
@example({"norm": "Linf", "eps": math.nan})
@example({"norm": "Linf", "eps": 8.0})
@example({"norm": "L2", "eps": math.inf})
@example({"norm": "Linf", "step_size": math.nan})
@example({"norm": "Linf", "step_size": math.inf})
@example({"norm": "Linf", "step_size": 0.0})
@example({"norm": "Linf", "eps": 0.0, "autoattack": "standard"})
def test_settings_are_in_their_range_or_refused(given_: dict[str, Any]) -> None:
    try:
        found = Protocol(**given_)
    except ValueError:
        known = given_["norm"] != "L1" and given_.get("loss") != "kl" and given_.get("autoattack") != "plus"
        least = {"steps": 0, "restarts": 1, "seed": 0, "batch_size": 1, "check_images": 0}
        whole = all(given_.get(name, 1) >= smallest for name, smallest in least.items())
        lengths = (given_.get("eps"), given_.get("step_size"))
        assert not (known and whole and all(length is None or 0 < length <= 1 for length in lengths))
        return
    assert 0 <= found.radius < math.inf and (found.norm == "L2" or found.radius <= 1)
    assert 0 <= found.step < math.inf and (found.step > 0 or not found.attacks_with_pgd)
    assert found.restarts >= 1 and found.batch_size >= 1 and min(found.steps, found.seed, found.check_images) >= 0
    assert Protocol(**found.to_dict()) == found
