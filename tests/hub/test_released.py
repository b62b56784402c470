"""released.json: what it says of weights, and what it must not; where the weights are joined."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import advcl_hub
from advcl_hub.hub import registry, released
from tests.support.released_file import data_file
from tests.support.small_encoders import export_encoder


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_encoder(tmp_path_factory.mktemp("released") / "encoder")


def test_ids_without_a_namespace_belong_to_one_organisation(
    encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = data_file(tmp_path / "released.json", encoder, hub_id="short", revision="a" * 40)
    assert released.load_releases(path)[0].hub_id == "acme/short"
    monkeypatch.setenv("ADVCL_HUB_ORG", "fork")
    (release,) = released.load_releases(path)
    assert release.hub_id == "fork/short" and release.cfg.hf_hub_id == f"fork/short@{'a' * 40}"
    full = data_file(tmp_path / "released.json", encoder, hub_id="them/full", revision="a" * 40)
    assert released.load_releases(full)[0].hub_id == "them/full"


@pytest.mark.parametrize("content", ["", "{", "[]", '{"releases": 3}'])
def test_a_damaged_data_file_is_named_and_costs_the_names_only(
    content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "released.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=r"released\.json is damaged .* install advcl-hub again"):
        released.load_releases(path)
    monkeypatch.setattr(registry, "load_releases", lambda: released.load_releases(path))
    with pytest.warns(UserWarning, match="Until then there are no released weights"):
        registry._register_released()


@pytest.mark.parametrize(
    "entry", [{"hub_id": "short"}, {"files": None}, {"facts": None, "bundled": True}, {"config": None, "bundled": True}, {}]
)
def test_a_damaged_entry_is_named(entry: dict[str, Any], encoder: Path, tmp_path: Path) -> None:
    path = data_file(tmp_path / "released.json", encoder, **entry)
    with pytest.raises(ValueError, match=r"the entry resnet8_cifar\.test is damaged"):
        released.load_releases(path)


BAD_TAGS = ["", "x.", "x-", ".", "..", "./x", "/../x", "/x", "x/y", "a\\b", "-x", "_x", ".x", "a..b", "a b", "a\n", "é"]


def test_a_name_is_an_architecture_and_a_tag_and_nothing_else(encoder: Path, tmp_path: Path) -> None:
    for name in ("resnet8_cifar.x", "resnet8_cifar.advcl_c10-2.v1", "resnet8_cifar.1"):
        released.check_name(name, "resnet8_cifar")
    names = [*[f"resnet8_cifar.{tag}" for tag in BAD_TAGS], "", "resnet8_cifar", "/resnet8_cifar.x", "../resnet8_cifar.x"]
    for name in [*names, "resnet18_cifar.x", "resnet8_cifar_x.y"]:
        with pytest.raises(ValueError, match="is no name of a release: expected resnet8_cifar, a dot, and a tag of") as said:
            released.check_name(name, "resnet8_cifar")
        assert str(said.value).startswith(repr(name))
        data = json.loads(data_file(tmp_path / "released.json", encoder, bundled=True).read_text(encoding="utf-8"))
        data["releases"] = {name: data["releases"]["resnet8_cifar.test"]}
        (tmp_path / "released.json").write_text(json.dumps(data), encoding="utf-8")
        with pytest.raises(ValueError, match=r"(?s)^released\.json: the entry .* is damaged"):
            released.load_releases(tmp_path / "released.json")
    for architecture in ("../resnet8_cifar", "/etc/x", ""):  # of somebody's config.json
        with pytest.raises(ValueError, match="expected an architecture of timm, a dot"):
            released.check_name(f"{architecture}.x", architecture)
    for name in names:
        with pytest.raises(ValueError, match=r"register it as resnet8_cifar\.TAG"):
            advcl_hub.register(name, encoder)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_the_temporary_folder_goes_with_its_process_and_not_with_a_fork_of_it() -> None:
    program = """
import os, sys
from huggingface_hub import constants
from advcl_hub.hub import released
constants.HF_HOME = "/dev/null/x"
folder = released._home()
if (child := os.fork()) == 0:
    sys.exit()
os.waitpid(child, 0)
assert folder.is_dir()
print(folder)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=200, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    assert "advcl_hub-" in done.stdout and not Path(done.stdout.strip()).exists()
