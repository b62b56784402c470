"""What an evaluation has measured so far, batch by batch, so that it can be killed at any moment and go on exactly."""

import contextlib
import json
import shutil
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from advcl_hub.files import check_writable, lock, parse_json, sync, write_errors
from advcl_hub.training.processes import Processes

Payload = dict[str, list[Any]]


def _is_result(entry: Mapping[str, Any]) -> bool:
    """Whether the line of a unit has what a unit needs."""
    unit, payload, seconds = (entry.get(key) for key in ("unit", "payload", "seconds"))
    lists = isinstance(payload, dict) and all(isinstance(column, list) for column in payload.values())
    return isinstance(unit, str) and lists and isinstance(seconds, int | float)


def _entries(content: bytes) -> Iterator[tuple[dict[str, Any], int]]:
    """Each line with the place where it ends, up to the first one that a kill cut short or that is damaged."""
    end = 0
    for line in content.splitlines(keepends=True):
        try:
            entry = parse_json(line)
        except ValueError:
            return
        if not isinstance(entry, dict) or ("unit" in entry and not _is_result(entry)):
            return
        end += len(line)
        yield entry, end


class Journal:
    """Results by unit of work (`STAGE/BATCH`), one JSON line each, written the moment they are known.

    Every process of a run appends to a file of its own and reads all of them, so that a run may go on with another number of
    processes. A last line that a kill cut short is dropped, and a damaged line with what follows it: that is measured again.

    Args:
        folder: where the files are; None keeps the results in memory only.
        header: what decides the results. A journal with another header is not continued.
        processes: who shares the work.

    Raises:
        ValueError: the folder holds an unfinished evaluation of something else, or another process is at work in it.
        OSError: the folder cannot be written.
    """

    def __init__(self, folder: Path | None, header: Mapping[str, Any], processes: Processes) -> None:
        self.folder, self.processes = folder, processes
        self.units, self.seconds, self.earlier_seconds = dict[str, Payload](), 0.0, 0.0
        self.file: TextIO | None = None
        self.full = False  # whether the file takes no more
        if folder is None:
            return
        check_writable(folder)
        header = json.loads(json.dumps(header))
        for path in sorted(folder.glob("*.jsonl")):
            self._read(path, header)
        processes.wait()  # nobody writes before all have read
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{processes.rank}.jsonl"
        with write_errors(path):
            self.file = path.open("a", encoding="utf-8")
            if not lock(self.file):
                raise ValueError(
                    f"Another process is evaluating into {folder.parent}: wait for it, or choose another --output."
                )
            content = path.read_bytes()
            whole = max((end for _, end in _entries(content) if content[:end].endswith(b"\n")), default=0)
            if whole < len(content):
                self.file.truncate(whole)
            if not whole:
                self._append({"header": header})

    def _read(self, path: Path, header: Mapping[str, Any]) -> None:
        content = path.read_bytes()
        entries = [entry for entry, _ in _entries(content)]
        if not entries and b"\n" in content:
            entries = [{}]  # its first line, which says of what it is, is damaged: refused
        for number, entry in enumerate(entries):
            if number == 0 and entry.get("header") != header:
                earlier = entry.get("header")
                differing = [k for k in header if not isinstance(earlier, dict) or earlier.get(k) != header[k]]
                raise ValueError(
                    f"{path.parent} holds an unfinished evaluation with another {', '.join(differing) or 'format'}. "
                    "Repeat its command to finish it, choose another --output, or remove that folder."
                )
            if "unit" in entry:
                self.units[entry["unit"]] = entry["payload"]
                self.earlier_seconds += entry["seconds"]

    def _append(self, entry: Mapping[str, Any]) -> None:
        assert self.file is not None
        self.file.write(json.dumps(entry) + "\n")
        self.file.flush()
        sync(self.file)

    def write(self, unit: str, payload: Payload, seconds: float) -> None:
        """Keeps the result of one unit, on disk at once.

        When the disk does not take it there is one warning, and this and what follows is kept in memory alone.
        """
        self.units[unit] = payload
        self.seconds += seconds
        if self.file is None or self.full:
            return
        try:
            self._append({"unit": unit, "seconds": round(seconds, 3), "payload": payload})
        except OSError as error:
            self.full = True  # after half a line nothing may follow
            warnings.warn(
                f"{self.file.name} could not be written ({error.strerror}): the evaluation goes on, but what it measures from "
                "now on is lost if it is stopped.",
                stacklevel=2,
            )

    def exchange(self, units: list[str]) -> None:
        """After every process has done its share of `units`: all of them know all results."""
        for part in self.processes.gather({unit: self.units[unit] for unit in units if unit in self.units}):
            self.units.update(part)

    def total_seconds(self) -> float:
        """Time spent on all units by all processes, in this run and before it was cut off."""
        return self.earlier_seconds + sum(self.processes.gather(self.seconds))

    def close(self) -> None:
        """Closes this process's file; what it holds stays."""
        if self.file is not None:
            with contextlib.suppress(OSError):  # of which `write` has warned
                self.file.close()
            self.file = None

    def remove(self) -> None:
        """Deletes the files: the results are stored elsewhere now."""
        self.close()
        self.processes.wait()  # an open file cannot be removed everywhere
        if self.folder is not None and self.processes.rank == 0:
            shutil.rmtree(self.folder, ignore_errors=True)
