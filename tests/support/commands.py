"""Commands of `advcl-hub` in processes of their own, one or several as under torchrun: `warm.start` for short.

said = finish(start("list"))
"""

from pathlib import Path

from tests.support import warm

_SHORT = "from tests.support.tiny_classifiers import shorten; from advcl_hub.cli import main; shorten(); main()"


def start(command: str, *arguments: str | Path, processes: int = 1, short: bool = False) -> warm.Warm:
    """Starts `advcl-hub COMMAND ARGUMENTS` in a process group of its own; `short` as the fixture `short_autoattack`."""
    program = ("-c", _SHORT) if short else ("-m", "advcl_hub.cli")
    return warm.start(*program, command, *arguments, processes=processes)


def finish(process: warm.Warm) -> str:
    """Waits for a process that has to succeed, and returns what it printed."""
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err[-3000:]
    return out
