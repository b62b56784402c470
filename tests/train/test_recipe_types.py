"""Values of the wrong type in a recipe."""

from typing import Any

import pytest

from train.recipe import from_dict


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"epochs": True}, "epochs must be int, got True"),
        ({"epochs": 2.0}, r"epochs must be int, got 2\.0"),
        ({"optimizer": {"lr": True}}, r"optimizer\.lr must be float, got True"),
        ({"speed": {"compile": 1}}, r"speed\.compile must be bool, got 1"),
        ({"model": 18}, "model must be str, got 18"),
    ],
)
def test_true_is_no_number_and_a_number_no_text(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_dict(values)
