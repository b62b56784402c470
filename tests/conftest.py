"""Loads the fixtures of all tests, which are in tests/support/fixtures.py."""

import os

import pytest

# Before torch is imported: several processes of tests, and those that they start, would fight for the cores.
os.environ["OMP_NUM_THREADS"] = "1"


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Loads them, but with `-n` in the workers only: the process that deals out the tests would import torch for nothing."""
    works = hasattr(config, "workerinput") or not config.getoption("numprocesses", None)
    if works or config.option.collectonly:
        config.pluginmanager.import_plugin("tests.support.fixtures")
