"""The stages of train.flagship as forks of it: `python tests/support/forked.py ARGUMENTS` in a process of tests.support.warm.

Each stage is a process of its own, with the group and the locks that it inherits; only its libraries are imported already.
"""

import atexit
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from tests.support import warm
from tests.support.held import program
from train import flagship, processes

HELD_AT = "TESTS_HELD_AT"
"""The variable that says where the stage of pretraining waits: see tests.support.held."""


class Popen(warm.Started):
    """What `subprocess.Popen(command, stdout=PIPE, stderr=STDOUT, text=True, ...)` offers `train.processes`."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str], pass_fds: Sequence[int], **given: Any) -> None:
        reading, writing = os.pipe()
        sys.stdout.flush()
        arguments = list(command[1:])
        stage = multiprocessing.get_context("fork").Process(target=_stage, args=(arguments, env, writing))
        super().__init__(arguments, stage)
        os.close(writing)
        self.stdout = open(reading, encoding="utf-8", errors="replace")  # noqa: SIM115  # as long as it lives


def _stage(arguments: list[str], environment: Mapping[str, str], output: int) -> None:
    """Does in a fork what `python ARGUMENTS` does."""
    atexit._clear()  # what train.flagship has registered
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    module, held = arguments[1], environment.get(HELD_AT, "")
    if module == "train.pretrain" and held:
        arguments[:2] = program(module, held)
    warm.become(arguments, environment, (output, output))


if __name__ == "__main__":
    setattr(processes, "subprocess", SimpleNamespace(**vars(subprocess) | {"Popen": Popen}))  # noqa: B010  # in this process
    flagship.main()
