"""The projection head beside an encoder: kept exactly, checked like the weights, refused where it cannot be used."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from huggingface_hub import constants
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import advcl_hub
from advcl_hub.files import file_sha256
from advcl_hub.hub.cards import card
from advcl_hub.hub.export import RESULTS, check_replaceable, export_again, export_folder, verify_folder
from advcl_hub.hub.projector import PROJECTOR, load_projector, projector_from_state
from advcl_hub.hub.projector_file import read_projector
from tests.support.projection_heads import trained_head

LAYERS = "Linear,BatchNorm1d,ReLU,Linear"


def encoder(**kwargs: Any) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("resnet8_cifar", num_classes=0, **kwargs).eval()


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder of 64 features with its head."""
    return export_folder(encoder(), tmp_path_factory.mktemp("e") / "export", results={}, projector=trained_head(64, 64, 12))


@pytest.fixture
def folder(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "export"))


def results(folder: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((folder / RESULTS).read_text(encoding="utf-8"))
    return record


def record(folder: Path, name: str) -> None:
    """Makes results.json tell the sha256 that a file has now."""
    now = results(folder)
    now["sha256"][name] = file_sha256(folder / name)
    (folder / RESULTS).write_text(json.dumps(now), encoding="utf-8")


def rewrite(folder: Path, state: dict[str, Tensor], layers: str | None = LAYERS) -> None:
    save_file(state, folder / PROJECTOR, metadata=None if layers is None else {"layers": layers})
    record(folder, PROJECTOR)


# ------------------------------------------------------------------------------------------------------------ export


def test_the_head_comes_back_as_it_was(exported: Path) -> None:
    head, images = trained_head(64, 64, 12), torch.rand(3, 64)
    for source in (exported, str(exported), f"local-dir:{exported}"):
        loaded = load_projector(source)
        assert not loaded.training and torch.equal(loaded(images), head(images))
        assert {key: value.dtype for key, value in loaded.state_dict().items()} == {
            key: value.dtype for key, value in head.state_dict().items()
        }
    with safe_open(exported / PROJECTOR, "pt") as file:
        assert file.metadata() == {"layers": LAYERS} and set(file.keys()) == set(head.state_dict())
    assert results(exported)["projector"] == {"layers": LAYERS.split(","), "widths": [64, 64, 12]}
    loaded.train()(images.requires_grad_()).sum().backward()
    assert loaded[0].weight.grad is not None  # it can be trained on


def test_the_same_export_without_it_is_the_same_bytes(tmp_path: Path, exported: Path) -> None:
    plain = export_folder(encoder(), tmp_path / "plain", results={})
    names = {path.name for path in plain.iterdir()}
    assert {path.name for path in exported.iterdir()} == names | {PROJECTOR}
    assert all((plain / name).read_bytes() == (exported / name).read_bytes() for name in names - {RESULTS})
    expected = results(exported)
    del expected["projector"], expected["sha256"][PROJECTOR]
    assert (plain / RESULTS).read_text(encoding="utf-8") == json.dumps(expected, indent=2) + "\n"


def test_equal_heads_are_equal_files(tmp_path: Path, exported: Path) -> None:
    again = export_folder(encoder(), tmp_path / "again", results={}, projector=trained_head(64, 64, 12))
    assert (again / PROJECTOR).read_bytes() == (exported / PROJECTOR).read_bytes()


def test_timm_opens_the_folder_with_the_encoders_weights(exported: Path) -> None:
    images = torch.rand(2, 3, 32, 32)
    opened = timm.create_model(f"local-dir:{exported}", pretrained=True).eval()
    assert torch.equal(opened(images), encoder()(images))
    assert load_projector(exported)(opened(images)).shape == (2, 12)


def test_what_a_converter_or_a_run_gives_as_tensors() -> None:
    head, features = trained_head(20, 16, 16, 8), torch.rand(5, 20)
    made = projector_from_state(head.state_dict())
    assert [type(layer) for layer in made] == [type(layer) for layer in head]
    assert torch.equal(made(features), head(features))
    made[0].weight.data.zero_()
    assert head[0].weight.abs().sum() > 0  # copies


def test_heads_as_other_methods_build_them(tmp_path: Path) -> None:
    """SimCLR without biases, a last batch norm without scale as in SimSiam, SyncBatchNorm, a ReLU at the end."""
    head = nn.Sequential(nn.Linear(64, 32, bias=False), nn.SyncBatchNorm(32), nn.ReLU(inplace=True))
    head += nn.Sequential(nn.Linear(32, 32, bias=False), nn.BatchNorm1d(32, affine=False), nn.ReLU())
    head[1].running_mean.uniform_()
    folder = export_folder(encoder(), tmp_path / "e", results={}, projector=head.eval())
    loaded, features = load_projector(folder), torch.rand(4, 64)
    assert [type(layer).__name__ for layer in loaded] == ["Linear", "BatchNorm1d", "ReLU"] * 2
    assert torch.equal(loaded(features), head(features)) and loaded(features).min() == 0


def test_float16_rounds_the_head_too_and_loads_as_float32(folder: Path, tmp_path: Path) -> None:
    half = export_again(folder, tmp_path / "half", dtype="float16")
    whole = load_file(folder / PROJECTOR)
    expected = {k: v.half() if v.is_floating_point() and "running" not in k else v for k, v in whole.items()}
    stored, loaded = load_file(half / PROJECTOR), load_projector(half).state_dict()
    assert all(stored[k].dtype == v.dtype and torch.equal(stored[k], v) for k, v in expected.items())
    assert loaded["0.weight"].dtype == torch.float32 and torch.equal(loaded["0.weight"], expected["0.weight"].float())
    assert results(half)["projector"] == results(folder)["projector"]


def test_an_earlier_export_with_a_head_is_replaced(folder: Path) -> None:
    check_replaceable(folder)
    export_folder(encoder(), folder, results={})
    assert not (folder / PROJECTOR).exists() and "projector" not in results(folder)


class Doubled(nn.Linear):
    def forward(self, images: Tensor) -> Tensor:
        return 2 * super().forward(images)


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (nn.Sequential(nn.Linear(64, 8), nn.Dropout()), "Layer 1 of the projection head is a Dropout: only Linear"),
        (nn.Sequential(nn.Sequential(nn.Linear(64, 8))), "Layer 0 of the projection head is a Sequential"),
        (nn.Sequential(Doubled(64, 8)), "Layer 0 of the projection head is a Doubled"),
        (nn.Linear(64, 8), "is an nn.Sequential of Linear, BatchNorm1d, ReLU, got Linear"),
        (nn.Sequential(nn.Linear(63, 8)), "takes 63 features, but the encoder gives 64"),
        (nn.Sequential(nn.Linear(64, 8), nn.Linear(9, 2)), "Layer 1 .* takes 9 features, but what is before it gives 8"),
        (nn.Sequential(nn.Linear(64, 8), nn.BatchNorm1d(8, eps=1e-3)), "eps of its own"),
        (nn.Sequential(nn.Linear(64, 8), nn.BatchNorm1d(8, track_running_stats=False)), "without running statistics"),
        (nn.Sequential(nn.ReLU()), "cannot have the layers ReLU"),
    ],
)
def test_heads_that_the_file_cannot_describe(tmp_path: Path, head: nn.Sequential, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        export_folder(encoder(), tmp_path / "e", results={}, projector=head)
    assert not list(tmp_path.iterdir())


def test_no_head_behind_a_classifier_and_none_beyond_float16(tmp_path: Path) -> None:
    classifier, head = timm.create_model("resnet8_cifar", num_classes=2), trained_head(64, 8)
    with pytest.raises(ValueError, match="is a classifier: a projection head is exported with the encoder"):
        export_folder(classifier, tmp_path / "e", results={}, projector=head)
    head[0].weight.data.fill_(1e6)
    with pytest.raises(ValueError, match="not finite as float16"):
        export_folder(encoder(), tmp_path / "e", results={}, projector=head, dtype="float16")
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------------------ checks


def test_verify_checks_the_head(folder: Path) -> None:
    assert verify_folder(folder) < 1e-6
    content = (folder / PROJECTOR).read_bytes()
    (folder / PROJECTOR).write_bytes(content[:-5] + bytes([content[-5] ^ 1]) + content[-4:])
    for check in (verify_folder, load_projector):
        with pytest.raises(ValueError, match=rf"{PROJECTOR} is not the file that was exported"):
            check(folder)
    (folder / PROJECTOR).unlink()
    for check in (verify_folder, load_projector):
        with pytest.raises(FileNotFoundError, match=rf"has no {PROJECTOR}: not a complete export"):
            check(folder)


def test_an_export_without_one_says_how_to_get_it(tmp_path: Path) -> None:
    folder = export_folder(encoder(), tmp_path / "e", results={})
    shutil.copytree(folder, tmp_path / "bare")
    (tmp_path / "bare" / RESULTS).unlink()
    for source in (folder, tmp_path / "bare", "resnet10_cifar.pseudo_label_at_c10"):
        with pytest.raises(FileNotFoundError) as error:
            load_projector(source)
        assert str(error.value) == f"{source} has no {PROJECTOR}: export the encoder again with --keep-projector."


def test_a_folder_without_a_record_is_loaded_with_a_warning(folder: Path) -> None:
    (folder / RESULTS).unlink()
    with pytest.warns(UserWarning, match=rf"tells no sha256: {PROJECTOR} is not checked"):
        load_projector(folder)


Change = Callable[[dict[str, Tensor]], object]


def set_tensor(name: str, value: Tensor | None) -> Change:
    return lambda state: state.pop(name) if value is None else state.update({name: value})


@pytest.mark.parametrize(
    ("change", "layers", "message"),
    [
        (set_tensor("3.weight", torch.zeros(12, 60)), LAYERS, "Layer 3 .* takes 60 features, but what is before it gives 64"),
        (
            set_tensor("1.running_var", torch.zeros(63)),
            LAYERS,
            r"Layer 1 .* cannot be a BatchNorm1d with .*running_var \(63,\)",
        ),
        (set_tensor("1.running_var", None), LAYERS, "Layer 1 .* cannot be a BatchNorm1d"),
        (set_tensor("1.bias", None), LAYERS, "Layer 1 .* cannot be a BatchNorm1d"),
        (set_tensor("0.weight", torch.zeros(64)), LAYERS, "Layer 0 .* cannot be a Linear"),
        (set_tensor("3.weight", torch.zeros(12, 64, dtype=torch.int64)), LAYERS, "Layer 3 .* cannot be a Linear"),
        (set_tensor("0.weight", torch.full((64, 64), torch.nan)), LAYERS, "values in 0.weight that are not finite"),
        (set_tensor("2.weight", torch.zeros(2, 2)), LAYERS, "Layer 2 .* cannot be a ReLU"),
        (set_tensor("4.weight", torch.zeros(2, 12)), LAYERS, r"tensors up to 4\.\* cannot have the layers"),
        (set_tensor("00.bias", torch.zeros(64)), LAYERS, "'00.bias' is no tensor of an nn.Sequential"),
        (set_tensor("head.weight", torch.zeros(64)), LAYERS, "'head.weight' is no tensor of an nn.Sequential"),
        (set_tensor("none", None), None, "does not name its layers"),
        (set_tensor("none", None), "Linear,BatchNorm1d,Tanh,Linear", "but no 'Tanh'"),
        (set_tensor("none", None), "Linear,ReLU,BatchNorm1d,Linear", "Layer 1 .* cannot be a ReLU"),
        (set_tensor("none", None), "", "but no ''"),
    ],
)
def test_files_that_are_no_projection_head(folder: Path, change: Change, layers: str | None, message: str) -> None:
    state = load_file(folder / PROJECTOR) | {"none": torch.zeros(1)}
    change(state)
    state.pop("none", None)
    rewrite(folder, state, layers)
    with pytest.raises(ValueError, match=message):
        load_projector(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"\x80\x04a pickle", "is damaged"), (b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer")],
)
def test_other_files_are_named(folder: Path, content: bytes, message: str) -> None:
    (folder / PROJECTOR).write_bytes(content)
    record(folder, PROJECTOR)
    with pytest.raises(ValueError, match=rf"{PROJECTOR} {message}"):
        load_projector(folder)


@pytest.mark.parametrize("name", ["none.safetensors", "."])
def test_a_file_that_is_not_there_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(FileNotFoundError, match=rf"^There is no {tmp_path / name}\.$"):
        read_projector(tmp_path / name)


def test_loading_leaves_torch_as_it_was(folder: Path) -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    with torch.inference_mode(), torch.device("meta"):
        torch.set_default_dtype(torch.float64)
        try:
            loaded = load_projector(folder)
        finally:
            torch.set_default_dtype(torch.float32)
    assert torch.equal(torch.get_rng_state(), before)
    weight = loaded[0].weight
    assert (weight.dtype, weight.device.type, weight.is_inference()) == (torch.float32, "cpu", False)


# -------------------------------------------------------------------------------------------------- what else knows it


def test_the_card_and_registered_names(folder: Path, tmp_path: Path) -> None:
    text = card(folder, "mine", "hf-hub:acme/mine")
    assert "`projector.safetensors` (Linear, BatchNorm1d, ReLU, Linear; widths 64, 64, 12)" in text
    assert 'projector = load_projector("hf-hub:acme/mine")' in text
    assert f"| {PROJECTOR} | `{file_sha256(folder / PROJECTOR)}` |" in text
    plain = export_folder(encoder(), tmp_path / "plain", results={})
    assert "project" not in card(plain, "mine")

    advcl_hub.register("resnet8_cifar.with_head", folder)
    assert load_projector("resnet8_cifar.with_head")[3].out_features == 12
    state = load_file(folder / PROJECTOR)
    rewrite(folder, state | {"3.bias": state["3.bias"] + 1})
    with pytest.raises(ValueError, match="is not the file that was registered"):
        load_projector("resnet8_cifar.with_head")


def test_unknown_sources_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere is no folder with "):
        load_projector(tmp_path / "nowhere")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match="acme/nothing cannot be fetched from the Hub"):
        load_projector("hf-hub:acme/nothing")
