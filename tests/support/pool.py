"""Runs a function in several real processes that form one gloo group."""

import os
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn


def run_ranks(function: Callable[..., Any], world: int, *args: Any) -> list[Any]:
    """`function(rank, world, *args)` on every rank; returns what each rank returned (tensors and plain containers)."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        spawn(_main, (world, port, folder, function, args), nprocs=world)
        return [torch.load(Path(folder) / f"{rank}.pt") for rank in range(world)]


def _main(rank: int, world: int, port: int, folder: str, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    assert dist.get_world_size() == world
    torch.save(function(rank, world, *args), Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()
