"""What a Hub keeps and says of it: files, commits, repositories, cards; large files also as Xet."""

import hashlib
import json
import os
import re
import struct
import subprocess
import sys
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import yaml  # a dependency of huggingface_hub

LFS = (".bin", ".ckpt", ".gz", ".h5", ".npy", ".npz", ".onnx", ".pkl", ".pt", ".pth", ".safetensors", ".tar", ".zip")
ATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS)
LICENCES = ("apache-2.0", "mit", "bsd-3-clause", "cc0-1.0", "cc-by-4.0", "gpl-3.0", "other")  # of many more
JSON = {"Content-Type": "application/json"}


class Answer(NamedTuple):
    content: bytes
    status: int = 200
    headers: dict[str, str] = JSON


class Refused(Exception):
    def __init__(self, status: int, message: str, code: str = "", headers: dict[str, str] = JSON) -> None:
        about = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self.answer = Answer(json.dumps({"error": message}).encode(), status, headers | about)


@dataclass(frozen=True)
class File:
    content: bytes
    lfs: bool = False

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @cached_property
    def about(self) -> dict[str, Any]:
        """As the Hub lists it; for git, a file of LFS is its pointer."""
        size = len(self.content)
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {size}\n".encode()
        blob = pointer if self.lfs else self.content
        oid = hashlib.sha1(b"blob %d\0" % len(blob) + blob).hexdigest()
        lfs = {"oid": self.sha256, "sha256": self.sha256, "size": size, "pointerSize": len(pointer)}
        return {"oid": oid, "blobId": oid, "size": size} | ({"lfs": lfs} if self.lfs else {})


class Commit(NamedTuple):
    sha: str
    files: dict[str, File]


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

    def commit(self, ref: str, files: dict[str, File]) -> Commit:
        tree = sorted((path, file.about["oid"]) for path, file in files.items())
        sha = hashlib.sha1(repr((self.id, len(self.commits), tree)).encode()).hexdigest()
        self.objects |= {file.sha256: file.content for file in files.values() if file.lfs}
        self.refs[ref] = sha
        return self.commits.setdefault(sha, Commit(sha, files))


def read_card(readme: bytes) -> tuple[dict[str, Any], list[str]]:
    """The metadata and what the Hub finds wrong with it."""
    found = re.match(r"\s*---[\r\n]+(.*?)[\r\n]+---(\s|$)", readme.decode(), re.DOTALL)
    try:
        data = dict(yaml.safe_load(found[1]) if found else {})
    except (yaml.YAMLError, TypeError, ValueError) as error:
        return {}, [f"YAML Metadata Error: {error}"]
    errors = [] if data.get("license", "other") in LICENCES else [f'"license" must be one of [{", ".join(LICENCES)}]']
    kinds = {"library_name": str, "pipeline_tag": str, "tags": list, "datasets": list, "metrics": list, "model-index": list}
    errors += [f'"{key}" must be a {kind.__name__}' for key, kind in kinds.items() if type(data.get(key, kind())) is not kind]
    for result in [result for model in data.get("model-index", []) for result in model.get("results", [])]:
        parts = [(result.get("task", {}), {"type"}), (result.get("dataset", {}), {"type", "name"})]
        parts += [(metric, {"type", "value"}) for metric in result.get("metrics", [{}])]
        errors += [f'"model-index": {needed - part.keys()} is required' for part, needed in parts if not needed <= part.keys()]
    return data, errors


class Xet:
    """A folder in the place of a CAS server: hf_xet stores and reads itself what is at `local://...`; no fault reaches that."""

    FETCH = """if True:
        import hf_xet, sys
        store, hash, size, path = sys.argv[1:]
        with hf_xet.XetSession().new_file_download_group(endpoint=store, token="xet", token_expiry_unix_secs=2**40) as group:
            group.start_download_file(hf_xet.XetFileInfo(hash, int(size)), path)
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.address = folder, f"local://{folder.absolute()}"
        self.hashes: dict[str, str] = {}  # by SHA-256

    def fetch(self, sha256: str, size: int) -> bytes | None:
        """As only hf_xet can put a file together; in another process, as it starts threads."""
        for shard in self.folder.glob("xet/xorbs/shards/*.mdb"):
            content, at = shard.read_bytes(), 48
            while content[at : at + 32] != b"\xff" * 32:  # each file: 48 bytes of header, its segments, the SHA-256
                flags, segments = struct.unpack_from("<II", content, at + 32)
                end = at + 48 * (1 + segments * (1 + (flags >> 31)) + (flags >> 30 & 1))
                hash, found = ("%016x" * 4 % struct.unpack_from("<4Q", content, start) for start in (at, end - 48))
                if found == sha256:
                    path = self.folder / sha256
                    command = [sys.executable, "-c", self.FETCH, self.address, hash, str(size), str(path)]
                    subprocess.run(command, env=os.environ | {"HF_HOME": str(self.folder)}, check=True, timeout=200)
                    self.hashes[sha256] = hash
                    return path.read_bytes()
                at = end
        return None
