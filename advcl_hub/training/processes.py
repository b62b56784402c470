"""Several processes that share one task (torchrun, accelerate launch), and the device that each computes on."""

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed

from advcl_hub.errors import need, reason_of


def join(device: str | torch.device | None) -> torch.device:
    """Joins the other processes that a launcher has started, if any, and says which device this one computes on.

    Args:
        device: as the user asked; None takes a GPU if there is one. Of several processes each takes a GPU of its own.

    Raises:
        ValueError: no such device, or one device for several processes.
        ImportError: a launcher was used and accelerate is not installed.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return choose(device)
    need("accelerate", "Sharing work among processes", "eval")
    from accelerate import PartialState

    if str(device) not in ("None", "cpu", "cuda"):
        raise ValueError(f"The device {device} cannot be shared by several processes: leave it out, or say cpu.")
    from advcl_hub.training.ambient import hidden_variables

    # One batch of Square may take hours while the others wait; what waits for ever is killed by hand.
    with hidden_variables():  # ACCELERATE_TORCH_DEVICE would give all of them one device
        return PartialState(cpu=str(device) == "cpu" or not torch.cuda.is_available(), timeout=timedelta(days=30)).device


def leave() -> None:
    """Ends the work with other processes, if there are any: threads of the group must not outlive the interpreter."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def choose(device: str | torch.device | None) -> torch.device:
    """The device asked for, by default a GPU if there is one.

    Raises:
        ValueError: no such device.
    """
    try:
        chosen = torch.device(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu")
        torch.empty(1, device=chosen)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"The device {device} cannot be used: {reason_of(error)}") from None
    return chosen


@dataclass(frozen=True)
class Processes:
    """Who shares the work: this process is number `rank` of `count`."""

    rank: int = 0
    count: int = 1

    @staticmethod
    def current() -> "Processes":
        """The processes of torch.distributed's default group, or this one alone."""
        if not torch.distributed.is_initialized():
            return ALONE
        return Processes(torch.distributed.get_rank(), torch.distributed.get_world_size())

    def gather(self, part: Any) -> list[Any]:
        """Every process's part, in order of rank, in every process."""
        if self.count == 1:
            return [part]
        parts: list[Any] = [None] * self.count
        torch.distributed.all_gather_object(parts, part)
        return parts

    def wait(self) -> None:
        """Waits for all of them."""
        self.gather(None)


ALONE = Processes()
