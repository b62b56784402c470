"""Opens a model with its weights: from the registry, the Hub or a folder."""

import contextlib
import difflib
import hashlib
import json
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.hub import HASH_REGEX

from advcl_hub.errors import reason_of
from advcl_hub.files import file_sha256, refuse_pointer
from advcl_hub.hub.download import content_hash, fetch, hub_errors, split_revision
from advcl_hub.hub.export import CONFIG, WEIGHTS, verify_folder
from advcl_hub.hub.registry import find_release, is_model_folder, open_source
from advcl_hub.hub.released import Release
from advcl_hub.modes import as_usual
from advcl_hub.records import RESULTS

_TIMM_FILE = "pytorch_model.bin"  # what timm asks the Hub for where a cfg names no file


@dataclass(frozen=True)
class LoadedModel:
    """A model and where it came from.

    Attributes:
        name: as the user gave it, without the folders that lead to a local one.
        model: in evaluation mode.
        source: what `timm.create_model` opens.
        arguments: that its config passes to the architecture.
        provenance: results.json of an exported folder or Hub repository, else None.
        file_sha256: of model.safetensors, where that is known.
    """

    name: str
    model: nn.Module
    source: str = ""
    arguments: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] | None = None
    file_sha256: str | None = None


@as_usual()
def load_model(name: str | Path) -> LoadedModel:
    """Opens a model with its weights: a registered name, `hf-hub:ORG/NAME[@REVISION]`, `local-dir:FOLDER` or a folder.

    An exported folder is verified first. Files from the Hub are compared with their hashes; a damaged one
    in the cache is fetched again. Without the Hub, what timm opens from the cache opens here, too, with a warning if its
    results.json is not there: then nothing says which weights were released.

    Raises:
        ValueError: an unknown name (the nearest known ones are given), a model without weights, or a damaged file.
        FileNotFoundError: no such folder, or a file of it is missing.
        OSError: the Hub cannot be reached, or has no such model.
    """
    text = str(name)
    path = Path(text.removeprefix("local-dir:")).expanduser()
    if isinstance(name, Path) or text.startswith(("local-dir:", "./", "../", "/", "~")) or is_model_folder(path):
        return _load_folder(path)
    if text.startswith("hf-hub:"):
        return _load_release(text, open_source(text))
    _check_name(text)
    release = find_release(text)
    return _load_timm(text) if release is None else _load_release(release.name, release)


def _load_release(name: str, release: Release) -> LoadedModel:
    """Weights of the registry, or of a repository on the Hub."""
    source, weights = name, None
    if name.startswith("hf-hub:"):
        source = f"hf-hub:{release.hub_id}@{release.revision}"
        if release.unchecked:
            warnings.warn(f"{release.unchecked}: nothing says whether its weights are those that were released.", stacklevel=4)
        # Registered weights are checked when they are opened; of hf-hub: timm looks at the size only.
        weights = release.fetch() if release.files else _check_download(source.removeprefix("hf-hub:"))
    model = _create(name, source, weights)
    provenance = None
    if release.files:
        try:
            provenance = json.loads(release.fetch(RESULTS).read_text(encoding="utf-8"))
        except OSError as error:
            if release.folder is not None:
                raise
            warnings.warn(f"The weights of {name} are checked, but their provenance is missing: {error}", stacklevel=4)
    return LoadedModel(name, model, source, release.model_args, provenance, release.files.get(WEIGHTS, {}).get("sha256"))


def _load_timm(name: str) -> LoadedModel:
    """Weights of timm's own."""
    cfg, weights = timm.models.get_pretrained_cfg(name), None
    if cfg is not None and cfg.hf_hub_id:
        weights = _check_download(cfg.hf_hub_id, cfg.hf_hub_filename or _TIMM_FILE)
    elif cfg is not None and isinstance(cfg.url, str):
        weights = Path(torch.hub.get_dir(), "checkpoints", Path(cfg.url).name)
        digits = HASH_REGEX.search(weights.name)  # the first of its sha256, as torch.hub writes them
        if digits and weights.is_file() and not file_sha256(weights).startswith(digits[1]):
            raise ValueError(f"{weights} is damaged (its sha256 is not that of its name): delete it, and it is fetched again.")
    return LoadedModel(name, _create(name, name, weights), name)


def _check_download(hub_id: str, file: str = _TIMM_FILE) -> Path | None:
    """Fetches the file that timm will open, so that it is checked before.

    Args:
        hub_id: `ORG/NAME[@REVISION]`.
        file: that timm asks for: it prefers safetensors of the same name.

    Returns:
        Where the file lies; None if timm has to say why there is none.

    Raises:
        ValueError: it is damaged and cannot be fetched again.
    """
    repository, revision = split_revision(hub_id)
    safe = (
        WEIGHTS
        if file == _TIMM_FILE
        else file.replace("pytorch_model.bin", "model.safetensors").replace(".bin", ".safetensors")
    )
    for candidate in dict.fromkeys((safe, file)):
        with contextlib.suppress(OSError):
            return fetch(repository, candidate, revision=revision)
    return None


def _create(name: str, source: str, weights: Path | None) -> nn.Module:
    """`timm.create_model(source)` with its weights, in evaluation mode, its errors as one sentence.

    Args:
        name: as the user gave it.
        source: what timm opens.
        weights: the file of the weights, if it is known.

    Raises:
        OSError: the Hub cannot be reached or has no such model.
        ValueError: timm cannot open it.
    """
    try:
        with hub_errors(name, f"{name} cannot be fetched from the Hub"):
            return timm.create_model(source, pretrained=True).eval()
    except (OSError, ImportError):
        raise
    except Exception as error:  # timm, torch and safetensors share no base class
        hint = ""
        if weights and weights.is_file() and content_hash(weights) is None:  # else it is what the Hub has
            hint = f" (its file is {weights}: if that is damaged, delete it, and it is fetched again)"
        raise ValueError(f"{name} cannot be opened: {reason_of(error)}{hint}") from error


def _load_folder(folder: Path) -> LoadedModel:
    if not (folder / CONFIG).is_file():
        what = "has no config.json: not a model folder" if folder.is_dir() else "is no folder"
        for inner in ("classifier", "export"):  # of a run of finetuning or pretraining
            if (folder / inner / CONFIG).is_file():
                raise FileNotFoundError(f"{folder} is the folder of a run, whose model is {folder / inner}.")
        raise FileNotFoundError(f"{folder} {what}; a folder that timm opens holds config.json and {WEIGHTS}.")
    weights, results = folder / WEIGHTS, folder / RESULTS
    if not weights.is_file():
        raise FileNotFoundError(f"{folder} has no {WEIGHTS}; pickled weights are not read.")
    for name in (CONFIG, WEIGHTS, RESULTS):
        refuse_pointer(folder / name)
    provenance = None
    if results.is_file():
        verify_folder(folder)
        provenance = json.loads(results.read_text(encoding="utf-8"))
    try:
        model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    except Exception as error:  # timm, torch and safetensors share no base class
        raise ValueError(f"{folder} cannot be opened by timm: {reason_of(error)}") from error
    sha256 = provenance["sha256"][WEIGHTS] if provenance else file_sha256(weights)  # just verified
    arguments = json.loads((folder / CONFIG).read_text(encoding="utf-8")).get("model_args") or {}
    return LoadedModel(_short_name(folder), model, f"local-dir:{folder}", arguments, provenance, sha256)


def _short_name(folder: Path) -> str:
    """The last two parts: `runs/advcl/export` and `runs/simclr/export` have to stay apart, and no more of the path is told."""
    parts = folder.parts if folder.name not in ("", "..") else folder.resolve().parts
    return "/".join(parts[-2:]).lstrip("/")


def weights_sha256(model: nn.Module) -> str:
    """sha256 in hex over names, types, shapes and bytes of a state dict, whatever file it came from."""
    digest = hashlib.sha256()
    for key, value in sorted(model.state_dict().items()):
        if not isinstance(value, Tensor):  # what get_extra_state returns, or a quantized layer
            digest.update(f"{key} {value!r}\n".encode())
            continue
        tensor = (value.to_dense() if value.layout != torch.strided else value).detach().cpu().contiguous()
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _check_name(name: str) -> None:
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        near = difflib.get_close_matches(architecture, timm.list_models(), 3)
        hint = f" Near: {', '.join(near)}." if near else ""
        raise ValueError(f"{name} is neither a folder nor a model that timm knows.{hint}")
    known = [full for full in timm.list_pretrained(f"{architecture}*") if full.partition(".")[0] == architecture]
    if not known or (tag and name not in known):
        near = difflib.get_close_matches(tag, [full.partition(".")[2] for full in known], 1) if tag else []
        hint = f" Did you mean {architecture}.{near[0]}?" if near else ""
        there_are = f"; there are {', '.join(known[:8])}" if known else ""
        raise ValueError(f"{name} has no weights that timm could open{there_are}.{hint}")
