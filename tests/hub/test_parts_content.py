"""Weights that are joined are those that were exported, to the bit."""

from pathlib import Path

import torch
from safetensors.torch import save_file

from advcl_hub.files import file_sha256
from advcl_hub.hub.parts import contains, join


def test_zeros_of_different_sign_are_different_weights() -> None:
    zero = {"w": torch.tensor([0.0, 1.0])}
    assert contains(zero, {"w": torch.tensor([0.0, 1.0])})
    assert not contains(zero, {"w": torch.tensor([-0.0, 1.0])})


def test_a_joined_file_that_was_damaged_is_made_again(tmp_path: Path) -> None:
    part, whole = tmp_path / "part.safetensors", tmp_path / "home" / "model.safetensors"
    save_file({"w": torch.arange(4.0)}, part, metadata={"format": "pt"})
    sha256 = file_sha256(part)  # of one part, the whole is the same file
    assert file_sha256(join([part], whole, sha256)) == sha256
    whole.write_bytes(whole.read_bytes()[:-1] + b"x")
    assert file_sha256(join([part], whole, sha256)) == sha256
