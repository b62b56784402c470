"""Fixtures shared by all tests."""

import os
from pathlib import Path

import pytest
import torch

# pytest-xdist runs several of these processes: with torch's default threads they would fight for the cores.
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def cifar10_folder() -> Path:
    """Folder with CIFAR-10 as parquet files, as in the Hugging Face dataset; skips where it is absent."""
    sibling = Path(__file__).parents[2] / "shared" / "data"
    folder = Path(os.environ.get("ADVCL_TEST_DATA", sibling)) / "cifar10"
    if not any(folder.glob("train-*.parquet")) or not any(folder.glob("test-*.parquet")):
        pytest.skip(
            f"needs real CIFAR-10: no train-*.parquet and test-*.parquet in {folder}; "
            "set ADVCL_TEST_DATA to the folder that holds cifar10/"
        )
    return folder
