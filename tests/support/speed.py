"""What tests of speed share: is there a compiler, how does a network lie in memory."""

import shutil

import pytest
import torch
from torch import nn

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on a CPU needs g++")


def channels_last(network: nn.Module) -> bool:
    """How all weights of the 3x3 convolutions lie (those of 1x1 lie both ways)."""
    weights = [m.weight for m in network.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    (found,) = {weight.is_contiguous(memory_format=torch.channels_last) for weight in weights}
    return found
