"""Loads the fixtures of all tests, which are in tests/support/fixtures.py."""

import pytest


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """With `-n`, not in the process that deals out the tests: it would import torch for nothing, while all others wait."""
    if hasattr(config, "workerinput") or not config.getoption("numprocesses", None):
        config.pluginmanager.import_plugin("tests.support.fixtures")
