"""Weights in parts: files small enough for any transport, in which what several models share is stored once.

A model is the union of the tensors in its parts. A linear head on a frozen encoder adds one part to those of the encoder. Files
are named after their content, so that a part never replaces another one.
"""

import hashlib
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save, save_file
from torch import Tensor

from advcl_hub.errors import reason_of
from advcl_hub.files import file_sha256, make_readable, read_safetensors, refuse_pointer, replacing, write_errors
from advcl_hub.hub.export import WEIGHTS

LIMIT = 16 * 2**20  # bytes of a part
_HEADER = 2**18  # of them for names and shapes


def split(folders: Mapping[str, Path], target: Path, limit: int = LIMIT) -> dict[str, list[str]]:
    """Writes the weights of exported folders to `target` in parts.

    Args:
        folders: by name; a later one that holds all tensors of an earlier one, bit for bit, shares its parts.
        target: folder for the files, `NAME-SHA256.safetensors` with eight digits of the file's own sha256.
        limit: largest size of a file, in bytes.

    Returns:
        By name of the model the files whose tensors it is made of.

    Raises:
        ValueError: a single tensor is larger than a file may be, or a file of weights is damaged or of another program.
        OSError: a file cannot be read or written.
    """
    from huggingface_hub import split_torch_state_dict_into_shards  # every start of the library would wait for it

    target.mkdir(parents=True, exist_ok=True)
    whole: dict[str, dict[str, Tensor]] = {}
    parts: dict[str, list[str]] = {}
    for name, folder in folders.items():
        state = read(folder / WEIGHTS)
        if not rebuilds(state, folder / WEIGHTS):
            raise ValueError(f"{folder / WEIGHTS} was not written by advcl-hub: load the model and export it again.")
        base = next((n for n in reversed(whole) if contains(state, whole[n])), None)
        parts[name] = list(parts[base]) if base else []
        rest = {key: value for key, value in state.items() if base is None or key not in whole[base]}
        shards = split_torch_state_dict_into_shards(rest, max_shard_size=limit - _HEADER)
        for keys in shards.filename_to_tensors.values():
            parts[name].append(_write(target, name, {key: rest[key] for key in keys}, limit))
        whole[name] = state
    return parts


def _write(target: Path, name: str, tensors: dict[str, Tensor], limit: int) -> str:
    """Writes one part, and returns the name of its file."""
    with tempfile.TemporaryDirectory(prefix=".part-", dir=target) as temporary:
        draft = Path(temporary) / WEIGHTS
        with write_errors(target):
            save_file(tensors, draft, metadata={"format": "pt"})
        if (size := draft.stat().st_size) > limit:
            raise ValueError(f"{name} has a tensor too large for a file of {limit:,} bytes: it would have {size:,}.")
        make_readable(draft)
        path = target / f"{name}-{file_sha256(draft)[:8]}.safetensors"
        draft.replace(path)
    return path.name


def contains(state: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> bool:
    """Whether a model holds all tensors of another one, bit for bit."""
    return all(key in state and _same_bytes(state[key], value) for key, value in base.items())


def _same_bytes(one: Tensor, other: Tensor) -> bool:
    """0.0 and -0.0 are equal numbers, but other weights."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return torch.equal(*(tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other)))


def rebuilds(state: Mapping[str, Tensor], path: Path) -> bool:
    """Whether `join` would write a file's very bytes from its tensors; others than `export_folder` may add metadata."""
    return hashlib.sha256(save(dict(state), metadata={"format": "pt"})).hexdigest() == file_sha256(path)


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of a file. Raises ValueError if it is damaged."""
    refuse_pointer(path)
    try:
        return read_safetensors(path).tensors
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({reason_of(error)}): copy it again.") from error


def join(parts: Sequence[Path], path: Path, sha256: str) -> Path:
    """Writes the model.safetensors that parts were made of.

    Args:
        parts: all of them.
        path: where to.
        sha256: of the result; a file that has it already is left as it is.

    Raises:
        ValueError: the parts do not give the file that was exported.
        OSError: a part is missing, or the file cannot be written.
    """
    if path.is_file() and file_sha256(path) == sha256:
        return path
    state: dict[str, Tensor] = {}
    for part in parts:
        if not part.is_file():
            raise FileNotFoundError(f"{part} is missing: get it from where the others come from.")
        state |= read(part)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"{path.parent} cannot be made ({error.strerror}): give another cache_dir, or HF_HOME.") from error
    with replacing(path) as draft:
        save_file(state, draft, metadata={"format": "pt"})
        if file_sha256(draft) != sha256:
            raise ValueError(
                f"{', '.join(map(str, parts))} do not give the weights that were exported: one of them is damaged, or of other "
                "weights. Get them again from where they come from."
            )
    return path
