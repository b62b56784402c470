"""The Hub client's cache without the Hub, and with damaged files: what timm opens opens here, and no wrong byte goes unsaid."""

import hashlib
import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

import advcl_hub
from advcl_hub.hub.download import content_hash, is_damaged
from advcl_hub.hub.export import CONFIG, WEIGHTS
from advcl_hub.hub.push_pull import described
from advcl_hub.opening import load_model
from tests.support.hub_client import TOKENS, Client, open_client
from tests.support.hub_server import Fault, Hub, flipped
from tests.support.small_encoders import export_encoder

PLAIN, EXPORT = "bob/plain", "acme/export"


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_encoder(tmp_path_factory.mktemp("offline") / "export", num_classes=4)


@pytest.fixture(scope="module")
def hub(export: Path) -> Iterator[Hub]:
    with Hub(TOKENS).serve() as hub:
        content = {path.name: path.read_bytes() for path in export.iterdir()}
        hub.add(PLAIN, {name: content[name] for name in (CONFIG, WEIGHTS)})
        hub.add(EXPORT, content)
        yield hub


@pytest.fixture(autouse=True)
def working(hub: Hub) -> Iterator[None]:
    yield
    hub.faults.clear()


@pytest.fixture(scope="module")
def online(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """A client whose HF_HOME nobody uses: each test names its own cache."""
    with open_client(hub, tmp_path_factory.mktemp("home")) as client:
        yield client


@pytest.fixture(scope="module")
def offline(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    with open_client(hub, tmp_path_factory.mktemp("home"), HF_HUB_OFFLINE="1") as client:
        yield client


def within(cache: Path, call: Any, *args: Any, **options: Any) -> tuple[Any, list[str]]:
    """In the client's process: calls with another cache. The result, and what was warned."""
    from huggingface_hub import constants

    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(record=True) as warned:
        patch.setattr(constants, "HF_HUB_CACHE", str(cache))
        warnings.simplefilter("always")
        result = call(*args, **options)
    return result, [str(warning.message) for warning in warned]


def by_timm(name: str) -> torch.Tensor:
    return logits(timm.create_model(name, pretrained=True))


def opened(name: str) -> tuple[torch.Tensor, bool, str | None]:
    """Logits, whether there is a provenance, and the sha256 that the record would tell."""
    loaded = load_model(name)
    return logits(loaded.model), loaded.provenance is not None, loaded.file_sha256


def registered(name: str) -> torch.Tensor:
    advcl_hub.register("resnet8_cifar.offline", name)
    return by_timm("resnet8_cifar.offline")


def config_of(name: str) -> Any:
    with described(name) as (folder, _):
        return json.loads((folder / CONFIG).read_text(encoding="utf-8"))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)))
    return found


def cached(cache: Path, file: str = WEIGHTS) -> Path:
    (path,) = cache.glob(f"models--*/snapshots/*/{file}")
    return path


@pytest.mark.parametrize("repository", [PLAIN, EXPORT])
@pytest.mark.parametrize("revision", ["", "@main", "@commit"])
def test_what_timm_opened_opens_offline(
    repository: str, revision: str, hub: Hub, online: Client, offline: Client, tmp_path: Path
) -> None:
    name = f"hf-hub:{repository}{revision.replace('commit', hub.repos[repository].resolve('main').sha)}"
    expected, _ = online(within, tmp_path, by_timm, name)
    (found, provenance, sha256), warned = offline(within, tmp_path, opened, name)
    assert torch.equal(found, expected) and not provenance and sha256 is None  # the record claims no check
    assert len(warned) == 1 and "is unchecked (results.json: " in warned[0] and "HF_HUB_OFFLINE is set" in warned[0]
    found, warned = offline(within, tmp_path, registered, name)
    assert torch.equal(found, expected) and [text for text in warned if "not checked" in text and "unchecked" in text]
    for function in (advcl_hub.verify, config_of):
        with pytest.raises(OSError, match=r"is unchecked .* nothing to describe or to verify"):
            offline(within, tmp_path, function, f"{repository}{name.removeprefix(f'hf-hub:{repository}')}")


def test_with_the_hub_unreachable_the_cache_serves_as_well(hub: Hub, online: Client, tmp_path: Path) -> None:
    expected, _ = online(within, tmp_path, by_timm, f"hf-hub:{EXPORT}")
    hub.faults.append(Fault(".*", status=503))
    (found, provenance, _), warned = online(within, tmp_path, opened, f"hf-hub:{EXPORT}")
    assert torch.equal(found, expected) and not provenance and "is unchecked" in warned[0]


def test_the_cache_knows_that_there_is_no_such_file(online: Client, offline: Client, tmp_path: Path) -> None:
    online(within, tmp_path, opened, f"hf-hub:{PLAIN}")
    assert offline(within, tmp_path, opened, f"hf-hub:{PLAIN}")[1] == []  # timm's own push has none: nothing is missing


def test_what_was_opened_here_is_checked_offline_too(online: Client, offline: Client, export: Path, tmp_path: Path) -> None:
    (expected, provenance, sha256), warned = online(within, tmp_path, opened, f"hf-hub:{EXPORT}")
    assert provenance and sha256 and not warned
    (found, *rest), warned = offline(within, tmp_path, opened, f"hf-hub:{EXPORT}")
    assert torch.equal(found, expected) and rest == [True, sha256] and not warned
    found, warned = offline(within, tmp_path, config_of, EXPORT)  # without the picture, of which nobody knows
    assert found["num_classes"] == 4 and len(warned) == 1 and warned[0].startswith("examples.png is left out: ")


def test_weights_that_are_not_in_the_cache_are_refused_as_before(offline: Client, tmp_path: Path) -> None:
    with pytest.raises(OSError, match=f"{PLAIN} cannot be fetched from the Hub: it is not in the cache and HF_HUB_OFFLINE"):
        offline(within, tmp_path, opened, f"hf-hub:{PLAIN}")


def shortened(content: bytes) -> bytes:
    return content[: len(content) // 2]


def damage(path: Path, change: Any) -> bytes:
    """Replaces what a link of the cache points to; returns what was there."""
    blob = path.resolve()
    content = blob.read_bytes()
    blob.chmod(0o644)
    blob.write_bytes(change(content))
    return content


@pytest.mark.parametrize("change", [shortened, flipped])
@pytest.mark.parametrize("file", [WEIGHTS, CONFIG])
@pytest.mark.parametrize("repository", [PLAIN, EXPORT])
def test_a_damaged_file_is_named_and_fetched_again(
    repository: str, file: str, change: Any, online: Client, offline: Client, tmp_path: Path
) -> None:
    (expected, *_), _ = online(within, tmp_path, opened, f"hf-hub:{repository}")
    path = cached(tmp_path, file)
    content = damage(path, change)
    assert is_damaged(path)
    with pytest.raises(ValueError, match=r"is damaged .*: unset HF_HUB_OFFLINE once") as caught:
        offline(within, tmp_path, opened, f"hf-hub:{repository}")
    assert str(path) in str(caught.value) and path.read_bytes() != content
    (found, *_), warned = online(within, tmp_path, opened, f"hf-hub:{repository}")
    assert torch.equal(found, expected) and path.read_bytes() == content and not is_damaged(path)
    assert len(warned) == 1 and str(path) in warned[0] and "removed and fetched again" in warned[0]


def test_a_hub_that_cannot_be_reached_leaves_the_file_and_says_so(hub: Hub, online: Client, tmp_path: Path) -> None:
    online(within, tmp_path, opened, f"hf-hub:{PLAIN}")
    content = damage(path := cached(tmp_path), flipped)
    hub.faults.append(Fault(".*", status=503))
    with pytest.raises(ValueError, match=r"is damaged .* could not be fetched again \(.*HTTP 503") as caught:
        online(within, tmp_path, opened, f"hf-hub:{PLAIN}")
    assert str(path) in str(caught.value) and path.read_bytes() == flipped(content)


def read_only(name: str) -> Any:
    """In a process that may not write the cache; permission bits do not bind root."""
    from huggingface_hub import file_download

    def refuse(*args: Any, **options: Any) -> None:
        raise PermissionError(13, "Permission denied", "blobs")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(file_download, "_download_to_tmp_and_move", refuse)
        return opened(name)


def test_a_cache_that_cannot_be_written(online: Client, tmp_path: Path) -> None:
    online(within, tmp_path, opened, f"hf-hub:{PLAIN}")
    content = damage(path := cached(tmp_path), flipped)
    with pytest.raises(ValueError, match=r"could not be fetched again \(.*Permission denied \(blobs\)\): delete it") as caught:
        online(within, tmp_path, read_only, f"hf-hub:{PLAIN}")
    assert str(path) in str(caught.value) and path.read_bytes() == flipped(content)


def test_what_comes_damaged_twice_is_refused_and_removed(hub: Hub, online: Client, tmp_path: Path) -> None:
    hub.faults.append(Fault("GET /storage/.*", change=flipped))
    with pytest.raises(ValueError, match=f"{WEIGHTS} of {PLAIN} came damaged .* removed from the cache: try again"):
        online(within, tmp_path, opened, f"hf-hub:{PLAIN}")
    assert not list(tmp_path.glob(f"models--*/snapshots/*/{WEIGHTS}"))


def no_links(name: str) -> Any:
    """In a process whose system has no links."""
    from huggingface_hub import file_download

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(file_download, "are_symlinks_supported", lambda *_: False)
        patch.setattr(os, "symlink", lambda *_, **__: (_ for _ in ()).throw(OSError("no links")))
        return opened(name)


def test_without_links_the_path_and_the_remedy_are_named(online: Client, tmp_path: Path) -> None:
    (expected, *_), _ = online(within, tmp_path / "plain", no_links, f"hf-hub:{PLAIN}")
    path = cached(tmp_path / "plain")
    assert not path.is_symlink() and content_hash(path) is None
    damage(path, shortened)
    with pytest.raises(ValueError, match=r"cannot be opened: .* delete it, and it is fetched again") as caught:
        online(within, tmp_path / "plain", no_links, f"hf-hub:{PLAIN}")
    assert str(path) in str(caught.value)
    online(within, tmp_path / "export", no_links, f"hf-hub:{EXPORT}")  # of an export the sha256 is known
    damage(cached(tmp_path / "export"), flipped)
    (found, *_), warned = online(within, tmp_path / "export", no_links, f"hf-hub:{EXPORT}")
    assert torch.equal(found, expected) and "removed and fetched again" in warned[0]


def test_nothing_outside_the_cache_is_removed(online: Client, tmp_path: Path) -> None:
    online(within, tmp_path / "cache", opened, f"hf-hub:{EXPORT}")
    path, own = cached(tmp_path / "cache"), tmp_path / "my-weights"
    content = damage(path, flipped)
    path.resolve().rename(own)
    path.unlink()
    path.symlink_to(own)
    (_, provenance, _), _ = online(within, tmp_path / "cache", opened, f"hf-hub:{EXPORT}")
    assert provenance and own.read_bytes() == flipped(content)


def test_the_name_in_a_store_for_all_repositories_is_no_sha256(tmp_path: Path) -> None:
    """There the Hub client's files have hashes of another kind, of as many digits."""
    store, blob = tmp_path / "blobs" / "aa" / ("a" * 64), tmp_path / "models--a--b" / "blobs"
    pointer = tmp_path / "models--a--b" / "snapshots" / "c" / WEIGHTS
    for folder in (store.parent, blob, pointer.parent):
        folder.mkdir(parents=True)
    store.write_bytes(b"weights")
    name = hashlib.sha256(b"weights").hexdigest()
    (blob / name).symlink_to(store)
    pointer.symlink_to(Path("../../blobs", name))
    assert content_hash(pointer) == name and not is_damaged(pointer)
    store.write_bytes(b"WEIGHTS")
    assert is_damaged(pointer)


def weights_of(name: str) -> float:
    return sum(parameter.double().abs().sum().item() for parameter in load_model(name).model.parameters())


def test_a_name_of_timms_own_registry(hub: Hub, online: Client, offline: Client, tmp_path: Path) -> None:
    name = "test_resnet.r160_in1k"
    model = timm.create_model(name.partition(".")[0])
    save_file(model.state_dict(), tmp_path / WEIGHTS, metadata={"format": "pt"})
    hub.add(f"timm/{name}", {WEIGHTS: (tmp_path / WEIGHTS).read_bytes()})
    cache = tmp_path / "cache"
    expected, _ = online(within, cache, weights_of, name)
    assert offline(within, cache, weights_of, name) == (expected, [])
    for change in (shortened, flipped):
        damage(cached(cache), change)
        with pytest.raises(ValueError, match=r"is damaged .*: unset HF_HUB_OFFLINE once"):
            offline(within, cache, weights_of, name)
        found, warned = online(within, cache, weights_of, name)
        assert found == expected and len(warned) == 1 and load_file(cached(cache))
