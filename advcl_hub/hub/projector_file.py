"""The file of a projection head: projector.safetensors.

It holds the state dict of an nn.Sequential ("0.weight", "1.running_mean", ...), and its metadata names the layers:
"Linear,BatchNorm1d,ReLU,Linear". `advcl_hub.hub.projector` opens it, wherever it lies.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from advcl_hub.errors import reason_of
from advcl_hub.files import read_safetensors, refuse_pointer
from advcl_hub.modes import as_usual

PROJECTOR = "projector.safetensors"
_LAYERS = "layers"  # key of the metadata
# SyncBatchNorm has the same tensors as BatchNorm1d, and computes the same in one process.
_KINDS: Mapping[type[nn.Module], str] = {
    nn.Linear: "Linear",
    nn.BatchNorm1d: "BatchNorm1d",
    nn.SyncBatchNorm: "BatchNorm1d",
    nn.ReLU: "ReLU",
}
_NAMES = tuple(dict.fromkeys(_KINDS.values()))


@as_usual()
def projector_from_state(state: Mapping[str, Tensor], layers: Sequence[str] | None = None) -> nn.Sequential:
    """A projection head made from the state dict of an nn.Sequential, in evaluation mode, float32, on the CPU.

    Args:
        state: tensors `INDEX.NAME`, which are copied. A Linear may have no bias, a BatchNorm1d neither weight nor bias.
        layers: kinds of the layers, in order: Linear, BatchNorm1d, ReLU. By default an index with a `running_mean` is a
            BatchNorm1d, one with other tensors a Linear, and one that is missing a ReLU. (One at the end would not show.)

    Raises:
        ValueError: a layer of another kind, tensors that are missing, too many or not finite, or shapes of which one does not
            follow from the other.
    """
    copies: dict[str, Tensor] = {}
    tensors: dict[int, dict[str, Tensor]] = {}  # by layer
    for key, value in state.items():
        place = re.fullmatch(r"(0|[1-9]\d{0,3})\.([\w.]+)", key, re.ASCII)
        if place is None:
            raise ValueError(f"{key!r:.60} is no tensor of an nn.Sequential of layers; expected names such as 0.weight.")
        copies[key] = value.detach().to("cpu", torch.float32 if value.is_floating_point() else value.dtype, copy=True)
        if not copies[key].isfinite().all():
            raise ValueError(f"The projection head has values in {key} that are not finite.")
        tensors.setdefault(int(place[1]), {})[place[2]] = copies[key]
    last = max(tensors, default=0)
    if layers is None:
        layers = [_kind(tensors.get(index, {})) for index in range(last + 1)]
    if unknown := [layer for layer in layers if layer not in _NAMES]:
        raise ValueError(f"A projection head has layers {', '.join(_NAMES)}, but no {unknown[0]!r:.60}.")
    if last >= len(layers) or "Linear" not in layers:
        raise ValueError(
            f"A projection head with tensors up to {last}.* cannot have the layers {','.join(layers) or 'none':.200}."
        )
    modules: list[nn.Module] = []
    width: int | None = None
    for index, kind in enumerate(layers):
        module, takes, gives = _layer(index, kind, tensors.get(index, {}))
        if None not in (width, takes) and width != takes:
            raise ValueError(
                f"Layer {index} of the projection head takes {takes} features, but what is before it gives {width}."
            )
        modules.append(module)
        width = gives or width
    projector = nn.Sequential(*modules)
    projector.load_state_dict(copies, assign=True)
    return projector.eval()


def layers_of(projector: nn.Sequential) -> list[str]:
    """The kinds of a projection head's layers, as its file names them.

    Raises:
        ValueError: a layer that the file cannot describe.
    """
    if not isinstance(projector, nn.Sequential):
        raise ValueError(f"A projection head is an nn.Sequential of {', '.join(_NAMES)}, got {type(projector).__name__}.")
    layers = []
    for index, module in enumerate(projector):
        if type(module) not in _KINDS:
            raise ValueError(
                f"Layer {index} of the projection head is a {type(module).__name__}: only {', '.join(_NAMES)} can be exported."
            )
        if isinstance(module, nn.BatchNorm1d | nn.SyncBatchNorm) and (
            module.running_mean is None or module.eps != nn.BatchNorm1d(1).eps
        ):
            raise ValueError(
                f"Layer {index} of the projection head is a batch norm without running statistics or with an eps of its own: "
                "only the usual ones can be exported."
            )
        layers.append(_KINDS[type(module)])
    return layers


def widths_of(projector: nn.Sequential) -> list[int]:
    """The width of a projection head's input, and of the output of every Linear layer."""
    linear = [module for module in projector if isinstance(module, nn.Linear)]
    return [linear[0].in_features, *(module.out_features for module in linear)]


def save_projector(state: Mapping[str, Tensor], layers: Sequence[str], path: Path) -> None:
    """Writes a projection head: its tensors as they are to be stored, and the kinds of its layers (see `layers_of`)."""
    # One key only: safetensors writes several in any order, and the sha256 of equal heads would differ.
    save_file(dict(state), path, metadata={_LAYERS: ",".join(layers)})


def read_projector(path: Path) -> nn.Sequential:
    """The projection head in a file, in evaluation mode, float32, on the CPU.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or is no projection head that `save_projector` wrote.
    """
    refuse_pointer(path)
    try:
        file = read_safetensors(path)
    except (FileNotFoundError, IsADirectoryError):
        raise FileNotFoundError(f"There is no {path}.") from None
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({reason_of(error)}): copy it again.") from error
    layers = file.metadata.get(_LAYERS)
    if layers is None:
        raise ValueError(f"{path} does not name its layers: it is no projection head that advcl-hub exported.")
    try:
        return projector_from_state(file.tensors, layers.split(","))
    except ValueError as error:
        raise ValueError(f"{path} cannot be used: {error}") from error


def _kind(tensors: Mapping[str, Tensor]) -> str:
    return "BatchNorm1d" if "running_mean" in tensors else "Linear" if tensors else "ReLU"


def _layer(index: int, kind: str, tensors: Mapping[str, Tensor]) -> tuple[nn.Module, int | None, int | None]:
    """A layer without values, and how many features it takes and gives (None of a ReLU, for any number).

    Made on the device `meta`: random weights, which are replaced at once, would move the caller's random numbers on.
    """
    shapes = {name: tuple(value.shape) for name, value in tensors.items()}
    module: nn.Module | None = None
    takes = gives = None
    if kind == "Linear" and len(shapes.get("weight", ())) == 2:
        gives, takes = shapes["weight"]
        module = nn.Linear(takes, gives, bias="bias" in tensors, device="meta")
    elif kind == "BatchNorm1d" and len(shapes.get("running_mean", ())) == 1:
        (takes,) = (gives,) = shapes["running_mean"]
        module = nn.BatchNorm1d(takes, affine="weight" in tensors, device="meta")
    elif kind == "ReLU":
        module = nn.ReLU()
    expected = None if module is None else {name: (value.dtype, value.shape) for name, value in module.state_dict().items()}
    if module is None or {name: (value.dtype, value.shape) for name, value in tensors.items()} != expected:
        found = ", ".join(f"{name} {shape}" for name, shape in sorted(shapes.items())) or "no tensors"
        raise ValueError(f"Layer {index} of the projection head cannot be a {kind} with {found:.200}.")
    return module, takes, gives
