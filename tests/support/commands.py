"""Commands of `advcl-hub` in processes of their own, one or several as under torchrun: `warm.start` for short.

said = finish(start("list"))
"""

from pathlib import Path

from tests.support import warm
from tests.support.held import program


def start(command: str, *arguments: str | Path, processes: int = 1, held: str = "", short: bool = False) -> warm.Warm:
    """Starts `advcl-hub COMMAND ARGUMENTS` in a process group of its own.

    `held` says where it waits, as `"at_step(4)"`: see tests.support.held. `short` is for it what the fixture
    `short_autoattack` is for a test.
    """
    return warm.start(*program("advcl_hub.cli", held, short), command, *arguments, processes=processes)


def finish(process: warm.Warm) -> str:
    """Waits for a process that has to succeed, and returns what it printed."""
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err[-3000:]
    return out
