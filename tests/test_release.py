"""Releasing weights: what model_cards/release.py writes, in a copy of the package."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import advcl_hub
from advcl_hub.export import WEIGHTS
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


def run(checkout: Path, *arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "model_cards/release.py", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1", **variables}
    return subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, timeout=120)


def released(checkout: Path) -> dict[str, dict[str, object]]:
    return json.loads((checkout / "advcl_hub/released.json").read_text())["releases"]


def test_bundled_first_and_on_the_hub_later(checkout: Path, tmp_path: Path) -> None:
    folder = export_encoder(tmp_path / "encoder", "resnet20_cifar")
    earlier = released(checkout)
    done = run(checkout, folder, NAME)
    assert done.returncode == 0, done.stderr
    bundled = checkout / "advcl_hub/weights" / NAME
    assert (bundled / WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()
    entry = released(checkout)[NAME]
    assert entry["bundled"] and "hub_id" not in entry and released(checkout).keys() == {*earlier, NAME}
    assert f"[`{NAME}`](model_cards/{NAME}/README.md) | none |" in (checkout / "README.md").read_text()
    assert (checkout / "model_cards" / NAME / "README.md").read_text().startswith("---\n")

    with Hub(TOKENS).serve() as hub, open_client(hub, tmp_path / "home") as client:
        right = client(advcl_hub.push, folder, "acme/encoder").commit
        wrong = client(advcl_hub.push, export_encoder(tmp_path / "other", "resnet20_cifar", seed=1), "acme/other").commit
        there = hub.environment(tmp_path / "home")
        for source, said in {
            f"acme/other@{wrong}": "has other weights than",
            "acme/encoder@v1": "a release is pinned",
        }.items():
            refused = run(checkout, folder, NAME, "--hub", source, **there)
            assert refused.returncode == 1 and said in refused.stderr and released(checkout)[NAME] == entry
        done = run(checkout, folder, NAME, "--hub", f"acme/encoder@{right}", **there)
    assert done.returncode == 0, done.stderr
    found = released(checkout)[NAME]
    assert (found["hub_id"], found["revision"]) == ("acme/encoder", right) and "bundled" not in found
    assert not bundled.exists() and not (checkout / "model_cards" / NAME / WEIGHTS).exists()
    assert "| acme/encoder |" in (checkout / "README.md").read_text()
    assert "not resnet8_cifar.x" in run(checkout, folder, "resnet8_cifar.x").stderr
