"""The stages of train.flagship as forks of it: `python tests/support/forked.py ARGUMENTS` in a process of tests.support.warm.

Each stage is a process of its own, with the group and the locks that it inherits; only its libraries are imported already.
"""

import atexit
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from tests.support import warm
from train import flagship, processes


class Popen:
    """What `subprocess.Popen(command, stdout=PIPE, stderr=STDOUT, text=True, ...)` offers `train.processes`."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str], pass_fds: Sequence[int], **given: Any) -> None:
        reading, writing = os.pipe()
        sys.stdout.flush()
        self.args = command
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            os._exit(_stage(list(command[1:]), env, writing))
        os.close(writing)
        self.stdout = open(reading, encoding="utf-8", errors="replace")  # noqa: SIM115  # as long as it lives

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, timeout: float = float("inf")) -> int:
        end = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired(self.args, timeout)
            time.sleep(0.01)
        return code

    def kill(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)

    def terminate(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGTERM)


def _stage(arguments: list[str], environment: Mapping[str, str], output: int) -> int:
    """Does in a fork what `python ARGUMENTS` does; returns its exit status."""
    atexit._clear()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for stream in (1, 2):
        os.dup2(output, stream)
    os.close(output)
    warm.open_streams()
    warm.enter(environment)
    code: Any = 0
    try:
        warm.interpret(arguments)
    except SystemExit as end:
        code = end.code
    except BaseException:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        code = 1
    if not isinstance(code, int | None):
        print(code, file=sys.stderr)
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    return code or 0


if __name__ == "__main__":
    setattr(processes, "subprocess", SimpleNamespace(**vars(subprocess) | {"Popen": Popen}))  # noqa: B010  # in this process
    flagship.main()
