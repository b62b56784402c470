"""Seeds that follow from the position in a run, so that a checkpoint needs no random state."""

import numpy as np
import torch
from torch import Tensor

_ORDER, _STEP = 0, 1  # streams of random numbers: the order of an epoch, everything in a step


def mix(*numbers: int) -> int:
    """A well-mixed seed of several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


def epoch_order(images: int, seed: int, epoch: int) -> Tensor:
    """The order, int64 (images,), in which an epoch takes its images."""
    return torch.randperm(images, generator=torch.Generator().manual_seed(mix(_ORDER, seed, epoch)))


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seeds torch's generators, on all devices, for one step of one process."""
    torch.manual_seed(mix(_STEP, seed, step, rank))
