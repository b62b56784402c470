"""For all tests of train/."""

import pytest


@pytest.fixture(autouse=True)
def no_rendering(blank_pictures: None) -> None:
    """For the whole room."""
