"""Cases of a test that `make test` leaves out."""

from typing import Any

import pytest


def slow(*values: Any) -> Any:
    """A set of parameters, marked slow: `@pytest.mark.parametrize("name", ["a", slow("b")])`."""
    return pytest.param(*values, marks=pytest.mark.slow)
