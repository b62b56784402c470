"""What a plan keeps: few small files, always whole, from which the folders come back."""

import json
import shutil
import zipfile
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file

from advcl_hub.export import WEIGHTS, export_folder
from tests.small_encoders import export_encoder
from train import kept
from train.kept import keep, unpack


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    return export_encoder(tmp_path / "runs" / "encoder")


@pytest.fixture
def others(tmp_path: Path) -> dict[str, Path]:
    """A plan, a picture, a log, an evaluation, and something that does not exist yet."""
    folder = tmp_path / "runs"
    (folder / "figures" / "deep").mkdir(parents=True)
    for name in ("plan.json", "curves.png", "log.jsonl", "figures/results.json", "figures/deep/images.csv"):
        (folder / name).write_text(name)
    found = {name: folder / name for name in ("plan.json", "curves.png")}
    return found | {"run/log.jsonl": folder / "log.jsonl", "figures": folder / "figures", "run/later": folder / "later"}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_everything_comes_back(encoder: Path, others: dict[str, Path], tmp_path: Path) -> None:
    files = keep(tmp_path / "kept", {"encoder": encoder}, others, "as it stands\n")
    assert [file.name for file in files] == ["curves.png", "encoder-1.safetensors", "folders.zip", "summary.md"]
    shutil.rmtree(tmp_path / "runs")
    folders = unpack(tmp_path / "kept", tmp_path / "back")
    assert folders == {"encoder": tmp_path / "back" / "encoder"}
    found = contents(tmp_path / "back")
    assert found["run/log.jsonl"] == b"log.jsonl" and found["figures/deep/images.csv"] == b"figures/deep/images.csv"
    assert found["plan.json"] == b"plan.json" and "run/later" not in found


def test_keeping_again_removes_the_parts_of_a_model_that_is_gone_and_nothing_else(
    encoder: Path, others: dict[str, Path], tmp_path: Path
) -> None:
    target = tmp_path / "kept"
    keep(target, {"run_unfinished": encoder}, others, "")
    (target / "mine-1.safetensors").write_text("of somebody else")
    keep(target, {"encoder": encoder}, others, "")
    assert {"encoder-1.safetensors", "mine-1.safetensors"} <= {path.name for path in target.iterdir()}
    assert not (target / "run_unfinished-1.safetensors").exists()
    assert unpack(target, tmp_path / "back").keys() == {"encoder"}


def test_a_folder_with_something_else_is_refused_and_loses_nothing(encoder: Path, tmp_path: Path) -> None:
    target = tmp_path / "home"
    target.mkdir()
    (target / "thesis.tex").write_text("years")
    with pytest.raises(ValueError, match=r"holds something else \(thesis\.tex\): choose another folder"):
        keep(target, {"encoder": encoder}, {}, "")
    assert [path.name for path in target.iterdir()] == ["thesis.tex"]


def test_what_does_not_fit_is_told(encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "FILES", 2)
    with pytest.raises(ValueError, match="holds 3 files, more than can be taken away in 2 files"):
        keep(tmp_path / "kept", {"encoder": encoder}, {}, "")
    monkeypatch.setattr(kept, "LIMIT", 1000)
    with pytest.raises(ValueError, match=r"encoder-1\.safetensors, folders\.zip larger than 0 MiB"):
        keep(tmp_path / "kept", {"encoder": encoder}, {}, "")


def test_damage_is_found(encoder: Path, tmp_path: Path) -> None:
    source = tmp_path / "kept"
    keep(source, {"encoder": encoder}, {}, "")
    with pytest.raises(FileNotFoundError, match=r"has no folders\.zip: not what a plan keeps"):
        unpack(tmp_path, tmp_path / "a")
    whole = (source / "encoder-1.safetensors").read_bytes()
    (source / "encoder-1.safetensors").write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ValueError, match="do not give the weights that were exported"):
        unpack(source, tmp_path / "b")
    (source / "encoder-1.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"encoder-1\.safetensors is missing"):
        unpack(source, tmp_path / "c")
    (source / "folders.zip").write_bytes(b"PK")
    with pytest.raises(ValueError, match="is damaged"):
        unpack(source, tmp_path / "d")


def test_an_archive_cannot_reach_out_of_its_folder(encoder: Path, tmp_path: Path) -> None:
    """Somebody else's files: names with .. stay inside, parts come from the folder alone."""
    source, outside = tmp_path / "kept", tmp_path / "outside.safetensors"
    keep(source, {"encoder": encoder}, {}, "")
    shutil.copy(encoder / WEIGHTS, outside)
    with zipfile.ZipFile(source / "folders.zip") as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    files["parts.json"] = json.dumps({"encoder": [str(outside)]}).encode()
    with zipfile.ZipFile(source / "folders.zip", "w") as archive:
        for name, content in (files | {"../escaped": b"x"}).items():
            archive.writestr(name, content)
    with pytest.raises(FileNotFoundError, match=r"kept/outside\.safetensors is missing"):
        unpack(source, tmp_path / "deep" / "back")
    assert not (tmp_path / "deep" / "escaped").exists()


def test_a_resnet18_with_two_heads_is_eight_files(tmp_path: Path, others: dict[str, Path]) -> None:
    """What the plan resnet18_advcl makes: in float16 22.3 MB for the encoder and for the finetuned classifier."""
    models = {}
    for seed, (name, classes) in enumerate({"encoder": 0, "aff": 10}.items()):
        torch.manual_seed(seed)
        model = timm.create_model("resnet18_cifar", num_classes=classes)
        models[name] = export_folder(model.eval(), tmp_path / name, results={}, dtype="float16")
    model.load_state_dict(load_file(models["encoder"] / WEIGHTS), strict=False)
    models["slf"] = export_folder(model, tmp_path / "slf", results={}, dtype="float16")
    files = keep(tmp_path / "kept", {name: models[name] for name in ("encoder", "slf", "aff")}, others, "")
    assert len(files) == 8 and max(file.stat().st_size for file in files) <= 16 * 2**20
    assert sum(file.stat().st_size for file in files) < 46e6
    assert list(unpack(tmp_path / "kept", tmp_path / "back")) == ["encoder", "slf", "aff"]
