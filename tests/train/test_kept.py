"""What a plan keeps: few small files, always whole, from which the folders come back."""

import json
import re
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file

from advcl_hub.hub.export import WEIGHTS, export_folder
from tests.support.small_encoders import export_encoder
from train import kept
from train.kept import keep, unpack

PLAN = {"name": "one"}


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    return export_encoder(tmp_path / "runs" / "encoder")


@pytest.fixture
def others(tmp_path: Path) -> dict[str, Path]:
    """A plan, a picture, a log, an evaluation, and something that does not exist yet."""
    folder = tmp_path / "runs"
    (folder / "figures" / "deep").mkdir(parents=True)
    for name in ("plan.json", "curves.png", "log.jsonl", "figures/results.json", "figures/deep/images.csv"):
        (folder / name).write_text(name, encoding="utf-8")
    found = {name: folder / name for name in ("plan.json", "curves.png")}
    return found | {"run/log.jsonl": folder / "log.jsonl", "figures": folder / "figures", "run/later": folder / "later"}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_everything_comes_back(encoder: Path, others: dict[str, Path], tmp_path: Path) -> None:
    files = keep(tmp_path / "kept", PLAN, {"encoder": encoder}, others, "as it stands\n")
    assert [re.sub("-[0-9a-f]{8}", "", file.name) for file in files] == [
        *("curves.png", "encoder.safetensors", "folders.zip", "summary.md")
    ]
    shutil.rmtree(tmp_path / "runs")
    folders = unpack(tmp_path / "kept", tmp_path / "back")
    assert folders == {"encoder": tmp_path / "back" / "encoder"}
    found = contents(tmp_path / "back")
    assert found["run/log.jsonl"] == b"log.jsonl" and found["figures/deep/images.csv"] == b"figures/deep/images.csv"
    assert found["plan.json"] == b"plan.json" and "run/later" not in found


def part(folder: Path, name: str) -> Path:
    """The one part of a small model."""
    (found,) = folder.glob(f"{name}-*.safetensors")
    return found


def test_keeping_again_removes_the_parts_of_a_model_that_is_gone_and_nothing_else(
    encoder: Path, others: dict[str, Path], tmp_path: Path
) -> None:
    target = tmp_path / "kept"
    keep(target, PLAN, {"pretrain": encoder}, others, "")
    (target / "mine-1.safetensors").write_text("of somebody else", encoding="utf-8")
    keep(target, PLAN, {"encoder": encoder}, others, "")
    assert part(target, "mine").is_file() and part(target, "encoder").is_file()
    assert not list(target.glob("pretrain-*")) and unpack(target, tmp_path / "back").keys() == {"encoder"}


class Killed(BaseException):
    """As SIGKILL, nothing that is caught."""


class KilledAt:
    """Lets so many acts happen, and none after them."""

    def __init__(self, moment: int) -> None:
        self.left = moment

    def count(self, path: Path, *args: Any, act: Any, **options: Any) -> Any:
        self.left -= 1
        if self.left < 0:
            raise Killed
        return act(path, *args, **options)


def killing(kill: KilledAt, act: Any) -> Any:
    return lambda path, *args, **options: kill.count(path, *args, act=act, **options)


def test_cut_off_at_any_moment_the_earlier_state_or_the_new_one_is_whole(
    encoder: Path, others: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before every write, rename and removal in turn; drafts that stay do no harm and go with the next call."""
    other = export_encoder(tmp_path / "runs" / "other", seed=1)
    expected = {(folder / WEIGHTS).read_bytes() for folder in (encoder, other)}
    states = set()
    for moment in range(100):
        target = tmp_path / f"kept{moment}"
        keep(target, PLAN, {"run": encoder}, others, "one")
        with monkeypatch.context() as patch:
            kill = KilledAt(moment)
            for name in ("replace", "unlink"):
                patch.setattr(Path, name, killing(kill, getattr(Path, name)))
            try:
                keep(target, PLAN, {"run": other}, others, "two")
                finished = True
            except Killed:
                finished = False
        back = unpack(target, tmp_path / f"back{moment}")["run"]
        states.add((back / WEIGHTS).read_bytes())
        assert states <= expected
        keep(target, PLAN, {"run": other}, others, "three")
        if finished:
            break
    assert states == expected and moment > 3
    assert sorted(path.name for path in target.iterdir() if path.name.startswith(".")) == []


def test_two_plans_cannot_keep_in_one_folder(encoder: Path, others: dict[str, Path], tmp_path: Path) -> None:
    target = tmp_path / "kept"
    others["plan.json"].write_text(json.dumps({"plan": PLAN}), encoding="utf-8")
    keep(target, PLAN, {"encoder": encoder}, others, "")
    keep(target, PLAN, {"encoder": encoder}, others, "again")
    with pytest.raises(ValueError, match="holds the files of another plan"):
        keep(target, {"name": "two"}, {}, others, "")
    with pytest.raises(ValueError, match="of an earlier run of this plan, whose --output is another or lost"):
        kept.check_kept(target, PLAN, new=True)
    assert part(target, "encoder").is_file()


def test_a_folder_with_something_else_is_refused_and_loses_nothing(encoder: Path, tmp_path: Path) -> None:
    target = tmp_path / "home"
    target.mkdir()
    (target / "thesis.tex").write_text("years", encoding="utf-8")
    with pytest.raises(ValueError, match=r"holds something else \(thesis\.tex\): choose another folder"):
        keep(target, PLAN, {"encoder": encoder}, {}, "")
    assert [path.name for path in target.iterdir()] == ["thesis.tex"]


def test_what_does_not_fit_is_told(encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "FILES", 2)
    with pytest.raises(ValueError, match="holds 3 files, more than can be taken away in 2 files"):
        keep(tmp_path / "kept", PLAN, {"encoder": encoder}, {}, "")
    monkeypatch.setattr(kept, "LIMIT", 1000)
    with pytest.raises(ValueError, match=r"encoder-\w+\.safetensors, folders\.zip larger than 0 MiB"):
        keep(tmp_path / "kept", PLAN, {"encoder": encoder}, {}, "")


def test_damage_is_found(encoder: Path, tmp_path: Path) -> None:
    source = tmp_path / "kept"
    keep(source, PLAN, {"encoder": encoder}, {}, "")
    with pytest.raises(FileNotFoundError, match=r"has no folders\.zip: not what a plan keeps"):
        unpack(tmp_path, tmp_path / "a")
    weights = part(source, "encoder")
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ValueError, match="do not give the weights that were exported"):
        unpack(source, tmp_path / "b")
    weights.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=r"encoder-\w+\.safetensors is damaged"):
        unpack(source, tmp_path / "b2")
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"encoder-\w+\.safetensors is missing"):
        unpack(source, tmp_path / "c")
    (source / "folders.zip").write_bytes(b"PK")
    with pytest.raises(ValueError, match="is damaged"):
        unpack(source, tmp_path / "d")


def test_an_archive_cannot_reach_out_of_its_folder(encoder: Path, tmp_path: Path) -> None:
    """Somebody else's files: names with .. stay inside, parts come from the folder alone."""
    source, outside = tmp_path / "kept", tmp_path / "outside.safetensors"
    keep(source, PLAN, {"encoder": encoder}, {}, "")
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


@pytest.mark.slow
def test_a_resnet18_with_two_heads_is_eight_files(tmp_path: Path, others: dict[str, Path]) -> None:
    """What the plan resnet18_advcl makes: in float16 22.3 MB for the encoder and for the finetuned classifier."""
    models = {}
    for seed, (name, classes) in enumerate({"encoder": 0, "aff": 10}.items()):
        torch.manual_seed(seed)
        model = timm.create_model("resnet18_cifar", num_classes=classes)
        models[name] = export_folder(model.eval(), tmp_path / name, results={}, dtype="float16")
    model.load_state_dict(load_file(models["encoder"] / WEIGHTS), strict=False)
    models["slf"] = export_folder(model, tmp_path / "slf", results={}, dtype="float16")
    files = keep(tmp_path / "kept", PLAN, {name: models[name] for name in ("encoder", "slf", "aff")}, others, "")
    assert len(files) == 8 and max(file.stat().st_size for file in files) <= 16 * 2**20
    assert sum(file.stat().st_size for file in files) < 46e6
    assert list(unpack(tmp_path / "kept", tmp_path / "back")) == ["encoder", "slf", "aff"]
