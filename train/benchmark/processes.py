"""Several processes: how the throughput grows with them, and how many bytes a step sends."""

import json
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

from train.benchmark.report import Row, Section
from train.benchmark.step import Contestant, Mode
from train.benchmark.timing import Timing, clock
from train.collectives import Collectives
from train.recipe import Speed

MODE = Mode("bf16", Speed(mixed_precision="bf16", channels_last=True))


def measure(
    model: str, share: int, worlds: list[int], rounds: int, device: torch.device, tell: Callable[[str], None] = print
) -> Section:
    """Steps of 1, 2 ... processes with the same share of images each: a GPU each, or a CPU thread each."""
    rows: list[Row] = []
    for world in worlds:
        name = f"{world} process{'es' if world > 1 else ''}"
        tell(name)
        with tempfile.TemporaryDirectory() as folder:
            spawn(_main, (world, folder, device.type, model, share, rounds), nprocs=world)
            found = json.loads((Path(folder) / "found.json").read_text(encoding="utf-8"))
        timing = Timing.of(found["seconds"])
        alone = rows[0].timing.median if rows else timing.median
        more: dict[str, Any] = {"efficiency": f"{alone / timing.median:.0%}"}
        if world > 1:
            more |= {
                "gradient, MB": found["gradient"] / 1e6,
                "reduced, MB": found["reduced"] / 1e6,
                "gathered, MB": found["gathered"] / 1e6,
                "least to gather, MB": found["least"] / 1e6,
            }
        rows.append(Row(name, timing, world * share, more))
    note = (
        f"{model}, bf16, channels-last, {share} images a process and step, {_backend(device.type)}"
        f"{', one thread a process' if device.type == 'cpu' else ''}. Efficiency: against one process. Bytes are those that a "
        "process gives in a step: to the one all-reduce of the gradient, in buckets, and to the gathers of the contrastive "
        "loss. The least to gather: each projection and each normaliser once when it is new."
    )
    return Section("processes", "Processes, weak scaling", rows, note=note)


def _main(rank: int, world: int, folder: str, kind: str, model: str, share: int, rounds: int) -> None:
    warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
    device = torch.device(kind, rank) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    dist.init_process_group(_backend(kind), init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    images = torch.randint(256, (share, 3, 32, 32), dtype=torch.uint8).to(device)
    contestant = Contestant(MODE, model, images)
    network = contestant.network
    if world > 1:
        contestant.model = DistributedDataParallel(network, broadcast_buffers=False, gradient_as_bucket_view=True)
    for _ in range(3):  # after two steps the gradient's buckets have their final order
        contestant.step()
    with Collectives() as sent, torch.autograd.set_multithreading_enabled(False):
        contestant.step()
    seconds = []
    for _ in range(rounds):
        dist.barrier()
        seconds.append(clock(contestant.step, device))
    clean, attacked, attack, width = 3, 1, network.attack, network.objective.projection_dim  # views of AdvCL's contrastive loss
    new = clean * width + (attack.steps + 1) * (attacked * width + clean + attacked)
    found = {
        "seconds": seconds,
        "gradient": sum(p.nbytes for p in network.parameters()),
        "reduced": sent.bytes.get("allreduce_", 0),
        "gathered": sum(n for name, n in sent.bytes.items() if "gather" in name),
        "least": 4 * share * new,
    }
    if rank == 0:
        (Path(folder) / "found.json").write_text(json.dumps(found), encoding="utf-8")
    dist.destroy_process_group()


def _backend(kind: str) -> str:
    return "nccl" if kind == "cuda" else "gloo"
