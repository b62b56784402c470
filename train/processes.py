"""Commands as processes of their own: shown, logged, and stopped when their time is over."""

import contextlib
import os
import shlex
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Protocol

_GRACE = 30.0  # seconds that a command has to write its checkpoint
_TAIL = 60  # lines that may say why a command failed


class Stop(Protocol):
    """When to end a command; see `advcl_hub.training.stop.StopRequest`."""

    @property
    def requested(self) -> bool:
        """Whether to stop now."""

    @property
    def remaining(self) -> float:
        """Seconds that are left; infinite without a limit."""


class StageError(Exception):
    """A command that failed: why, and what to do."""


def run_command(
    command: Sequence[str], log: Path, stop: Stop, environment: Mapping[str, str], keep_open: Sequence[int] = ()
) -> None:
    """Runs a command to its end, or until a stop is requested: then it gets SIGTERM, and half a minute later SIGKILL.

    Args:
        command: words; the first is the program.
        log: what the command prints is appended here, too.
        stop: when to end it.
        environment: variables that it gets besides ours.
        keep_open: file descriptors that it inherits, such as that of a lock.

    Raises:
        StageError: it failed for another reason than a stop; the message names its last error.
    """
    shown = f"$ {shlex.join(['python' if command[0] == sys.executable else command[0], *command[1:]])}"
    print(shown, flush=True)
    log.parent.mkdir(parents=True, exist_ok=True)
    tail: deque[str] = deque(maxlen=_TAIL)
    with log.open("a", encoding="utf-8") as file:
        file.write(f"{shown}\n")
        process = subprocess.Popen(
            command,
            env=os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"} | dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
            errors="replace",
            pass_fds=tuple(keep_open) if os.name == "posix" else (),
        )
        assert process.stdout is not None
        reader = threading.Thread(target=_copy, args=(process.stdout, file, tail), daemon=True)
        reader.start()
        try:
            stopped = _wait(process, stop)
        except BaseException:
            process.kill()
            raise
        finally:
            process.wait()
            reader.join(timeout=5)  # a worker of the command may hold its output open
    if process.returncode and not stopped:
        raise StageError(_reason(process.returncode, list(tail), log))


def _wait(process: "subprocess.Popen[str]", stop: Stop) -> bool:
    """Waits for the end of a process. Returns whether it was stopped, by us or by a signal to both processes."""
    stopping = False
    while True:
        try:
            process.wait(timeout=_GRACE if stopping else min(0.2, max(0.0, stop.remaining)))
            return stopping or stop.requested
        except subprocess.TimeoutExpired:
            if stopping:
                process.kill()
            elif stop.requested:
                stopping = True
                process.terminate()


def _copy(source: IO[str], file: IO[str], tail: "deque[str]") -> None:
    """Shows and logs lines as they come; reads on where that fails, or the command would wait for ever."""
    for line in source:
        tail.append(line.strip())
        with contextlib.suppress(OSError, ValueError):
            file.write(line)
            file.flush()
        with contextlib.suppress(OSError, ValueError):
            print(line, end="", flush=True)


def _reason(code: int, tail: list[str], log: Path) -> str:
    """Why a command failed, and what to do, from the last lines that it printed."""
    lines = [line for line in tail if line]
    errors = [line.partition(": ")[2] for line in lines if line.lower().startswith("error: ")]
    if any("out of memory" in line.lower() for line in lines):
        reason = f"{(errors or lines)[-1].rstrip('.')}. Lower its batch size in the plan, in a new folder"
    elif errors:
        reason = errors[-1].rstrip(".")
    elif code == -9:
        reason = "The system killed it, most likely for memory: free some, or lower its batch size in the plan, in a new folder"
    else:
        last = f"its last line is {lines[-1]!r}" if lines else "it printed nothing"
        reason = f"exit code {code}; {last}. To look closer, type its command alone (after the last $ in {log})"
    return f"{reason}. The same call tries it again."
