"""What a run leaves to read and to look at: log.jsonl, TensorBoard, and curves.png."""

import json
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor

from advcl_hub.files import comfort, parse_json, replacing, write_errors

LOG = "log.jsonl"
_JUDGED = ("probe_", "val_")  # names of what is measured on held-out images begin so


class RunLog:
    """Appends records to log.jsonl and, if it is installed and its files can be written, TensorBoard.

    Args:
        folder: the run's folder.
        step: the step that the run starts or continues from. Later records, of a start that was killed, are dropped, and a
            judgement at this very step: it is made again.
    """

    def __init__(self, folder: Path, step: int) -> None:
        self.path = folder / LOG
        whole = [r for r in read_log(folder) if isinstance(r.get("step"), int)]
        kept = [r for r in whole if r["step"] < step or (r["step"] == step and not _is_judgement(r))]
        with replacing(self.path) as draft:
            draft.write_text("".join(json.dumps(r) + "\n" for r in kept), encoding="utf-8")
        self.board: Any = None
        with _board():
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, **values: float) -> None:
        """One record of scalars. Raises OSError if log.jsonl cannot be written."""
        with write_errors(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **{k: float(f"{v:.6g}") for k, v in values.items()}}) + "\n")
        board, self.board = self.board, None  # one that failed stays closed
        with _board():
            for name, value in values.items() if board else ():
                board.add_scalar(name, value, step)
            self.board = board

    def close(self) -> None:
        """Writes what is left for TensorBoard."""
        if self.board:
            with _board():
                self.board.close()


def _board() -> AbstractContextManager[None]:
    return comfort("TensorBoard's log", errors=Exception)


class Meter:
    """Sums losses on the device, so that training need not wait for them, and counts steps and seconds."""

    def __init__(self, device: torch.device, losses: int) -> None:
        self.sums, self.count = torch.zeros(losses, device=device), 0
        self.restart()

    def add(self, losses: Tensor) -> None:
        """Adds one step's losses."""
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


def _is_judgement(record: dict[str, Any]) -> bool:
    return any(name.startswith(_JUDGED) for name in record)


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The records of a run; a line cut off by a kill, or damaged, is left out."""
    records = []
    path = folder / LOG
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            record = parse_json(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            records.append(record)
    return records


class Panel(NamedTuple):
    """One diagram of curves.png: a title and the names of the values; shares of one are shown in percent, from 0 to 100."""

    title: str
    names: tuple[str, ...]
    percent: bool = False


def save_curves(folder: Path, panels: Sequence[Panel]) -> Path:
    """Draws values of the log over epochs to curves.png.

    Raises:
        OSError: it cannot be written.
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure  # without pyplot, which chooses a backend for the whole process

    from advcl_hub.training.pictures import save_figure

    records = read_log(folder)
    figure = Figure(figsize=(4.4 * len(panels), 3.6), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)
    for axis, panel in zip(axes[0], panels, strict=True):
        for name in panel.names:
            points = [(r["epoch"], r[name] * (100 if panel.percent else 1)) for r in records if name in r]
            if points and (panel.percent or any(value for _, value in points)):  # no curve for a term that is not used
                rare = name.startswith(_JUDGED)
                label = name.removeprefix("probe_").replace("_", " ")
                axis.plot(*zip(*points, strict=True), label=label, marker="o" if rare else None, ms=4)
        axis.set(title=panel.title, xlabel="epoch")
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend()
        if panel.percent:
            axis.set_ylim(0, 100)
    return save_figure(figure, folder / "curves.png")
