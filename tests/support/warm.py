"""Commands in processes that start at once: forks of one process that has imported torch and other libraries.

    said = warm.run("-m", "advcl_hub.cli", "list", code=0).stdout
    with warm.start("-m", "train.pretrain", "digits_demo") as process: ...

Importing the libraries takes seconds of a core, and the tests start hundreds of processes. What starts here is a real process
with its own arguments, environment, folder, output, signals, process group and exit status. It imports the project itself; in
another environment also timm, huggingface_hub and accelerate, which read its variables when they are imported. Variables that a
test sets reach it, but for those that torch and other libraries read when they are imported; what a test or a fixture patches
does not. A test of what is imported, or of an interpreter's own options, needs `subprocess`.
"""

import atexit
import contextlib
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Self

from tests.support import ROOT

PATIENCE = 300.0
"""Seconds after which a test gives up a process that does not end; a machine that is slow and busy needs far less."""

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.support.warm_imports"])
_started: list["Started"] = []
_PROJECT = ("advcl_hub", "train", "model_cards")
_READERS = ("huggingface_hub", "timm", "accelerate")  # of environment variables, when they are imported
_NOT_READ = {  # by those: what pytest and the imported libraries set
    *("OMP_NUM_THREADS", "KMP_DUPLICATE_LIB_OK", "KMP_INIT_AT_FORK", "TORCHINDUCTOR_CACHE_DIR"),
    *("PYTEST_CURRENT_TEST", "PYTEST_VERSION", "PYTEST_XDIST_TESTRUNUID", "PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT"),
}


@atexit.register
def _kill_all() -> None:
    """Ends what a failed test has left, before multiprocessing waits for it at the end of the interpreter."""
    for process in list(_started):
        process.end()


def start(*arguments: object, processes: int = 1, cwd: Path = ROOT, env: Mapping[str, str] | None = None) -> "Warm":
    """Starts `python ARGUMENTS`, or `torchrun --nproc_per_node=PROCESSES ARGUMENTS`, in a process group of its own.

    `env` is the whole environment: write `os.environ | {...}` to add to it. `cwd` is the checkout unless told otherwise.
    """
    return Warm([str(argument) for argument in arguments], processes, cwd, os.environ if env is None else env)


def run(
    *arguments: object, timeout: float = PATIENCE, code: int | None = None, **options: Any
) -> "subprocess.CompletedProcess[str]":
    """What `python ARGUMENTS` prints, and its exit status, which has to be `code` if that is given. Options: as `start`."""
    with start(*arguments, **options) as process:
        out, err = process.communicate(timeout)
    done = subprocess.CompletedProcess(process.args, process.wait(), out, err)
    assert code is None or done.returncode == code, f"{done.args} ended with {done.returncode}:\n{err[-4000:] or out[-4000:]}"
    return done


def in_new_process(function: Callable[..., Any], *args: Any) -> Any:
    """Returns what a function returns in a process that has imported the libraries, but not advcl_hub.

    The process imports the function's module: import advcl_hub inside the function. Environment variables that a test has set
    do not reach it: use `run` for those.
    """
    with ProcessPoolExecutor(1, CONTEXT) as pool:
        return result(pool.submit(function, *args))


def result(future: "Future[Any]") -> Any:
    """What a process of a pool returns; if it never does, it is killed, or the pool would wait for it."""
    try:
        return future.result(PATIENCE)
    except TimeoutError:
        for process in multiprocessing.active_children():
            process.kill()
        raise


class Started:
    """A process that was started: what `subprocess.Popen` offers, as far as it is used here."""

    def __init__(self, arguments: list[str], process: BaseProcess) -> None:
        self.args, self._process = arguments, process
        process.start()
        assert process.pid is not None
        _started.append(self)
        self.pid = process.pid

    def poll(self) -> int | None:
        """Its exit status, or None while it runs; a process that a signal has ended has minus the signal's number."""
        return self._process.exitcode

    @property
    def returncode(self) -> int | None:
        return self.poll()

    def wait(self, timeout: float | None = PATIENCE) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        return self._process.exitcode

    def end(self) -> None:
        """Kills it and what it has started in its process group, if that is its own, and forgets it."""
        self.kill()
        with contextlib.suppress(ProcessLookupError):
            if self.pid != os.getpgrp():
                os.killpg(self.pid, signal.SIGKILL)
        self.wait()
        if self in _started:
            _started.remove(self)

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class Warm(Started):
    """A command that was started.

    Args:
        arguments: as Python gets them: `-m MODULE ...`, `-c CODE ...` or `FILE ...`.
        processes: more than one are started as torchrun starts them.
        cwd: folder in which it works.
        environment: all of its environment variables.
    """

    def __init__(self, arguments: list[str], processes: int, cwd: Path, environment: Mapping[str, str]) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="warm-")
        self._files = [Path(self._folder.name) / name for name in ("stdout", "stderr")]
        for path in self._files:
            path.touch()
        given = (arguments, processes, str(cwd), dict(environment), [str(path) for path in self._files])
        super().__init__(arguments, CONTEXT.Process(target=_main, args=given))

    def printed(self) -> tuple[str, str]:
        """What it has written so far to its output and its error output."""
        out, err = (path.read_text(encoding="utf-8", errors="replace") for path in self._files)
        return out, err

    def wait_for(self, text: str) -> None:
        """Waits until it has written `text`."""
        end = time.monotonic() + PATIENCE
        while not any(text in printed for printed in self.printed()):
            assert self.poll() is None and time.monotonic() < end, self.printed()
            time.sleep(0.02)

    def communicate(self, timeout: float = PATIENCE) -> tuple[str, str]:
        """Waits for its end; returns what it has written to its output and its error output."""
        self.wait(timeout)
        return self.printed()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.end()
        self._folder.cleanup()


def _main(arguments: list[str], processes: int, cwd: str, environment: dict[str, str], files: list[str]) -> None:
    os.setsid()
    os.chdir(cwd)
    become(arguments, environment, [os.open(path, os.O_WRONLY | os.O_APPEND) for path in files], processes)


def become(arguments: list[str], environment: Mapping[str, str], outputs: Sequence[int], processes: int = 1) -> None:
    """Does what a new interpreter does after its imports; its output and error output go to the descriptors `outputs`."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for stream, file in enumerate(outputs, 1):
        os.dup2(file, stream)
    for file in set(outputs):
        os.close(file)
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115  # open as long as the process
    sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", buffering=1, closefd=False)  # noqa: SIM115
    enter(environment)
    try:
        if processes == 1:
            interpret(arguments)
        else:
            _torchrun(arguments, processes)
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()


def enter(environment: Mapping[str, str]) -> None:
    """Takes an environment over; what reads its variables when it is imported is imported anew, if it is another one."""
    from tests.support import warm_imports  # the process that was forked has done so

    before = warm_imports.ENVIRONMENT
    changed = {name for name in before.keys() | environment.keys() if before.get(name) != environment.get(name)}
    registered = "advcl_hub" in sys.modules  # its names in timm, which an advcl_hub that is imported anew would meet
    readers = _READERS if changed - _NOT_READ or registered else ()
    warm_imports.ENVIRONMENT = dict(environment)
    os.environ.clear()
    os.environ.update(environment)
    time.tzset()
    for name in [name for name in sys.modules if name.partition(".")[0] in (*readers, *_PROJECT)]:
        del sys.modules[name]


def interpret(arguments: list[str]) -> None:
    """What `python ARGUMENTS` does."""
    kind, *rest = arguments
    sys.argv = rest if kind == "-m" else ["-c", *rest[1:]] if kind == "-c" else arguments
    sys.path[:0] = [os.getcwd() if kind in ("-m", "-c") else str(Path(kind).parent), *_python_path()]
    if kind == "-m":
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif kind == "-c":
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    else:
        runpy.run_path(kind, run_name="__main__")


def _python_path() -> list[str]:
    return [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]


def _torchrun(arguments: list[str], processes: int) -> None:
    """What `torchrun --standalone --nproc_per_node=PROCESSES ARGUMENTS` does, with forks in place of new interpreters."""
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=processes, max_restarts=0, start_method="fork",
        run_id="warm", rdzv_backend="c10d", rdzv_endpoint="localhost:0",
    )  # fmt: skip
    elastic_launch(config, interpret)(arguments)
