"""Numbers of the published AdvCL step, and how to rebuild the inputs that gave them."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

_FILE = Path(__file__).with_name("official_step.safetensors")
KS = (2, 10, 50, 100, 500)


def load_golden() -> dict[str, Tensor]:
    """Every number measured with the published implementation (float64, one process, CPU)."""
    return load_file(_FILE)


def ramp(shape: tuple[int, ...], key: str) -> Tensor:
    """Repeatable pseudo-random numbers in [0, 1), float64: frac(|sin(12.9898 i + 78.233 h(key))| * 43758.5453)."""
    count = int(torch.Size(shape).numel())
    h = sum((i + 1) * ord(c) for i, c in enumerate(key)) % 1000
    i = torch.arange(count, dtype=torch.float64)
    return ((12.9898 * i + 78.233 * h).sin().abs() * 43758.5453).frac().reshape(shape)


def published_state(shapes: dict[str, torch.Size]) -> dict[str, Tensor]:
    """The published network's weights, by key and shape; counters (`num_batches_tracked`) are 0."""
    state = {}
    for key, shape in shapes.items():
        if key.endswith("num_batches_tracked"):
            state[key] = torch.zeros(shape, dtype=torch.int64)
            continue
        u = 2 * ramp(tuple(shape), key) - 1
        if key.endswith("running_mean"):
            value = 0.1 * u
        elif key.endswith("running_var"):
            value = 1 + 0.5 * u
        elif key.endswith("bias"):
            value = 0.1 * u
        elif u.ndim == 1:
            value = 1 + 0.2 * u
        else:
            value = 1.2 * (3 / u[0].numel()) ** 0.5 * u
        state[key] = value.float().double()
    return state
