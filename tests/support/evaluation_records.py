"""A record of an evaluation as results.json has it, and strategies that vary it."""

from typing import Any

from hypothesis import strategies as st

from advcl_hub.evaluation import Protocol
from advcl_hub.evaluation.results import proportion
from tests.support.properties import odd_text

RECORD: dict[str, Any] = {
    "kind": "evaluation",
    "format": 1,
    "model": {"name": "net", "attacked_at": [3, 32, 32], "fitted_inside": None, "file_sha256": "0" * 64},
    "data": {"name": "parquet:cifar10", "split": "test", "images": 1000, "of": 10000, "selection": "class-balanced"},
    "protocol": Protocol(autoattack="standard").to_dict(),
    "accuracy": {"standard": proportion(812, 1000), "pgd": proportion(510, 1000), "autoattack": proportion(440, 1000)},
    "autoattack_columns": {"apgd-ce": proportion(500, 1000), "apgd-t": proportion(440, 1000)},
    "autoattack_left_out": {"square": "too slow"},
    "checks": [{"name": "logits", "passed": False, "detail": "the outputs are probabilities"}],
    "warnings": ["few images"],
    "batch_size": 250,
    "command": "advcl-hub evaluate net --data cifar10",
    "seconds": 12.3,
    "hardware": {"name": "a processor"},
}


@st.composite
def records(draw: st.DrawFn) -> dict[str, Any]:
    """Records that are right, with any text of others in them."""
    text = odd_text
    change: dict[str, Any] = {
        "model": {**RECORD["model"], "name": draw(text), "fitted_inside": draw(st.none() | text)},
        "data": {**RECORD["data"], "name": draw(text), "split": draw(st.none() | text), "images": draw(st.integers(1, 10**6))},
        "checks": [{"name": draw(text), "passed": draw(st.booleans()), "detail": draw(text)}],
        "warnings": draw(st.lists(text, max_size=2)),
        "command": draw(st.none() | text),
        "hardware": {"name": draw(text)},
    }
    left_out = draw(st.sampled_from([{}, {"square": "too slow"}]))
    return RECORD | change | {"autoattack_left_out": left_out}
