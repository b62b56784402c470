"""A Hugging Face Hub in memory, over real HTTP, for the real client: models only, with LFS storage or, if asked, Xet."""

import base64
import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import RLock, Thread
from typing import Any, NamedTuple
from urllib.parse import parse_qs, quote, unquote, urlsplit

from tests.support.hub_store import ATTRIBUTES, JSON, LFS, Answer, Commit, File, Refused, Repo, Xet, read_card


class User(NamedTuple):
    name: str
    orgs: list[str] = []  # noqa: RUF012
    role: str = "write"  # the token's


@dataclass
class Fault:
    """What goes wrong with the next `times` requests (None: all) that match `pattern`, as in `GET .*/config.json`."""

    pattern: str
    times: int | None = None
    status: int = 0  # answered instead
    delay: float = 0  # seconds before the answer
    change: Callable[[bytes], bytes] = lambda content: content  # of what is served: sizes stated follow it, hashes do not
    cut_request: int | None = None  # bytes of the body that are read before the connection is closed
    cut_answer: int | None = None  # bytes of the body that are sent before the connection is closed


def flipped(content: bytes) -> bytes:
    """For `Fault.change`: one bit in the middle."""
    middle = len(content) // 2
    return content[:middle] + bytes(byte ^ 1 for byte in content[middle : middle + 1]) + content[middle + 1 :]


class Hub:
    """Repositories, users and what goes wrong; a test may read and change all of it at any time."""

    def __init__(self, tokens: dict[str, tuple[Any, ...]] | None = None, xet: Path | None = None) -> None:
        self.tokens = {token: User(*user) for token, user in (tokens or {}).items()}
        self.xet = Xet(xet) if xet else None
        self.repos: dict[str, Repo] = {}
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str]] = []  # method and path with query, the storage's too
        self.lock = RLock()
        self.endpoint = self.storage = ""  # on two hosts: for older clients, another port is no reason to keep the token back

    def create(self, id: str, private: bool = False) -> Repo:
        self.repos[id] = repo = Repo(id, private)
        repo.commit("refs/heads/main", {".gitattributes": File(ATTRIBUTES.encode())})
        return repo

    def add(self, id: str, files: dict[str, bytes]) -> Commit:
        """Commits to main, as if somebody else had."""
        repo = self.repos.get(id) or self.create(id)
        new = {path: File(content, path.endswith(LFS)) for path, content in files.items()}
        return repo.commit("refs/heads/main", repo.resolve("main").files | new)

    def files(self, id: str, revision: str = "main") -> dict[str, bytes]:
        return {path: file.content for path, file in self.repos[id].resolve(revision).files.items()}

    def environment(self, home: Path, token: str | None = None) -> dict[str, str]:
        """For a process that is to use this Hub, and neither the caches nor the token of whoever runs the tests."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and not k.lower().endswith("_proxy")}
        ours = {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "0" if self.xet else "1"}
        return kept | ours | ({"HF_TOKEN": token} if token else {})

    @contextmanager
    def serve(self) -> Iterator["Hub"]:
        handler = type("HandlerOfHub", (Handler,), {"hub": self})
        servers = [ThreadingHTTPServer(("127.0.0.1", 0), handler) for _ in range(2)]
        for server in servers:
            Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        hosts = zip(("127.0.0.1", "localhost"), servers, strict=True)  # 127.0.0.2 is this machine only under Linux
        self.endpoint, self.storage = (f"http://{host}:{server.server_address[1]}" for host, server in hosts)
        try:
            yield self
        finally:
            for server in servers:
                server.shutdown()
                server.server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def handle_request(self) -> None:
        self.hub.requests.append((self.command, self.path))
        asked = f"{self.command} {unquote(self.path)}"
        with self.hub.lock:
            self.fault = next((f for f in self.hub.faults if f.times != 0 and re.search(f.pattern, asked)), Fault(""))
            self.fault.times = self.fault.times and self.fault.times - 1
        time.sleep(self.fault.delay)
        try:
            length, limit = int(self.headers.get("Content-Length", 0)), self.fault.cut_request
            self.body = self.rfile.read(length if limit is None else min(length, limit))
            if limit is not None or len(self.body) < length:  # the next request would begin with the rest
                raise ConnectionError
            try:
                with self.hub.lock:
                    found = self.answer()
            except Refused as refused:
                found = refused.answer
            self.send(found)
        except ConnectionError:  # the client's, or a fault
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_request

    def send(self, found: Any) -> None:
        answer = found if isinstance(found, Answer) else Answer(self.fault.change(json.dumps(found, default=str).encode()))
        self.send_response(answer.status)
        for key, value in ({"Content-Length": str(len(answer.content))} | answer.headers).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.content[: self.fault.cut_answer])
        if self.fault.cut_answer is not None:
            raise ConnectionError

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""

    def answer(self) -> Any:
        """What becomes JSON, or an Answer."""
        if self.fault.status:
            raise Refused(self.fault.status, "A fault that the test asked for")
        address, method = urlsplit(self.path), self.command.replace("HEAD", "GET")
        self.query, parts = parse_qs(address.query), [unquote(part) for part in address.path[1:].split("/")]
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        self.user = self.hub.tokens.get(token)
        self.namespaces = [self.user.name, *self.user.orgs] if self.user else []
        stores = self.server.server_address[1] == urlsplit(self.hub.storage).port
        if token and stores:  # as with S3: an address of the storage and a token exclude each other
            raise Refused(400, "Only one auth mechanism allowed")
        if token and not self.user:
            raise Refused(401, "Invalid credentials in Authorization header")
        match [method, *parts]:
            case ["GET", "storage", org, name, oid, _] if stores:
                return self.ranged(self.hub.repos[f"{org}/{name}"].objects[oid], {"ETag": f'"{oid}"'})
            case ["PUT", "storage", org, name, oid] if stores:
                self.hub.repos[f"{org}/{name}"].objects[oid] = self.body
                return None
            case ["GET", "api", "whoami-v2"] if self.user:
                orgs = [{"type": "org", "name": org} for org in self.user.orgs]
                return {"type": "user", "name": self.user.name, "orgs": orgs}
            case ["POST", "api", "repos", "create"]:
                wanted = json.loads(self.body)
                id = f"{wanted.get('organization') or self.writer().name}/{wanted['name']}"
                self.writer(id)
                if id in self.hub.repos:
                    raise Refused(409, "You already created this model repo")
                self.hub.create(id, wanted.get("visibility") == "private" or wanted.get("private", False))
                return {"url": f"{self.hub.endpoint}/{id}", "name": id}
            case ["POST", "api", "validate-yaml"]:
                _, errors = read_card(json.loads(self.body)["content"].encode())
                found = {"errors": [{"message": error} for error in errors], "warnings": []}
                return Answer(json.dumps(found).encode(), 400 if errors else 200)
            case [_, "api", "models", org, name, *rest]:
                writes = rest[:1] in (["commit"], ["preupload"], ["tag"], ["xet-write-token"])
                return self.model(self.repo(f"{org}/{name}", writes), method, *rest)
            case ["POST", org, name, "info", "lfs", *rest]:
                self.writer()
                return self.lfs(self.repo(f"{org}/{name.removesuffix('.git')}"), rest, json.loads(self.body))
            case ["GET", org, name, "resolve", rev, *path]:
                return self.download(self.repo(f"{org}/{name}"), rev, "/".join(path))
        raise Refused(404, "Sorry, we can't find the page you are looking for.")

    def writer(self, id: str | None = None) -> User:
        """Who asks, if that is somebody who may write; to the repository, if one is named."""
        if self.user is None:
            raise Refused(401, "Invalid username or password.", "RepoNotFound")
        if self.user.role != "write":
            raise Refused(403, "Forbidden: you must use a write token to upload to a repository.")
        if id is not None and id.partition("/")[0] not in self.namespaces:
            raise Refused(403, f"You don't have the rights to change {id}")
        return self.user

    def repo(self, id: str, write: bool = False) -> Repo:
        repo = self.hub.repos.get(id)
        if repo is None or (repo.private and id.partition("/")[0] not in self.namespaces):
            raise Refused(404 if self.user else 401, "Repository not found", "RepoNotFound")
        if write:  # a pull request may come from anybody who has an account
            self.writer(None if "create_pr" in self.query else id)
        return repo

    def model(self, repo: Repo, method: str, *rest: str) -> Any:
        match [method, *rest]:
            case ["GET"] | ["GET", "revision", _]:
                commit = repo.resolve(rest[1] if rest else "main")
                data, _ = read_card(commit.files.get("README.md", File(b"")).content)
                named = {key: data[key] for key in ("library_name", "pipeline_tag") if key in data}
                tags = [*named.values(), *data.get("tags", []), *([f"license:{data['license']}"] if "license" in data else [])]
                siblings = [{"rfilename": p} | (f.about if "blobs" in self.query else {}) for p, f in commit.files.items()]
                info = {"id": repo.id, "sha": commit.sha, "private": repo.private, "tags": tags, "siblings": siblings}
                return info | named | {"cardData": data, "model-index": data.get("model-index")}
            case ["GET", "tree", rev, *_] | ["POST", "paths-info", rev]:
                folder, asked = "".join(f"{part}/" for part in rest[2:]), parse_qs(self.body.decode()).get("paths")
                files = {p: f for p, f in repo.resolve(rev).files.items() if p.startswith(folder) and p in (asked or [p])}
                return [{"type": "file", "path": path} | file.about for path, file in sorted(files.items())]
            case ["GET", "refs"]:
                refs = [{"name": ref.split("/", 2)[2], "ref": ref, "targetCommit": sha} for ref, sha in repo.refs.items()]
                kinds = {"branches": "heads", "tags": "tags", "pullRequests": "pr", "converts": "convert"}
                return {kind: [ref for ref in refs if ref["ref"].split("/")[1] == folder] for kind, folder in kinds.items()}
            case ["POST", "tag", rev]:
                ref = f"refs/tags/{json.loads(self.body)['tag']}"
                if ref in repo.refs:
                    raise Refused(409, "Tag reference exists already")
                repo.refs[ref] = repo.resolve(rev).sha
                return None
            case ["POST", "preupload", rev]:
                found, commit = [], repo.resolve(rev)
                for file in json.loads(self.body)["files"]:
                    sample, old = base64.b64decode(file["sample"]), commit.files.get(file["path"])
                    large = file["path"].endswith(LFS) or b"\0" in sample or file["size"] > 10 * 1024**2
                    mode = {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
                    found.append(mode | ({"oid": old.sha256 if old.lfs else old.about["oid"]} if old else {}))
                return {"files": found, "commitOid": commit.sha}
            case ["POST", "commit", rev]:
                return self.commit(repo, rev)
            case ["GET", "xet-read-token" | "xet-write-token", _] if self.hub.xet:
                address, expiry = self.hub.xet.address, 2**40  # never
                headers = {"X-Xet-Cas-Url": address, "X-Xet-Access-Token": "xet", "X-Xet-Token-Expiration": str(expiry)}
                content = json.dumps({"casUrl": address, "accessToken": "xet", "exp": expiry})
                return Answer(content.encode(), 200, JSON | headers)
        raise Refused(404, "This server does not know how to do that")

    def commit(self, repo: Repo, rev: str) -> Any:
        base, ref, answer = repo.resolve(rev), repo.ref(rev), {}
        header, *operations = [json.loads(line) for line in self.body.splitlines()]
        if header["value"].get("parentCommit", base.sha) != base.sha:
            raise Refused(412, "A commit has happened since. Please refresh and try again.")
        files = dict(base.files)
        for key, value in ((operation["key"], operation["value"]) for operation in operations):
            if key == "file":
                files[value["path"]] = File(base64.b64decode(value["content"]))
            elif key == "lfsFile":
                content = repo.objects.get(value["oid"]) or (self.hub.xet and self.hub.xet.fetch(value["oid"], value["size"]))
                if not content or hashlib.sha256(content).hexdigest() != value["oid"]:
                    raise Refused(400, f"LFS pointer pointed to a file that does not exist: {value['path']}")
                files[value["path"]] = File(content, lfs=True)
            elif files.pop(value["path"], None) is None:  # deletedFile
                raise Refused(404, "A file with this name doesn't exist", "EntryNotFound")
        for error in read_card(files.get("README.md", File(b"")).content)[1]:
            raise Refused(400, error)
        if "create_pr" in self.query:
            number = 1 + sum(name.startswith("refs/pr/") for name in repo.refs)
            ref, answer = f"refs/pr/{number}", {"pullRequestUrl": f"{self.hub.endpoint}/{repo.id}/discussions/{number}"}
        if not ref.startswith(("refs/heads/", "refs/pr/")):
            raise Refused(400, f"{rev} is not a branch")
        sha = repo.commit(ref, files).sha
        return answer | {"success": True, "commitOid": sha, "commitUrl": f"{self.hub.endpoint}/{repo.id}/commit/{sha}"}

    def lfs(self, repo: Repo, rest: list[str], asked: dict[str, Any]) -> Any:
        if rest == ["verify"]:
            if len(repo.objects.get(asked["oid"], b"")) != asked["size"]:
                raise Refused(404, "The object is not there in its full size")
            return None
        verify, found = {"href": f"{self.hub.endpoint}/{repo.id}.git/info/lfs/verify"}, []
        for wanted in asked["objects"]:
            upload = {"href": f"{self.hub.storage}/storage/{repo.id}/{wanted['oid']}"}
            new = wanted["oid"] not in repo.objects
            found.append(wanted | ({"actions": {"upload": upload, "verify": verify}} if new else {}))
        xet = self.hub.xet and "xet" in asked["transfers"]  # as clients before 1.20 let the server choose
        return {"transfer": "xet" if xet else "basic", "objects": found}

    def download(self, repo: Repo, rev: str, path: str) -> Answer:
        commit = repo.resolve(rev)
        headers, file = {"X-Repo-Commit": commit.sha}, commit.files.get(path)
        if file is None:
            raise Refused(404, "Entry not found", "EntryNotFound", headers)
        if not file.lfs:
            return self.ranged(file.content, headers | {"ETag": f'"{file.about["oid"]}"'})
        if self.hub.xet and file.sha256 in self.hub.xet.hashes:
            route = f"{self.hub.endpoint}/api/models/{repo.id}/xet-read-token/{commit.sha}"
            headers |= {"X-Xet-Hash": self.hub.xet.hashes[file.sha256], "Link": f'<{route}>; rel="xet-auth"'}
        headers |= {"X-Linked-Size": str(len(self.fault.change(file.content))), "X-Linked-Etag": f'"{file.sha256}"'}
        location = f"{self.hub.storage}/storage/{repo.id}/{file.sha256}/{quote(path.rpartition('/')[2])}"
        return Answer(b"", 302, headers | {"Location": location})

    def ranged(self, content: bytes, headers: dict[str, str]) -> Answer:
        content, headers = self.fault.change(content), headers | {"Accept-Ranges": "bytes"}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not asked:
            return Answer(content, 200, headers)
        first, last = int(asked[1]), min(int(asked[2] or len(content)), len(content) - 1)
        return Answer(content[first : last + 1], 206, headers | {"Content-Range": f"bytes {first}-{last}/{len(content)}"})


@contextmanager
def serve_hub(root: Path) -> Iterator[str]:
    """Serves the folders `root/{org}/{name}` as public models; gives the address for `HF_ENDPOINT`."""
    hub = Hub()
    for folder in root.glob("*/*/"):
        files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        hub.add(folder.relative_to(root).as_posix(), files)
    with hub.serve():
        yield hub.endpoint
