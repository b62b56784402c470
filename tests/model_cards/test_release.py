"""Releasing weights: what model_cards/release.py writes, in a copy of the package."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from huggingface_hub import constants
from safetensors.torch import load_file

import advcl_hub
from advcl_hub.hub import registry
from advcl_hub.hub import released as releases
from advcl_hub.hub.cards import add_to_results
from advcl_hub.hub.export import GOLDEN, PICTURE, WEIGHTS, load_folder
from model_cards import release
from model_cards.heads import HEAD
from tests.support.checkouts import CARD, DESCRIBED, NAME, PACKAGE, bytes_of_the_package, files, homes, loaded, released, run
from tests.support.hub_client import TOKENS, Client, open_client
from tests.support.hub_server import Hub
from tests.support.small_encoders import SMALL_RESNET, export_encoder, export_head
from train.kept import keep

IMAGES = torch.linspace(0, 1, 768).reshape(1, 3, 16, 16)


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
    found = next(release for release in releases.load_releases(release.RELEASED) if release.name == name)
    registry._register(found)
    return timm.create_model(name, pretrained=True).eval()(IMAGES).detach()


def hide_checkout(checkout: Path) -> None:
    """As where the package was installed from an index."""
    releases.CHECKOUT = checkout / "nowhere"


@pytest.mark.slow
def test_large_weights_lie_in_the_checkout_until_they_are_pushed(checkout: Path, tmp_path: Path) -> None:
    """Of 1 MB, where the package takes less."""
    folder = export_encoder(tmp_path / "encoder", "resnet20_cifar")
    expected = load_folder(folder)(IMAGES).detach()
    weights = checkout / "model_cards" / "weights"
    with Hub(TOKENS).serve() as hub, open_client(hub, tmp_path / "home", ADVCL_HUB_ORG="acme") as client:
        client(bytes_of_the_package, 1_000_000)
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


def load_with_a_home_that_cannot_be_written(name: str) -> torch.Tensor:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HOME", "/dev/null/home")
        return load_by_name(name)


@pytest.mark.slow
def test_of_a_head_on_a_bundled_encoder_only_the_head_is_stored(checkout: Path, tmp_path: Path, client: Client) -> None:
    encoder = export_encoder(tmp_path / "encoder", "resnet20_cifar", **SMALL_RESNET)
    other = export_encoder(tmp_path / "other", "resnet20_cifar", seed=1, **SMALL_RESNET)
    slf, alf = (
        export_head(encoder, tmp_path / "slf", 2, **SMALL_RESNET),
        export_head(encoder, tmp_path / "alf", 3, **SMALL_RESNET),
    )
    package = checkout / "advcl_hub/hub/weights"
    assert client(run, checkout, encoder, NAME, slf, f"{NAME}_slf") == ""
    assert client(run, checkout, alf, f"{NAME}_alf") == ""  # later
    for name, folder in ((f"{NAME}_slf", slf), (f"{NAME}_alf", alf)):
        entry = released(checkout)[name]
        assert entry["bundled"] and entry["parts"] == [f"{NAME}/{WEIGHTS}", f"{name}/{HEAD}"]
        assert set(load_file(package / name / HEAD)) == {"fc.weight", "fc.bias"} and not (package / name / WEIGHTS).exists()
        assert entry["files"][WEIGHTS]["size"] == (folder / WEIGHTS).stat().st_size
        assert torch.equal(client(load_by_name, name), load_folder(folder)(IMAGES).detach())
    assert torch.equal(client(load_with_a_home_that_cannot_be_written, f"{NAME}_slf"), load_folder(slf)(IMAGES).detach())
    assert "| other | - | - | - | - | - | - | package |" in (checkout / "README.md").read_text(encoding="utf-8")
    before = files(checkout)
    assert client(run, checkout, package / f"{NAME}_slf", f"{NAME}_slf") == "" and files(checkout) == before

    # An encoder does not change, or leave the package, under its heads.
    assert f"Of {NAME}_slf, {NAME}_alf only the head is stored, on {NAME}" in client(run, checkout, other, NAME, "--replace")
    assert files(checkout) == before
    new = export_head(other, tmp_path / "new", 4, **SMALL_RESNET)
    pairs = (other, NAME, new, f"{NAME}_slf", export_head(other, tmp_path / "new_alf", 5, **SMALL_RESNET), f"{NAME}_alf")
    assert client(run, checkout, *pairs, "--replace") == ""
    assert torch.equal(client(load_by_name, f"{NAME}_slf"), load_folder(new)(IMAGES).detach())


def test_several_releases_in_one_call_are_checked(checkout: Path, tmp_path: Path, client: Client) -> None:
    folder = export_encoder(tmp_path / "encoder", "resnet20_cifar", **SMALL_RESNET)
    assert "needs a name" in client(run, checkout, folder, NAME, folder)
    assert "The same name was given twice" in client(run, checkout, folder, NAME, folder, NAME)
    assert "are for one release" in client(run, checkout, folder, NAME, folder, f"{NAME}2", "--robustbench", "a_b_linf")
    assert NAME not in released(checkout)


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
    plan.write_text(json.dumps({"plan": {**values, "name": "resnet20_cifar./../x"}}), encoding="utf-8")
    keep(tmp_path / "worse", {}, {"encoder": folder}, {"plan.json": plan}, "")
    assert "damaged plan.json: name: 'resnet20_cifar./../x'" in client(run, checkout, tmp_path / "worse", "--licence", "mit")
    assert "is no name of a release" in client(run, checkout, folder, "resnet20_cifar.a/../b")
    assert NAME not in released(checkout)


# ---------------------------------------------------------------------------------- from where a release lies, and names


@pytest.mark.parametrize("given", ["as it is", "relative", "link", "link in its place"])
def test_a_release_is_made_again_from_its_own_folder(given: str, small: Path, client: Client, tmp_path: Path) -> None:
    home, before = small / "advcl_hub/hub/weights" / NAME, files(small)
    folder = Path(os.path.relpath(home)) if given == "relative" else home
    if given == "link":
        folder = tmp_path / "link"
        folder.symlink_to(home)
    elif given == "link in its place":
        home.rename(tmp_path / "elsewhere")
        home.symlink_to(tmp_path / "elsewhere")
    assert client(run, small, folder, NAME) == ""
    assert files(small) == before  # nothing is new, nothing is lost
    elsewhere = files(tmp_path / "elsewhere")
    assert not home.is_symlink() and (given != "link in its place" or elsewhere.keys() == PACKAGE)
    add_to_results(home, notes=["Added later."])
    assert client(run, small, folder, NAME) == ""
    changed = {name for name, content in files(small).items() if content != before.get(name)}
    assert changed == {f"advcl_hub/hub/weights/{NAME}/results.json", f"model_cards/{NAME}/README.md"}
    assert "Added later." in (small / "model_cards" / NAME / "README.md").read_text(encoding="utf-8")
    assert released(small)[NAME]["robustbench"] == "advcl_test_linf" and files(tmp_path / "elsewhere") == elsewhere


@pytest.mark.parametrize("in_parts", [False, True])
def test_from_its_own_folder_to_the_hub(
    in_parts: bool, small: Path, client: Client, tmp_path: Path, limit: Callable[[int], None]
) -> None:
    home, cards = small / ("model_cards/weights" if in_parts else "advcl_hub/hub/weights") / NAME, small / "model_cards" / NAME
    expected = client(loaded, small, tmp_path / "cache")
    if in_parts:
        limit(0)
        assert client(run, small, small / "advcl_hub/hub/weights" / NAME, NAME) == ""
        assert homes(small) == {"card": CARD, "checkout": {*DESCRIBED, GOLDEN}}
        before = files(small)
        assert client(run, small, home, NAME) == "" and files(small) == before
        assert torch.equal(client(loaded, small, tmp_path / "cache"), expected)
    name = f"acme/own{in_parts}"
    commit = client(advcl_hub.push, tmp_path / "encoder", name).commit
    add_to_results(home, notes=["Added later."])
    assert client(run, small, home, NAME, "--hub", f"{name}@{commit}") == ""
    assert homes(small) == {"card": {*DESCRIBED, "README.md"}} and not list((small / "model_cards/weights").glob("*"))
    assert torch.equal(client(loaded, small, tmp_path / "cache"), expected)
    before = files(small)
    assert "is no folder" in client(run, small, home, NAME, "--hub", f"{name}@{commit}")  # it has moved there
    assert client(run, small, cards, NAME, "--hub", f"{name}@{commit}") == "" and files(small) == before
    assert "Added later." in (cards / "README.md").read_text(encoding="utf-8")
    assert released(small)[NAME]["robustbench"] == "advcl_test_linf"
    assert client(run, small, cards, NAME) == ""  # and back
    assert homes(small).keys() == {"card", "checkout" if in_parts else "package"}
    assert torch.equal(client(loaded, small, tmp_path / "cache"), expected)


def test_of_a_link_in_the_place_of_a_home_only_the_link_is_removed(small: Path, client: Client, tmp_path: Path) -> None:
    other = export_encoder(tmp_path / "other", "resnet20_cifar", seed=1, **SMALL_RESNET)
    outside = tmp_path / "outside"
    outside.mkdir()
    for name in (*PACKAGE, "README.md", "notes.txt"):
        (outside / name).write_text(name, encoding="utf-8")
    before = files(outside)
    shutil.rmtree(small / "model_cards" / NAME)
    (small / "model_cards/weights").mkdir()
    for room in ("model_cards", "model_cards/weights"):
        (small / room / NAME).symlink_to(outside)
    assert client(run, small, other, NAME, "--replace") == ""
    assert files(outside) == before
    assert homes(small) == {"card": {"README.md"}, "package": PACKAGE - {PICTURE}}  # which has no picture
    assert (small / "advcl_hub/hub/weights" / NAME / WEIGHTS).read_bytes() == (other / WEIGHTS).read_bytes()
    assert not any((small / room / NAME).is_symlink() for room in ("model_cards", "model_cards/weights"))


def test_files_of_somebody_else_in_the_places_of_a_release_stay(small: Path, client: Client, tmp_path: Path) -> None:
    other = export_encoder(tmp_path / "other", "resnet20_cifar", seed=1, **SMALL_RESNET)
    for place in (small / "advcl_hub/hub/weights" / NAME / "notes.txt", small / "model_cards/weights" / NAME):
        place.parent.mkdir(exist_ok=True)
        place.write_text("mine", encoding="utf-8")
        before = files(small)
        assert "no part of a release: move it" in client(run, small, other, NAME, "--replace")
        assert files(small) == before
        place.unlink()
    for room in ("model_cards", "advcl_hub/hub/weights", "model_cards/weights"):  # an export that was never released
        mine = small / room / "resnet20_cifar.mine"
        shutil.copytree(other, mine)
        before = files(small)
        for folder in (other, mine):
            assert f"{mine} is in the way" in client(run, small, folder, "resnet20_cifar.mine", "--replace")
        assert files(small) == before
        shutil.rmtree(mine)
    shutil.rmtree(small / "model_cards/weights")
    (small / "model_cards/weights").symlink_to("../advcl_hub/hub/weights")
    assert "two are the same folder" in client(run, small, other, NAME, "--replace")
    (small / "model_cards/weights").unlink()
    assert client(run, small, other, NAME, "--replace") == ""


def test_a_name_that_is_no_name_touches_nothing(small: Path, client: Client, tmp_path: Path) -> None:
    before = files(tmp_path)
    tags = ("/../x", "..", "/x", "", ".x", "-x", "a..b", "a\\b", "a b", "a\n", "/", "é", str(tmp_path / "x"))
    for name in [*[f"resnet20_cifar.{tag}" for tag in tags], "resnet20_cifar", str(tmp_path / "resnet20_cifar.x"), "../a.b"]:
        for options in ((), ("--replace",), ("--hub", f"acme/x@{'a' * 40}")):
            assert "is no name of a release" in client(run, small, tmp_path / "encoder", name, *options), name
    assert files(tmp_path) == before
    data = json.loads((small / "advcl_hub/hub/released.json").read_text(encoding="utf-8"))
    data["releases"]["resnet20_cifar./../../x"] = data["releases"][NAME]
    (small / "advcl_hub/hub/released.json").write_text(json.dumps(data), encoding="utf-8")
    before = files(tmp_path)
    assert "the entry resnet20_cifar./../../x is damaged" in client(run, small, tmp_path / "encoder", NAME)
    assert files(tmp_path) == before
