"""Copies of the project for tests of releasing."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from advcl_hub.hub.export import PICTURE
from model_cards import release
from tests.support.checkouts import CARD, NAME, PACKAGE, bytes_of_the_package, copy_checkout, homes, run
from tests.support.hub_client import Client
from tests.support.small_encoders import SMALL_RESNET, export_encoder


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    return copy_checkout(tmp_path / "checkout")


@pytest.fixture
def limit(client: Client) -> Iterator[Callable[[int], None]]:
    """Sets the largest size of weights in the package, in the client's process."""
    yield lambda number: client(bytes_of_the_package, number)
    client(bytes_of_the_package, release.BUNDLED_BYTES)


@pytest.fixture
def small(checkout: Path, tmp_path: Path, client: Client) -> Path:
    """A checkout with one release, in the package, which RobustBench knows, too."""
    shutil.rmtree(checkout / "advcl_hub/hub/weights")
    for card in (checkout / "model_cards").glob("*_cifar.*"):
        shutil.rmtree(card)
    (checkout / "advcl_hub/hub/released.json").write_text('{"organisation": "acme", "releases": {}}\n', encoding="utf-8")
    folder = export_encoder(tmp_path / "encoder", "resnet20_cifar", **SMALL_RESNET)
    (folder / PICTURE).write_bytes(b"a picture")
    assert client(run, checkout, folder, NAME, "--robustbench", "advcl_test_linf") == ""
    assert homes(checkout) == {"card": CARD, "package": PACKAGE}
    return checkout
