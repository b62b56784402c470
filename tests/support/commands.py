"""Commands of `advcl-hub` in processes of their own, one or several under torchrun."""

import os
import signal
import subprocess
import sys
from pathlib import Path

from tests.support import ROOT


def start(command: str, *arguments: str | Path, processes: int = 1) -> subprocess.Popen[str]:
    """Starts `advcl-hub COMMAND ARGUMENTS` in a process group of its own."""
    launcher = [] if processes == 1 else ["torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "-m"]
    return subprocess.Popen(
        [sys.executable, "-m", *launcher, "advcl_hub.cli", command, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        start_new_session=True,
        encoding="utf-8",
        # A shell's background jobs inherit it as ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def finish(process: subprocess.Popen[str]) -> str:
    """Waits for a process that has to succeed, and returns what it printed."""
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err[-3000:]
    return out
