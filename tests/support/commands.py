"""Commands of `advcl-hub` in processes of their own, one or several as under torchrun."""

from pathlib import Path

from tests.support import warm


def start(command: str, *arguments: str | Path, processes: int = 1) -> warm.Warm:
    """Starts `advcl-hub COMMAND ARGUMENTS` in a process group of its own."""
    return warm.start("-m", "advcl_hub.cli", command, *arguments, processes=processes)


def finish(process: warm.Warm) -> str:
    """Waits for a process that has to succeed, and returns what it printed."""
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err[-3000:]
    return out
