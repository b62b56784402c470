"""A projection head on the Hub: pushed, pulled and verified with the weights, and never one of other weights."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

import advcl_hub
from advcl_hub.hub.export import RESULTS, WEIGHTS, export_folder, load_folder, verify_folder
from advcl_hub.hub.projector import PROJECTOR, load_projector
from advcl_hub.hub.push_pull import described
from tests.support.hub_client import Client
from tests.support.hub_server import Fault, Hub, flipped
from tests.support.projection_heads import trained_head
from tests.support.small_encoders import export_encoder

NAME = "acme/resnet8_cifar.test"


@pytest.fixture
def hub(served: Hub) -> Hub:
    served.repos.clear()
    served.faults.clear()
    return served


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same encoder without and with a head."""
    folder = tmp_path_factory.mktemp("exports")
    plain = export_encoder(folder / "plain")
    return plain, export_folder(
        load_folder(plain), folder / "with", results={"kind": "encoder"}, projector=trained_head(64, 12)
    )


@pytest.fixture
def plain(exports: tuple[Path, Path]) -> Path:
    return exports[0]


@pytest.fixture
def folder(exports: tuple[Path, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(exports[1], tmp_path / "export"))


def loaded(source: str) -> list[torch.Tensor]:
    """The head's tensors and what timm's encoder gives for one image (of one process, to the test's)."""
    images = torch.full((1, 3, 16, 16), 0.5)
    output = timm.create_model(source, pretrained=True).eval()(images)
    return [*load_projector(source).state_dict().values(), output.detach()]


def registered(hub_id: str) -> list[torch.Tensor]:
    advcl_hub.register("resnet8_cifar.from_hub", f"hf-hub:{hub_id}@v1")
    return loaded("resnet8_cifar.from_hub")


def described_files(name: str) -> tuple[set[str], dict[str, Any]]:
    with described(name) as (folder, _):
        return {path.name for path in folder.iterdir()}, json.loads((folder / RESULTS).read_text(encoding="utf-8"))


def test_push_pull_verify_and_load(hub: Hub, client: Client, folder: Path, tmp_path: Path) -> None:
    done = client(advcl_hub.push, folder, NAME)
    assert hub.files(NAME)[PROJECTOR] == (folder / PROJECTOR).read_bytes() and PROJECTOR in done.files
    assert f'load_projector("hf-hub:{NAME}")' in hub.files(NAME)["README.md"].decode()
    assert client(advcl_hub.push, folder, NAME).unchanged

    client(advcl_hub.pull, NAME, tmp_path / "copy", token=None)
    assert (tmp_path / "copy" / PROJECTOR).read_bytes() == (folder / PROJECTOR).read_bytes()
    assert verify_folder(tmp_path / "copy") == 0 and client(advcl_hub.verify, f"{NAME}@v1", token=None) < 1e-6
    files, results = client(described_files, NAME, token=None)
    assert PROJECTOR not in files and results["projector"]["widths"] == [64, 12]  # described without the file

    here = loaded(f"local-dir:{folder}")
    for there in (client(loaded, f"hf-hub:{NAME}@v1", token=None), client(registered, NAME, token=None)):
        assert len(there) == len(here) and all(torch.equal(a, b) for a, b in zip(here, there, strict=True))


def test_an_upload_that_changed_on_the_way_is_not_tagged(hub: Hub, client: Client, folder: Path) -> None:
    hub.faults.append(Fault(f"GET .*{PROJECTOR}", change=flipped))
    hub.faults.append(Fault("GET /storage/.*", change=flipped))
    with pytest.raises(OSError, match="could not be verified"):
        client(advcl_hub.push, folder, NAME)
    assert "refs/tags/v1" not in hub.repos[NAME].refs


def test_a_damaged_or_missing_head_is_found(hub: Hub, client: Client, folder: Path, tmp_path: Path) -> None:
    client(advcl_hub.push, folder, NAME)
    hub.add(NAME, {PROJECTOR: flipped((folder / PROJECTOR).read_bytes())})
    for function, arguments in ((advcl_hub.verify, ()), (advcl_hub.pull, (tmp_path / "copy",))):
        with pytest.raises(ValueError, match=rf"{PROJECTOR} of {NAME} is not the file that was released"):
            client(function, NAME, *arguments, cache_dir=tmp_path / "cache", token=None)
    with pytest.raises(ValueError, match=rf"{PROJECTOR} of {NAME} is not the file that was released"):
        client(load_projector, f"hf-hub:{NAME}", token=None)
    assert not (tmp_path / "copy").exists()
    hub.repos.clear()
    hub.add(NAME, {path.name: path.read_bytes() for path in folder.iterdir() if path.name != PROJECTOR})
    with pytest.raises(FileNotFoundError, match=rf"it has no {PROJECTOR}"):
        client(advcl_hub.verify, NAME, cache_dir=tmp_path / "cache", token=None)


def test_a_repository_without_one_says_so(hub: Hub, client: Client, plain: Path) -> None:
    client(advcl_hub.push, plain, NAME)
    hub.add("bob/plain", {file: (plain / file).read_bytes() for file in ("config.json", WEIGHTS)})  # as timm pushes
    for name in (NAME, "bob/plain"):
        with pytest.raises(FileNotFoundError, match=f"^hf-hub:{name} has no {PROJECTOR}: export the encoder again"):
            client(load_projector, f"hf-hub:{name}", token=None)


def test_a_version_names_the_head_too_and_no_head_of_others_stays(
    hub: Hub, client: Client, folder: Path, plain: Path, tmp_path: Path
) -> None:
    client(advcl_hub.push, plain, NAME)
    with pytest.raises(ValueError, match="other weights under version v1"):
        client(advcl_hub.push, folder, NAME)
    client(advcl_hub.push, folder, NAME, version="v2")
    with pytest.raises(ValueError, match="newer ones on main"):
        client(advcl_hub.push, plain, NAME)
    client(advcl_hub.push, plain, NAME, version="v3")
    assert PROJECTOR not in hub.files(NAME)  # nobody takes it for one of these weights
    assert client(advcl_hub.push, plain, NAME, version="v3").unchanged
    client(advcl_hub.pull, f"{NAME}@v2", tmp_path / "second", token=None)
    assert (tmp_path / "second" / PROJECTOR).is_file()
