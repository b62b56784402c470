"""Features of a timm model at its own size and normalisation, from a folder or the Hub; never of random weights."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from tests.hub_server import serve_hub
from tests.small_encoders import blobs, pixels, save_encoder
from train.encoder_features import open_encoder
from train.pseudo_labels import make_pseudo_labels

ROOT = Path(__file__).parents[1]


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


def ask_the_hub(endpoint: str, cache: Path, name: str) -> subprocess.CompletedProcess[str]:
    """Opens an encoder in a process of its own: the Hub client reads its environment when it is imported."""
    program = f"""if True:
        import json, torch
        from tests.small_encoders import blobs
        from train.encoder_features import open_encoder
        data = blobs()
        encoder = open_encoder({name!r}, data)
        with torch.no_grad():
            features = encoder.features(data.images)
        print(json.dumps([encoder.identity, features.tolist()]))
    """
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and not k.lower().endswith("_proxy")}
    environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(cache), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )


def test_an_encoder_on_the_hub_is_the_one_in_the_folder(tmp_path: Path) -> None:
    folder = save_encoder(tmp_path / "hub" / "org" / "tiny")
    with serve_hub(tmp_path / "hub") as endpoint:
        done = ask_the_hub(endpoint, tmp_path / "cache", "hf-hub:org/tiny")
        absent = ask_the_hub(endpoint, tmp_path / "cache", "hf-hub:org/absent")
    assert done.returncode == 0, done.stderr[-3000:]
    identity, features = json.loads(done.stdout.splitlines()[-1])
    data, local = blobs(), open_encoder(f"local-dir:{folder}", blobs())
    assert identity == local.identity | {"encoder": "hf-hub:org/tiny"}
    with torch.no_grad():
        torch.testing.assert_close(torch.tensor(features), local.features(pixels(data)))
    assert "ValueError: Cannot open the encoder 'hf-hub:org/absent'" in absent.stderr


def test_a_hub_that_cannot_be_reached(tmp_path: Path) -> None:
    said = ask_the_hub("http://127.0.0.1:9", tmp_path, "hf-hub:org/tiny").stderr.splitlines()[-1]
    assert said.startswith("ValueError: Cannot open the encoder 'hf-hub:org/tiny'")
