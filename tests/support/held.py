"""Commands that wait at one place until a test kills or stops them: at the same step on every machine, however busy it is.

    from tests.support.commands import start

    with start("finetune", *arguments, held="at_step(4)") as process:
        process.wait_for(HELD)
        process.send_signal(signal.SIGTERM)

Other commands: `warm.start(*program("train.pretrain", "at_step(4)"), *arguments)`. The functions are called in the process of
the command. They import the project inside, because that process imports it anew.
"""

import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

HELD = "Held by tests.support.held.\n"
"""What the process prints to its error output when it begins to wait."""


def program(module: str, held: str = "", short: bool = False) -> tuple[str, str]:
    """`python -m MODULE` as arguments of Python, with a call of a function below, and with AutoAttack in few steps."""
    first = f"from tests.support import held; held.{held}; " if held else ""
    first += "from tests.support.tiny_classifiers import shorten; shorten(); " if short else ""
    return ("-c", f"{first}from {module} import main; main()") if first else ("-m", module)


def _wait(over: Callable[[], bool]) -> None:
    """Prints HELD and waits until `over()`, or until the process that has started this one has ended (pytest was killed)."""
    sys.stderr.write(HELD)
    parent = os.getppid()
    while not over() and os.getppid() == parent:
        time.sleep(0.01)


def at_step(step: int, folder: str = "") -> None:
    """A training (in a folder of that name, if one is given) waits after so many steps until a stop is requested.

    It then takes one more step, as after any such request.
    """
    from advcl_hub.training.loop import Loop

    train = Loop.train

    def held(loop: Loop, stop: Any) -> None:
        remaining = loop.remaining_batches

        def batches() -> Iterator[Any]:
            for batch in remaining():
                if loop.state.step == step and folder in ("", loop.output.name):
                    _wait(lambda: stop.requested)
                yield batch

        vars(loop)["remaining_batches"] = batches
        train(loop, stop)

    setattr(Loop, "train", held)  # noqa: B010  # mypy refuses to assign to a method


def after_units(count: int) -> None:
    """An evaluation waits when it has measured so many batches, those of earlier starts and of other processes included."""
    from advcl_hub.evaluation.journal import Journal

    write = Journal.write

    def held(journal: Journal, *result: Any) -> None:
        write(journal, *result)
        assert journal.folder is not None
        lines = "".join(path.read_text(encoding="utf-8") for path in journal.folder.glob("*.jsonl"))
        if len(re.findall(r'"unit": "[^"]+/', lines)) >= count:  # other units are no batches
            _wait(lambda: False)

    setattr(Journal, "write", held)  # noqa: B010
