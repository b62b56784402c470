"""Small encoders to finetune, and a finetuning that takes a second."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import advcl_hub
from advcl_hub.finetuning import Finetuned


@pytest.fixture
def run(resnet: Path, tmp_path: Path) -> Callable[..., Finetuned]:
    """`finetune` of the module's `resnet`, unless told otherwise."""
    quick = {"epochs": 2, "batch_size": 16, "steps": 2, "lr": 0.1}

    def finetune(protocol: str, data: Any = "fake:80", output: str = "run", model: Any = None, **options: Any) -> Finetuned:
        return advcl_hub.finetune(model or resnet, data, protocol, output=tmp_path / output, **{**quick, **options})

    return finetune
