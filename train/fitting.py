"""Whether a finetuning fits its share of a plan: its own log tells, while it runs."""

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from advcl_hub.training.runlog import read_log
from advcl_hub.training.stop import StopRequest

_SURE = 10.0  # seconds of training after the first record in the log, after which its pace is known


class FitWatch:
    """When to stop a training: when its call has used its time, or when it turns out that not all epochs fit into its share.

    Nothing is stopped to measure: starting a process costs more, on a fast device, than all epochs of a linear head.

    Args:
        stop: of the call.
        training: folder with the log of the training. What is in it now was trained in an earlier call.
        epochs: that the training was asked for.
        share: seconds for all of it, starts of processes included.
        before: folders with the logs of trainings that come before it in the same command, and are not repeated.

    Attributes:
        fits: number of epochs that fit; None as long as that is not known.
    """

    def __init__(self, stop: StopRequest, training: Path, epochs: int, share: float, before: Sequence[Path] = ()) -> None:
        self.stop, self.training, self.epochs, self.share, self.before = stop, training, epochs, share, before
        self.began, self.trained = time.monotonic(), trained_seconds(training)
        self.earlier = self.trained + self._seconds_before()
        self.fits: int | None = None

    @property
    def requested(self) -> bool:
        """Whether to stop now."""
        self._look()
        return self.stop.requested or self.too_long

    @property
    def remaining(self) -> float:
        """Seconds that are left to the call."""
        return self.stop.remaining

    @property
    def too_long(self) -> bool:
        """Whether it is known that not all epochs fit."""
        return self.fits is not None and self.fits < self.epochs

    def _look(self) -> None:
        """Reads the log until it tells how many epochs fit; that is decided once, and only by what this call trains."""
        if self.fits is None and trained_seconds(self.training) > self.trained:
            spent = time.monotonic() - self.began + self.earlier
            records = timed_records(self.training)
            self.fits = fitting_epochs(records, self.epochs, self.share, spent, self._seconds_before())

    def _seconds_before(self) -> float:
        return sum(map(trained_seconds, self.before))


def fitting_epochs(
    records: Sequence[Mapping[str, float]], epochs: int, share: float, spent: float, once: float = 0.0
) -> int | None:
    """How many epochs of a training fit into its share.

    Args:
        records: of its log so far, from `timed_records`.
        epochs: that it was asked for.
        share: seconds for all of it, the start of its process included.
        spent: seconds that it has taken so far, the start included.
        once: of the seconds spent, those that need not be spent again by a new run with fewer epochs.

    Returns:
        `epochs` if all fit when it goes on, fewer to begin anew with if they do not, None as long as the log does not tell.
    """
    if len(records) < 2:
        return None
    first, last = records[0], records[-1]  # the first steps are slower: they choose algorithms
    seconds, done = last["seconds"] - first["seconds"], last["epoch"] - first["epoch"]
    if seconds < min(_SURE, share / 10) or done <= 0:
        return None
    pace, start_up = seconds / done, max(0.0, spent - last["seconds"] - once)
    fewer = max(1, min(epochs - 1, int((share - spent - start_up) / pace)))
    # A training may exceed its share by a tenth, and goes on if a new run with fewer epochs would take as long as to finish it.
    enough = max(share * 1.1 - spent, start_up + fewer * pace)
    return epochs if pace * (epochs - last["epoch"]) <= enough else fewer


def timed_records(folder: Path) -> list[dict[str, Any]]:
    """The records of a run's log that tell an `epoch` and the `seconds` of training until then; none if it cannot be read."""
    try:
        return [record for record in read_log(folder) if all(map(_is_number, (record.get("epoch"), record.get("seconds"))))]
    except (OSError, UnicodeDecodeError):
        return []


def trained_seconds(folder: Path) -> float:
    """Seconds of training in a run's log."""
    return max((float(record["seconds"]) for record in timed_records(folder)), default=0.0)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
