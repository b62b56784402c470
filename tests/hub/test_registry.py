"""Released weights in timm's registry: names, defaults, arguments, checks, and what stays as timm has it."""

import json
import pickle
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

import advcl_hub
from advcl_hub.files import file_sha256
from advcl_hub.hub import registry, released
from advcl_hub.hub.export import WEIGHTS, load_folder
from advcl_hub.hub.push_pull import described
from advcl_hub.opening import load_model
from advcl_hub.records import RESULTS
from tests.support.hub_client import Client, open_client
from tests.support.hub_server import Fault, Hub, flipped
from tests.support.kept_registry import kept_registry
from tests.support.released_file import data_file
from tests.support.small_encoders import SMALL_VIT, export_encoder

VIT = "vit_tiny_patch16_224"
NAME = "acme/resnet8_cifar.test"


@pytest.fixture(autouse=True)
def clean_registry() -> Iterator[None]:
    """What a test registers is gone afterwards."""
    with kept_registry():
        yield


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_encoder(tmp_path_factory.mktemp("registry") / "encoder")


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_encoder(tmp_path_factory.mktemp("registry") / "vit", VIT, **SMALL_VIT)


def images(size: int = 16) -> torch.Tensor:
    return torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def output(model: Any) -> torch.Tensor:
    return model.eval()(images())


# -------------------------------------------------------------------------------------------- folders of one's own


def test_a_registered_folder_is_a_name_in_timm(encoder: Path) -> None:
    release = advcl_hub.register("resnet8_cifar.mine", encoder)
    expected = output(load_folder(encoder))
    assert timm.list_models("*mine*", pretrained=True) == ["resnet8_cifar.mine"] and timm.is_model_pretrained(release.name)
    model: Any = timm.create_model("resnet8_cifar.mine", pretrained=True)
    assert torch.equal(output(model), expected) and model.training is not None
    assert (model.pretrained_cfg["tag"], model.pretrained_cfg["input_size"], model.num_classes) == ("mine", (3, 16, 16), 0)
    assert torch.equal(output(timm.create_model("resnet8_cifar", pretrained=True, pretrained_cfg="mine")), expected)
    cfg = timm.models.get_pretrained_cfg("resnet8_cifar.mine")
    for given in (cfg, cfg.to_dict()):
        assert torch.equal(output(timm.create_model("resnet8_cifar", pretrained=True, pretrained_cfg=given)), expected)
    untrained = timm.create_model("resnet8_cifar.mine")
    assert untrained.num_classes == 0 and not torch.equal(output(untrained), expected)
    plain = timm.create_model("resnet8_cifar")
    assert plain.num_classes == 10 and plain.pretrained_cfg["input_size"] == (3, 32, 32)


def test_the_usual_arguments_of_timm_work(encoder: Path, tmp_path: Path) -> None:
    advcl_hub.register("resnet8_cifar.mine", encoder)
    weights: Any = load_folder(encoder).state_dict()
    tuned = timm.create_model("resnet8_cifar.mine", pretrained=True, num_classes=7, in_chans=1, drop_rate=0.1)
    assert tuned.num_classes == 7 and tuned.conv1.weight.shape[1] == 1 and tuned.drop_rate == 0.1
    assert torch.equal(tuned.layer2[0].conv1.weight, weights["layer2.0.conv1.weight"])
    features = timm.create_model("resnet8_cifar.mine", pretrained=True, features_only=True, out_indices=(1, 3))
    assert [tuple(f.shape[1:]) for f in features(images())] == [(16, 16, 16), (64, 4, 4)]
    assert torch.equal(features.state_dict()["layer2.0.conv1.weight"], weights["layer2.0.conv1.weight"])

    other = export_encoder(tmp_path / "other", seed=5)
    overlay = {"file": str(other / WEIGHTS)}  # timm's way to bring other weights
    brought = timm.create_model("resnet8_cifar.mine", pretrained=True, pretrained_cfg_overlay=overlay)
    assert torch.equal(output(brought), output(load_folder(other)))
    state = {"state_dict": load_folder(other).state_dict()}
    brought = timm.create_model("resnet8_cifar.mine", pretrained=True, pretrained_cfg_overlay=state)
    assert torch.equal(output(brought), output(load_folder(other)))


def test_a_stock_architecture_keeps_its_own_weights_and_defaults(vit: Path) -> None:
    names = timm.list_models(f"{VIT}*", pretrained=True)
    default, entry_point = timm.models.get_pretrained_cfg(VIT), timm.model_entrypoint(VIT)
    advcl_hub.register(f"{VIT}.mine", vit)
    assert timm.list_models(f"{VIT}*", pretrained=True) == sorted([*names, f"{VIT}.mine"])
    assert timm.models.get_pretrained_cfg(VIT) == default
    model = timm.create_model(f"{VIT}.mine", pretrained=True)  # which needs img_size, patch_size, embed_dim ...
    assert torch.equal(output(model), output(load_folder(vit)))
    stock = timm.create_model(VIT, img_size=32, depth=1)
    assert stock.embed_dim == 192 and stock.pretrained_cfg["tag"] == default.tag and stock.num_classes == 1000
    now = timm.model_entrypoint(VIT)
    assert (now.__name__, now.__module__) == (entry_point.__name__, entry_point.__module__)
    larger = timm.create_model(f"{VIT}.mine", pretrained=True, img_size=32)
    assert larger(images(32)).shape == (2, 16)
    given = timm.models.resolve_model_input_args(f"{VIT}.mine")
    assert torch.equal(output(timm.create_model(**given, pretrained=True)), output(load_folder(vit)))


def test_what_timm_saves_of_a_registered_model_opens_again(vit: Path, tmp_path: Path) -> None:
    advcl_hub.register(f"{VIT}.mine", vit)
    model = timm.create_model(f"{VIT}.mine", pretrained=True)
    timm.models.save_for_hf(model, tmp_path / "saved", safe_serialization=True)
    assert torch.equal(output(timm.create_model(f"local-dir:{tmp_path / 'saved'}", pretrained=True)), output(load_folder(vit)))


@pytest.mark.slow
def test_without_a_tag_an_architecture_of_ours_takes_the_first_classifier(encoder: Path, tmp_path: Path) -> None:
    first = next((name for name in advcl_hub.releases() if name.startswith("resnet20_cifar.")), None)
    assert first is None, "choose an architecture without released weights"
    folder = export_encoder(tmp_path / "resnet20", "resnet20_cifar")
    with pytest.raises(RuntimeError, match="No pretrained weights"):
        timm.create_model("resnet20_cifar", pretrained=True)
    advcl_hub.register("resnet20_cifar.a", folder)
    advcl_hub.register("resnet20_cifar.b", export_encoder(tmp_path / "other", "resnet20_cifar", seed=1))
    assert torch.equal(output(timm.create_model("resnet20_cifar", pretrained=True)), output(load_folder(folder)))
    classifier = export_encoder(tmp_path / "classifier", "resnet20_cifar", num_classes=10)
    advcl_hub.register("resnet20_cifar.c", classifier)  # as timm's cfg of the bare name says
    assert timm.models.get_pretrained_cfg("resnet20_cifar").num_classes == 10
    assert torch.equal(output(timm.create_model("resnet20_cifar", pretrained=True)), output(load_folder(classifier)))
    opened = load_model("resnet20_cifar")  # the same, under the name that says which weights these are
    assert opened.name == "resnet20_cifar.c" and opened.provenance is not None
    assert torch.equal(output(opened.model), output(load_folder(classifier)))
    assert advcl_hub.verify("resnet20_cifar") == advcl_hub.verify("resnet20_cifar.c")


def test_registering_again_replaces_ones_own_only(encoder: Path, tmp_path: Path) -> None:
    advcl_hub.register("resnet8_cifar.mine", encoder)
    other = export_encoder(tmp_path / "other", seed=5)
    advcl_hub.register("resnet8_cifar.mine", other)
    assert torch.equal(output(timm.create_model("resnet8_cifar.mine", pretrained=True)), output(load_folder(other)))
    assert timm.list_models("*mine", pretrained=True) == ["resnet8_cifar.mine"]
    with pytest.raises(ValueError, match="taken by released weights"):
        advcl_hub.register(
            timm.list_models("resnet18.*", pretrained=True)[0].replace("resnet18.", "resnet18."),
            _as(tmp_path, other, "resnet18"),
        )


def _as(folder: Path, export: Path, architecture: str) -> Path:
    """An export that says it is of another architecture, without results.json to contradict it."""
    shutil.copytree(export, folder / architecture)
    (folder / architecture / "results.json").unlink()
    config = json.loads((export / "config.json").read_text(encoding="utf-8"))
    (folder / architecture / "config.json").write_text(json.dumps(config | {"architecture": architecture}), encoding="utf-8")
    return folder / architecture


@pytest.mark.parametrize(
    ("name", "source", "error", "said"),
    [
        ("resnet18_cifar.mine", "encoder", ValueError, "holds a resnet8_cifar: register it as resnet8_cifar.TAG"),
        ("resnet8_cifar", "encoder", ValueError, "register it as resnet8_cifar.TAG"),
        ("resnet8_cifar.a/b", "encoder", ValueError, "of letters, digits"),
        ("resnet8_cifar.mine", "absent", FileNotFoundError, "for the Hub, write hf-hub:ORG/NAME"),
        ("resnet8_cifar.mine", "damaged", ValueError, "not the file that was exported"),
        ("resnet8_cifar.mine", "hf-hub:acme", ValueError, "hf-hub:acme is no repository on the Hub: hf-hub:ORG/NAME"),
        ("no_such_net.mine", "no_such_net", ValueError, "no_such_net.mine: timm has no architecture no_such_net"),
    ],
)
def test_what_cannot_be_registered(
    name: str, source: str, error: type[Exception], said: str, encoder: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(encoder, tmp_path / "damaged"))
    (folder / WEIGHTS).write_bytes(flipped((folder / WEIGHTS).read_bytes()))
    unknown = _as(tmp_path, encoder, "no_such_net")
    known = {"encoder": encoder, "damaged": folder, "no_such_net": unknown, "hf-hub:acme": "hf-hub:acme"}
    with pytest.raises(error, match=said):
        advcl_hub.register(name, known.get(source, tmp_path / source))
    assert name not in advcl_hub.releases()


def test_a_byte_that_changes_after_registration_is_refused(encoder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(encoder, tmp_path / "copy"))
    advcl_hub.register("resnet8_cifar.mine", folder)
    (folder / WEIGHTS).write_bytes(flipped((folder / WEIGHTS).read_bytes()))
    cfg = timm.models.get_pretrained_cfg("resnet8_cifar.mine")
    for options in ({}, {"features_only": True}, {"pretrained_cfg": cfg}, {"pretrained_cfg": cfg.to_dict()}):
        name = "resnet8_cifar" if "pretrained_cfg" in options else "resnet8_cifar.mine"
        with pytest.raises(
            ValueError, match=r"not the file that was registered \(its sha256 is .*: register the weights again"
        ):
            timm.create_model(name, pretrained=True, **options)
    timm.create_model("resnet8_cifar.mine")  # without weights it does not matter


def test_a_config_cannot_point_to_other_weights(encoder: Path, tmp_path: Path) -> None:
    folder, other = Path(shutil.copytree(encoder, tmp_path / "copy")), export_encoder(tmp_path / "other", seed=5)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["pretrained_cfg"] |= {"source": "local-dir", "file": str(other), "hf_hub_id": "acme/x", "custom_load": True}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    results["sha256"]["config.json"] = file_sha256(folder / "config.json")
    (folder / "results.json").write_text(json.dumps(results), encoding="utf-8")
    advcl_hub.register("resnet8_cifar.mine", folder)
    assert torch.equal(output(timm.create_model("resnet8_cifar.mine", pretrained=True)), output(load_folder(encoder)))


def test_the_functions_of_architectures_know_the_weights_and_can_be_pickled(encoder: Path, vit: Path) -> None:
    advcl_hub.register("resnet8_cifar.mine", encoder)
    advcl_hub.register(f"{VIT}.mine", vit)
    expected = output(load_folder(encoder))
    assert torch.equal(output(advcl_hub.models.resnet8_cifar(pretrained=True, pretrained_cfg="mine")), expected)
    assert torch.equal(output(vars(timm.models)[VIT](pretrained=True, pretrained_cfg="mine")), output(load_folder(vit)))
    for name in ("resnet8_cifar", VIT):
        entry_point = timm.model_entrypoint(name)
        assert pickle.loads(pickle.dumps(entry_point)) is entry_point


def test_what_describes_a_registered_folder_lies_in_it(encoder: Path) -> None:
    advcl_hub.register("resnet8_cifar.mine", encoder)
    with described("resnet8_cifar.mine") as (folder, opens):
        assert (folder, opens) == (encoder, "resnet8_cifar.mine")


def test_evaluation_and_finetuning_open_a_name(encoder: Path) -> None:
    advcl_hub.register("resnet8_cifar.mine", encoder)
    loaded = load_model("resnet8_cifar.mine")
    assert loaded.provenance == json.loads((encoder / "results.json").read_text(encoding="utf-8"))
    assert loaded.file_sha256 == file_sha256(encoder / WEIGHTS) and torch.equal(
        output(loaded.model), output(load_folder(encoder))
    )


def test_robustbench_finds_a_classifier(tmp_path: Path, encoder: Path) -> None:
    """It asks timm in exactly this way, whenever the name is one of timm's."""
    classifier = export_encoder(tmp_path / "classifier", num_classes=10)
    path = data_file(
        tmp_path / "released.json", classifier, hub_id="a/b", revision="a" * 40, robustbench="advcl_test_cifar10_linf"
    )
    (release,) = released.load_releases(path)
    registry._register(replace(release, folder=classifier))
    assert timm.is_model("advcl_test_cifar10_linf")
    with pytest.raises(ValueError, match="the name advcl_test_cifar10_linf is taken"):
        registry._register(replace(release, name="resnet8_cifar.again", folder=classifier))
    model = timm.create_model("advcl_test_cifar10_linf", num_classes=10, pretrained=True, checkpoint_path="")
    assert torch.equal(output(model), output(load_folder(classifier))) and output(model).shape == (2, 10)
    opened = load_model("advcl_test_cifar10_linf")
    assert opened.name == "resnet8_cifar.test" and opened.provenance is not None


def test_a_folder_that_is_called_as_a_release_hides_it_only_if_it_holds_weights(
    encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "resnet8_cifar.beside"
    advcl_hub.register(name, encoder)
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).mkdir()
    (tmp_path / name / "README.md").write_text("its card", encoding="utf-8")
    assert load_model(name).source == name and advcl_hub.verify(name) < 1e-3
    other = export_encoder(tmp_path / "other", seed=3)
    shutil.rmtree(tmp_path / name)
    other.rename(tmp_path / name)
    assert load_model(name).source == f"local-dir:{name}"


# ------------------------------------------------------------------------------------------------------------ the Hub


def load_released(path: Path, **options: Any) -> Any:
    """In the client's process: registers a data file and opens its model as timm's users do."""
    (release,) = released.load_releases(path)
    registry._register(release)
    return output(timm.create_model(release.name, pretrained=True, **options))


def load_registered(source: str, name: str = "resnet8_cifar.hub", **options: Any) -> Any:
    advcl_hub.register(name, source)
    return output(timm.create_model(name, pretrained=True, **options))


def opened(name: str) -> Any:
    return output(load_model(name).model)


def load_plain(name: str) -> Any:
    return output(timm.create_model(name, pretrained=True))


def test_released_weights_on_the_hub(served: Hub, client: Client, encoder: Path, tmp_path: Path) -> None:
    done = client(advcl_hub.push, encoder, NAME)
    expected = output(load_folder(encoder))
    path = data_file(tmp_path / "released.json", encoder, hub_id="resnet8_cifar.test", revision=done.commit)
    served.add(NAME, {WEIGHTS: b"main has moved on"})

    served.requests = []
    assert torch.equal(client(load_released, path, token=None), expected)
    assert torch.equal(client(load_released, path, token=None, cache_dir=tmp_path / "cache"), expected)
    assert list((tmp_path / "cache").glob("models--acme--*/snapshots/*/model.safetensors"))
    assert sum(path.startswith("/storage") for _, path in served.requests) == 2  # once for each cache
    assert torch.equal(client(load_released, path, token=None), expected)
    assert sum(path.startswith("/storage") for _, path in served.requests) == 2
    assert torch.equal(client(load_plain, f"hf-hub:{NAME}@v1", token=None), expected)

    fresh = tmp_path / "other-cache"
    served.faults.append(Fault("GET /storage/.*", change=flipped))
    with pytest.raises(ValueError, match="is not the file that was released"):
        client(load_released, path, token=None, cache_dir=fresh)
    assert not [p for p in fresh.rglob("*") if p.is_file() and p.stat().st_size > 10_000]
    served.faults.clear()
    served.faults.append(Fault("GET /storage/.*", delay=1.0, times=1))  # slow is not wrong
    assert torch.equal(client(load_released, path, token=None, cache_dir=fresh), expected)


def test_private_weights_and_offline(served: Hub, client: Client, encoder: Path, tmp_path: Path) -> None:
    name = "alice/resnet8_cifar.private"
    client(advcl_hub.push, encoder, name, private=True)
    expected = output(load_folder(encoder))
    with pytest.raises(OSError, match="or is private: check the name, and log in"):
        client(load_registered, f"hf-hub:{name}", token=None)
    home = tmp_path / "home"
    with open_client(served, home) as other:
        assert torch.equal(other(load_registered, f"hf-hub:{name}@v1", token="hf_reader"), expected)
        served.add("bob/plain", {file: (encoder / file).read_bytes() for file in ("config.json", WEIGHTS)})
        assert torch.equal(other(opened, "hf-hub:bob/plain"), expected)
    requests = len(served.requests)
    with open_client(served, home, HF_HUB_OFFLINE="1") as offline:
        assert torch.equal(offline(load_registered, f"hf-hub:{name}@v1", token=None), expected)
        assert torch.equal(offline(opened, "hf-hub:bob/plain"), expected)
        with pytest.raises(OSError, match="HF_HUB_OFFLINE is set"):
            offline(load_registered, "hf-hub:alice/another", token=None)
    assert len(served.requests) == requests


def test_without_a_record_weights_that_are_not_here_are_not_taken(
    encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They could not be checked; those that are in the cache timm would open all the same."""

    def fetch(repository: str, file: str, **options: Any) -> Path:
        if file == RESULTS:
            raise OSError("The Hub has trouble.")
        return encoder / file

    monkeypatch.setattr(registry, "fetch", fetch)
    with pytest.raises(OSError, match=r"^The Hub has trouble\.$"):
        advcl_hub.register("resnet8_cifar.bob", "hf-hub:bob/export", cache_dir=tmp_path)
    assert "resnet8_cifar.bob" not in advcl_hub.releases()


def test_a_repository_that_timm_pushed(served: Hub, client: Client, encoder: Path) -> None:
    """It has no results.json and so no sha256; it opens all the same, pinned to its commit."""
    files = {name: (encoder / name).read_bytes() for name in ("config.json", WEIGHTS)}
    served.add("bob/plain", files)
    assert torch.equal(
        client(load_registered, "hf-hub:bob/plain", "resnet8_cifar.bob", token=None), output(load_folder(encoder))
    )
