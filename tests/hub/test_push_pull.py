"""Push, pull and verify: the real Hub client against a Hub on this machine, which also fails in every way that Hubs fail."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import advcl_hub
from advcl_hub.hub.export import GOLDEN, WEIGHTS, verify_folder
from advcl_hub.records import RESULTS
from tests.support.hub_client import TOKENS, Client, nobody, open_client
from tests.support.hub_server import Fault, Hub, flipped
from tests.support.hub_store import File
from tests.support.small_encoders import export_encoder

NAME = "acme/resnet8_cifar.test"
PUSHED = {".gitattributes", "config.json", WEIGHTS, GOLDEN, RESULTS, "README.md"}


@pytest.fixture
def hub(served: Hub) -> Hub:
    served.repos.clear()
    served.faults.clear()
    served.requests = []
    return served


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two encoders with other weights."""
    folder = tmp_path_factory.mktemp("exports")
    return export_encoder(folder / "first"), export_encoder(folder / "second", seed=1)


@pytest.fixture
def folder(exports: tuple[Path, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(exports[0], tmp_path / "export"))


@pytest.fixture
def other(exports: tuple[Path, Path]) -> Path:
    return exports[1]


def tree(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ------------------------------------------------------------------------------------------------------------- push


def test_push_is_one_commit_with_a_card_and_a_tag(hub: Hub, client: Client, folder: Path) -> None:
    (folder / "checkpoint.safetensors").write_bytes(b"optimizer state")
    (folder / ".env").write_text("HF_TOKEN=secret", encoding="utf-8")
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    done = client(advcl_hub.push, folder, NAME)
    repo = hub.repos[NAME]
    head = repo.resolve("main")
    assert done.commit == head.sha == repo.refs["refs/tags/v1"] and len(repo.commits) == 2 and not repo.private
    assert (
        head.files.keys() == {".gitattributes", "config.json", WEIGHTS, GOLDEN, RESULTS, "README.md"}
        and head.files[WEIGHTS].lfs
    )
    assert done.left_out == (".env", "checkpoint.safetensors", "pytorch_model.bin")
    assert head.files["README.md"].content.decode() == done.card and f'timm.create_model("hf-hub:{NAME}"' in done.card
    assert ("POST", "/api/validate-yaml") in [(m, p.partition("?")[0]) for m, p in hub.requests]

    hub.requests = []
    again = client(advcl_hub.push, folder, NAME)
    assert again.unchanged and again.commit == done.commit and len(repo.commits) == 2
    assert {path.partition("?")[0] for _, path in hub.requests} == {f"/api/models/{NAME}", f"/api/models/{NAME}/refs"} | {
        f"/api/models/{NAME}/revision/{done.commit}"
    }


def test_dry_run_talks_to_nobody(hub: Hub, client: Client, folder: Path) -> None:
    plan = client(advcl_hub.push, folder, NAME, dry_run=True, token=None)
    assert not hub.requests and plan.commit is None
    assert plan.files[WEIGHTS] == (folder / WEIGHTS).stat().st_size and plan.card.startswith("---\nlibrary_name: timm")


def test_local_paths_are_not_published(hub: Hub, client: Client, folder: Path) -> None:
    results = json.loads((folder / RESULTS).read_text(encoding="utf-8"))
    results["recipe"] = {"data": {"root": "/home/someone/secret/cifar10"}, "attack": {}, "epochs": 1}
    results |= {
        "provenance": {"data": {"name": "d", "images": 1, "sha256": "0"}, "versions": {}, "hardware": {"device": "cpu"}}
    }
    results |= {"step": 1, "branch": "adv", "seconds": 1.0}
    (folder / RESULTS).write_text(json.dumps(results), encoding="utf-8")
    client(advcl_hub.push, folder, NAME)
    published = b"".join(hub.files(NAME).values())
    assert b"someone" not in published and json.loads(hub.files(NAME)[RESULTS])["recipe"]["data"]["root"] == "cifar10"


def test_a_version_names_weights_for_good(hub: Hub, client: Client, folder: Path, other: Path) -> None:
    first = client(advcl_hub.push, folder, NAME)
    with pytest.raises(ValueError, match="other weights under version v1"):
        client(advcl_hub.push, other, NAME)
    assert hub.repos[NAME].resolve("main").sha == first.commit
    second = client(advcl_hub.push, other, NAME, version="v2")
    assert hub.repos[NAME].refs["refs/tags/v1"] == first.commit and hub.repos[NAME].refs["refs/tags/v2"] == second.commit
    with pytest.raises(ValueError, match="newer ones on main"):
        client(advcl_hub.push, folder, NAME)

    results = json.loads((other / RESULTS).read_text(encoding="utf-8"))
    (other / RESULTS).write_text(json.dumps(results | {"notes": ["Birds are lost."]}), encoding="utf-8")
    card = client(advcl_hub.push, other, NAME, version="v2")
    assert b"Birds are lost." in hub.files(NAME)["README.md"] and card.commit != second.commit
    assert hub.repos[NAME].refs["refs/tags/v2"] == second.commit


def test_private_and_pull_request(hub: Hub, client: Client, folder: Path, other: Path, tmp_path: Path) -> None:
    client(advcl_hub.push, folder, NAME, private=True)
    assert hub.repos[NAME].private
    for token in (None, "hf_stranger"):
        with pytest.raises(OSError, match="or is private"):
            client(advcl_hub.pull, NAME, tmp_path / "copy", cache_dir=tmp_path / "cache", token=token)
    client(advcl_hub.pull, NAME, tmp_path / "copy", token="hf_reader")

    request = client(advcl_hub.push, other, NAME, create_pr=True)
    repo = hub.repos[NAME]
    assert repo.refs["refs/pr/1"] == request.commit != repo.refs["refs/heads/main"] and request.version is None
    assert set(repo.refs) == {"refs/heads/main", "refs/tags/v1", "refs/pr/1"}
    hub.repos[NAME].private = False
    with pytest.raises(ValueError, match="is public already"):
        client(advcl_hub.push, folder, NAME, private=True)


@pytest.mark.parametrize(
    ("token", "said"),
    [
        (None, "no token was found; log in with `hf auth login` or set HF_TOKEN"),
        ("hf_wrong", "does not know the token"),
        ("hf_reader", "no permission"),
        ("hf_stranger", "no permission"),
    ],
)
def test_who_may_not_push_is_told_why(hub: Hub, client: Client, folder: Path, token: str | None, said: str) -> None:
    with pytest.raises(OSError) as error:
        client(advcl_hub.push, folder, NAME, token=token)
    assert said in str(error.value) and len(str(error.value).splitlines()) == 1
    assert NAME not in hub.repos


def test_names_that_cannot_be_pushed_to(hub: Hub, client: Client, folder: Path) -> None:
    hub.add("acme/taken", {"model.safetensors": b"of somebody else", "config.json": b"{}"})
    with pytest.raises(ValueError, match="holds something else"):
        client(advcl_hub.push, folder, "acme/taken")
    for name in ("not a name/x y", "acme", "https://hub/acme/x", "acme/x@v1"):
        with pytest.raises(ValueError, match="no name of a Hub repository"):
            client(advcl_hub.push, folder, name, dry_run=True)
    for version in ("", "main", "v 1", "../x", "refs/heads/main", "-x", "a" * 40):
        with pytest.raises(ValueError, match="cannot be a version"):
            client(advcl_hub.push, folder, NAME, version=version, dry_run=True)
    with pytest.raises(ValueError, match="push without one first"):
        client(advcl_hub.push, folder, NAME, create_pr=True)
    (folder / WEIGHTS).write_bytes(flipped((folder / WEIGHTS).read_bytes()))
    with pytest.raises(ValueError, match="not the file that was exported"):
        client(advcl_hub.push, folder, NAME)
    assert NAME not in hub.repos


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (Fault("PUT .*", cut_request=1000), "cannot be reached"),
        (Fault("POST .*/commit/.*", status=503), "has trouble (HTTP 503)"),
        (Fault("POST .*/tag/.*", status=500), "cannot be tagged v1"),
        (Fault("GET /storage/.*", change=flipped), "could not be verified"),
        (Fault("GET .*/README.md", change=flipped), "README.md of acme/resnet8_cifar.test came damaged"),
    ],
    ids=["upload cut", "commit refused", "tag refused", "other weights come back", "another card comes back"],
)
def test_an_interrupted_push_shows_nothing_half_finished_and_is_finished_by_the_same_call(
    hub: Hub, client: Client, folder: Path, fault: Fault, said: str
) -> None:
    hub.faults.append(fault)
    with pytest.raises(OSError) as error:
        client(advcl_hub.push, folder, NAME)
    assert said in str(error.value) and len(str(error.value).splitlines()) == 1
    repo = hub.repos[NAME]
    assert repo.resolve("main").files.keys() in ({".gitattributes"}, PUSHED)
    assert "refs/tags/v1" not in repo.refs

    hub.faults.clear()
    done = client(advcl_hub.push, folder, NAME)
    assert repo.refs["refs/tags/v1"] == done.commit == repo.resolve("main").sha and len(repo.commits) == 2


class Meanwhile(list[Any]):
    """Requests of a Hub, after each of which somebody else does something."""

    def __init__(self, act: Any) -> None:
        super().__init__()
        self.act = act

    def append(self, request: Any) -> None:
        super().append(request)
        self.act(request[1])


def test_two_who_push_at_once_do_not_mix_their_files(hub: Hub, client: Client, folder: Path) -> None:
    client(advcl_hub.push, folder, NAME)
    results = json.loads((folder / RESULTS).read_text(encoding="utf-8"))
    (folder / RESULTS).write_text(json.dumps(results | {"notes": ["Mine."]}), encoding="utf-8")

    def theirs(path: str) -> None:
        if "/preupload/" in path:
            hub.add(NAME, {"README.md": b"---\nlicense: mit\n---\ntheirs"})

    hub.requests = Meanwhile(theirs)
    with pytest.raises(OSError, match="changed by somebody else"):
        client(advcl_hub.push, folder, NAME)
    assert hub.files(NAME)["README.md"].endswith(b"theirs") and b"Mine" not in hub.files(NAME)[RESULTS]


def test_a_version_that_somebody_else_takes_meanwhile_is_not_reported_as_ours(hub: Hub, client: Client, folder: Path) -> None:
    def theirs(path: str) -> None:
        if "/tag/" in path:
            hub.repos[NAME].refs["refs/tags/v1"] = next(iter(hub.repos[NAME].commits))

    hub.requests = Meanwhile(theirs)
    with pytest.raises(OSError, match="cannot be tagged v1: it was changed by somebody else"):
        client(advcl_hub.push, folder, NAME)


def test_a_hub_that_changes_what_it_was_given_is_found(hub: Hub, client: Client, folder: Path) -> None:
    """Where results.json has no sha256: everything else about that card is as it should be."""

    def changed(path: str) -> None:
        if path.endswith("/README.md"):
            hub.repos[NAME].resolve("main").files["README.md"] = File(b"---\nlicense: mit\n---\ntheirs")

    hub.requests = Meanwhile(changed)
    said = r"could not be verified: README\.md came back changed\. Nothing was tagged; the same command tries again"
    with pytest.raises(OSError, match=said):
        client(advcl_hub.push, folder, NAME)
    assert set(hub.repos[NAME].refs) == {"refs/heads/main"}


# ------------------------------------------------------------------------------------------------------ pull, verify


def test_pull_gives_the_same_folder(hub: Hub, client: Client, folder: Path, other: Path, tmp_path: Path) -> None:
    client(advcl_hub.push, folder, NAME)
    client(advcl_hub.push, other, NAME, version="v2")
    copy = tmp_path / "copies" / "first"
    client(advcl_hub.pull, f"hf-hub:{NAME}@v1", copy, token=None)
    assert verify_folder(copy) == 0
    assert {name: content for name, content in tree(copy).items() if name != "README.md"} == tree(folder)
    assert (copy / WEIGHTS).stat().st_mode & 0o777 == 0o644 and not (copy / WEIGHTS).is_symlink()

    (copy.parent / "link").symlink_to(copy)
    client(advcl_hub.pull, NAME, copy.parent / "link", token=None)  # replaces an earlier export by main
    (copy.parent / "link").unlink()
    assert tree(copy)[WEIGHTS] == tree(other)[WEIGHTS]
    assert client(advcl_hub.verify, f"{NAME}@v1", token=None) < 1e-6
    assert [path.name for path in copy.parent.iterdir()] == ["first"]


@pytest.mark.parametrize("change", [flipped, lambda content: content[:-100]], ids=["flipped byte", "truncated"])
def test_a_damaged_download_is_refused_and_does_not_stay(
    hub: Hub, client: Client, folder: Path, tmp_path: Path, change: Any
) -> None:
    client(advcl_hub.push, folder, NAME)
    cache, copy = tmp_path / "cache", tmp_path / "copy"
    hub.faults.append(Fault("(HEAD|GET) (/storage/.*|.*/resolve/.*safetensors)", change=_Change(change)))
    with pytest.raises(ValueError, match="is not the file that was released") as error:
        client(advcl_hub.pull, NAME, copy, cache_dir=cache, token=None)
    assert "removed from the cache" in str(error.value) and not copy.exists()
    hub.faults.clear()
    client(advcl_hub.pull, NAME, copy, cache_dir=cache, token=None)
    assert verify_folder(copy) == 0


class _Change:
    """A change of large contents only."""

    def __init__(self, change: Any) -> None:
        self.change = change

    def __call__(self, content: bytes) -> bytes:
        return self.change(content) if len(content) > 5000 else content


def test_pull_says_what_is_wrong(hub: Hub, client: Client, folder: Path, tmp_path: Path) -> None:
    client(advcl_hub.push, folder, NAME)
    hub.add("acme/plain", {"config.json": (folder / "config.json").read_bytes(), "model.safetensors": b"x"})
    cases = {
        "acme/absent": (OSError, "is not on http"),
        f"{NAME}@v9": (OSError, "has no such revision"),
        "acme/plain": (ValueError, "not pushed by advcl-hub"),
        "resnet8_cifar.absent": (ValueError, "no folder here, no released weights, and no repository"),
    }
    for name, (kind, said) in cases.items():
        with pytest.raises(kind, match=said) as error:
            client(advcl_hub.pull, name, tmp_path / "copy", token=None)
        assert len(str(error.value).splitlines()) == 1
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("years of work", encoding="utf-8")
    with pytest.raises(ValueError, match="not an earlier export"):
        client(advcl_hub.pull, NAME, tmp_path / "thesis", token=None)
    hub.faults.append(Fault(".*", status=500))
    with pytest.raises(OSError, match=r"has trouble \(HTTP 500\)"):
        client(advcl_hub.pull, NAME, tmp_path / "copy", cache_dir=tmp_path / "cache", token=None)
    assert not (tmp_path / "copy").exists()


def test_without_a_network(tmp_path: Path, folder: Path) -> None:
    with open_client(nobody(), tmp_path / "home") as client:
        for call in (
            lambda: client(advcl_hub.push, folder, NAME),
            lambda: client(advcl_hub.pull, NAME, tmp_path / "copy"),
        ):
            with pytest.raises(OSError, match=r"http://127.0.0.1:9 cannot be reached .*check the network") as error:
                call()
            assert len(str(error.value).splitlines()) == 1


def test_a_full_disk(hub: Hub, client: Client, folder: Path, tmp_path: Path) -> None:
    client(advcl_hub.push, folder, NAME)
    with pytest.raises(OSError, match="File too large"):
        client(_pull_with_little_space, NAME, tmp_path / "copy", tmp_path / "cache")
    assert not (tmp_path / "copy").exists() and not list(tmp_path.glob(".copy*"))


def _pull_with_little_space(name: str, folder: Path, cache: Path) -> None:
    """Files may not grow beyond 100 kB, fewer than the weights have: the system refuses as it does when a disk is full."""
    import resource
    import signal

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        advcl_hub.pull(name, folder, cache_dir=cache)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_push_and_pull_through_xet(folder: Path, tmp_path: Path) -> None:
    """With the storage that the Hub and its client prefer today."""
    pytest.importorskip("hf_xet")
    with Hub(TOKENS, xet=tmp_path / "xet").serve() as hub, open_client(hub, tmp_path / "home") as client:
        done = client(advcl_hub.push, folder, NAME)
        assert (
            hub.files(NAME)[WEIGHTS] == (folder / WEIGHTS).read_bytes() and done.commit == hub.repos[NAME].refs["refs/tags/v1"]
        )
        assert any("/xet-write-token/" in path for _, path in hub.requests)
        assert not any(".git/info/lfs" in path and "/objects/batch" not in path for _, path in hub.requests)
        client(advcl_hub.pull, NAME, tmp_path / "copy")
        assert verify_folder(tmp_path / "copy") == 0
