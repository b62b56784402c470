"""When to stop: SIGTERM, Ctrl-C, or the end of a time budget."""

import argparse
import signal
import sys
import threading
import time
from types import FrameType, TracebackType
from typing import Self

_UNITS = {"s": 1, "m": 60, "h": 3600}


class StopRequest:
    """A context in which SIGTERM and SIGINT ask for a stop instead of killing; a second SIGINT interrupts as usual.

    In a thread that is not the main one they do what they did: Python lets only the main thread choose.

    Args:
        budget: seconds from now after which a stop is due; None for no limit.
    """

    def __init__(self, budget: float | None = None) -> None:
        self.deadline = None if budget is None else time.monotonic() + budget
        self.signalled = False

    @property
    def requested(self) -> bool:
        """Whether to stop now."""
        return self.signalled or self.remaining <= 0

    @property
    def remaining(self) -> float:
        """Seconds that are left of the budget; infinite without one."""
        return float("inf") if self.deadline is None else self.deadline - time.monotonic()

    def __enter__(self) -> Self:
        signals = (signal.SIGTERM, signal.SIGINT) if threading.current_thread() is threading.main_thread() else ()
        self.previous = {s: signal.signal(s, self._on_signal) for s in signals}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: one that is not Python's

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.signalled and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signalled = True
        print("\nStopping after this step, with a checkpoint.", file=sys.stderr, flush=True)


def duration(text: str) -> float:
    """Seconds from `90s`, `9m` or `2h`; for argparse."""
    try:
        seconds = float(text[:-1]) * _UNITS[text[-1:]]
        if not 0 <= seconds < float("inf"):
            raise ValueError
        return seconds
    except (KeyError, ValueError):
        raise argparse.ArgumentTypeError(f"{text!r} is not a duration such as 90s, 9m or 2h") from None
