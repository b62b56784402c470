"""Features of a timm model at its own size and normalisation, from a folder or the Hub; never of random weights."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from advcl_hub.pretraining.encoder_features import open_encoder
from advcl_hub.pretraining.pseudo_labels import make_pseudo_labels
from tests.support.hub_client import nobody, open_client
from tests.support.hub_server import Hub
from tests.support.small_encoders import blobs, pixels, save_encoder


def test_encoder_gets_its_own_size_and_normalisation(tmp_path: Path) -> None:
    config: dict[str, Any] = {"mean": (0.1, 0.2, 0.3), "std": (0.5, 0.25, 2.0), "input_size": (3, 8, 8)}
    folder = save_encoder(tmp_path / "encoder", **config)
    model = timm.create_model("test_resnet", num_classes=5, checkpoint_path=str(folder / "model.safetensors"))
    data = blobs()
    encoder = open_encoder(f"local-dir:{folder}", data)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = encoder.features(pixels(data))
    mean, std = (torch.tensor(config[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    model.reset_classifier(0)
    with torch.no_grad():
        expected = model.eval()((pixels(data) / 255 - mean) / std)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected)
    assert encoder.identity["encoder"] == "local-dir:encoder"  # no folder of this machine

    large = replace(data, images=pixels(data).repeat_interleave(4, 2).repeat_interleave(4, 3))
    with torch.no_grad():
        shrunk = open_encoder(f"local-dir:{folder}", large).features(pixels(large))
    assert torch.nn.functional.cosine_similarity(shrunk, expected).min() > 0.98


def test_missing_weights_are_refused_instead_of_left_random(tiny_encoder: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_bytes((tiny_encoder / "config.json").read_bytes())
    tensors = load_file(tiny_encoder / "model.safetensors")
    tensors.pop(next(key for key in tensors if key.endswith("conv1.weight")))
    save_file(tensors, broken / "model.safetensors")
    with pytest.raises(ValueError, match=r"Cannot open the encoder.*Missing key"):
        open_encoder(f"local-dir:{broken}", blobs())


def test_encoder_errors(tmp_path: Path, tiny_encoder: Path) -> None:
    data = blobs()
    with pytest.raises(ValueError, match="Cannot open the encoder 'resnet18_nonsense'"):
        open_encoder("resnet18_nonsense", data)
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        open_encoder(f"local-dir:{tmp_path / 'absent'}", data)
    with pytest.raises(ValueError, match=r"Cannot open the encoder .* \(a folder needs local-dir: before it\)"):
        open_encoder(str(tiny_encoder), data)
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(ValueError, match=r"no model\.safetensors"):
        open_encoder(f"local-dir:{pickled}", data)
    with pytest.raises(ValueError, match="3 channels, blobs was loaded with 1"):
        open_encoder(f"local-dir:{tiny_encoder}", replace(data, images=pixels(data)[:, :1]))
    with pytest.raises(ValueError, match="small images"):
        open_encoder("pixels", replace(data, images=torch.zeros(60, 3, 65, 64, dtype=torch.uint8)))
    overflow = save_encoder(tmp_path / "overflow", std=(1e-45, 1e-45, 1e-45))
    with pytest.raises(ValueError, match="finite"):
        make_pseudo_labels(data, f"local-dir:{overflow}", (2,))


def opened(name: str) -> tuple[dict[str, str], Tensor]:
    """An encoder's identity and features; called in a process of its own, as the Hub client reads its addresses at import."""
    data = blobs()
    encoder = open_encoder(name, data)
    with torch.no_grad():
        return encoder.identity, encoder.features(pixels(data))


def test_an_encoder_on_the_hub_is_the_one_in_the_folder(tmp_path: Path) -> None:
    folder = save_encoder(tmp_path / "tiny")
    with Hub().serve() as hub, open_client(hub, tmp_path / "home") as client:
        hub.add("org/tiny", {path.name: path.read_bytes() for path in folder.iterdir()})
        identity, features = client(opened, "hf-hub:org/tiny", token=None)
        with pytest.raises(ValueError, match="Cannot open the encoder 'hf-hub:org/absent'"):
            client(opened, "hf-hub:org/absent", token=None)
    expected, local = opened(f"local-dir:{folder}")
    assert identity == expected | {"encoder": "hf-hub:org/tiny"}
    torch.testing.assert_close(features, local)


def test_a_hub_that_cannot_be_reached(tmp_path: Path) -> None:
    said = "Cannot open the encoder 'hf-hub:org/tiny'"
    with open_client(nobody(), tmp_path / "home") as client, pytest.raises(ValueError, match=said):
        client(opened, "hf-hub:org/tiny", token=None)
