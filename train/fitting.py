"""Whether a finetuning fits its share of a plan: its own log tells, while it runs."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from advcl_hub.training.runlog import read_log
from advcl_hub.training.stop import StopRequest

_SURE = 10.0  # seconds of training after the first record in the log, after which its pace is known


class FitRequest(StopRequest):
    """The stop request of a call, due also when a training turns out to be too long for its share.

    Nothing is stopped to measure: starting a process costs more, on a fast device, than all epochs of a linear head.

    Args:
        stop: of the call.
        training: folder with the log of the training. What is in it now was trained in an earlier call.
        epochs: that the training was asked for.
        share: seconds for all of it, starts of processes included.

    Attributes:
        fits: number of epochs that fit; None as long as that is not known.
    """

    def __init__(self, stop: StopRequest, training: Path, epochs: int, share: float) -> None:
        super().__init__(share)
        self.stop, self.training, self.epochs, self.share = stop, training, epochs, share
        self.before = _seconds(read_log(training))
        self.fits: int | None = None

    @property
    def requested(self) -> bool:
        """Whether to stop now."""
        if self.fits is None:
            spent = self.share - super().remaining + self.before
            self.fits = fitting_epochs(read_log(self.training), self.epochs, self.share, spent)
        return self.stop.requested or self.too_long

    @property
    def too_long(self) -> bool:
        """Whether it is known that not all epochs fit."""
        return self.fits is not None and self.fits < self.epochs

    @property
    def remaining(self) -> float:
        """Seconds that are left to the call."""
        return self.stop.remaining


def fitting_epochs(records: Sequence[Mapping[str, Any]], epochs: int, share: float, spent: float) -> int | None:
    """How many epochs of a training fit into its share.

    Args:
        records: of its log so far; those with `seconds` tell the `epoch` that was reached by then.
        epochs: that it was asked for.
        share: seconds for all of it, the start of its process included.
        spent: seconds that it has taken so far, the start included.

    Returns:
        `epochs` if all fit when it goes on, fewer to begin anew with if they do not, None as long as the log does not tell.
    """
    timed = [record for record in records if record.get("seconds")]
    if len(timed) < 2:
        return None
    first, last = timed[0], timed[-1]  # the first steps are slower: they choose algorithms
    seconds, done = last["seconds"] - first["seconds"], last["epoch"] - first["epoch"]
    if seconds < min(_SURE, share / 10) or done <= 0:
        return None
    pace, start_up = seconds / done, max(0.0, spent - last["seconds"])
    fewer = max(1, min(epochs - 1, int((share - spent - start_up) / pace)))
    # What is trained is worth a tenth more than the share, and is not thrown away for what takes as long.
    enough = max(share * 1.1 - spent, start_up + fewer * pace)
    return epochs if pace * (epochs - last["epoch"]) <= enough else fewer


def _seconds(records: Sequence[Mapping[str, Any]]) -> float:
    """Seconds of training in a log."""
    return max((float(record.get("seconds") or 0) for record in records), default=0.0)
