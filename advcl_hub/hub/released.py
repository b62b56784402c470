"""Releases: weights with a name, as `released.json` beside this file tells them.

That file is the only source: timm's tags and `advcl-hub list` are made from it (in a checkout, `model_cards/release.py` writes
it).
"""

import atexit
import functools
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from huggingface_hub import constants
from timm.models import PretrainedCfg

from advcl_hub.files import check_writable, parse_json, refuse_pointer
from advcl_hub.hub.download import check_file, fetch
from advcl_hub.hub.export import WEIGHTS
from advcl_hub.hub.parts import join

RELEASED = Path(__file__).with_name("released.json")
# Folders of exports, named like their releases. Of a head on the weights of another release, only the head lies there.
BUNDLED = Path(__file__).with_name("weights")
# In a checkout, weights too large for the package until they are pushed: their parts, and a folder with all else for each.
CHECKOUT = Path(__file__).parents[2] / "model_cards" / "weights"

_CFG_FIELDS = {f.name for f in fields(PretrainedCfg)}
# Of timm's cfg: who overlays one of them brings other weights.
SOURCES = ("url", "file", "state_dict", "hf_hub_id", "hf_hub_filename", "source")


@dataclass(frozen=True)
class Release:
    """Weights with a name.

    Attributes:
        name: `ARCHITECTURE.TAG`, as timm writes it.
        config: config.json of the export: architecture, `model_args`, `pretrained_cfg`, `label_names`.
        files: by name the `sha256` and `size` of the files that are checked whenever they are read.
        hub_id: `ORG/NAME` on the Hub, None if they are not there.
        revision: commit on the Hub; of weights that are not pushed yet, the tag that the push will make.
        folder: where they lie on this machine (in the package, a checkout, or a user's own), None for those on the Hub.
        parts: files that the weights are made of, where several releases share them or they are large; see
            `advcl_hub.hub.parts`. The first use writes the whole weights to `HF_HOME/advcl_hub`.
        facts: for people: `summary`, `head` (see `head_of`), `data`, `threat_model`, `results`, `provenance`, `licence`,
            `parameters`; for weights that a user registered, `own` and `head` only.
        robustbench: name under which RobustBench finds the classifier: `MODEL_DATASET_THREAT`.
        unchecked: why results.json could not be read, so that nothing is checked; else empty.
    """

    name: str
    config: Mapping[str, Any]
    files: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    hub_id: str | None = None
    revision: str | None = None
    folder: Path | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    robustbench: str | None = None
    parts: tuple[Path, ...] = ()
    unchecked: str = ""

    @property
    def architecture(self) -> str:
        """Its timm architecture."""
        return self.name.partition(".")[0]

    @property
    def model_args(self) -> dict[str, Any]:
        """What `timm.create_model` has to pass to the architecture, but for the classifier."""
        return {key: value for key, value in (self.config.get("model_args") or {}).items() if key != "num_classes"}

    @property
    def cfg(self) -> PretrainedCfg:
        """As timm registers it."""
        # A config must not say where weights lie: they are those of this release.
        known = _CFG_FIELDS - {*SOURCES, "custom_load"}
        stored = {key: value for key, value in self.config.get("pretrained_cfg", {}).items() if key in known}
        stored = {key: tuple(value) if isinstance(value, list) else value for key, value in stored.items()}
        stored |= {"architecture": self.architecture, "tag": self.name.partition(".")[2], "license": self.facts.get("licence")}
        stored["num_classes"] = self.config.get("num_classes", 0)
        if labels := self.config.get("label_names"):
            stored["label_names"] = tuple(labels)
        if self.hub_id:
            stored["hf_hub_id"] = self.hub_id + (f"@{self.revision}" if self.revision else "")
        if self.folder and not self.parts:
            stored["file"] = str(self.folder / WEIGHTS)
        return PretrainedCfg(**stored)

    def fetch(self, file: str = WEIGHTS, cache_dir: str | Path | None = None) -> Path:
        """A file of the release, checked; downloaded the first time, where it is not on this machine.

        Raises:
            OSError: it is not here and cannot be downloaded.
            ValueError: it is not the file that was released; a download was removed from the cache.
        """
        expected = self.files.get(file)
        if self.folder is None:
            assert self.hub_id is not None
            return fetch(self.hub_id, file, revision=self.revision, cache_dir=cache_dir, expected=expected)
        if file == WEIGHTS and self.parts:
            home = Path(cache_dir) if cache_dir else _home()
            return join(self.parts, home / "advcl_hub" / self.files[WEIGHTS]["sha256"] / WEIGHTS, self.files[WEIGHTS]["sha256"])
        path = self.folder / file
        if not path.is_file():
            what = "is gone" if not self.folder.is_dir() else f"has no {file}"
            raise FileNotFoundError(f"{self.folder} {what}: {self._remedy}.")
        refuse_pointer(path)
        try:
            if expected:
                check_file(path, expected)
        except ValueError as error:
            raise ValueError(f"{path} is not the file that was registered ({error}): {self._remedy}.") from None
        return path

    @property
    def _remedy(self) -> str:
        """What to do about a file that is missing or damaged on this machine."""
        if self.facts.get("own"):
            return "register the weights again, at their new place if they were moved"
        return "install advcl-hub again" if not self.hub_id else "get the checkout again"


def _home() -> Path:
    """HF_HOME; where its `advcl_hub` cannot be written (a read-only container), a folder that goes with this process."""
    try:
        check_writable(Path(constants.HF_HOME) / "advcl_hub")
    except OSError:
        return _temporary()
    return Path(constants.HF_HOME)


@functools.cache
def _temporary() -> Path:
    """A folder that is removed when this process ends, not when a fork of it does (as that of `TemporaryDirectory` is)."""
    folder, process = Path(tempfile.mkdtemp(prefix="advcl_hub-")), os.getpid()
    atexit.register(lambda: shutil.rmtree(folder, ignore_errors=True) if os.getpid() == process else None)
    return folder


def organisation(data: Mapping[str, Any]) -> str:
    """The namespace on the Hub of ids that name none: ADVCL_HUB_ORG if that is set (forks, mirrors), else that of the data."""
    return os.environ.get("ADVCL_HUB_ORG") or data["organisation"]


def check_name(name: str, architecture: str | None = None) -> None:
    """Raises ValueError unless `name` is ARCHITECTURE.TAG, of this architecture if one is given: folders are named after it."""
    well_formed = re.fullmatch(r"\w+\.[A-Za-z0-9]([\w.-]*\w)?", name, re.ASCII) and ".." not in name
    if not well_formed or architecture not in (None, name.partition(".")[0]):
        known = architecture if re.fullmatch(r"\w+", architecture or "", re.ASCII) else "an architecture of timm"
        raise ValueError(
            f"{name!r} is not ARCHITECTURE.TAG and so is no name of a release: expected {known}, a dot, and a tag of letters, "
            "digits, dots, - and _ that begins with a letter or digit, ends with one or _, and has no two dots in a row."
        )


def load_releases(path: Path = RELEASED) -> list[Release]:
    """Reads a data file of releases.

    Raises:
        ValueError: the file is damaged; the entry is named.
    """
    found = []
    try:
        data = parse_json(path.read_text(encoding="utf-8"))
        entries = dict(data["releases"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error!r}): install advcl-hub again.") from None
    for name, entry in entries.items():
        try:
            check_name(name, entry["config"]["architecture"])  # before it becomes a path
            hub_id = entry.get("hub_id")
            if hub_id and "/" not in hub_id:
                hub_id = f"{organisation(data)}/{hub_id}"
            if not entry.get("bundled") and not (hub_id and entry["revision"]):
                raise ValueError("it is neither bundled nor pinned to a commit or a tag on the Hub")
            if not isinstance(entry["facts"], dict) or not isinstance(entry["files"], dict):
                raise TypeError("facts and files are no groups of values")
            store = BUNDLED if entry.get("bundled") else CHECKOUT
            parts = tuple(store / part for part in entry.get("parts", ()) if (store / name).is_dir())
            folder = store / name if entry.get("bundled") or parts else None
            found.append(
                Release(
                    name,
                    entry["config"],
                    entry["files"],
                    hub_id,
                    entry.get("revision"),
                    folder,
                    entry["facts"],
                    entry.get("robustbench"),
                    parts,
                )
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path.name}: the entry {name} is damaged: {error!r}") from None
    return found


def row(release: Release) -> dict[str, str]:
    """What a table of released weights says of one, by column; of an encoder, the figures of its first classifier."""
    facts = release.facts
    best = (facts.get("results") or [{}])[0]
    figures = {column: best.get(key) for column, key in (("SA", "standard"), ("PGD", "pgd"), ("AutoAttack", "autoattack"))}
    return {
        "name": release.name,
        "head": facts.get("head") or "-",
        "data": facts.get("data") or "-",
        **{column: "-" if value is None else f"{100 * value:.1f}" for column, value in figures.items()},
        "attack": f"{best['norm']} {best['eps']}" if best else "-",
        "images": f"{best['images']:,}" if best else "-",
        "where": _where(release),
    }


def _where(release: Release) -> str:
    if release.folder is None or release.facts.get("own"):
        return str(release.folder or release.hub_id)
    return "checkout" if release.folder.parent == CHECKOUT else "package"


def head_of(results: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """How the classifier of an export was made: `none`, a finetuning protocol (`slf`, `alf`, `aff`, `sff`), or `other`."""
    if not config.get("num_classes"):
        return "none"
    protocol = (results.get("settings") or {}).get("protocol")
    return protocol if protocol in ("slf", "alf", "aff", "sff") else "other"
