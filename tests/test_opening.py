"""What cannot be opened is refused in one sentence that names the file and the reason, whoever found out."""

import errno
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

import advcl_hub
from advcl_hub import opening
from advcl_hub.errors import reason_of
from advcl_hub.files import file_sha256
from advcl_hub.hub import released
from advcl_hub.hub.converters import convert
from advcl_hub.hub.export import CONFIG, GOLDEN, WEIGHTS, export_again, load_folder, verify_folder
from advcl_hub.hub.parts import join, split
from advcl_hub.opening import load_model, weights_sha256
from advcl_hub.private import RegistryEntry
from advcl_hub.records import RESULTS
from tests.support.kept_registry import kept_registry
from tests.support.small_encoders import export_encoder, save_encoder

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"4d7a" * 16 + b"\nsize 12345\n"


@pytest.fixture(autouse=True)
def clean_registry() -> Iterator[None]:
    """What a test registers is gone afterwards."""
    with kept_registry():
        yield


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


def test_the_folder_of_a_run_leads_to_its_model(export: Path, tmp_path: Path) -> None:
    for inner in ("classifier", "export"):
        run = tmp_path / f"run of a {inner}"
        shutil.copytree(export, run / inner)
        with pytest.raises(FileNotFoundError) as caught:
            load_model(run)
        assert str(caught.value) == f"{run} is the folder of a run, whose model is {run / inner}."


@pytest.mark.parametrize("here", [True, False])
def test_weights_whose_record_cannot_be_read_open_if_they_are_checked(
    export: Path, monkeypatch: pytest.MonkeyPatch, here: bool
) -> None:
    """Of weights on the Hub; on this machine a missing file is an error."""
    release = advcl_hub.register("resnet8_cifar.mine", export)
    (export / RESULTS).unlink()
    if here:
        with pytest.raises(FileNotFoundError, match=f"^{export} has no {RESULTS}: register the weights again"):
            load_model(release.name)
        return
    monkeypatch.setattr(opening, "find_release", lambda name: replace(release, folder=None, hub_id="acme/m"))
    monkeypatch.setattr(released, "fetch", lambda *_, **__: (_ for _ in ()).throw(OSError("no way to the Hub.")))
    told = r"^The weights of resnet8_cifar\.mine are checked, but their provenance is missing: no way to the Hub\.$"
    with pytest.warns(UserWarning, match=told):
        loaded = load_model(release.name)
    assert loaded.provenance is None and loaded.file_sha256 == file_sha256(export / WEIGHTS)


def add_to_timm(tag: str, **where: str) -> str:
    """A name of weights in timm that is none of ours."""
    cfg = timm.models.PretrainedCfg(architecture="resnet20_cifar", tag=tag, num_classes=10, input_size=(3, 32, 32), **where)
    RegistryEntry("resnet20_cifar").add_tag(tag, cfg)
    return f"resnet20_cifar.{tag}"


@pytest.mark.parametrize("kind", ["file", "url", "url without digits"])
def test_weights_of_timms_own_that_are_not_on_the_hub_are_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    model = timm.create_model("resnet20_cifar")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    torch.save(model.state_dict(), folder / "net.pth")
    digits = f"-{file_sha256(folder / 'net.pth')[:8]}" if kind == "url" else ""
    path = (folder / "net.pth").rename(folder / f"net{digits}.pth")  # of an address: what was downloaded before
    where = {"file": str(path)} if kind == "file" else {"url": f"http://127.0.0.1:9/{path.name}"}
    loaded = load_model(add_to_timm("plain", **where))
    assert loaded.name == loaded.source == "resnet20_cifar.plain" and loaded.provenance is None
    assert weights_sha256(loaded.model) == weights_sha256(model) and not loaded.model.training


@pytest.mark.parametrize(
    ("error", "kind", "told"),
    [
        (RuntimeError("no weights there"), ValueError, "NAME cannot be opened: no weights there"),
        (OSError(errno.EIO, "Input/output error"), OSError, "NAME cannot be fetched from the Hub: Input/output error."),
        (ImportError("a broken installation"), ImportError, "a broken installation"),
    ],
)
def test_where_there_is_no_file_to_check_timm_says_why(
    monkeypatch: pytest.MonkeyPatch, error: Exception, kind: type[Exception], told: str
) -> None:
    asked = []

    def fetch(repository: str, file: str, **options: Any) -> None:
        asked.append((repository, file, options["revision"]))
        raise FileNotFoundError

    def create_model(*arguments: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr(opening, "fetch", fetch)
    monkeypatch.setattr(timm, "create_model", create_model)
    name = add_to_timm("hub", hf_hub_id="acme/net@v1", hf_hub_filename="net.bin")
    with pytest.raises(kind) as caught:
        load_model(name)
    assert str(caught.value) == told.replace("NAME", name)
    assert asked == [("acme/net", "net.safetensors", "v1"), ("acme/net", "net.bin", "v1")]
