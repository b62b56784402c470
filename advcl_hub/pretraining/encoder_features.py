"""Features of any pretrained timm model, at its own input size and normalisation, and their identity."""

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import timm
import torch
import torch.nn.functional as F
from timm.data.config import resolve_model_data_config
from torch import Tensor

from advcl_hub.data import ImageData
from advcl_hub.errors import reason_of
from advcl_hub.opening import load_model

MAX_PIXELS = 3 * 64 * 64  # values an image: beyond that raw pixels are neither meaningful nor affordable


class Encoder(NamedTuple):
    """Turns uint8 images (B, C, H, W) into float32 features (B, D)."""

    features: Callable[[Tensor], Tensor]
    identity: dict[str, str]  # everything the features depend on: name, weights_sha256, preprocessing


def open_encoder(encoder: str, data: ImageData, device: str | torch.device = "cpu") -> Encoder:
    """Opens what `make_pseudo_labels` calls an encoder; arguments and errors as there."""
    channels, height, width = data.shape
    if encoder == "pixels":
        if channels * height * width > MAX_PIXELS:
            raise ValueError(f"Raw pixels are for small images, got {data.shape}; name a timm encoder.")
        return Encoder(lambda images: images.flatten(1) / 255, _identity("pixels", "none", "pixels / 255"))

    model = _load_network(encoder).to(device)
    config = resolve_model_data_config(model)
    size, mode = config["input_size"], config["interpolation"]
    if size[0] != channels:
        raise ValueError(f"{encoder} takes {size[0]} channels, {data.name} was loaded with {channels}.")
    mode = mode if mode in ("bilinear", "bicubic") else "bicubic"  # timm also knows "random", "lanczos", ...
    mean, std = (torch.tensor(config[key], device=device).view(1, -1, 1, 1) for key in ("mean", "std"))

    def features(images: Tensor) -> Tensor:
        batch = images.to(device) / 255
        if batch.shape[1:] != size:
            batch = F.interpolate(batch, size[1:], mode=mode, antialias=True).clamp(0, 1)
        with torch.autocast(torch.device(device).type, enabled=False):
            output: Tensor = model((batch - mean) / std)
        return output

    name = (
        f"local-dir:{Path(encoder.removeprefix('local-dir:')).resolve().name}" if encoder.startswith("local-dir:") else encoder
    )
    preprocessing = f"{size} {mode}, mean {config['mean']}, std {config['std']}"
    return Encoder(features, _identity(name, _sha256(model.state_dict()), preprocessing))


def _load_network(name: str) -> torch.nn.Module:
    folder = Path(name.removeprefix("local-dir:"))
    if name.startswith("local-dir:"):
        if not folder.is_dir():
            raise FileNotFoundError(f"The encoder {name!r} does not exist: {folder} is not a folder.")
        if not (folder / "model.safetensors").is_file():  # timm would fall back to pickled weights
            raise ValueError(f"{folder} has no model.safetensors; write it with timm.models.save_for_hf.")
    try:
        if Path(name).is_dir() and not timm.is_model(name):
            raise ValueError("a folder needs local-dir: before it")
        # With its head: with num_classes=0 timm would load non-strictly and leave missing weights random.
        model = load_model(name).model
    except Exception as error:  # timm, the Hub client and safetensors share no base class
        raise ValueError(
            f"Cannot open the encoder {name!r} ({reason_of(error, 600).rstrip('.')}). Expected a timm model that has weights "
            "('resnet18.a1_in1k', 'hf-hub:org/name', 'local-dir:FOLDER') or 'pixels'."
        ) from error
    model.reset_classifier(0)  # type: ignore[operator]  # every timm model has it
    return model.eval()


def _identity(name: str, weights_sha256: str, preprocessing: str) -> dict[str, str]:
    return {"encoder": name, "weights_sha256": weights_sha256, "preprocessing": preprocessing}


def _sha256(tensors: Mapping[str, Tensor]) -> str:
    # Not `opening.weights_sha256`, which sorts: the keys of label files that people have cached are made with this one.
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
