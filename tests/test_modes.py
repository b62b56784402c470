"""A caller's modes of torch do not reach what the library computes, and ours do not reach what is computed inside."""

from pathlib import Path

import pytest
import torch
from torch import nn

import advcl_hub
from advcl_hub.modes import as_usual
from advcl_hub.training.runlog import read_log
from tests.support.slow import slow
from tests.support.small_encoders import SMALL_RESNET, export_encoder


def test_autocast_inside_computes_with_the_weights_as_they_are() -> None:
    """torch keeps bfloat16 copies of weights until the outermost autocast ends, which would be ours."""
    layer, images = nn.Linear(1, 1, bias=False), torch.ones(1, 1)
    seen = []
    with as_usual():
        for value in (1.0, 2.0):
            nn.init.constant_(layer.weight, value)
            with torch.autocast("cpu", torch.bfloat16):
                seen.append(layer(images).item())
    assert seen == [1, 2]


def test_a_callers_autocast_and_modes_are_off_and_come_back() -> None:
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        with as_usual():
            made = nn.Linear(2, 2)(torch.ones(1, 2))
            assert made.dtype == torch.float32 and made.requires_grad
        assert torch.is_inference_mode_enabled() and torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize(("protocol", "lr"), [("slf", 0.5), slow("sff", 0.1)])
def test_finetuning_in_bfloat16_learns_as_in_float32(protocol: str, lr: float, tmp_path: Path) -> None:
    """Once it computed with the weights of its first step to the end."""
    encoder = export_encoder(tmp_path / "encoder", **SMALL_RESNET)
    losses = {}
    for precision in ("float32", "bfloat16"):
        output = tmp_path / precision
        advcl_hub.finetune(
            encoder, "digits", protocol, epochs=3, lr=lr, batch_size=64, precision=precision, output=output, cpu=True
        )
        losses[precision] = [record["total"] for record in read_log(output) if "total" in record]
    whole, coarse = losses["float32"], losses["bfloat16"]
    learnt = whole[0] - whole[-1]
    assert learnt > 0.03 and coarse == pytest.approx(whole, abs=learnt / 3)
