"""Commands of `advcl-hub`: `run("list")` in a process of its own, one or several as under torchrun, or `invoke("list")`."""

from pathlib import Path

from click.testing import CliRunner, Result

from advcl_hub.cli import main
from tests.support import warm
from tests.support.held import program


def start(command: str, *arguments: str | Path, processes: int = 1, held: str = "", short: bool = False) -> warm.Warm:
    """Starts `advcl-hub COMMAND ARGUMENTS` in a process group of its own.

    `held` says where it waits, as `"at_step(4)"`: see tests.support.held. `short` is for it what the fixture
    `short_autoattack` is for a test.
    """
    return warm.start(*program("advcl_hub.cli", held, short), command, *arguments, processes=processes)


def run(command: str, *arguments: str | Path, processes: int = 1, short: bool = False) -> str:
    """What `advcl-hub COMMAND ARGUMENTS` prints; it has to succeed."""
    return warm.run(*program("advcl_hub.cli", short=short), command, *arguments, processes=processes, code=0).stdout


def invoke(*arguments: str | Path) -> Result:
    """What `advcl-hub ARGUMENTS` does in this process, which takes no time to start."""
    return CliRunner().invoke(main, [str(argument) for argument in arguments])
