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


@pytest.fixture(scope="module")
def one_release(client: Client, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `small`, and the encoder that it was made from."""
    folder = tmp_path_factory.mktemp("release")
    checkout = copy_checkout(folder / "checkout")
    shutil.rmtree(checkout / "advcl_hub/hub/weights")
    for card in (checkout / "model_cards").glob("*_cifar.*"):
        shutil.rmtree(card)
    (checkout / "advcl_hub/hub/released.json").write_text('{"organisation": "acme", "releases": {}}\n', encoding="utf-8")
    encoder = export_encoder(folder / "encoder", "resnet20_cifar", **SMALL_RESNET)
    (encoder / PICTURE).write_bytes(b"a picture")
    assert client(run, checkout, encoder, NAME, "--robustbench", "advcl_test_linf") == ""
    assert homes(checkout) == {"card": CARD, "package": PACKAGE}
    return folder


@pytest.fixture
def small(one_release: Path, tmp_path: Path) -> Path:
    """A checkout with one release, in the package, which RobustBench knows, too."""
    shutil.copytree(one_release, tmp_path, dirs_exist_ok=True)
    return tmp_path / "checkout"
