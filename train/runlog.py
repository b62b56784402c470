"""What a run leaves to read and to look at: log.jsonl, TensorBoard, and curves.png."""

import json
import time
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from advcl_hub.files import replacing

LOG = "log.jsonl"


class RunLog:
    """Appends records to log.jsonl and TensorBoard.

    Args:
        folder: the run's folder.
        step: the step that the run starts or continues from. Later records, of a start that was killed, are dropped, and a
            probe at this very step: it is made again.
    """

    def __init__(self, folder: Path, step: int) -> None:
        self.path = folder / LOG
        kept = [r for r in read_log(folder) if r["step"] < step or (r["step"] == step and "probe_robust" not in r)]
        with replacing(self.path) as draft:
            draft.write_text("".join(json.dumps(r) + "\n" for r in kept))
        self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, **values: float) -> None:
        """One record of scalars."""
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **{k: float(f"{v:.6g}") for k, v in values.items()}}) + "\n")
        for name, value in values.items():
            self.board.add_scalar(name, value, step)

    def close(self) -> None:
        self.board.close()


class Meter:
    """Sums losses on the device, so that training need not wait for them, and counts steps and seconds."""

    def __init__(self, device: torch.device) -> None:
        self.sums, self.count = torch.zeros(3, device=device), 0
        self.restart()

    def add(self, losses: Tensor) -> None:
        """Adds one step's losses (3,)."""
        self.sums += losses
        self.count += 1

    def take(self, accelerator: Accelerator) -> tuple[list[float], int, float]:
        """Mean losses over steps and processes, the number of steps, and seconds since the last call; starts anew."""
        means = accelerator.reduce(self.sums / self.count, "mean").tolist()
        taken = means, self.count, time.monotonic() - self.since
        self.sums.zero_()
        self.count = 0
        self.restart()
        return taken

    def restart(self) -> None:
        """Restarts the clock, to leave out what is not training."""
        self.since = time.monotonic()


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The records of a run; a line cut off by a kill is left out."""
    records = []
    path = folder / LOG
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


def save_curves(folder: Path) -> Path:
    """Draws losses, probe accuracies and the learning rate over epochs to curves.png."""
    records = read_log(folder)
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.6), layout="constrained")
    panels = (
        ("loss", ("total", "contrastive", "pseudo_label"), None),
        ("linear probe, held-out images (%)", ("probe_standard", "probe_robust"), 100),
        ("learning rate", ("lr",), None),
    )
    for axis, (title, names, scale) in zip(axes, panels, strict=True):
        for name in names:
            points = [(r["epoch"], r[name] * (scale or 1)) for r in records if name in r]
            if points and (scale or any(value for _, value in points)):  # no curve for a term that is not used
                axis.plot(
                    *zip(*points, strict=True),
                    label=name.replace("probe_", ""),
                    marker="o" if scale else None,
                    ms=4,
                )
        axis.set(title=title, xlabel="epoch")
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend()
        if scale:
            axis.set_ylim(0, 100)
    path = folder / "curves.png"
    with replacing(path) as draft:
        figure.savefig(draft, dpi=110)
    plt.close(figure)
    return path
