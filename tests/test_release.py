"""Releasing weights: what model_cards/release.py writes, in a copy of the package."""

import json
import shutil
import sys
from pathlib import Path

import pytest

import advcl_hub
from advcl_hub import registry
from advcl_hub.export import WEIGHTS
from model_cards import release
from tests.hub_client import TOKENS, open_client
from tests.hub_server import Hub
from tests.small_encoders import export_encoder

ROOT = Path(__file__).parents[1]
NAME = "resnet20_cifar.test"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    folder = tmp_path / "checkout"
    for part in ("advcl_hub", "model_cards"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "README.md", folder)
    return folder


def run(checkout: Path, *arguments: object) -> str:
    """What the script says when it refuses; called in the client's process, on a copy."""
    registry.BUNDLED = release.BUNDLED = checkout / "advcl_hub/weights"
    registry.CHECKOUT = release.CHECKOUT = checkout / "model_cards/weights"
    release.RELEASED = checkout / "advcl_hub/released.json"
    release.ROOT, release.CARDS, release.README = checkout, checkout / "model_cards", checkout / "README.md"
    sys.argv = ["release.py", *map(str, arguments)]
    try:
        release.main()
    except SystemExit as refused:
        return str(refused.code)
    return ""


def released(checkout: Path) -> dict[str, dict[str, object]]:
    return json.loads((checkout / "advcl_hub/released.json").read_text())["releases"]


def test_bundled_first_and_on_the_hub_later(checkout: Path, tmp_path: Path) -> None:
    folder = export_encoder(tmp_path / "encoder", "resnet20_cifar")
    bundled, earlier = checkout / "advcl_hub/weights" / NAME, released(checkout)
    with Hub(TOKENS).serve() as hub, open_client(hub, tmp_path / "home") as client:
        assert client(run, checkout, folder, NAME) == ""
        assert (bundled / WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()
        entry = released(checkout)[NAME]
        assert entry["bundled"] and "hub_id" not in entry and released(checkout).keys() == {*earlier, NAME}
        assert f"[`{NAME}`](model_cards/{NAME}/README.md) | none |" in (checkout / "README.md").read_text()
        assert (checkout / "model_cards" / NAME / "README.md").read_text().startswith("---\n")

        right = client(advcl_hub.push, folder, "acme/encoder").commit
        wrong = client(advcl_hub.push, export_encoder(tmp_path / "other", "resnet20_cifar", seed=1), "acme/other").commit
        assert "has other weights than" in client(run, checkout, folder, NAME, "--hub", f"acme/other@{wrong}")
        assert "a release is pinned" in client(run, checkout, folder, NAME, "--hub", "acme/encoder@v1")
        assert "not resnet8_cifar.x" in client(run, checkout, folder, "resnet8_cifar.x")
        assert released(checkout)[NAME] == entry and bundled.is_dir()
        assert client(run, checkout, folder, NAME, "--hub", f"acme/encoder@{right}") == ""
    found = released(checkout)[NAME]
    assert (found["hub_id"], found["revision"]) == ("acme/encoder", right) and "bundled" not in found
    assert not bundled.exists() and not (checkout / "model_cards" / NAME / WEIGHTS).exists()
    assert "| acme/encoder |" in (checkout / "README.md").read_text()
