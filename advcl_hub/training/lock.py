"""One training at a time in a folder."""

import atexit
import contextlib
import os
from pathlib import Path
from typing import TextIO

from advcl_hub.files import lock, warn_once, write_errors

FILE = ".lock"  # in the run's folder, while a training is at work there
_TRIES = 10  # some file systems never give a file the same number twice
_held: dict[Path, TextIO] = {}  # of this process, which runs one training after the other


class RunLock:
    """The lock of a run's folder: no other process trains there until `release`, or until this process ends.

    A run of the same process that was given up without `release` hands its lock on.

    Args:
        folder: is made if there is none.

    Raises:
        ValueError: another process trains there.
        OSError: the folder cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        with write_errors(folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            for _ in range(_TRIES):
                if self.folder in _held:
                    return
                file = (self.folder / FILE).open("a", encoding="utf-8")
                if not lock(file):
                    file.close()
                    raise ValueError(f"Another process trains in {folder}: wait for it, or choose another output.")
                if _is_at(file, self.folder / FILE):
                    _held[self.folder] = file
                    return
                file.close()  # between opening and locking, the one before removed it
            warn_once("lock", f"{self.folder / FILE} cannot be locked: do not start the same work twice.")

    def release(self) -> None:
        """Lets others train in the folder."""
        file = _held.pop(self.folder, None)
        if file is None:
            return
        with contextlib.suppress(OSError):  # a file that stays locks nobody out
            (self.folder / FILE).unlink()
        file.close()


def _is_at(file: TextIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


@atexit.register
def _remove_all() -> None:
    """At the end of the process: what runs that were given up have left."""
    for folder, file in _held.items():
        with contextlib.suppress(OSError):
            (folder / FILE).unlink()
        file.close()


def _forget() -> None:
    """In a forked process, such as one that decodes images: the lock ends with its parent."""
    for file in _held.values():
        file.close()
    _held.clear()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_forget)
