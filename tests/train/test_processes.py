"""Commands in processes of their own: shown, logged, stopped in time, and what is said of those that fail."""

import os
import sys
from pathlib import Path

import pytest

from advcl_hub.training.stop import StopRequest
from train import processes
from train.processes import StageError, run_command

STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('ready', flush=True); time.sleep(600)"
GENTLE = (
    "import signal, sys, time\n"
    "def stop(*_): print('saved', flush=True); sys.exit(3)\n"
    "signal.signal(signal.SIGTERM, stop); print('ready', flush=True); time.sleep(600)"
)


class StopWhen:
    """A stop that is due as soon as the command has said something; no clock decides the test."""

    remaining = 0.05

    def __init__(self, log: Path, text: str) -> None:
        self.log, self.text = log, text

    @property
    def requested(self) -> bool:
        return self.log.is_file() and self.text in self.log.read_text(encoding="utf-8").splitlines()


def python(program: str, *arguments: str) -> list[str]:
    return [sys.executable, "-c", program, *arguments]


def test_output_is_shown_and_logged_after_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "logs" / "stage.log"
    run_command(
        python("import os, sys; print(os.environ['EXTRA']); print('é', file=sys.stderr)"), log, StopRequest(), {"EXTRA": "1"}
    )
    run_command(python("print('again')"), log, StopRequest(), {})
    shown, logged = capsys.readouterr().out, log.read_text(encoding="utf-8")
    assert shown == logged and shown.splitlines()[1:3] == ["1", "é"] and shown.splitlines()[-1] == "again"
    assert shown.startswith("$ python -c 'import os, sys;") and shown.count("$ python") == 2


@pytest.mark.parametrize("program", [GENTLE, STUBBORN], ids=["gentle", "stubborn"])
def test_a_stop_is_a_signal_and_then_a_stronger_one(program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither is a failure of the stage."""
    monkeypatch.setattr(processes, "_GRACE", 5.0 if program is GENTLE else 0.2)
    log = tmp_path / "stage.log"
    run_command(python(program), log, StopWhen(log, "ready"), {})  # type: ignore[arg-type]
    assert ("saved" in log.read_text(encoding="utf-8").splitlines()) == (program is GENTLE)


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("import sys; print('loading'); sys.exit('error: no such folder: /x')", "no such folder: /x. The same call"),
        ("import sys; print('Error: no token; log in', file=sys.stderr); sys.exit(1)", "no token; log in. The same call"),
        (
            "print('one'); raise KeyError('layer')",
            "exit code 1; its last line is \"KeyError: 'layer'\". To look closer",
        ),
        ("import sys; sys.exit(4)", "exit code 4; it printed nothing. To look closer, type its command alone"),
        ("raise RuntimeError('CUDA out of memory. Tried 2 GiB')", "Lower its batch size in the plan, in a new folder"),
        ("import os; os.kill(os.getpid(), 9)", "The system killed it, most likely for memory"),
    ],
)
def test_a_failure_says_why_and_what_to_do(program: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(StageError) as failed:
        run_command(python(program), tmp_path / "stage.log", StopRequest(), {})
    assert message in str(failed.value) and str(failed.value).endswith(". The same call tries it again.")


def test_an_interruption_ends_the_command_too(tmp_path: Path) -> None:
    class Interrupted(StopWhen):
        @property
        def requested(self) -> bool:
            if super().requested:
                raise KeyboardInterrupt
            return False

    log, program = tmp_path / "stage.log", "import os, time; print(os.getpid()); print('ready', flush=True); time.sleep(600)"
    with pytest.raises(KeyboardInterrupt):
        run_command(python(program), log, Interrupted(log, "ready"), {})  # type: ignore[arg-type]
    with pytest.raises(ProcessLookupError):
        os.kill(int(log.read_text(encoding="utf-8").splitlines()[1]), 0)
