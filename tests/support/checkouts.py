"""Copies of the project in which weights are released, in the process of a Hub client."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch

from advcl_hub.hub import registry
from advcl_hub.hub import released as releases
from advcl_hub.hub.export import GOLDEN, PICTURE, WEIGHTS
from model_cards import release
from tests.support import ROOT

NAME = "resnet20_cifar.test"
CARD = {"README.md", PICTURE}
DESCRIBED = {"results.json", "config.json", PICTURE}
PACKAGE = {*DESCRIBED, WEIGHTS, GOLDEN}


def copy_checkout(folder: Path) -> Path:
    """The parts of the project that releasing reads and writes, without large weights."""
    for part in ("advcl_hub", "model_cards"):
        shutil.copytree(ROOT / part, folder / part, ignore=_left_out)
    released = folder / "advcl_hub" / "hub" / "released.json"
    data = json.loads(released.read_text(encoding="utf-8"))
    data["releases"] = {name: entry for name, entry in data["releases"].items() if "bundled" in entry}
    released.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    shutil.copy(ROOT / "README.md", folder)
    return folder


def _left_out(folder: str, names: list[str]) -> set[str]:
    """What is not copied of a folder: caches, and large weights where there are any."""
    return {"__pycache__"} | ({"weights"} if Path(folder) == ROOT / "model_cards" else set())


def _work_in(checkout: Path) -> None:
    releases.BUNDLED = release.BUNDLED = checkout / "advcl_hub/hub/weights"
    releases.CHECKOUT = release.CHECKOUT = checkout / "model_cards/weights"
    release.RELEASED = checkout / "advcl_hub/hub/released.json"
    release.ROOT, release.CARDS, release.README = checkout, checkout / "model_cards", checkout / "README.md"


def run(checkout: Path, *arguments: object) -> str:
    """What the script says when it refuses; called in the client's process, on a copy."""
    _work_in(checkout)
    sys.argv = ["release.py", *map(str, arguments)]
    try:
        release.main()
    except SystemExit as refused:
        return str(refused.code)
    return ""


def released(checkout: Path) -> dict[str, dict[str, Any]]:
    return json.loads((checkout / "advcl_hub/hub/released.json").read_text(encoding="utf-8"))["releases"]


def files(folder: Path) -> dict[str, bytes | str]:
    """Everything in a folder by path: of files their bytes, of links where they point."""
    found = sorted(path for path in folder.rglob("*") if path.is_symlink() or path.is_file())
    return {str(p.relative_to(folder)): str(p.readlink()) if p.is_symlink() else p.read_bytes() for p in found}


def homes(checkout: Path) -> dict[str, set[str]]:
    """The names of the files of the release, by the room of the home."""
    rooms = {"card": "model_cards", "package": "advcl_hub/hub/weights", "checkout": "model_cards/weights"}
    found = {name: checkout / room / NAME for name, room in rooms.items() if (checkout / room / NAME).is_dir()}
    return {name: {path.name for path in home.iterdir()} for name, home in found.items()}


def bytes_of_the_package(limit: int) -> None:
    release.BUNDLED_BYTES = limit


def loaded(checkout: Path, cache: Path) -> torch.Tensor:
    """What the release computes, from nothing but the checkout."""
    _work_in(checkout)
    shutil.rmtree(cache, ignore_errors=True)
    found = next(found for found in releases.load_releases(release.RELEASED) if found.name == NAME)
    registry._register(replace(found, robustbench=None))  # whose name can be given once only
    model = timm.create_model(NAME, pretrained=True, cache_dir=cache)
    return model.eval()(torch.linspace(0, 1, 768).reshape(1, 3, 16, 16)).detach()
