"""A Hugging Face Hub in memory, over real HTTP, for the real client: models only, with LFS storage or, if asked, Xet."""

import base64
import hashlib
import json
import os
import re
import secrets
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from fnmatch import fnmatch
from functools import cached_property, partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import RLock, Thread
from typing import Any, NamedTuple
from urllib.parse import parse_qs, quote, unquote, urlsplit

import yaml  # a dependency of huggingface_hub

LFS = " filter=lfs diff=lfs merge=lfs -text\n"
LFS_PATTERNS = """*.7z *.arrow *.bin *.bz2 *.ckpt *.ftz *.gz *.h5 *.joblib *.lfs.* *.mlmodel *.model *.msgpack *.npy *.npz
    *.onnx *.ot *.parquet *.pb *.pickle *.pkl *.pt *.pth *.rar *.safetensors saved_model/**/* *.tar.* *.tar *.tflite *.tgz
    *.wasm *.xz *.zip *.zst *tfevents*"""
LARGE = 10 * 1024**2  # git itself holds no larger files
LICENCES = """apache-2.0 mit bsd-2-clause bsd-3-clause isc zlib cc0-1.0 cc-by-3.0 cc-by-4.0 cc-by-sa-4.0 cc-by-nc-4.0
    cc-by-nd-4.0 cc-by-nc-sa-4.0 cc-by-nc-nd-4.0 gpl-2.0 gpl-3.0 lgpl-3.0 agpl-3.0 mpl-2.0 openrail unlicense unknown
    other"""  # the usual ones of the Hub's list
JSON = {"Content-Type": "application/json"}


class User(NamedTuple):
    """Whose token it is; `role` is the token's."""

    name: str
    orgs: list[str] = []  # noqa: RUF012
    role: str = "write"


@dataclass
class Fault:
    """What goes wrong with the next `times` requests (None: all) that match `pattern`, as in `GET .*/config.json`."""

    pattern: str
    times: int | None = None
    status: int = 0  # answered instead
    delay: float = 0  # seconds before the answer
    change: Callable[[bytes], bytes] | None = None  # of what is served: the sizes stated follow it, the hashes do not
    cut_request: int | None = None  # bytes of the body that are read before the connection is closed
    cut_answer: int | None = None  # bytes of the body that are sent before the connection is closed


def flipped(content: bytes) -> bytes:
    """For `Fault.change`: one bit in the middle."""
    middle = len(content) // 2
    return content[:middle] + bytes(byte ^ 1 for byte in content[middle : middle + 1]) + content[middle + 1 :]


class Answer(NamedTuple):
    content: bytes
    status: int = 200
    headers: dict[str, str] = JSON


class Refused(Exception):
    def __init__(self, status: int, message: str, code: str = "", headers: dict[str, str] = JSON, **body: str) -> None:
        about = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self.answer = Answer(json.dumps({"error": message} | body).encode(), status, headers | about)


@dataclass(frozen=True)
class File:
    content: bytes
    lfs: bool = False

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @cached_property
    def oid(self) -> str:
        """The one of git, for which a file of LFS is its pointer."""
        blob = self.pointer if self.lfs else self.content
        return hashlib.sha1(b"blob %d\0" % len(blob) + blob).hexdigest()

    @property
    def pointer(self) -> bytes:
        text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.content)}\n"
        return text.encode()


@dataclass
class Commit:
    sha: str
    parent: str | None
    files: dict[str, File]
    title: str
    message: str
    author: str
    date: str


@dataclass
class Repo:
    id: str
    private: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)  # refs/heads/main, refs/tags/v1, refs/pr/1
    objects: dict[str, bytes] = field(default_factory=dict)  # the large files, by SHA-256

    def ref(self, revision: str) -> str:
        """Empty for a commit, and for what there is not."""
        return next((r for r in (f"refs/heads/{revision}", f"refs/tags/{revision}", revision) if r in self.refs), "")

    def resolve(self, revision: str) -> Commit:
        sha = self.refs.get(self.ref(revision), revision)
        if sha not in self.commits:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[sha]

    def commit(self, ref: str, files: dict[str, File], title: str, message: str = "", author: str = "system") -> Commit:
        now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        parent, tree = self.refs.get(ref), sorted((path, file.oid) for path, file in files.items())
        sha = hashlib.sha1(repr((parent, tree, title, message, author, len(self.commits))).encode()).hexdigest()
        self.commits[sha] = Commit(sha, parent, files, title, message, author, now)
        self.objects |= {file.sha256: file.content for file in files.values() if file.lfs}
        self.refs[ref] = sha
        return self.commits[sha]


def tracked(files: dict[str, File], path: str) -> bool:
    """Whether `.gitattributes` gives the file to LFS."""
    lines = files[".gitattributes"].content.decode().splitlines() if ".gitattributes" in files else []
    patterns = [line.split()[0] for line in lines if "filter=lfs" in line]
    return any(fnmatch(path if "/" in p else path.rpartition("/")[2], p) for p in patterns)


def read_card(readme: bytes) -> tuple[dict[str, Any], list[str], list[str]]:
    """The metadata, the errors and the warnings."""
    found = re.match(r"\s*---[\r\n]+(.*?)[\r\n]+---(\s|$)", readme.decode(), re.DOTALL)
    if found is None:
        return {}, [], ["empty or missing yaml metadata in repo card"]
    try:
        data = yaml.safe_load(found[1])
    except yaml.YAMLError as error:
        return {}, [f"YAML Metadata Error: {error}"], []
    if not isinstance(data, dict):
        return {}, ['"value" must be of type object'], []
    licences = data.get("license", "unknown")
    unknown = {*map(str, licences if isinstance(licences, list) else [licences])} - {*LICENCES.split()}
    errors = [f'"license" must be one of [{", ".join(LICENCES.split())}]'] if unknown else []
    names = ("library_name", "pipeline_tag")
    errors += [f'"{key}" must be a string' for key in names if not isinstance(data.get(key, ""), str)]
    for key in ("tags", "datasets", "metrics"):
        value = data.get(key, [])
        if not isinstance(value, str | list) or not all(isinstance(item, str) for item in value):
            errors.append(f'"{key}" must be an array')
    for i, model in enumerate(data.get("model-index") or []):
        errors += [f'"model-index[{i}].{key}" is required' for key in ("name", "results") if key not in model]
        for j, result in enumerate(model.get("results") or []):
            at, needed = f"model-index[{i}].results[{j}]", [("task", "type"), ("dataset", "type"), ("dataset", "name")]
            errors += [f'"{at}.{a}.{b}" is required' for a, b in needed if b not in result.get(a, {})]
            errors += [f'"{at}.metrics" is required' for m in result.get("metrics", [{}]) if not {"type", "value"} <= m.keys()]
    return data, errors, []


FETCH = """if True:
    import hf_xet, sys, time
    _, store, hash, size, path = sys.argv
    session = hf_xet.XetSession()
    expiry = int(time.time()) + 3600
    with session.new_file_download_group(endpoint=store, token="xet", token_expiry_unix_secs=expiry) as group:
        group.start_download_file(hf_xet.XetFileInfo(hash, int(size)), path)
"""


class Xet:
    """A folder in the place of a CAS server: hf_xet stores and reads itself what is at `local://...`; no fault reaches that."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.address = folder, f"local://{folder.absolute()}"
        self.hashes: dict[str, str] = {}  # by SHA-256

    def fetch(self, sha256: str) -> bytes | None:
        """As only hf_xet can put a file together; in another process, as it starts threads."""
        for shard in self.folder.glob("xet/xorbs/shards/*.mdb"):
            content, at = shard.read_bytes(), 48
            while content[at : at + 32] != b"\xff" * 32:  # each file: 48 bytes of header, its segments, the SHA-256
                flags, segments = struct.unpack_from("<II", content, at + 32)
                end = at + 48 * (1 + segments * (1 + (flags >> 31)) + (flags >> 30 & 1))
                names = ["".join(f"{word:016x}" for word in struct.unpack_from("<4Q", content, i)) for i in (at, end - 48)]
                if names[1] == sha256:
                    size = sum(struct.unpack_from("<I", content, at + 48 * i + 36)[0] for i in range(1, segments + 1))
                    path = self.folder / sha256
                    command = [sys.executable, "-c", FETCH, self.address, names[0], str(size), str(path)]
                    subprocess.run(command, env=os.environ | {"HF_HOME": str(self.folder)}, check=True, timeout=60)
                    self.hashes[sha256] = names[0]
                    return path.read_bytes()
                at = end
        return None


class Hub:
    """Repositories, users and what goes wrong; a test may read and change all of it at any time."""

    def __init__(self, tokens: dict[str, tuple[Any, ...]] | None = None, xet: Path | None = None) -> None:
        self.tokens = {token: User(*user) for token, user in (tokens or {}).items()}
        self.xet = Xet(xet) if xet else None
        self.repos: dict[str, Repo] = {}
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str]] = []  # method and path with query, the storage's too
        self.lock, self.secret = RLock(), secrets.token_hex()
        self.endpoint = self.storage = ""  # two origins, as the client keeps its token from other origins

    def create(self, id: str, private: bool = False) -> Repo:
        self.repos[id] = repo = Repo(id, private)
        attributes = "".join(pattern + LFS for pattern in LFS_PATTERNS.split())
        repo.commit("refs/heads/main", {".gitattributes": File(attributes.encode())}, "initial commit")
        return repo

    def add(self, id: str, files: dict[str, bytes], title: str = "Add files") -> Commit:
        """Commits to main, as if somebody else had."""
        repo = self.repos.get(id) or self.create(id)
        old = repo.resolve("main").files
        new = {path: File(content, tracked(old, path) or len(content) > LARGE) for path, content in files.items()}
        return repo.commit("refs/heads/main", old | new, title)

    def files(self, id: str, revision: str = "main") -> dict[str, bytes]:
        return {path: file.content for path, file in self.repos[id].resolve(revision).files.items()}

    def environment(self, home: Path, token: str | None = None) -> dict[str, str]:
        """For a process that is to use this Hub, and neither the caches nor the token of whoever runs the tests."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and not k.lower().endswith("_proxy")}
        ours = {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "0" if self.xet else "1"}
        return kept | ours | ({"HF_TOKEN": token} if token else {})

    def signed(self, path: str) -> str:
        return f"{self.storage}{path}?Signature={hashlib.sha256((self.secret + path).encode()).hexdigest()}"

    @contextmanager
    def serve(self) -> Iterator["Hub"]:
        servers = [ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, hub=self)) for _ in range(2)]
        for server in servers:
            Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        self.endpoint, self.storage = (f"http://127.0.0.1:{server.server_address[1]}" for server in servers)
        try:
            yield self
        finally:
            for server in servers:
                server.shutdown()
                server.server_close()


Function = Callable[..., Any]
ROUTES: list[tuple[str, str, Function]] = []


def route(method: str, path: str) -> Callable[[Function], Function]:
    def add(function: Function) -> Function:
        pattern = path.replace("{id}", "(?P<id>[^/]+/[^/]+)").replace("{rev}", "(?P<rev>[^/]+)")
        ROUTES.append((method, pattern, function))
        return function

    return add


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, *args: Any, hub: Hub) -> None:
        self.hub = hub
        super().__init__(*args)

    def handle_request(self) -> None:
        self.hub.requests.append((self.command, self.path))
        self.fault = self.find_fault()
        time.sleep(self.fault.delay)
        try:
            self.body = self.read_body()
            try:
                answer = self.dispatch()
            except Refused as refused:
                answer = refused.answer
            self.send(answer)
        except ConnectionError:  # the client's, or a fault
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_request

    def find_fault(self) -> Fault:
        with self.hub.lock:
            for fault in self.hub.faults:
                if fault.times != 0 and re.search(fault.pattern, f"{self.command} {unquote(self.path)}"):
                    fault.times = None if fault.times is None else fault.times - 1
                    return fault
        return Fault("")

    def read_body(self) -> bytes:
        """All of it, or the next request on this connection would begin with the rest."""
        length, limit = int(self.headers.get("Content-Length", 0)), self.fault.cut_request
        body = self.rfile.read(length if limit is None else min(length, limit))
        if limit is not None or len(body) < length:
            raise ConnectionError
        return body

    def send(self, answer: Answer) -> None:
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

    def dispatch(self) -> Answer:
        if self.fault.status:
            raise Refused(self.fault.status, "A fault that the test asked for")
        address = urlsplit(self.path)
        self.query, self.user = parse_qs(address.query), self.who()
        for method, pattern, function in ROUTES:
            found = re.fullmatch(pattern, address.path)
            if found and method == self.command.replace("HEAD", "GET"):
                with self.hub.lock:
                    answer = function(self, **{key: unquote(value or "") for key, value in found.groupdict().items()})
                return answer if isinstance(answer, Answer) else Answer(self.changed(json.dumps(answer).encode()))
        raise Refused(404, "Sorry, we can't find the page you are looking for.")

    def changed(self, content: bytes) -> bytes:
        return self.fault.change(content) if self.fault.change else content

    def who(self) -> User | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if self.server.server_address[1] == urlsplit(self.hub.storage).port:
            if token:  # as S3 does: a signed address and a token exclude each other
                raise Refused(400, "Only one auth mechanism allowed")
            if self.hub.signed(urlsplit(self.path).path) != self.hub.storage + self.path:
                raise Refused(403, "Access denied")
        elif token and token not in self.hub.tokens:
            raise Refused(401, "Invalid credentials in Authorization header")
        return self.hub.tokens.get(token)

    def member(self, namespace: str) -> bool:
        return self.user is not None and namespace in (self.user.name, *self.user.orgs)

    def writer(self, namespace: str | None = None) -> User:
        """Who writes, to a namespace of theirs if one is named."""
        if self.user is None:
            raise Refused(401, "Invalid username or password.", "RepoNotFound")
        if self.user.role != "write":
            raise Refused(403, "Forbidden: you must use a write token to upload to a repository.")
        if namespace is not None and not self.member(namespace):
            raise Refused(403, f'You don\'t have the rights to change a model under the namespace "{namespace}"')
        return self.user

    def repo(self, id: str, write: bool = False) -> Repo:
        repo, namespace = self.hub.repos.get(id), id.partition("/")[0]
        if repo is None or (repo.private and not self.member(namespace)):
            status, message = (401, "Invalid username or password.") if self.user is None else (404, "Repository not found")
            raise Refused(status, message, "RepoNotFound")
        if write:  # a pull request may come from anybody who has an account
            self.writer(None if "create_pr" in self.query else namespace)
        return repo

    def json(self) -> Any:
        return json.loads(self.body or b"{}")

    @route("GET", "/api/whoami-v2")
    def whoami(self) -> Any:
        if self.user is None:
            raise Refused(401, "Invalid username or password.")
        orgs = [{"type": "org", "name": org, "fullname": org, "roleInOrg": "write"} for org in self.user.orgs]
        auth = {"type": "access_token", "accessToken": {"displayName": "test", "role": self.user.role}}
        return {"type": "user", "name": self.user.name, "fullname": self.user.name, "orgs": orgs, "auth": auth}

    @route("POST", "/api/repos/create")
    def create(self) -> Any:
        wanted = self.json()
        namespace = self.writer(wanted.get("organization")).name
        id = f"{wanted.get('organization') or namespace}/{wanted['name']}"
        url = {"url": f"{self.hub.endpoint}/{id}", "name": id}
        if not re.fullmatch(r"[\w.-]{1,96}", wanted["name"]) or wanted.get("type", "model") != "model":
            raise Refused(400, "Invalid repository name or type")
        if id in self.hub.repos:
            raise Refused(409, "You already created this model repo", **url)
        self.hub.create(id, wanted.get("visibility") == "private" or bool(wanted.get("private")))
        return url

    @route("DELETE", "/api/repos/delete")
    def delete(self) -> Any:
        id = f"{self.json().get('organization') or self.writer().name}/{self.json()['name']}"
        self.repo(id, write=True)
        del self.hub.repos[id]

    @route("PUT", "/api/models/{id}/settings")
    def settings(self, id: str) -> Any:
        repo, wanted = self.repo(id, write=True), self.json()
        if not {"visibility", "private"} & {*wanted}:
            raise Refused(501, "This server changes no other settings")
        repo.private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
        return {"private": repo.private}

    def info(self, repo: Repo, commit: Commit) -> dict[str, Any]:
        data = read_card(commit.files["README.md"].content)[0] if "README.md" in commit.files else {}
        named = {key: data[key] for key in ("library_name", "pipeline_tag") if data.get(key)}
        tags = [*named.values(), *(data.get("tags") or [])]
        tags += [f"license:{data['license']}"] if data.get("license") else []
        siblings: list[dict[str, Any]] = [{"rfilename": path} for path in sorted(commit.files)]
        for sibling in siblings if "blobs" in self.query else []:
            file = commit.files[sibling["rfilename"]]
            sibling |= {"blobId": file.oid, "size": len(file.content)}
            if file.lfs:
                sibling["lfs"] = {"sha256": file.sha256, "size": len(file.content), "pointerSize": len(file.pointer)}
        info: dict[str, Any] = {"id": repo.id, "modelId": repo.id, "author": repo.id.partition("/")[0], "sha": commit.sha}
        info |= {"private": repo.private, "gated": False, "disabled": False, "downloads": 0, "likes": 0, "siblings": siblings}
        info |= {"lastModified": commit.date, "createdAt": next(iter(repo.commits.values())).date, "tags": tags, **named}
        info |= {"cardData": data, "model-index": data.get("model-index")} if data else {}
        return json.loads(json.dumps(info, default=str))

    @route("GET", "/api/models")
    def models(self) -> Any:
        asked = {"author": [], "filter": [], "search": [""], "limit": ["1000"]} | self.query
        found = [self.info(repo, repo.resolve("main")) for repo in self.hub.repos.values()]
        found = [i for i in found if not i["private"] or self.member(i["author"])]
        found = [i for i in found if i["author"] in (asked["author"] or [i["author"]])]
        found = [i for i in found if {*asked["filter"]} <= {*i["tags"]} and asked["search"][0].lower() in i["id"].lower()]
        hidden = set() if "full" in asked else {"author", "sha", "lastModified", "siblings", "gated", "disabled"}
        hidden |= set() if "cardData" in asked else {"cardData", "model-index"}
        found.sort(key=lambda info: info["lastModified"], reverse=True)
        return [{k: v for k, v in i.items() if k not in hidden} for i in found[: int(asked["limit"][0])]]

    @route("GET", "/api/models/{id}(/revision/{rev})?")
    def model(self, id: str, rev: str) -> Any:
        repo = self.repo(id)
        info = self.info(repo, repo.resolve(rev or "main"))
        wanted = {"id", *self.query.get("expand", info)}
        return {key: value for key, value in info.items() if key in wanted}

    def entries(self, commit: Commit) -> list[dict[str, Any]]:
        """Of the files and folders, however deep."""
        folders = {str(parent) for path in commit.files for parent in Path(path).parents} - {"."}
        found = [{"type": "directory", "oid": hashlib.sha1(f.encode()).hexdigest(), "size": 0, "path": f} for f in folders]
        for path, file in commit.files.items():
            entry: dict[str, Any] = {"type": "file", "oid": file.oid, "size": len(file.content), "path": path}
            if file.lfs:
                entry["lfs"] = {"oid": file.sha256, "size": len(file.content), "pointerSize": len(file.pointer)}
            if self.hub.xet and file.sha256 in self.hub.xet.hashes:
                entry["xetHash"] = self.hub.xet.hashes[file.sha256]
            found.append(entry)
        return sorted(found, key=lambda entry: str(entry["path"]))

    @route("GET", "/api/models/{id}/tree/{rev}(/(?P<folder>.+))?")
    def tree(self, id: str, rev: str, folder: str) -> Any:
        within = f"{folder}/" if folder else ""
        found = [e for e in self.entries(self.repo(id).resolve(rev)) if e["path"].startswith(within)]
        if not found:
            raise Refused(404, f"{folder} does not exist", "EntryNotFound")
        recursive = self.query.get("recursive", [""])[0].lower() == "true"
        return [e for e in found if recursive or "/" not in e["path"].removeprefix(within)]

    @route("POST", "/api/models/{id}/paths-info/{rev}")
    def paths_info(self, id: str, rev: str) -> Any:
        asked = parse_qs(self.body.decode())["paths"]
        return [entry for entry in self.entries(self.repo(id).resolve(rev)) if entry["path"] in asked]

    @route("GET", "/api/models/{id}/refs")
    def list_refs(self, id: str) -> Any:
        kinds = {"branches": "refs/heads/", "tags": "refs/tags/", "converts": "refs/convert/"}
        kinds |= {"pullRequests": "refs/pr/"} if "include_prs" in self.query else {}
        found: dict[str, list[dict[str, str]]] = {kind: [] for kind in kinds}
        for ref, sha in self.repo(id).refs.items():
            for kind, prefix in kinds.items():
                if ref.startswith(prefix):
                    found[kind].append({"name": ref.removeprefix(prefix), "ref": ref, "targetCommit": sha})
        return found

    @route("GET", "/api/models/{id}/commits/{rev}")
    def history(self, id: str, rev: str) -> Any:
        repo, found = self.repo(id), []
        commit: Commit | None = repo.resolve(rev)
        while commit:
            about = {"id": commit.sha, "title": commit.title, "message": commit.message, "date": commit.date}
            found.append(about | {"authors": [{"user": commit.author}]})
            commit = repo.commits.get(commit.parent or "")
        return found

    @route("POST", "/api/models/{id}/tag/{rev}")
    def create_tag(self, id: str, rev: str) -> Any:
        repo, ref = self.repo(id, write=True), f"refs/tags/{self.json()['tag']}"
        if ref in repo.refs:
            raise Refused(409, "Tag reference exists already")
        repo.refs[ref] = repo.resolve(rev).sha

    @route("DELETE", "/api/models/{id}/tag/{rev}")
    def delete_tag(self, id: str, rev: str) -> Any:
        if self.repo(id, write=True).refs.pop(f"refs/tags/{rev}", None) is None:
            raise Refused(404, f"Invalid rev id: {rev}", "RevisionNotFound")

    @route("POST", "/api/validate-yaml")
    def validate(self) -> Any:
        _, errors, warnings = read_card(self.json()["content"].encode())
        found = {"errors": [{"message": m} for m in errors], "warnings": [{"message": m} for m in warnings]}
        return Answer(json.dumps(found).encode(), 400 if errors else 200)

    @route("POST", "/api/models/{id}/preupload/{rev}")
    def preupload(self, id: str, rev: str) -> Any:
        commit = self.repo(id, write=True).resolve(rev)
        ignored = self.json().get("gitIgnore", commit.files.get(".gitignore", File(b"")).content.decode()).split()
        found = []
        for file in self.json()["files"]:
            path, old = file["path"], commit.files.get(file["path"])
            lfs = tracked(commit.files, path) or file["size"] > LARGE or b"\0" in base64.b64decode(file["sample"])
            ignore = any(fnmatch(path, p) or fnmatch(path.rpartition("/")[2], p) for p in ignored)
            oid = {"oid": old.sha256 if old.lfs else old.oid} if old else {}
            found.append({"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": ignore} | oid)
        return {"files": found, "commitOid": commit.sha}

    @route("GET", "/api/models/{id}/xet-(?P<kind>read|write)-token/[^/]+")
    def xet_token(self, id: str, kind: str) -> Any:
        self.repo(id, write=kind == "write")
        if self.hub.xet is None:
            raise Refused(404, "This server has no Xet storage; set HF_HUB_DISABLE_XET=1")
        address, expiry = self.hub.xet.address, int(time.time()) + 3600
        headers = {"X-Xet-Cas-Url": address, "X-Xet-Access-Token": "xet", "X-Xet-Token-Expiration": str(expiry)}
        content = json.dumps({"casUrl": address, "accessToken": "xet", "exp": expiry})
        return Answer(content.encode(), 200, JSON | headers)

    @route("POST", "/{id}.git/info/lfs/objects/batch")
    def lfs_batch(self, id: str) -> Any:
        self.writer()
        repo, found = self.repo(id), []
        for wanted in self.json()["objects"]:
            actions = {"upload": {"href": self.hub.signed(f"/storage/{id}/{wanted['oid']}")}}
            actions["verify"] = {"href": f"{self.hub.endpoint}/{id}.git/info/lfs/verify"}
            found.append(wanted | ({} if wanted["oid"] in repo.objects else {"actions": actions}))
        xet = self.hub.xet and "xet" in self.json()["transfers"]  # as clients before 1.20 let the server choose
        return {"transfer": "xet" if xet else "basic", "objects": found}

    @route("PUT", "/storage/{id}/(?P<oid>[0-9a-f]{64})")
    def lfs_upload(self, id: str, oid: str) -> Any:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refused(400, "The SHA-256 you specified did not match what we received")
        self.hub.repos[id].objects[oid] = self.body

    @route("POST", "/{id}.git/info/lfs/verify")
    def lfs_verify(self, id: str) -> Any:
        if len(self.repo(id).objects.get(self.json()["oid"], b"")) != self.json()["size"]:
            raise Refused(404, "The object is not there in its full size")

    @route("POST", "/api/models/{id}/commit/{rev}")
    def commit(self, id: str, rev: str) -> Any:
        repo, pull_request, author = self.repo(id, write=True), "create_pr" in self.query, self.writer().name
        base, ref = repo.resolve(rev), repo.ref(rev)
        header, *operations = [json.loads(line) for line in self.body.splitlines()]
        about, files = header["value"], dict(base.files)
        if about.get("parentCommit", base.sha) != base.sha:
            raise Refused(412, "A commit has happened since. Please refresh and try again.")
        if not pull_request and not ref.startswith(("refs/heads/", "refs/pr/")):
            raise Refused(400, f"{rev} is not a branch")
        for operation in operations:
            self.apply(operation["key"], operation["value"], files, repo)
        added = [path for path, file in files.items() if file.lfs and not tracked(files, path)]
        if added:  # a large or binary file of another kind gets a line of its own
            attributes = files.get(".gitattributes", File(b"")).content + "".join(path + LFS for path in added).encode()
            files[".gitattributes"] = File(attributes)
        for error in read_card(files["README.md"].content)[1] if "README.md" in files else []:
            raise Refused(400, error)
        answer = {}
        if pull_request:
            number = 1 + sum(r.startswith("refs/pr/") for r in repo.refs)
            ref, answer = f"refs/pr/{number}", {"pullRequestUrl": f"{self.hub.endpoint}/{id}/discussions/{number}"}
            repo.refs[ref] = base.sha
        sha = repo.commit(ref, files, about["summary"], about.get("description", ""), author).sha
        return answer | {"success": True, "commitOid": sha, "commitUrl": f"{self.hub.endpoint}/{id}/commit/{sha}"}

    def apply(self, key: str, value: dict[str, Any], files: dict[str, File], repo: Repo) -> None:
        path = value["path"]
        if key == "file":
            files[path] = File(base64.b64decode(value["content"]))
            if len(files[path].content) > LARGE:
                raise Refused(400, f"Your push was rejected because it contains files larger than 10 MiB: {path}")
        elif key == "lfsFile":
            found = repo.objects.get(value["oid"])
            if found is None and self.hub.xet:
                found = self.hub.xet.fetch(value["oid"])
            if found is None or hashlib.sha256(found).hexdigest() != value["oid"]:
                raise Refused(400, f"LFS pointer pointed to a file that does not exist: {path}")
            files[path] = File(found, lfs=True)
        else:  # deletedFile, deletedFolder
            gone = [p for p in files if p == path or (key == "deletedFolder" and p.startswith(path.rstrip("/") + "/"))]
            if not gone:
                raise Refused(404, "A file with this name doesn't exist", "EntryNotFound")
            for p in gone:
                del files[p]

    @route("GET", "/{id}/resolve/{rev}/(?P<path>.+)")
    def download(self, id: str, rev: str, path: str) -> Any:
        commit = self.repo(id).resolve(rev)
        headers, file = {"X-Repo-Commit": commit.sha}, commit.files.get(path)
        if file is None:
            raise Refused(404, "Entry not found", "EntryNotFound", headers)
        if not file.lfs:
            return self.ranged(file.content, headers | {"ETag": f'"{file.oid}"'})
        if self.hub.xet and file.sha256 in self.hub.xet.hashes:
            route = f"{self.hub.endpoint}/api/models/{id}/xet-read-token/{commit.sha}"
            headers |= {"X-Xet-Hash": self.hub.xet.hashes[file.sha256], "Link": f'<{route}>; rel="xet-auth"'}
        headers |= {"X-Linked-Size": str(len(self.changed(file.content))), "X-Linked-Etag": f'"{file.sha256}"'}
        location = self.hub.signed(f"/storage/{id}/{file.sha256}/{quote(path.rpartition('/')[2])}")
        return Answer(b"", 302, headers | {"Location": location})

    @route("GET", "/storage/{id}/(?P<oid>[0-9a-f]{64})/[^/]+")
    def lfs_download(self, id: str, oid: str) -> Any:
        return self.ranged(self.hub.repos[id].objects[oid], {"ETag": f'"{oid}"'})

    def ranged(self, content: bytes, headers: dict[str, str]) -> Answer:
        content, headers = self.changed(content), headers | {"Accept-Ranges": "bytes"}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not asked:
            return Answer(content, 200, headers)
        first, last = int(asked[1]), min(int(asked[2] or len(content)), len(content) - 1)
        if first > last:
            return Answer(b"", 416, {"Content-Range": f"bytes */{len(content)}"})
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
