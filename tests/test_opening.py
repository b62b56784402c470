"""What cannot be opened is refused in one sentence that names the file and the reason, whoever found out."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

import advcl_hub
from advcl_hub.errors import reason_of
from advcl_hub.hub.converters import convert
from advcl_hub.hub.export import CONFIG, GOLDEN, WEIGHTS, export_again, load_folder, verify_folder
from advcl_hub.hub.parts import join, split
from advcl_hub.opening import load_model
from advcl_hub.records import RESULTS
from tests.support.small_encoders import export_encoder, save_encoder

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"4d7a" * 16 + b"\nsize 12345\n"


@pytest.fixture
def export(tmp_path: Path) -> Path:
    return export_encoder(tmp_path / "export")


@pytest.mark.parametrize("file", [WEIGHTS, GOLDEN, RESULTS, CONFIG])
def test_a_git_lfs_pointer_is_called_one(file: str, export: Path, tmp_path: Path) -> None:
    (export / file).write_bytes(POINTER)
    calls: list[Callable[[], Any]] = [
        lambda: load_model(export),
        lambda: verify_folder(export),
        lambda: advcl_hub.verify(export),
        lambda: export_again(export, tmp_path / "again", dtype="float16"),
        lambda: advcl_hub.register("resnet8_cifar.pointer", export),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=f"{file} is a Git LFS pointer, not the file itself: run `git lfs pull`"):
            call()


def test_a_pointer_among_plain_weights_parts_and_published_files(export: Path, tmp_path: Path) -> None:
    (parts,) = split({"a": export}, tmp_path / "parts").values()
    plain = save_encoder(tmp_path / "plain")
    files = [plain / WEIGHTS, tmp_path / "parts" / parts[0], tmp_path / "checkpoint.pth"]
    for file in files:
        file.write_bytes(POINTER)
    calls: list[Callable[[], Any]] = [
        lambda: load_model(plain),
        lambda: load_folder(plain),
        lambda: join([files[1]], tmp_path / WEIGHTS, "0" * 64),
        lambda: split({"a": plain}, tmp_path / "other"),
        lambda: convert(files[2], tmp_path / "converted"),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="is a Git LFS pointer"):
            call()


def test_a_registered_folder_whose_weights_became_a_pointer(export: Path) -> None:
    release = advcl_hub.hub.registry.open_source(export)
    (export / WEIGHTS).write_bytes(POINTER)
    with pytest.raises(ValueError, match="is a Git LFS pointer"):
        release.fetch()


def test_a_refused_state_dict_names_its_keys(tmp_path: Path) -> None:
    plain = save_encoder(tmp_path / "plain")
    state = load_file(plain / WEIGHTS)
    keys = [key for key in state if "num_batches" not in key]  # of which torch misses none
    for key in keys[:5]:
        del state[key]
    state["a\n\x1b[2Jb"] = torch.zeros(1)
    state["fc.weight" if "fc.weight" in state else keys[-1]] = torch.zeros(3, 3)
    save_file(state, plain / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"cannot be opened by timm: Error\(s\) in loading state_dict for") as caught:
        load_model(plain)
    text = str(caught.value)
    assert 'Missing key(s) in state_dict: "' in text and " and 3 more" in text and "Unexpected key(s)" in text
    assert "size mismatch for" in text and "[3, 3] instead of [" in text
    assert all(c.isprintable() for c in text) and len(text) < 300 + len(str(plain)) + 40


def test_one_sentence_of_any_error() -> None:
    model = timm.create_model("test_resnet", num_classes=5)
    with pytest.raises(RuntimeError) as caught:
        model.load_state_dict({})
    count = sum("num_batches" not in key for key in model.state_dict())
    assert reason_of(caught.value).endswith(f" and {count - 2} more") and len(str(caught.value)) > 1000
    with pytest.raises(RuntimeError) as caught:
        model.load_state_dict({"k" * 5000: torch.zeros(1)})
    assert 100 < len(reason_of(caught.value)) <= 300
    assert reason_of(KeyError("sha256")) == "KeyError('sha256')"
    assert reason_of(AssertionError()) == "AssertionError()"
    assert reason_of(RuntimeError("first\nsecond\n\nadvice of many lines")) == "first second"
    assert reason_of(ValueError("a\r\x1b[31m\u202eb\x00")) == "a [31m b"
    assert len(reason_of(ValueError("x" * 10_000))) == 300


def test_damage_that_only_a_golden_pair_of_others_shows(export: Path) -> None:
    """With right hashes, but not ours: no error of torch or safetensors comes through."""
    from advcl_hub.files import file_sha256

    save_file({"input": torch.zeros(1, 2, 3)}, export / GOLDEN)
    results = json.loads((export / RESULTS).read_text(encoding="utf-8"))
    results["sha256"][GOLDEN] = file_sha256(export / GOLDEN)
    (export / RESULTS).write_text(json.dumps(results), encoding="utf-8")
    with pytest.raises(ValueError, match="cannot be opened by timm"):
        verify_folder(export)


def test_a_damaged_config_names_its_folder(export: Path, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    shutil.copytree(export, plain)
    (plain / RESULTS).unlink()
    for text in ("{", "[]", '{"architecture": "no_such_net"}'):
        (plain / CONFIG).write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match="plain cannot be opened by timm: "):
            load_model(plain)
    (plain / CONFIG).write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match=r"has a damaged config.json or results.json \(in .*plain\)"):
        advcl_hub.register("resnet8_cifar.damaged", plain)


def test_a_damaged_file_of_an_address_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some of timm's weights are not on the Hub but at an address; the file's name tells the first digits of its sha256."""
    found = (
        name
        for name in timm.list_pretrained()
        if (cfg := timm.models.get_pretrained_cfg(name)) and cfg.url and not cfg.hf_hub_id and "-" in cfg.url.rpartition("/")[2]
    )
    if (name := next(found, None)) is None:
        pytest.skip("all of timm's weights are on the Hub")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    cfg = timm.models.get_pretrained_cfg(name)
    path = tmp_path / "hub" / "checkpoints" / cfg.url.rpartition("/")[2]
    path.parent.mkdir(parents=True)
    path.write_bytes(b"half a file")
    with pytest.raises(ValueError, match=r"is damaged .* delete it, and it is fetched again") as caught:
        load_model(name)
    assert str(path) in str(caught.value)
