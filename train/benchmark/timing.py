"""Clocks for functions that are compared: time with its spread, floating-point operations, memory, the device's own limits."""

import ctypes
import gc
import math
import re
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

_SHORTEST = 0.05  # seconds: what is faster is run several times a sample


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: the median of all samples, the shortest and the longest."""

    median: float
    low: float
    high: float

    @staticmethod
    def of(samples: list[float]) -> "Timing":
        """The summary of some samples."""
        return Timing(statistics.median(samples), min(samples), max(samples))


def race(
    contestants: Mapping[str, Callable[[], Any]],
    device: torch.device,
    rounds: int,
    warm_up: int = 1,
    tell: Callable[[str], None] = lambda text: None,
) -> dict[str, Timing]:
    """Times functions in turns, so that a machine which changes its speed changes it for all of them.

    Args:
        contestants: functions by name.
        device: waited for before the clock is read.
        rounds: samples of each.
        warm_up: calls of each before; the first compiles, fills caches and chooses algorithms.
        tell: hears what is being done.
    """
    repeats: dict[str, int] = {}
    for name, run in contestants.items():
        tell(name)
        seconds = math.inf
        for _ in range(warm_up):
            seconds = clock(run, device)
        if _SHORTEST < seconds < 5:  # the first call of something fast may have been slow
            seconds = clock(run, device)
        repeats[name] = 1 if seconds > _SHORTEST else math.ceil(_SHORTEST / max(seconds, 1e-6))
    samples: dict[str, list[float]] = {name: [] for name in contestants}
    for i in range(rounds):
        for name, run in contestants.items():
            tell(f"round {i + 1} of {rounds}: {name}")
            samples[name].append(clock(run, device, repeats[name]))
    return {name: Timing.of(seconds) for name, seconds in samples.items()}


def clock(run: Callable[[], Any], device: torch.device, repeats: int = 1) -> float:
    """Seconds of one call, the mean over some."""
    _wait(device)
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    _wait(device)
    return (time.perf_counter() - start) / repeats


def count_flops(run: Callable[[], Any]) -> int:
    """Floating-point operations of the matrix products and convolutions in a call, by torch's formulas; eager code only."""
    with _Flops() as counter, torch.autograd.set_multithreading_enabled(False):
        run()
    return counter.total


class _Flops(TorchDispatchMode):
    """torch's FlopCounterMode without its hooks on modules, which do not bear `autograd.grad` with respect to the images."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if formula := flop_registry.get(func._overloadpacket):
            self.total += formula(*args, **(kwargs or {}), out_val=result)
        return result


def peak_memory(run: Callable[[], Any], device: torch.device) -> int | None:
    """The most bytes that a call holds above what was held before it; None where the system does not tell.

    On a GPU what tensors take; on a CPU the resident memory of the process (Linux).
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # else freed memory that the process keeps would be used unseen
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the high-water mark falls to what is resident now
        before = _status("VmRSS")
        run()
        return max(0, _status("VmHWM") - before)
    except OSError:
        return None


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of torch's matrix product, the best of some sizes: what the device can reach."""
    best = 0.0
    for size in (4096, 8192) if device.type == "cuda" else (1024, 2048):
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        seconds = race({"": partial(torch.matmul, a, b)}, device, rounds=5, warm_up=2)[""].low
        best = max(best, 2 * size**3 / seconds)
    return best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _status(key: str) -> int:
    found = re.search(rf"^{key}:\s+(\d+) kB$", Path("/proc/self/status").read_text(encoding="utf-8"), re.MULTILINE)
    if found is None:
        raise OSError(f"/proc/self/status has no {key}")
    return 1024 * int(found[1])
