"""A timm model as the function that is attacked: from images in [0, 1] to logits."""

import difflib
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms.functional import center_crop

from advcl_hub.download import first_line, hub_errors
from advcl_hub.export import CONFIG, RESULTS, WEIGHTS, verify_folder
from advcl_hub.files import file_sha256
from advcl_hub.registry import open_source, releases


def pretrained_cfg(model: nn.Module) -> dict[str, Any]:
    """What timm knows of a model's input and classes; empty for a module that is not timm's."""
    return cast(dict[str, Any], getattr(model, "pretrained_cfg", None) or {})


class PixelSpace(nn.Module):
    """A classifier of images in [0, 1]: the preprocessing of a timm model's pretrained cfg becomes part of the function.

    The perturbation budget then always counts in pixels, whatever mean and standard deviation the model wants.

    Args:
        model: a timm model.
        fit: bring the images to the input size of the model's cfg: smaller ones are enlarged (bilinear if the cfg says so, else
            bicubic), of larger ones the centre is taken.
        precision: `float32`, or `bfloat16` to compute under autocast.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, *, fit: bool = False, precision: str = "float32") -> None:
        super().__init__()
        cfg = pretrained_cfg(model)
        self.model = model
        for name, default in (("mean", 0.0), ("std", 1.0)):
            self.register_buffer(name, torch.tensor(cfg.get(name, default)).reshape(-1, 1, 1))
        self.size = tuple(cfg["input_size"][-2:]) if fit and cfg.get("input_size") else None
        self.interpolation = "bilinear" if cfg.get("interpolation") == "bilinear" else "bicubic"
        self.precision = precision

    def forward(self, images: Tensor) -> Tensor:
        if self.size is not None and images.shape[-2:] != self.size:
            images = self.fit(images, self.size)
        images = (images - self.mean) / self.std
        if self.precision == "float32":
            return self.model(images)
        with torch.autocast(images.device.type, torch.bfloat16):
            return self.model(images).float()

    def fit(self, images: Tensor, size: tuple[int, ...]) -> Tensor:
        """Images of the model's size (H, W)."""
        if images.shape[-2] < size[0] or images.shape[-1] < size[1]:
            return F.interpolate(images, size, mode=self.interpolation, align_corners=False)
        return center_crop(images, list(size))


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


def load_model(name: str | Path) -> LoadedModel:
    """Opens a model with its weights: a registered name, `hf-hub:ORG/NAME`, `local-dir:FOLDER` or a folder.

    A folder that `advcl_hub.export` wrote is verified first.

    Raises:
        ValueError: an unknown name (the nearest known ones are given), a model without weights, or a damaged folder.
        FileNotFoundError: no such folder, or a file of it is missing.
        OSError: the Hub cannot be reached, or has no such model.
    """
    text = str(name)
    local = text.removeprefix("local-dir:")
    if local != text or isinstance(name, Path) or (Path(text) / CONFIG).is_file():
        return _load_folder(Path(local))
    if text.startswith(("./", "../", "/", "~")) or (Path(text).is_dir() and not timm.is_model(text)):
        return _load_folder(Path(text).expanduser())
    if not text.startswith("hf-hub:"):
        _check_name(text)
    hub = text.startswith("hf-hub:")
    try:
        release = open_source(text) if hub else releases().get(text)
        if release is None:
            with hub_errors(text, f"{text} cannot be fetched from the Hub"):
                return LoadedModel(text, timm.create_model(text, pretrained=True).eval(), text)
        source = f"hf-hub:{release.hub_id}@{release.revision}" if hub else text
        if hub and release.files:  # names are checked when they are opened; of hf-hub: timm looks at the size only
            release.fetch()
        with hub_errors(text, f"{text} cannot be fetched from the Hub"):
            model = timm.create_model(source, pretrained=True).eval()
        provenance = json.loads(release.fetch(RESULTS).read_text(encoding="utf-8")) if release.files else None
        return LoadedModel(text, model, source, release.model_args, provenance, release.files.get(WEIGHTS, {}).get("sha256"))
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"{text} cannot be opened: {first_line(error)}") from error


def _load_folder(folder: Path) -> LoadedModel:
    if not (folder / CONFIG).is_file():
        what = "has no config.json: not a model folder" if folder.is_dir() else "is no folder"
        raise FileNotFoundError(f"{folder} {what}; a folder that timm opens holds config.json and {WEIGHTS}.")
    weights, results = folder / WEIGHTS, folder / RESULTS
    if not weights.is_file():
        raise FileNotFoundError(f"{folder} has no {WEIGHTS}; pickled weights are not read.")
    provenance = None
    if results.is_file():
        verify_folder(folder)
        provenance = json.loads(results.read_text(encoding="utf-8"))
    try:
        model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    except Exception as error:
        raise ValueError(f"{folder} cannot be opened by timm: {first_line(error)}") from error
    sha256 = provenance["sha256"][WEIGHTS] if provenance else file_sha256(weights)  # just verified
    arguments = json.loads((folder / CONFIG).read_text(encoding="utf-8")).get("model_args") or {}
    return LoadedModel(_short_name(folder), model, f"local-dir:{folder}", arguments, provenance, sha256)


def _short_name(folder: Path) -> str:
    """The last two parts: `runs/advcl/export` and `runs/simclr/export` have to stay apart, and no more of the path is told."""
    parts = folder.parts if folder.name not in ("", "..") else folder.resolve().parts
    return "/".join(parts[-2:]).lstrip("/")


def _check_name(name: str) -> None:
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        near = difflib.get_close_matches(architecture, timm.list_models(), 3)
        hint = f" Near: {', '.join(near)}." if near else ""
        raise ValueError(f"{name} is neither a folder nor a model that timm knows.{hint}")
    known = [full for full in timm.list_pretrained(f"{architecture}*") if full.partition(".")[0] == architecture]
    if not known or (tag and name not in known):
        has = f"has {', '.join(known[:8])}" if known else "has no weights to download"
        raise ValueError(f"{name} has no weights: {architecture} {has}.")


def weights_sha256(model: nn.Module) -> str:
    """sha256 in hex over names, types, shapes and bytes of a state dict, whatever file it came from."""
    digest = hashlib.sha256()
    for key, tensor in sorted(model.state_dict().items()):
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


@contextmanager
def borrowed(model: nn.Module, device: torch.device) -> Iterator[None]:
    """The model on `device` in evaluation mode, without parameter gradients, computing in true float32 by fixed algorithms.

    Afterwards the model is where and as it was, and so are the global random state and the backends' settings. (FAB calls
    backward(), which would otherwise compute and keep the gradient of every weight.)
    """
    tensors = [*model.parameters(), *model.buffers()]
    home = tensors[0].device if tensors else device
    modes = {module: module.training for module in model.modules()}
    wanted = [p for p in model.parameters() if p.requires_grad]
    # A batch norm that stays in training mode moves its own.
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    cuda = device.type == "cuda"
    devices = [device] if cuda else []
    with torch.random.fork_rng(devices), torch.inference_mode(False), torch.enable_grad(), _exact_backends(cuda):
        try:
            model.to(device).eval()
            for parameter in wanted:
                parameter.requires_grad_(False)
            yield
        finally:
            model.to(home)
            with torch.no_grad():
                for name, buffer in model.named_buffers():
                    buffer.copy_(buffers[name])
            for parameter in wanted:
                parameter.requires_grad_(True)
            for module, training in modes.items():
                module.training = training


@contextmanager
def _exact_backends(cuda: bool) -> Iterator[None]:
    """No TensorFloat-32, and on a GPU deterministic kernels wherever there are any (torch warns where there are none)."""
    cudnn: Any = torch.backends.cudnn
    matmul: Any = torch.backends.cuda.matmul
    settings: list[tuple[Any, str, Any]]
    if hasattr(matmul, "fp32_precision"):  # torch 2.9; it refuses to mix these with the older allow_tf32
        settings = [(cudnn.conv, "fp32_precision", "ieee"), (matmul, "fp32_precision", "ieee")]
    else:
        settings = [(cudnn, "allow_tf32", False), (matmul, "allow_tf32", False)]
    settings += [(cudnn, "benchmark", False), (cudnn, "deterministic", True)]
    earlier = [(module, name, getattr(module, name)) for module, name, _ in settings]
    strict, warn_only = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    try:
        for module, name, value in settings:
            setattr(module, name, value)
        if cuda and not strict:
            torch.use_deterministic_algorithms(True, warn_only=True)
        yield
    finally:
        for module, name, value in earlier:
            setattr(module, name, value)
        torch.use_deterministic_algorithms(strict, warn_only=warn_only)
