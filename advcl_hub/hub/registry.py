"""Released weights under timm's names: `timm.create_model("resnet10_cifar.pseudo_label_at_c10", pretrained=True)`.

`released.json` beside this file is the only source: timm's tags and `advcl-hub list` are made from it (in a checkout,
`model_cards/release.py` writes it). `register` adds weights of one's own for this process.
"""

import functools
import json
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import timm
from huggingface_hub import constants
from timm.models import PretrainedCfg
from torch import nn

import advcl_hub.models  # noqa: F401  # whose architectures released weights belong to
from advcl_hub.files import check_writable, refuse_pointer
from advcl_hub.hub.download import check_file, commit_of, fetch, is_cached, split_revision
from advcl_hub.hub.export import CONFIG, WEIGHTS, verify_folder
from advcl_hub.hub.parts import join
from advcl_hub.private import RegistryEntry, set_model_args
from advcl_hub.records import RESULTS

__all__ = ["Release", "load_releases", "open_source", "register", "releases", "row"]  # timm adds the models of this module

RELEASED = Path(__file__).with_name("released.json")
# Folders of exports, named like their releases. Of a head on the weights of another release, only the head lies there.
BUNDLED = Path(__file__).with_name("weights")
# In a checkout, weights too large for the package until they are pushed: their parts, and a folder with all else for each.
CHECKOUT = Path(__file__).parents[2] / "model_cards" / "weights"

_CFG_FIELDS = {f.name for f in fields(PretrainedCfg)}
# Of timm's cfg: who overlays one of them brings other weights.
_SOURCES = ("url", "file", "state_dict", "hf_hub_id", "hf_hub_filename", "source")


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
        known = _CFG_FIELDS - {*_SOURCES, "custom_load"}
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
            what = "is gone: register its new place" if not self.folder.is_dir() else f"has no {file}"
            raise FileNotFoundError(f"{self.folder} {what}.")
        refuse_pointer(path)
        try:
            if expected:
                check_file(path, expected)
        except ValueError as error:
            raise ValueError(f"{path} is not the file that was registered: {error}.") from None
        return path


def _home() -> Path:
    """HF_HOME; where that cannot be written (a read-only container), a folder that goes with this process."""
    try:
        check_writable(Path(constants.HF_HOME))
    except OSError:
        return Path(_temporary().name)
    return Path(constants.HF_HOME)


@functools.cache
def _temporary() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="advcl_hub-")


_releases: dict[str, Release] = {}
_tags: dict[str, dict[str, Release]] = {}  # by architecture, the same by tag


def releases() -> dict[str, Release]:
    """By name all weights that are registered: those of `released.json`, then the user's own."""
    return dict(_releases)


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
    data, found = json.loads(path.read_text(encoding="utf-8")), []
    for name, entry in data["releases"].items():
        try:
            check_name(name, entry["config"]["architecture"])  # before it becomes a path
            hub_id = entry.get("hub_id")
            if hub_id and "/" not in hub_id:
                hub_id = f"{organisation(data)}/{hub_id}"
            if not entry.get("bundled") and not (hub_id and entry["revision"]):
                raise ValueError("it is neither bundled nor pinned to a commit or a tag on the Hub")
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


def register(name: str, source: str | Path, *, cache_dir: str | Path | None = None) -> Release:
    """Gives weights of your own a name in timm, until Python ends.

        advcl_hub.register("resnet18_cifar.mine", "runs/resnet18/export")
        advcl_hub.register("resnet18_cifar.theirs", "hf-hub:ORG/NAME@v1")
        timm.create_model("resnet18_cifar.mine", pretrained=True)

    Args:
        name: `ARCHITECTURE.TAG`; an earlier one of yours is replaced.
        source: a folder that `advcl_hub` exported or timm saved, or `hf-hub:ORG/NAME[@REVISION]`, which is pinned to the commit
            that it names now.
        cache_dir: of downloads, instead of the Hub client's own.

    Raises:
        ValueError: another architecture, a name that is taken, or files that are not what their results.json says.
        OSError: no such folder or repository, or no network.
        ImportError: this version of timm is not as we know it; see `advcl_hub.private.RegistryEntry`.
    """
    release = open_source(source, name, cache_dir=cache_dir)
    architecture = release.config["architecture"]
    try:
        check_name(name, architecture)
    except ValueError:
        how = f"register it as {architecture}.TAG, with a tag of letters, digits, dots, - and _"
        raise ValueError(f"{source} holds a {architecture}: {how} (got {name!r}).") from None
    if not release.files:
        why = release.unchecked or f"{source} tells no sha256"
        warnings.warn(f"{why}: the weights of {name} are not checked.", stacklevel=2)
    earlier = _releases.get(name)
    if not (earlier and earlier.facts.get("own")) and timm.models.is_model_pretrained(name):
        raise ValueError(f"{name} is taken by released weights: choose another tag.")
    _register(release)
    return release


def open_source(source: str | Path, name: str | None = None, *, cache_dir: str | Path | None = None) -> Release:
    """The weights in a folder or a Hub repository, pinned to what they are now, without registering them; see `register`.

    What timm opens from the Hub client's cache opens here, too. If only results.json is neither there nor to be had, the
    release has no `files` to check, and `unchecked` says why.
    """
    folder: Path | None = None
    hub_id = revision = None
    unchecked = ""
    results_file: Path | None
    if str(source).startswith("hf-hub:"):
        hub_id, revision = split_revision(str(source))
        if hub_id.count("/") != 1:
            raise ValueError(f"{source} is no repository on the Hub: hf-hub:ORG/NAME[@REVISION].")
        config_file = fetch(hub_id, CONFIG, revision=revision, cache_dir=cache_dir)
        revision = commit_of(config_file)
        try:
            results_file = fetch(hub_id, RESULTS, revision=revision, cache_dir=cache_dir)
        except FileNotFoundError:  # timm's own push writes none
            results_file = None
        except OSError as error:
            if not is_cached(hub_id, WEIGHTS, revision, cache_dir):
                raise
            results_file, unchecked = None, f"{source} is unchecked ({RESULTS}: {str(error).rstrip('.')})"
    else:
        folder = Path(str(source).removeprefix("local-dir:")).expanduser().absolute()
        config_file, results_file = folder / CONFIG, folder / RESULTS
        if not config_file.is_file() or not (folder / WEIGHTS).is_file():
            raise FileNotFoundError(f"{source} is no folder with {CONFIG} and {WEIGHTS}; for the Hub, write hf-hub:ORG/NAME.")
        refuse_pointer(folder / WEIGHTS)
        if results_file.is_file():
            verify_folder(folder)
        else:
            results_file = None
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
        results = json.loads(results_file.read_text(encoding="utf-8")) if results_file else {}
        files = {file: {"sha256": sha256} for file, sha256 in results.get("sha256", {}).items()}
        facts = {"own": True, "head": head_of(results, config)}
        return Release(name or config["architecture"], config, files, hub_id, revision, folder, facts, unchecked=unchecked)
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{source} has a damaged {CONFIG} or {RESULTS} (in {config_file.parent}): {error!r}.") from None


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


def _entry(release: Release) -> RegistryEntry:
    """The architecture of a release in timm's registry; ValueError or ImportError if the release cannot be registered."""
    if not timm.is_model(release.architecture):
        raise ValueError(f"{release.name}: timm has no architecture {release.architecture}.")
    if timm.models.get_pretrained_cfg(release.architecture) is None:
        raise ValueError(f"{release.name}: timm has no cfg of {release.architecture}, so that it cannot have tags.")
    if release.robustbench and timm.is_model(release.robustbench):
        raise ValueError(f"{release.name}: the name {release.robustbench} is taken.")
    return RegistryEntry(release.architecture)


def _register(release: Release, entry: RegistryEntry | None = None) -> None:
    """Adds a tag to an architecture that timm has; `entry` is of `_entry`, if that was asked before."""
    entry = entry or _entry(release)
    architecture, tag = release.architecture, release.name.partition(".")[2]
    if architecture not in _tags:
        # Of an architecture without weights of its own, `pretrained=True` without a tag means one of ours.
        ours = not timm.models.is_model_pretrained(architecture)
        num_classes = timm.models.get_pretrained_cfg_value(architecture, "num_classes") if ours else None
        original = timm.model_entrypoint(architecture)
        entry.replace_entrypoint(_with_releases(original, _tags.setdefault(architecture, {}), num_classes))
        if ours:
            entry.mark_pretrained(architecture)
    entry.add_tag(tag, release.cfg)
    _tags[architecture][tag] = _releases[release.name] = release
    if release.robustbench:
        _register_alias(release.robustbench, release.name)
        entry.mark_pretrained(release.robustbench)


def _with_releases(
    original: Callable[..., nn.Module], tags: Mapping[str, Release], num_classes: int | None
) -> Callable[..., nn.Module]:
    """An entry point that knows our tags and hands everything else to timm's as it came.

    Args:
        original: timm's.
        tags: our weights of the architecture, which may become more.
        num_classes: of the architecture's own cfg, if one of ours is meant where no tag is named: the first with so many
            classes, which is what timm says of the bare name, else the first.
    """

    @functools.wraps(original)
    def create(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        asked = kwargs.get("pretrained_cfg")
        if asked is None and pretrained and num_classes is not None:
            alike = [tag for tag, release in tags.items() if release.cfg.num_classes == num_classes]
            asked = next(iter([*alike, *tags]))
        release, cfg = _asked_for(asked, tags)
        if release is None:
            return original(pretrained=pretrained, **kwargs)
        if any((kwargs.get("pretrained_cfg_overlay") or {}).get(key) for key in _SOURCES):
            cfg = replace(cfg, file=None)
        elif pretrained:
            cfg = replace(cfg, file=str(release.fetch(cache_dir=kwargs.get("cache_dir"))))
        model = original(pretrained=pretrained, **{**release.model_args, **kwargs, "pretrained_cfg": cfg})
        set_model_args(model, release.model_args)
        return model

    return create


def _asked_for(asked: Any, tags: Mapping[str, Release]) -> tuple[Release | None, PretrainedCfg]:
    """Which weights a `pretrained_cfg` of timm means: a tag, or a cfg (also as a dict) that names where ours lie."""
    none = None, PretrainedCfg()
    if asked is None or isinstance(asked, str):
        release = tags.get(asked or "")
        return (release, release.cfg) if release else none
    cfg = PretrainedCfg(**asked) if isinstance(asked, dict) else asked
    release = tags.get(cfg.tag or "")
    ours = release is not None and all(getattr(cfg, key) == getattr(release.cfg, key) for key in _SOURCES)
    return (release, cfg) if ours else none


def _register_alias(alias: str, name: str) -> None:
    """A model of its own name for `name`: RobustBench asks timm for `MODEL_DATASET_THREAT`, with weights."""

    def create(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return timm.create_model(
            name, pretrained=pretrained, **{key: value for key, value in kwargs.items() if value is not None}
        )

    create.__name__ = create.__qualname__ = alias
    create.__module__ = __name__
    timm.models.register_model(create)
    globals()[alias] = create  # timm has added it to __all__


def _register_released() -> None:
    """Registers the released weights; where timm's registry is not as we know it, none of them, with a warning."""
    found = load_releases()
    try:
        entries = [_entry(release) for release in found]  # all are checked before the first is registered
        for release, entry in zip(found, entries, strict=True):
            _register(release, entry)
    except ImportError as error:
        _releases.update({release.name: release for release in found})  # `pull` needs no name in timm
        works = "`advcl_hub.pull(NAME, FOLDER)`, folders, `hf-hub:ORG/NAME` and the architectures without weights still work"
        warnings.warn(f"{error} Until then released weights have no names in timm; {works}.", stacklevel=2)


_register_released()
