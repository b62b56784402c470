"""Releasing weights: what model_cards/release.py writes, in a copy of the package."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

import advcl_hub
from advcl_hub.hub import registry
from advcl_hub.hub.export import WEIGHTS, load_folder
from model_cards import release
from tests.support import ROOT
from tests.support.hub_client import TOKENS, Client, open_client
from tests.support.hub_server import Hub
from tests.support.small_encoders import SMALL_RESNET, export_encoder
from train.kept import keep

NAME = "resnet20_cifar.test"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    folder = tmp_path / "checkout"
    for part in ("advcl_hub", "model_cards"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.rmtree(folder / "model_cards" / "weights", ignore_errors=True)  # large weights, where there are any
    released = folder / "advcl_hub" / "hub" / "released.json"
    data = json.loads(released.read_text(encoding="utf-8"))
    data["releases"] = {name: entry for name, entry in data["releases"].items() if "parts" not in entry}
    released.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    shutil.copy(ROOT / "README.md", folder)
    return folder


def run(checkout: Path, *arguments: object) -> str:
    """What the script says when it refuses; called in the client's process, on a copy."""
    registry.BUNDLED = release.BUNDLED = checkout / "advcl_hub/hub/weights"
    registry.CHECKOUT = release.CHECKOUT = checkout / "model_cards/weights"
    release.RELEASED = checkout / "advcl_hub/hub/released.json"
    release.ROOT, release.CARDS, release.README = checkout, checkout / "model_cards", checkout / "README.md"
    sys.argv = ["release.py", *map(str, arguments)]
    try:
        release.main()
    except SystemExit as refused:
        return str(refused.code)
    return ""


def released(checkout: Path) -> dict[str, dict[str, Any]]:
    return json.loads((checkout / "advcl_hub/hub/released.json").read_text(encoding="utf-8"))["releases"]


def test_bundled_first_and_on_the_hub_later(checkout: Path, tmp_path: Path) -> None:
    folder = export_encoder(tmp_path / "encoder", "resnet20_cifar", **SMALL_RESNET)
    bundled, earlier = checkout / "advcl_hub/hub/weights" / NAME, released(checkout)
    with Hub(TOKENS).serve() as hub, open_client(hub, tmp_path / "home") as client:
        assert client(run, checkout, folder, NAME) == ""
        assert (bundled / WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()
        entry = released(checkout)[NAME]
        assert entry["bundled"] and "hub_id" not in entry and released(checkout).keys() == {*earlier, NAME}
        assert f"[`{NAME}`](model_cards/{NAME}/README.md) | none |" in (checkout / "README.md").read_text(encoding="utf-8")
        assert (checkout / "model_cards" / NAME / "README.md").read_text(encoding="utf-8").startswith("---\n")

        right = client(advcl_hub.push, folder, "acme/encoder").commit
        wrong = client(
            advcl_hub.push, export_encoder(tmp_path / "other", "resnet20_cifar", seed=1, **SMALL_RESNET), "acme/other"
        ).commit
        assert "has other weights than" in client(run, checkout, folder, NAME, "--hub", f"acme/other@{wrong}")
        assert "a release is pinned" in client(run, checkout, folder, NAME, "--hub", "acme/encoder@v1")
        assert "is released with other weights" in client(run, checkout, tmp_path / "other", NAME)
        assert "not resnet8_cifar.x" in client(run, checkout, folder, "resnet8_cifar.x")
        assert released(checkout)[NAME] == entry and bundled.is_dir()
        assert client(run, checkout, folder, NAME, "--hub", f"acme/encoder@{right}") == ""
    found = released(checkout)[NAME]
    assert (found["hub_id"], found["revision"]) == ("acme/encoder", right) and "bundled" not in found
    assert not bundled.exists() and not (checkout / "model_cards" / NAME / WEIGHTS).exists()
    assert "| acme/encoder |" in (checkout / "README.md").read_text(encoding="utf-8")


def load_by_name(name: str) -> torch.Tensor:
    """In the client's process, as timm's users do; the checkout's data file is registered first."""
    found = next(release for release in registry.load_releases(release.RELEASED) if release.name == name)
    registry._register(found)
    return timm.create_model(name, pretrained=True).eval()(torch.linspace(0, 1, 768).reshape(1, 3, 16, 16)).detach()


def hide_checkout(checkout: Path) -> None:
    """As where the package was installed from an index."""
    registry.CHECKOUT = checkout / "nowhere"


def test_large_weights_lie_in_the_checkout_until_they_are_pushed(checkout: Path, tmp_path: Path) -> None:
    folder = export_encoder(tmp_path / "encoder", "resnet20_cifar")
    expected = load_folder(folder)(torch.linspace(0, 1, 768).reshape(1, 3, 16, 16)).detach()
    weights = checkout / "model_cards" / "weights"
    assert (folder / WEIGHTS).stat().st_size >= release.BUNDLED_BYTES
    with Hub(TOKENS).serve() as hub, open_client(hub, tmp_path / "home", ADVCL_HUB_ORG="acme") as client:
        assert client(run, checkout, folder, NAME) == ""
        entry = released(checkout)[NAME]
        (file,) = entry["parts"]
        assert file.startswith(f"{NAME}-") and (entry["hub_id"], entry["revision"]) == (NAME, "v1")
        assert (weights / file).is_file() and not (weights / NAME / WEIGHTS).exists()
        assert "| checkout |" in (checkout / "README.md").read_text(encoding="utf-8")
        assert torch.equal(client(load_by_name, NAME), expected)
        (joined,) = (tmp_path / "home" / "advcl_hub").glob(f"*/{WEIGHTS}")
        assert joined.read_bytes() == (folder / WEIGHTS).read_bytes()
        client(hide_checkout, checkout)
        with pytest.raises(OSError, match=rf"acme/{NAME} is not on"):
            client(load_by_name, NAME)
        client(run, checkout)
        client(load_by_name, NAME)
        pushed = client(advcl_hub.push, NAME, f"acme/{NAME}")  # by name
        assert pushed.version == "v1"
        client(hide_checkout, checkout)
        assert torch.equal(client(load_by_name, NAME), expected)  # now from anywhere
        assert client(run, checkout, folder, NAME, "--hub", f"acme/{NAME}@{pushed.commit}") == ""
    assert "parts" not in released(checkout)[NAME] and released(checkout)[NAME]["revision"] == pushed.commit
    assert list(weights.iterdir()) == []


def test_what_a_plan_kept_needs_a_licence_and_an_encoder(checkout: Path, tmp_path: Path, client: Client) -> None:
    folder = export_encoder(tmp_path / "encoder", "resnet20_cifar", **SMALL_RESNET)
    plan = tmp_path / "plan.json"
    benchmark, pretrain = {"run": "benchmark", "recipe": "x"}, {"run": "pretrain", "of": "benchmark"}
    values = {"name": NAME, "minutes": 1, "data": "digits", "stages": {"benchmark": benchmark, "pretrain": pretrain}}
    plan.write_text(json.dumps({"plan": values}), encoding="utf-8")
    keep(tmp_path / "kept", values, {"pretrain": folder}, {"plan.json": plan}, "")
    assert "give a --licence only" in client(run, checkout, tmp_path / "kept")
    assert f"did you mean {tmp_path / 'kept'}?" in client(run, checkout, tmp_path, "--licence", "mit")
    assert "no-such is no folder" in client(run, checkout, tmp_path / "no-such", NAME)
    assert "holds no finished encoder: let the plan go on" in client(run, checkout, tmp_path / "kept", "--licence", "mit")
    plan.write_text(json.dumps({"plan": {**values, "name": "../../evil"}}), encoding="utf-8")
    keep(tmp_path / "evil", {}, {"encoder": folder}, {"plan.json": plan}, "")
    assert "has a damaged plan.json: name: '../../evil'" in client(run, checkout, tmp_path / "evil", "--licence", "mit")
    assert "is no name of a release" in client(run, checkout, folder, "resnet20_cifar.a/../b")
    assert NAME not in released(checkout)
