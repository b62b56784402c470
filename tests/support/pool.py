"""Runs a function in several real processes that form one gloo group."""

import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes

from tests.support import warm  # and the processes are forks of its server


def run_ranks(function: Callable[..., Any], world: int, *args: Any) -> list[Any]:
    """`function(rank, world, *args)` on every rank; returns what each rank returned (tensors and plain containers)."""
    with tempfile.TemporaryDirectory() as folder:
        start_processes(_main, (world, folder, function, args), nprocs=world, start_method="forkserver")
        return [torch.load(Path(folder) / f"{rank}.pt") for rank in range(world)]


def _main(rank: int, world: int, folder: str, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    place = {"init_method": f"file://{folder}/store", "rank": rank, "world_size": world}
    dist.init_process_group("gloo", timeout=timedelta(seconds=warm.PATIENCE), **place)
    torch.save(function(rank, world, *args), Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()
