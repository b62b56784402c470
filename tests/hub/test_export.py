"""Export folders: complete or not at all, equal after reloading, and checked."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

import advcl_hub  # noqa: F401
from advcl_hub.files import file_sha256
from advcl_hub.hub import export
from advcl_hub.hub.export import GOLDEN, WEIGHTS, export_folder, load_folder, verify_folder
from advcl_hub.models.branch_norm import add_branches
from advcl_hub.training.tensors import separate

VIT: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2}


def model(name: str = "resnet8_cifar", **kwargs: Any) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=0, **kwargs).eval()


@pytest.mark.parametrize(("name", "kwargs"), [("resnet8_cifar", {}), ("vit_tiny_patch16_224", VIT)])
def test_reloads_equal_with_and_without_a_head(tmp_path: Path, name: str, kwargs: dict[str, Any]) -> None:
    encoder = model(name, **kwargs)
    folder = export_folder(encoder, tmp_path / "e", results={"seed": 0}, model_args=kwargs)
    assert (folder / "golden.safetensors").exists()
    images = torch.rand(2, 3, 32, 32)
    reloaded = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    with torch.no_grad():
        assert torch.equal(reloaded(images), encoder(images))
        classifier = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=7).eval()
        assert classifier(images).shape == (2, 7)
        features = classifier.forward_head(classifier.forward_features(images), pre_logits=True)
        assert torch.equal(features, encoder(images))
    assert verify_folder(folder) < 1e-3


def test_float16_is_the_rounded_weights_and_the_running_averages_as_they_are(tmp_path: Path) -> None:
    encoder = model()
    encoder.bn1.running_var.fill_(1e5)  # more than float16 holds
    folder = export_folder(encoder, tmp_path / "whole", results={}, dtype="float16")
    half = {k: v.half() if v.is_floating_point() and "running" not in k else v for k, v in encoder.state_dict().items()}
    state = load_folder(folder).state_dict()
    assert all(torch.equal(state[k], v.to(state[k].dtype)) for k, v in half.items())
    stored = load_file(folder / WEIGHTS)
    assert {v.dtype for k, v in stored.items() if "running" in k} == {torch.float32}
    assert {v.dtype for k, v in stored.items() if k.endswith("weight")} == {torch.float16}


@pytest.mark.parametrize("name", [WEIGHTS, "config.json", GOLDEN])
def test_a_flipped_byte_is_found_wherever_it_is(tmp_path: Path, name: str) -> None:
    folder = export_folder(model(), tmp_path / "e", results={})
    data = bytearray((folder / name).read_bytes())
    data[-5] ^= 1
    (folder / name).write_bytes(data)
    with pytest.raises(ValueError, match=rf"{name} is not the file that was exported \(its sha256 differs"):
        verify_folder(folder)


@pytest.mark.parametrize("content", ["{", "{}", "[]", '{"sha256": {}}'])
def test_a_damaged_record_and_missing_files_are_named(tmp_path: Path, content: str) -> None:
    folder = export_folder(model(), tmp_path / "e", results={})
    (folder / "results.json").write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=r"results\.json is damaged"):
        verify_folder(folder)
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        verify_folder(folder)


def test_other_behaviour_with_the_right_weights_is_found(tmp_path: Path) -> None:
    encoder = model("vit_tiny_patch16_224", **VIT)
    for parameter in encoder.parameters():
        parameter.data *= 5  # as they are drawn, attention hardly matters
    folder = export_folder(encoder, tmp_path / "e", results={}, model_args=VIT)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["model_args"]["num_heads"] = 4
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    results["sha256"]["config.json"] = file_sha256(folder / "config.json")
    (folder / "results.json").write_text(json.dumps(results), encoding="utf-8")
    with pytest.raises(ValueError, match="computes something else"):
        verify_folder(folder)


def test_replaces_an_earlier_export_and_leaves_other_folders_alone(tmp_path: Path) -> None:
    folder = export_folder(model(), tmp_path / "e", results={"run": 1})
    export_folder(model(), folder, results={"run": 2}, label_names=())
    assert json.loads((folder / "results.json").read_text(encoding="utf-8"))["run"] == 2
    assert [p.name for p in tmp_path.iterdir()] == ["e"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious", encoding="utf-8")
    with pytest.raises(ValueError, match="not an earlier export"):
        export_folder(model(), tmp_path / "mine", results={})
    assert (tmp_path / "mine" / "thesis.txt").read_text(encoding="utf-8") == "precious"
    with pytest.raises(ValueError, match="dtype must be one of"):
        export_folder(model(), tmp_path / "x", results={}, dtype="int8")


def test_everyone_may_read_what_a_new_file_lets_them(tmp_path: Path) -> None:
    folder = export_folder(model(), tmp_path / "e", results={})
    (tmp_path / "new").touch()
    expected = (tmp_path / "new").stat().st_mode
    assert {path.name for path in folder.iterdir() if path.stat().st_mode != expected} == set()


def test_a_full_disk_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise SafetensorError("No space left on device (os error 28)")

    monkeypatch.setattr(export, "save_file", full)
    with pytest.raises(OSError, match=r"e could not be written: No space left on device"):
        export_folder(model(), tmp_path / "e", results={})
    assert not list(tmp_path.iterdir())


def test_a_failure_halfway_leaves_nothing_behind(tmp_path: Path) -> None:
    folder = export_folder(model(), tmp_path / "e", results={"run": 1})
    with pytest.raises(TypeError):
        export_folder(model(), folder, results={"run": object()})
    assert [p.name for p in tmp_path.iterdir()] == ["e"]
    assert json.loads((folder / "results.json").read_text(encoding="utf-8"))["run"] == 1


def test_the_current_folder_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever works in it would be left in one that is gone."""
    folder = export_folder(model(), tmp_path / "e", results={"run": 1})
    monkeypatch.chdir(folder)
    for name in (".", folder, "../e"):
        with pytest.raises(ValueError, match=r"^The current folder cannot be replaced: name another\.$"):
            export_folder(model(), name, results={"run": 2})
    assert json.loads((folder / "results.json").read_text(encoding="utf-8"))["run"] == 1


@pytest.mark.parametrize("earlier", [True, False])
def test_a_failed_swap_puts_the_earlier_export_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, earlier: bool) -> None:
    folder = export_folder(model(), tmp_path / "e", results={"run": 1}) if earlier else tmp_path / "e"
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if Path(target) == folder and not self.name.endswith("-earlier"):
            raise OSError("no space")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="no space"):
        export_folder(model(), folder, results={"run": 2})
    assert [p.name for p in tmp_path.iterdir()] == (["e"] if earlier else [])
    assert not earlier or json.loads((folder / "results.json").read_text(encoding="utf-8"))["run"] == 1


def test_a_model_that_still_has_branches_is_not_exported(tmp_path: Path) -> None:
    branched = model()
    add_branches(branched, ("clean", "adv"))
    with pytest.raises(RuntimeError, match="bn_branches"):
        export_folder(branched, tmp_path / "e", results={})
    assert not list(tmp_path.iterdir())


def test_the_given_model_args_are_recorded_without_none(tmp_path: Path) -> None:
    given = {"drop_path_rate": 0.25, "output_stride": None}  # not those the model was made with, which timm may add itself
    folder = export_folder(model(), tmp_path / "e", results={}, model_args=given)
    recorded = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_args"]
    assert recorded["drop_path_rate"] == 0.25 and "output_stride" not in recorded


def test_class_names_go_with_a_classifier(tmp_path: Path) -> None:
    classifier = timm.create_model("resnet8_cifar", num_classes=2).eval()
    folder = export_folder(classifier, tmp_path / "e", results={}, label_names=("cat", "dog"))
    assert json.loads((folder / "config.json").read_text(encoding="utf-8"))["label_names"] == ["cat", "dog"]
    assert load_folder(folder).num_classes == 2


def test_foreign_files_in_an_earlier_export_are_not_deleted(tmp_path: Path) -> None:
    folder = export_folder(model(), tmp_path / "e", results={})
    (folder / "thesis.txt").write_text("precious", encoding="utf-8")
    with pytest.raises(ValueError, match="not an earlier export"):
        export_folder(model(), folder, results={})
    assert (folder / "thesis.txt").read_text(encoding="utf-8") == "precious"


def test_weights_beyond_float16_are_refused(tmp_path: Path) -> None:
    encoder = model()
    encoder.bn1.weight.data.fill_(1e5)
    with pytest.raises(ValueError, match="not finite as float16"):
        export_folder(encoder, tmp_path / "e", results={}, dtype="float16")
    assert not (tmp_path / "e").exists()


# ---- what safetensors does not take as it is -------------------------------------------------------------------------


def test_tied_weights_are_all_in_the_file_and_stay_tied(tmp_path: Path) -> None:
    tied = model("coat_lite_tiny")
    state = tied.state_dict()
    assert len({value.data_ptr() for value in state.values()}) < len(state)
    folder = export_folder(tied, tmp_path / "e", results={})
    stored = load_file(folder / WEIGHTS)
    assert stored.keys() == state.keys() and all(torch.equal(stored[key], value) for key, value in state.items())
    again = load_folder(folder).state_dict()
    assert len({value.data_ptr() for value in again.values()}) == len({value.data_ptr() for value in state.values()})
    assert verify_folder(folder) == 0


def test_any_layout_in_memory_is_stored_by_its_values(tmp_path: Path) -> None:
    whole = torch.arange(24.0)
    tensors = {
        "whole": whole,
        "view": whole[3:5],
        "overlap": whole[4:8],
        "turned": whole.reshape(4, 6).T,
        "expanded": torch.ones(1).expand(4),
        "channels last": torch.rand(1, 2, 3, 4).to(memory_format=torch.channels_last),
        "none": torch.zeros(0, 3),
        "none either": torch.zeros(0, 3),
        "scalar": torch.tensor(3),
        "flags": torch.tensor([True, False]),
        "complex": torch.ones(2, dtype=torch.complex64).conj(),
        "parameter": nn.Parameter(torch.ones(2)),
    }
    save_file(separate(tensors), tmp_path / "t.safetensors")
    stored = load_file(tmp_path / "t.safetensors")
    assert stored.keys() == tensors.keys()
    assert all(stored[key].dtype == value.dtype and torch.equal(stored[key], value) for key, value in tensors.items())


def test_tensors_that_stand_alone_are_not_copied() -> None:
    first, second = torch.ones(2), torch.ones(2)
    stored = separate({"a": first, "b": second, "c": first})
    assert [stored[key].data_ptr() == tensor.data_ptr() for key, tensor in (("a", first), ("b", second), ("c", first))] == [
        True,
        True,
        False,
    ]


@pytest.mark.parametrize(
    ("tensor", "kind"), [(torch.eye(2).to_sparse(), "sparse_coo"), (torch.ones(2, dtype=torch.complex128), "complex128")]
)
def test_types_that_safetensors_does_not_know_are_named(tmp_path: Path, tensor: torch.Tensor, kind: str) -> None:
    encoder = model()
    encoder.register_buffer("odd", tensor)
    with pytest.raises(ValueError, match=f"odd is of the type {kind}, which safetensors does not store"):
        export_folder(encoder, tmp_path / "e", results={})
    assert not list(tmp_path.iterdir())


def test_buffers_that_are_not_finite_are_refused_also_complex_ones(tmp_path: Path) -> None:
    encoder = model()
    encoder.register_buffer("odd", torch.tensor([complex("nan")]))
    with pytest.raises(ValueError, match="not finite"):
        export_folder(encoder, tmp_path / "e", results={})


def test_buffers_that_are_not_persistent_are_made_anew(tmp_path: Path) -> None:
    encoder = model()
    encoder.register_buffer("made", torch.zeros(3), persistent=False)
    folder = export_folder(encoder, tmp_path / "e", results={})
    assert "made" not in load_file(folder / WEIGHTS) and verify_folder(folder) < 1e-3
