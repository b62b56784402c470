"""A progress bar that can also be read in a log file."""

import io
import sys
from typing import Any

from tqdm import tqdm


def progress_bar(**options: Any) -> tqdm:
    """tqdm with ETA on standard error; where that is no terminal, one line at most every half minute.

    Args:
        options: `total`, `initial`, `unit`, `desc`, `bar_format`, `delay`, `disable` of tqdm.
    """
    if sys.stderr.isatty():
        return tqdm(dynamic_ncols=True, mininterval=0.5, **options)
    return tqdm(file=_Lines(), ncols=100, mininterval=30, maxinterval=30, **options)


class _Lines(io.TextIOBase):
    """Standard error for tqdm's texts: each a line, instead of all on one line that overwrites itself."""

    def write(self, text: str) -> int:
        if line := text.strip():
            print(line, file=sys.stderr, flush=True)
        return len(text)
