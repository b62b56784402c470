"""A released.json of a test."""

import json
from pathlib import Path
from typing import Any

from advcl_hub.files import file_sha256
from advcl_hub.hub.export import GOLDEN, WEIGHTS


def data_file(path: Path, folder: Path, **entry: Any) -> Path:
    """released.json with one entry, of an exported folder."""
    files = {name: {"sha256": file_sha256(folder / name), "size": (folder / name).stat().st_size} for name in (WEIGHTS, GOLDEN)}
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    found = {"config": config, "files": files, "facts": {"head": "none", "licence": "apache-2.0"}} | entry
    path.write_text(
        json.dumps({"organisation": "acme", "releases": {f"{config['architecture']}.test": found}}), encoding="utf-8"
    )
    return path
