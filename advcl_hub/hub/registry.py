"""Released weights under timm's names: `timm.create_model("resnet10_cifar.pseudo_label_at_c10", pretrained=True)`.

Those of `released.json` are registered when this module is imported; `register` adds weights of one's own for this process.
"""

import functools
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
from timm.models import PretrainedCfg
from torch import nn

import advcl_hub.models  # noqa: F401  # whose architectures released weights belong to
from advcl_hub.files import parse_json, refuse_pointer
from advcl_hub.hub.download import commit_of, fetch, is_cached, split_revision
from advcl_hub.hub.export import CONFIG, WEIGHTS, verify_folder
from advcl_hub.hub.released import SOURCES, Release, check_name, head_of, load_releases
from advcl_hub.private import RegistryEntry, set_model_args
from advcl_hub.records import RESULTS

__all__ = ["find_release", "open_source", "register", "releases"]  # timm adds the models of this module

_releases: dict[str, Release] = {}
_tags: dict[str, dict[str, Release]] = {}  # by architecture, the same by tag
_bare: dict[str, int] = {}  # number of classes of the architectures whose name without a tag means one of ours


def releases() -> dict[str, Release]:
    """By name all weights that are registered: those of `released.json`, then the user's own."""
    return dict(_releases)


def find_release(name: str) -> Release | None:
    """The registered weights of a name, as `timm.create_model(name, pretrained=True)` understands it; None if there are none.

    Args:
        name: `ARCHITECTURE.TAG`; a name for RobustBench; or an architecture that has weights of ours only: timm then means the
            first ones with as many classes as the architecture has by default, else the first ones.
    """
    if name in _bare and name in _tags:
        return _of_bare_name(name, _tags[name])
    alias = (release for release in _releases.values() if release.robustbench == name)
    return _releases.get(name) or next(alias, None)


def is_model_folder(path: Path) -> bool:
    """Whether a name that may be a folder or a model means the folder: it holds weights, or timm knows no such model.

    So a folder beside the user that happens to be called as a release is (such as its card's) does not hide the release.
    """
    return (path / WEIGHTS).is_file() or (path.is_dir() and not timm.is_model(str(path)))


def _of_bare_name(architecture: str, tags: Mapping[str, Release]) -> Release:
    alike = [release for release in tags.values() if release.cfg.num_classes == _bare[architecture]]
    return next(iter([*alike, *tags.values()]))


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
        config = parse_json(config_file.read_text(encoding="utf-8"))
        results = parse_json(results_file.read_text(encoding="utf-8")) if results_file else {}
        files = {file: {"sha256": sha256} for file, sha256 in results.get("sha256", {}).items()}
        facts = {"own": True, "head": head_of(results, config)}
        if not isinstance(config["architecture"], str):
            raise TypeError(f"the architecture is {config['architecture']!r}")
        opened = Release(name or config["architecture"], config, files, hub_id, revision, folder, facts, unchecked=unchecked)
        _ = opened.model_args, opened.cfg  # made of the config
        return opened
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{source} has a damaged {CONFIG} or {RESULTS} (in {config_file.parent}): {error!r}.") from None


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
        original = timm.model_entrypoint(architecture)
        entry.replace_entrypoint(_with_releases(architecture, original, _tags.setdefault(architecture, {})))
        if ours:
            _bare[architecture] = timm.models.get_pretrained_cfg_value(architecture, "num_classes") or 0
            entry.mark_pretrained(architecture)
    entry.add_tag(tag, release.cfg)
    _tags[architecture][tag] = _releases[release.name] = release
    if release.robustbench:
        _register_alias(release.robustbench, release.name)
        entry.mark_pretrained(release.robustbench)


def _with_releases(
    architecture: str, original: Callable[..., nn.Module], tags: Mapping[str, Release]
) -> Callable[..., nn.Module]:
    """An entry point that knows our tags and hands everything else to timm's as it came.

    Args:
        architecture: its name.
        original: timm's entry point.
        tags: our weights of the architecture, which may become more.
    """

    @functools.wraps(original)
    def create(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        asked = kwargs.get("pretrained_cfg")
        if asked is None and pretrained and architecture in _bare:
            asked = _of_bare_name(architecture, tags).cfg
        release, cfg = _asked_for(asked, tags)
        if release is None:
            return original(pretrained=pretrained, **kwargs)
        if any((kwargs.get("pretrained_cfg_overlay") or {}).get(key) for key in SOURCES):
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
    ours = release is not None and all(getattr(cfg, key) == getattr(release.cfg, key) for key in SOURCES)
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
    try:
        found = load_releases()
    except ValueError as error:
        warnings.warn(f"{error} Until then there are no released weights.", stacklevel=2)
        return
    try:
        entries = [_entry(release) for release in found]  # all are checked before the first is registered
        for release, entry in zip(found, entries, strict=True):
            _register(release, entry)
    except ImportError as error:
        _releases.update({release.name: release for release in found})  # `pull` needs no name in timm
        works = "`advcl_hub.pull(NAME, FOLDER)`, folders, `hf-hub:ORG/NAME` and the architectures without weights still work"
        warnings.warn(f"{error} Until then released weights have no names in timm; {works}.", stacklevel=2)


_register_released()
