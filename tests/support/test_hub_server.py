"""The Hub that other tests are made with, asked by the real client."""

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_session
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import _http
from safetensors.numpy import save

from tests.support.hub_client import hurry
from tests.support.hub_server import Fault, Hub, flipped

CARD = b"---\nlicense: apache-2.0\nlibrary_name: timm\ntags: [robust]\n---\n# A model\n"
WEIGHTS = save({"weight": np.arange(3000, dtype=np.float32)})


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(_http, "time", time)  # put back afterwards
    hurry()
    with Hub({"hf_alice": ("alice", ["acme"]), "hf_bob": ("bob",), "hf_read": ("alice", ["acme"], "read")}).serve() as hub:
        yield hub


def client(hub: Hub, token: str | bool = "hf_alice") -> HfApi:
    return HfApi(endpoint=hub.endpoint, token=token)


def commit(api: HfApi, files: dict[str, bytes], **settings: Any) -> str:
    operations = [CommitOperationAdd(path, content) for path, content in files.items()]
    return api.create_commit("acme/m", operations, commit_message="Change", **settings).oid


def test_a_model_is_uploaded_tagged_and_downloaded(hub: Hub, tmp_path: Path) -> None:
    api = client(hub)
    assert api.whoami()["orgs"][0]["name"] == "acme"
    api.create_repo("acme/m")
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_repo("acme/m")
    first = commit(api, {"model.safetensors": WEIGHTS, "README.md": CARD, "images/a.png": b"\x89PNG\0"})
    api.create_tag("acme/m", tag="v1")
    assert commit(api, {"model.safetensors": WEIGHTS, "README.md": CARD}) == first  # nothing has changed
    second = commit(api, {"config.json": b"{}"}, parent_commit=first)
    with pytest.raises(HfHubHTTPError, match="412"):
        commit(api, {"config.json": b"{ }"}, parent_commit=first)
    refs = api.list_repo_refs("acme/m")
    assert (refs.branches[0].target_commit, refs.tags[0].name, refs.tags[0].target_commit) == (second, "v1", first)
    assert list(hub.repos["acme/m"].commits)[1:] == [first, second]
    info = api.model_info("acme/m", revision="v1", files_metadata=True)
    assert info.sha == first and {s.rfilename for s in info.siblings if s.lfs} == {"model.safetensors", "images/a.png"}
    assert info.card_data.license == "apache-2.0" and set(info.tags) == {"timm", "robust", "license:apache-2.0"}
    assert [e.size for e in api.get_paths_info("acme/m", ["model.safetensors", "absent"])] == [len(WEIGHTS)]
    hub.faults = [Fault("GET /storage", times=1, cut_answer=5000)]
    assert Path(api.hf_hub_download("acme/m", "model.safetensors", cache_dir=tmp_path)).read_bytes() == WEIGHTS  # resumed
    folder = Path(api.snapshot_download("acme/m", revision="v1", cache_dir=tmp_path))
    assert folder.name == first and {"README.md", "images"} < {path.name for path in folder.iterdir()}
    with pytest.raises(RevisionNotFoundError):
        api.hf_hub_download("acme/m", "config.json", revision="v2", cache_dir=tmp_path)
    assert [api.file_exists("acme/m", "config.json", revision=revision) for revision in ("v1", "main")] == [False, True]


def test_who_may_read_and_write(hub: Hub) -> None:
    client(hub).create_repo("acme/m", private=True)
    for token in (False, "hf_bob"):
        with pytest.raises(RepositoryNotFoundError):
            client(hub, token).model_info("acme/m")
    with pytest.raises(HfHubHTTPError, match="Invalid credentials"):
        client(hub, "hf_unknown").model_info("acme/m")
    hub.repos["acme/m"].private = False
    for token in ("hf_bob", "hf_read"):
        for act in (lambda api: commit(api, {"a.txt": b"a"}), lambda api: api.create_repo("acme/other")):
            with pytest.raises(HfHubHTTPError, match="403"):
                act(client(hub, token))
    proposed = commit(client(hub, "hf_bob"), {"a.bin": b"a"}, create_pr=True)  # anybody may ask
    assert client(hub, False).model_info("acme/m", revision="refs/pr/1").sha == proposed
    assert "a.bin" in hub.files("acme/m", "refs/pr/1") and "a.bin" not in hub.files("acme/m")


def test_a_commit_is_whole_or_not_at_all(hub: Hub) -> None:
    api, before = client(hub), hub.add("acme/m", {"README.md": CARD}).sha
    operations = [CommitOperationAdd("a.txt", b"a"), CommitOperationDelete("absent.txt")]
    with pytest.raises(HfHubHTTPError, match="doesn't exist"):
        api.create_commit("acme/m", operations, commit_message="Change")
    with pytest.raises(ValueError, match=r'"license" must be one of'):
        commit(api, {"a.txt": b"a", "README.md": b"---\nlicense: mine\n---\n"})
    hub.faults = [Fault("PUT /storage", times=1, cut_request=5000)]
    after = commit(api, {"model.safetensors": WEIGHTS})
    assert list(hub.repos["acme/m"].commits)[1:] == [before, after]
    assert hub.files("acme/m")["model.safetensors"] == WEIGHTS
    assert [method for method, path in hub.requests if path.startswith("/storage")] == ["PUT", "PUT"]


def test_storage_may_lie(hub: Hub, tmp_path: Path) -> None:
    hub.add("acme/m", {"model.safetensors": WEIGHTS})
    for number, change in enumerate((flipped, lambda content: content[:-1])):
        hub.faults = [Fault("model.safetensors", change=change)]
        found = client(hub).hf_hub_download("acme/m", "model.safetensors", cache_dir=tmp_path / str(number))
        assert Path(found).read_bytes() == change(WEIGHTS) != WEIGHTS  # the client does not see it


def test_storage_takes_an_address_but_no_token(hub: Hub) -> None:
    file = hub.add("acme/m", {"model.safetensors": WEIGHTS}).files["model.safetensors"]
    address = f"{hub.storage}/storage/acme/m/{file.sha256}/model.safetensors"
    for token, found in (("", (200, WEIGHTS)), ("hf_alice", (400, b'{"error": "Only one auth mechanism allowed"}'))):
        answer = get_session().get(address, headers={"Authorization": f"Bearer {token}"} if token else {})
        assert (answer.status_code, answer.content) == found


def test_xet(tmp_path: Path) -> None:
    pytest.importorskip("hf_xet")  # what clients use by default
    (tmp_path / "model.safetensors").write_bytes(WEIGHTS)
    program = """if True:
        from huggingface_hub import hf_hub_download, upload_file
        upload_file(path_or_fileobj="model.safetensors", path_in_repo="model.safetensors", repo_id="acme/m")
        print(hf_hub_download("acme/m", "model.safetensors"))
    """
    with Hub({"hf_alice": ("alice", ["acme"])}, xet=tmp_path / "xet").serve() as hub:
        hub.create("acme/m", private=True)
        command, environment = [sys.executable, "-c", program], hub.environment(tmp_path, "hf_alice")
        done = subprocess.run(
            command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=200, encoding="utf-8"
        )
        assert done.returncode == 0, done.stderr
        assert hub.files("acme/m")["model.safetensors"] == Path(done.stdout.strip()).read_bytes() == WEIGHTS
        assert "/storage" not in str(hub.requests)
