"""Reads checkpoint files that others published: tensors only, whatever they are wrapped in. Nothing is ever unpickled."""

import errno
import re
import struct
import warnings
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from advcl_hub.errors import reason_of
from advcl_hub.files import file_sha256, refuse_pointer

HEAD_ENTRY = "classifier"  # where AdvCL's finetuning saves its linear head, beside `model`
_WRAPPERS = ("module.", "_orig_mod.")  # of DataParallel and torch.compile
_DYNACL = ("encoder_k", "encoder_q")  # DynACL trains the second and averages its weights in the first
# solo-learn's network, and its average or (in DeACL) its teacher; its older versions write `encoder`.
SOLO = ("backbone", "encoder", "momentum_backbone", "momentum_encoder")
# What the parsers raise at damaged files (found by damaging some thousands): Python's unpickling is driven by the bytes of the
# file, and torch.load turns few of its errors into UnpicklingError.
_DAMAGE = (
    *(UnpicklingError, SafetensorError, zipfile.BadZipFile, zlib.error, struct.error),
    *(AssertionError, AttributeError, EOFError, LookupError, OverflowError, RuntimeError, TypeError, ValueError),
)


@dataclass(frozen=True)
class Checkpoint:
    """The weights of one network out of a checkpoint file.

    Attributes:
        file: name of the file, without folders.
        sha256: of the file.
        state: by key, without the prefixes of wrappers; the head of an entry `classifier` has that prefix.
        entry: the entry of the file that was taken, empty if the file is the state dict itself.
        left: keys of the file that belong to no part of this network, by the reason why they are left out.
        others: entries of the file that are no weights of a network, such as the optimizer's state.
    """

    file: str
    sha256: str
    state: dict[str, Tensor]
    entry: str = ""
    left: dict[str, list[str]] = field(default_factory=dict)
    others: tuple[str, ...] = ()


def read_checkpoint(file: str | Path, entry: str | None = None) -> Checkpoint:
    """Reads a file of torch.save or safetensors and finds the network in it.

    The state dict may be the file itself or one entry of it (`state_dict`, `net`, `model`, `ema` ...); all its keys may have
    `module.` before them. Of DynACL's two copies the averaged one (`encoder_k`) is taken, as its authors do, without that
    prefix; of solo-learn's and DeACL's two (`backbone`, `momentum_backbone`) the first, with its prefix, beside which its heads
    are.

    Args:
        file: what to read.
        entry: which entry, where several hold a network; or the other copy of it: DynACL's `encoder_q`, or
            `momentum_backbone`, the teacher in DeACL's files.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is damaged, needs unpickling, holds no network, or several and `entry` names none of them.
    """
    file = Path(file)
    if not file.is_file():
        raise FileNotFoundError(f"{file} {'is a folder, not a checkpoint file' if file.is_dir() else 'does not exist'}.")
    content, name = _load(file), file.name
    networks = {"": content} if _is_network(content) else {}
    if not networks and isinstance(content, Mapping):
        networks = {str(key): value for key, value in content.items() if _is_network(value)}
    if not networks:
        found = ", ".join(map(str, list(content)[:8])) if isinstance(content, Mapping) else type(content).__name__
        raise ValueError(f"{name} holds no state dict of a convolutional network: found {found or 'nothing'}.")
    if entry in networks:
        taken, entry = str(entry), None
    elif len(networks) == 1:
        (taken,) = networks
    else:
        asked = f"no {entry!r}" if entry else "several networks"
        raise ValueError(f"{name} holds {asked}: choose an entry out of {', '.join(networks)}.")
    tensors = {key: value for key, value in networks[taken].items() if isinstance(value, Tensor)}
    others = [key for key in networks[taken] if key not in tensors]
    left: dict[str, list[str]] = {}
    if "n_averaged" in tensors:  # of torch.optim.swa_utils.AveragedModel
        del tensors["n_averaged"]
        left["counter of weight averaging"] = ["n_averaged"]
    state, copy = _one_copy(_without_wrappers(tensors), entry, left, name)
    if taken:
        others += [str(key) for key in content if key != taken]
        head = content.get(HEAD_ENTRY)
        if isinstance(head, Mapping) and head and all(isinstance(value, Tensor) for value in head.values()):
            others.remove(HEAD_ENTRY)
            state |= {f"{HEAD_ENTRY}.{key}": value for key, value in _without_wrappers(head).items()}
    return Checkpoint(name, file_sha256(file), state, "/".join(filter(None, [taken, copy])), left, tuple(others))


def _is_network(value: Any) -> bool:
    """A mapping by name with the weights of a convolution in it: neither an optimizer's state nor a single layer."""
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        return False
    return any(isinstance(tensor, Tensor) and tensor.ndim == 4 for tensor in value.values())


def _without_wrappers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    bare = dict(state)
    while prefix := next((p for p in _WRAPPERS if bare and all(key.startswith(p) for key in bare)), None):
        bare = {key.removeprefix(prefix): value for key, value in bare.items()}
    return bare


def _one_copy(
    state: dict[str, Tensor], entry: str | None, left: dict[str, list[str]], name: str
) -> tuple[dict[str, Tensor], str]:
    """One copy of the network out of those that DynACL or solo-learn saves, and which; any other network is the only copy."""
    copies = {copy: keys for copy in (*_DYNACL, *SOLO) if (keys := [key for key in state if key.startswith(f"{copy}.")])}
    if any(copy in copies for copy in _DYNACL) and sum(map(len, copies.values())) < len(state):
        copies = {}  # DynACL's hold everything
    if entry is not None and entry not in copies:
        has = ", ".join(copies) or "nothing to choose: it holds one network"
        raise ValueError(f"{name} has no entry {entry!r}; it has {has}.")
    if not copies:
        return state, ""
    taken = entry or next(iter(copies))
    for copy, keys in copies.items():
        if copy != taken:
            left[f"another copy of the network ({copy})"] = keys
    if taken in _DYNACL:
        return _without_wrappers({key.removeprefix(f"{taken}."): state[key] for key in copies[taken]}), taken
    others = {key for copy, keys in copies.items() if copy != taken for key in keys}
    return {key: value for key, value in state.items() if key not in others}, taken


def _load(file: Path) -> Any:
    """What the file holds, by PyTorch's unpickler that knows tensors and plain containers only, or by safetensors."""
    refuse_pointer(file, file.name)
    with file.open("rb") as opened:
        start = opened.read(9)
    try:
        if start[8:] == b"{":
            return load_file(file)
        if start.startswith(b"PK"):  # torch.load does not look at the checksums
            with zipfile.ZipFile(file) as archive:
                if damaged := archive.testzip():
                    raise ValueError(f"the checksum of its part {damaged} differs")
        with warnings.catch_warnings():  # of these two the refusal below says more
            warnings.filterwarnings("ignore", "Detected pickle protocol|'torch.load' received a zip file", UserWarning)
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        if not _is_damage(error):
            raise
        if carried := _carried_code(start, error):
            raise ValueError(
                f"{file.name} holds more than tensors ({carried}): opening it would run code that came with it, so it is not "
                "opened. If you trust its authors, save the tensors alone in a place where that code can do no harm, and "
                "convert the new file:\n"
                f"  loaded = torch.load({file.name!r}, map_location='cpu', weights_only=False)\n"
                "  torch.save(loaded['state_dict'], 'weights.pt')    # or its entry 'model', 'net' ..."
            ) from None  # torch's own message says how to run the code
        reason = "" if isinstance(error, UnpicklingError) else f": {reason_of(error, 200)}"
        raise ValueError(
            f"{file.name} is damaged or incomplete, or neither a checkpoint of torch.save nor safetensors (it starts with "
            f"{start!r}{reason}). Download it again."
        ) from error


def _is_damage(error: Exception) -> bool:
    """Whether an error is about what the file holds, not about the machine: its memory, its disk, a broken installation."""
    if isinstance(error, OSError):  # zipfile seeks to wherever a damaged table of contents sends it
        return error.errno == errno.EINVAL
    return isinstance(error, _DAMAGE) and "DefaultCPUAllocator" not in str(error)  # torch's MemoryError, a RuntimeError


def _carried_code(start: bytes, error: Exception) -> str:
    """What in a file needs unpickling, empty if that is not what was wrong with it."""
    text = str(error)
    if isinstance(error, UnpicklingError):
        if name := re.search(r"GLOBAL ([\w.]+)", text):
            return name[1]
        if start[:1] == b"\x80" and start[1:2] > b"\x02":  # torch.save writes protocol 2
            return "a pickle"
    return "a TorchScript program" if "TorchScript" in text else ""
