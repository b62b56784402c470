"""Published checkpoints become folders with the same outputs."""

import copy
import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

import advcl_hub  # noqa: F401
from advcl_hub.data.matching import class_names
from advcl_hub.files import file_sha256
from advcl_hub.hub.converters import Conversion, convert, runner
from advcl_hub.hub.converters.layouts import place
from advcl_hub.hub.export import load_folder
from advcl_hub.models.pixel_space import PixelSpace
from tests.support.golden import load_golden, published_state, ramp
from tests.support.published_networks import (
    DEPTHS,
    IMAGENET,
    KUANGLIU,
    NARROW,
    WIDE,
    Normalize,
    Published,
    acl,
    acl_finetuned,
    advcl,
    advcl_finetuned,
    kuangliu,
)


def save(folder: Path, content: Mapping[str, Any], name: str = "model.pt") -> Path:
    torch.save(dict(content), folder / name)
    return folder / name


def images(size: int = 32) -> Tensor:
    return torch.rand(3, 3, size, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def outputs(folder: Path, size: int = 32) -> Tensor:
    """Of the folder's model on images in [0, 1], with the normalisation of its config."""
    with torch.no_grad():
        return PixelSpace(load_folder(folder)).double()(images(size))


def check(done: Conversion, network: Published, branch: int = 0, size: int = 32) -> None:
    with torch.no_grad():
        expected = copy.deepcopy(network).use(branch).double()(images(size))
    assert expected.std(0).max() > 1e-3, "the outputs have to depend on the image"
    torch.testing.assert_close(outputs(done.folder, size), expected, rtol=1e-9, atol=1e-9)


# ------------------------------------------------------------------------------------------------------ layouts


@pytest.mark.slow
def test_the_published_advcl_encoder(tmp_path: Path) -> None:
    """At its real size, with the numbers that the published implementation gave."""
    state = published_state({key: value.shape for key, value in advcl(widths=WIDE).state_dict().items()})
    file = save(tmp_path, {"model": {f"module.{k}": v for k, v in state.items()}, "epoch": 1000, "rng_state": torch.zeros(9)})
    done = convert(file, tmp_path / "folder")
    assert (done.layout, done.branch, done.record["kind"]) == ("advcl", "adv", "encoder")
    assert done.record["other_entries"] == ["epoch", "rng_state"]
    smooth = F.avg_pool2d(F.pad(ramp((8, 3, 32, 32), "xo"), (2, 2, 2, 2), mode="reflect"), 5, stride=1)
    with torch.no_grad():
        features = load_folder(done.folder).double()(smooth)
    torch.testing.assert_close(features, load_golden()["eval_feat_pgd"], rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("number", [0, 1, 2])
def test_each_branch_of_advcl(tmp_path: Path, number: int) -> None:
    network, branch = advcl(), ("clean", "adv", "adv_ce")[number]
    done = convert(save(tmp_path, network.state_dict()), tmp_path / "folder", "advcl", branch=branch)
    check(done, network, number)
    assert done.branch == branch
    heads = {reason: {key.split(".")[0] for key in keys} for reason, keys in done.record["dropped"].items()}
    assert heads["pseudo-label heads"] == {"fc_002", "fc_010", "fc_050", "fc_100", "fc_500"}
    assert heads["projection head"] == {"head_proj"}
    assert sorted(keys for reason, keys in heads.items() if "losses never use" in reason) == [{"head_ce"}, {"head_pred"}]
    others = {reason for reason in heads if reason.startswith("batch norms")}
    assert others == {f"batch norms of branch {name}" for name in ("clean", "adv", "adv_ce") if name != branch}
    assert (done.record["normalisation"]["mean"], done.record["normalisation"]["std"]) == ([0.0] * 3, [1.0] * 3)


def test_finetuned_advcl_has_the_head_that_was_trained(tmp_path: Path) -> None:
    network, head = advcl_finetuned(), nn.Linear(NARROW[-1], 7)
    file = save(tmp_path, {"model": network.state_dict(), "classifier": {f"fc.{k}": v for k, v in head.state_dict().items()}})
    done = convert(file, tmp_path / "folder", label_names=[f"c{i}" for i in range(7)])
    with torch.no_grad():
        expected = head.double()(network.double()(images()))
    torch.testing.assert_close(outputs(done.folder), expected, rtol=1e-9, atol=1e-9)
    assert (done.layout, done.branch, done.record["kind"], done.record["outputs"]) == ("advcl", None, "classifier", 7)
    (untrained,) = (keys for reason, keys in done.record["dropped"].items() if "never trains" in reason)
    assert untrained == ["linear.weight", "linear.bias"]
    alone = convert(save(tmp_path, network.state_dict()), tmp_path / "encoder")
    assert alone.record["kind"] == "encoder"


@pytest.mark.parametrize(("branch", "number"), [(None, 1), ("adv", 1), ("clean", 0)])
def test_acl_before_finetuning(tmp_path: Path, branch: str | None, number: int) -> None:
    network = acl()
    content = {"epoch": 1000, "state_dict": network.state_dict(), "optim": {"state": {0: {"m": torch.ones(2, 2, 3, 3)}}}}
    done = convert(save(tmp_path, content), tmp_path / "folder", branch=branch)
    check(done, network, number)
    assert (done.layout, done.branch, done.record["kind"]) == ("acl", ("clean", "adv")[number], "encoder")
    assert len(done.record["dropped"]["projection head"]) == sum(key.startswith("fc.") for key in network.state_dict())


def test_acl_without_its_adversarial_half_has_one_branch(tmp_path: Path) -> None:
    network = acl(branches=1)
    file = save(tmp_path, network.state_dict())
    done = convert(file, tmp_path / "folder")
    check(done, network)
    assert done.branch == "clean"
    with pytest.raises(ValueError, match=r"no batch-norm branch 'adv'; it has clean \(published as normal\)"):
        convert(file, tmp_path / "folder", branch="adv")


@pytest.mark.parametrize("make", [lambda: acl(head="fc"), acl_finetuned])
def test_acl_after_finetuning(tmp_path: Path, make: Any) -> None:
    network = make()
    done = convert(save(tmp_path, {"state_dict": network.state_dict()}), tmp_path / "folder", label_names=("a", "b", "c"))
    check(done, network, 1)
    model = load_folder(done.folder)
    assert model.num_classes == 3
    assert class_names(model) == ("a", "b", "c")
    assert done.record["normalisation"]["mean"] == list(IMAGENET[0])
    assert any("pseudo-labels" in hint for hint in done.hints)
    encoder = convert(save(tmp_path, network.state_dict()), tmp_path / "encoder", keep_head=False)
    network.head = ""
    check(encoder, network, 1)


@pytest.mark.slow
def test_acl_for_stl10_has_the_stem_of_timms_own_resnet(tmp_path: Path) -> None:
    network = acl(widths=WIDE, large_stem=True)
    done = convert(save(tmp_path, network.state_dict()), tmp_path / "folder")
    check(done, network, 1, size=96)
    assert done.record["architecture"] == "resnet18"
    assert timm.data.resolve_model_data_config(load_folder(done.folder))["input_size"] == (3, 96, 96)


def test_of_dynacls_two_copies_the_averaged_one_is_taken(tmp_path: Path) -> None:
    copies = {"encoder_q": acl(seed=0), "encoder_k": acl(seed=1)}
    state = {f"{name}.{key}": value for name, network in copies.items() for key, value in network.state_dict().items()}
    file = save(tmp_path, {"state_dict": state, "epoch": 1000})
    done = convert(file, tmp_path / "averaged")
    check(done, copies["encoder_k"], 1)
    assert done.record["entry"] == "state_dict/encoder_k"
    assert len(done.record["dropped"]["another copy of the network (encoder_q)"]) == len(state) / 2
    check(convert(file, tmp_path / "trained", entry="encoder_q"), copies["encoder_q"], 1)


@pytest.mark.parametrize("depth", DEPTHS)
def test_kuangliu(tmp_path: Path, depth: int) -> None:
    network = kuangliu(depth=depth)
    content = {"net": {f"module.{k}": v for k, v in network.state_dict().items()}, "acc": 95.0, "epoch": 199}
    done = convert(save(tmp_path, content), tmp_path / "folder", mean=KUANGLIU[0], std=KUANGLIU[1])
    network.normalize = Normalize(*KUANGLIU)
    check(done, network)
    assert (done.layout, done.record["architecture"]) == ("kuangliu", f"resnet{depth}_cifar")
    config = timm.data.resolve_model_data_config(load_folder(done.folder))
    assert (*map(tuple, (config["mean"], config["std"])), config["crop_pct"]) == (*KUANGLIU, 1.0)
    counter = load_folder(done.folder).state_dict()["layer2.0.downsample.1.num_batches_tracked"]
    assert counter == network.state_dict()["layer2.0.shortcut.1.num_batches_tracked"] > 0  # does not show in the outputs


def load_module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"published_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_real_checkpoint(tmp_path: Path) -> None:
    """The ResNet-18 that AutoAttack's example attacks, and the network that it is published with."""
    spec = importlib.util.find_spec("pyautoattack")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    examples = Path(spec.submodule_search_locations[0]) / "examples"
    theirs = load_module(examples / "resnet.py").ResNet18()
    theirs.load_state_dict(torch.load(examples / "model_test.pt", map_location="cpu", weights_only=True))
    done = convert(examples / "model_test.pt", tmp_path / "folder", mean=0, std=1)
    assert (done.layout, done.record["outputs"]) == ("kuangliu", 10)
    with torch.no_grad():
        expected = theirs.double().eval()(images())
    torch.testing.assert_close(outputs(done.folder), expected, rtol=1e-9, atol=1e-9)


# ------------------------------------------------------------------------------------------------------ wrappers


def averaged(state: dict[str, Tensor]) -> dict[str, Any]:
    return {"n_averaged": torch.tensor(5), **{f"module.{k}": v for k, v in state.items()}}


@pytest.mark.parametrize(
    ("wrap", "entry"),
    [
        (lambda s: s, ""),
        (lambda s: {f"_orig_mod.module.{k}": v for k, v in s.items()}, ""),
        (lambda s: {**s, "epoch": 3}, ""),
        (averaged, ""),
        (lambda s: {"model": s, "optimizer": {"state": {}, "param_groups": []}}, "model"),
        (lambda s: {"ema": averaged(s)}, "ema"),
        (lambda s: {"net": {k: v.half() for k, v in s.items()}}, "net"),
    ],
)
def test_wrapped_checkpoints(tmp_path: Path, wrap: Any, entry: str) -> None:
    network = acl_finetuned()
    if entry == "net":
        network.load_state_dict({k: v.half() for k, v in network.state_dict().items()})
        network.normalize.load_state_dict({k: v.half() for k, v in network.normalize.state_dict().items()})
    done = convert(save(tmp_path, wrap(network.state_dict())), tmp_path / "folder")
    check(done, network)
    assert done.record["entry"] == entry


def test_safetensors_and_files_of_old_pytorch(tmp_path: Path) -> None:
    network = kuangliu()
    save_file(network.state_dict(), tmp_path / "weights.bin")
    check(convert(tmp_path / "weights.bin", tmp_path / "folder", mean=0, std=1), network)
    without_counters = {k: v for k, v in network.state_dict().items() if not k.endswith("num_batches_tracked")}
    torch.save(without_counters, tmp_path / "old.t7", _use_new_zipfile_serialization=False)
    check(convert(tmp_path / "old.t7", tmp_path / "folder", mean=0, std=1), network)


def test_one_of_several_networks_has_to_be_chosen(tmp_path: Path) -> None:
    networks = {"model": acl_finetuned(seed=0), "ema": acl_finetuned(seed=1)}
    file = save(tmp_path, {name: network.state_dict() for name, network in networks.items()})
    with pytest.raises(ValueError, match=r"several networks: choose an entry out of model, ema\.$"):
        convert(file, tmp_path / "folder")
    with pytest.raises(ValueError, match=r"no 'avg': choose an entry out of model, ema\.$"):
        convert(file, tmp_path / "folder", entry="avg")
    for name, network in networks.items():
        check(convert(file, tmp_path / "folder", entry=name), network)


# -------------------------------------------------------------------------------------------------------- record


def test_the_record_says_what_was_done(tmp_path: Path) -> None:
    network = acl_finetuned()
    file = save(tmp_path, {"state_dict": network.state_dict(), "optim": {}})
    done = convert(file, tmp_path / "folder", origin="somebody's ACL", dtype="float16")
    written = json.loads((done.folder / "results.json").read_text(encoding="utf-8"))
    assert {key: written[key] for key in done.record} == done.record
    assert (written["file"], written["file_sha256"]) == ("model.pt", file_sha256(file))
    assert (written["entry"], written["other_entries"], written["notes"]) == ("state_dict", ["optim"], [])
    assert written["normalisation"]["from"] == "the file's normalize.mean and normalize.std"
    assert (written["kind"], written["origin"], written["layout"]) == ("classifier", "somebody's ACL", "acl")
    assert 0 <= written["output_check"]["largest_difference"] < 1e-12
    assert (written["dtype"], written["versions"]["torch"]) == ("float16", torch.__version__)
    assert str(tmp_path) not in json.dumps(written)
    assert done.describe().startswith("model.pt, entry state_dict: layout acl\n")
    assert "resnet18_cifar, classifier with 3 classes" in done.describe()
    torch.testing.assert_close(outputs(done.folder), network.double()(images()), rtol=0.02, atol=0.02)
    assert not torch.equal(outputs(done.folder), network(images()))


def test_a_given_normalisation_replaces_the_files(tmp_path: Path) -> None:
    network = acl_finetuned()
    done = convert(save(tmp_path, network.state_dict()), tmp_path / "folder", mean=0, std=(1, 1, 2))
    network.normalize = Normalize((0, 0, 0), (1, 1, 2))
    check(done, network)
    assert any("mean 0.485 0.456 0.406 and std 0.229 0.224 0.225, was replaced on" in note for note in done.record["notes"])


def test_a_head_of_zeros_is_no_classifier(tmp_path: Path) -> None:
    network = acl_finetuned()
    nn.init.zeros_(network.fc.weight)
    nn.init.zeros_(network.fc.bias)
    done = convert(save(tmp_path, network.state_dict()), tmp_path / "folder")
    network.head = ""
    check(done, network)
    assert done.record["dropped"]["linear head of zeros, never trained"] == ["fc.weight", "fc.bias"]


def test_size_of_the_images(tmp_path: Path) -> None:
    network = acl()
    done = convert(save(tmp_path, network.state_dict()), tmp_path / "folder", size=48)
    check(done, network, 1, size=48)
    assert load_folder(done.folder).pretrained_cfg["input_size"] == (3, 48, 48)


def test_the_output_check_finds_a_wrong_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def swapped(*arguments: Any) -> Any:
        placement = place(*arguments)
        one, two = "layer1.0.bn1.running_mean", "layer1.0.bn2.running_mean"
        placement.state[one], placement.state[two] = placement.state[two], placement.state[one]
        return placement

    monkeypatch.setattr(runner, "place", swapped)
    with pytest.raises(ValueError, match=r"computes something else after its conversion .* Nothing was written"):
        convert(save(tmp_path, acl().state_dict()), tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_the_output_check_finds_the_wrong_branch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "place", lambda state, layout, _, *rest: place(state, layout, "clean", *rest))
    with pytest.raises(ValueError, match="computes something else"):
        convert(save(tmp_path, acl().state_dict()), tmp_path / "folder", branch="adv")
