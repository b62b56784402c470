"""Makes the virtual environment of a checkout; `make` calls it, nobody else has to.

It needs nothing but the standard library and runs on Python 3.6, so that a Python which is too old can still
say so. Whatever goes wrong is said in one sentence, and an environment that was not finished is removed.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import List, NamedTuple, Optional, Set, Tuple

ROOT = Path(__file__).resolve().parent.parent
OLDEST = (3, 11)
OTHER_PYTHONS = ("python3", "python3.13", "python3.12", "python3.11")
# PyTorch's default build for Linux brings CUDA: 6 GB installed, and 3 GB of wheels while pip works.
NEED_GB = 9.0 if sys.platform.startswith("linux") else 2.0
# Lies in an environment that is being made: a run that was killed leaves it behind.
UNFINISHED = ".advcl-hub-unfinished"

PROBE = """
import json, sys
from importlib.util import find_spec
modules = [name for name in ("venv", "ensurepip", "pip", "torch") if find_spec(name)]
print(json.dumps([sys.executable, sys.version_info[:3], modules]))
"""
NO_SPACE = re.compile(r"No space left on device|Errno 28|Disk quota exceeded")
NO_NETWORK = re.compile(
    r"NewConnectionError|Connection (refused|reset|broken|aborted)|timed out|Max retries exceeded"
    r"|name resolution|Name or service not known|nodename nor servname|No address associated"
    r"|Network is unreachable|No route to host|ProxyError|SSLError"
)
NO_PACKAGE = re.compile(r"satisfies the requirement (\S+).* \(from versions: none\)")
LARGE_DOWNLOAD = re.compile(r"Downloading \S*?([^-/\s]+-\d[^-/\s]*)-\S+ \((\d{3,}(?:\.\d+)? MB|[\d.]+ GB)\)")


class SetupError(Exception):
    """What stopped the setup, in one sentence that says what to do."""


class Python(NamedTuple):
    """What a Python interpreter says about itself."""

    path: str
    version: Tuple[int, ...]
    modules: Set[str]

    def __str__(self) -> str:
        return f"Python {'.'.join(map(str, self.version))} ({self.path})"

    @property
    def new_enough(self) -> bool:
        return self.version >= OLDEST


def say(message: str) -> None:
    print("setup: " + message, flush=True)


def split_options(text: str) -> List[str]:
    try:
        return shlex.split(text)
    except ValueError as error:
        raise SetupError(f"PIP_ARGS={text} cannot be split into options: {error}") from None


def probe(command: str) -> Optional[Python]:
    """Asks an interpreter about itself; None if it does not run (a pyenv shim on the path may not)."""
    try:
        answer = subprocess.check_output([command, "-c", PROBE], stderr=subprocess.DEVNULL)
    except (OSError, subprocess.CalledProcessError):
        return None
    path, version, modules = json.loads(answer.decode())
    return Python(path, tuple(version), set(modules))


def find_python(wanted: str) -> Python:
    """Returns `wanted` if it will do, else the first other Python on the path that will."""
    found = [python for python in map(probe, (wanted, *OTHER_PYTHONS)) if python is not None]
    new_enough = [python for python in found if python.new_enough]
    usable = [python for python in new_enough if {"venv", "ensurepip"} <= python.modules]
    if usable:
        return usable[0]
    if new_enough:
        package = f"python{new_enough[0].version[0]}.{new_enough[0].version[1]}-venv"
        raise SetupError(
            f"{new_enough[0]} cannot make virtual environments: its venv or ensurepip module is missing; "
            f"install it (Debian, Ubuntu: sudo apt install {package}) and try again"
        )
    raise SetupError(
        f"Python 3.11 or newer is needed and {found[0] if found else 'no Python that runs'} was found; "
        "install one, or name it: make PYTHON=/path/to/python3.12"
    )


def check_disk(folder: Path, need_gb: float) -> None:
    """Raises SetupError unless the disk that holds `folder`, or will hold it, has `need_gb` free."""
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free_gb = shutil.disk_usage(str(existing)).free / 1e9
    if free_gb < need_gb:
        raise SetupError(
            f"installing PyTorch needs {need_gb:g} GB of disk and {existing} has {free_gb:.1f} GB free; "
            "free some, choose another place (VENV=path) or a CPU build (PIP_ARGS and NEED_GB: see make help)"
        )


def existing_environment(folder: Path) -> Python:
    """Returns the interpreter of the environment in `folder`, or says why it cannot be used."""
    python = probe(str(folder / "bin" / "python"))
    if python is None:
        problem = f"{folder} is there already and is not a working virtual environment; remove it"
    elif not python.new_enough:
        problem = f"the environment {folder} has {python} and 3.11 or newer is needed; remove it"
    elif "pip" not in python.modules:
        problem = f"the environment {folder} has no pip; run {python.path} -m ensurepip"
    else:
        return python
    raise SetupError(problem + ", or choose another folder: make VENV=path")


def create_environment(folder: Path, python: Python) -> None:
    say(f"making {folder} with {python}")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / UNFINISHED).touch()
    command = [python.path, "-m", "venv", str(folder)]
    made = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    if made.returncode:
        output = made.stdout.decode(errors="replace").split()
        raise SetupError(f"{' '.join(command)} failed: {' '.join(output)}")


def progress(line: str) -> Optional[str]:
    """Turns a line of pip's output into progress words; None for most lines."""
    if line.startswith("Installing collected packages:"):
        return f"unpacking {line.count(',') + 1} packages"
    download = LARGE_DOWNLOAD.search(line)
    return f"downloading {download.group(1)} ({download.group(2)})" if download else None


def explain(output: str) -> str:
    """Says why pip failed."""
    if NO_SPACE.search(output):
        return "the disk is full; free some space and try again"
    if NO_NETWORK.search(output):
        return "the package index could not be reached; check the network and the proxy, and try again"
    missing = NO_PACKAGE.search(output)
    if missing:
        return f"no package index within reach has {missing.group(1)}; check the network, the proxy and PIP_ARGS"
    errors = re.findall(r"^ *ERROR: (.+)$", output, re.MULTILINE) or output.split("\n\n")
    return "pip could not install the packages: " + " ".join(errors[-1].split())


def install(folder: Path, pip_args: List[str]) -> None:
    """Installs the checkout in editable mode with its dev extras; all that pip says goes to a log."""
    log = folder.with_name(folder.name + "-install.log")
    say(f"installing the packages takes a few minutes the first time (log: {log})")
    # pip's temporary files go to the disk that was checked: the system's folder for them is often small.
    scratch = folder / ".pip-tmp"
    scratch.mkdir(exist_ok=True)
    environment = dict(os.environ, TMPDIR=str(scratch), PIP_USER="0", PYTHONUNBUFFERED="1")
    options = ["--disable-pip-version-check", "--no-input", "--progress-bar=off", *pip_args]
    pip = subprocess.Popen(
        [str(folder / "bin" / "python"), "-m", "pip", "install", *options, "-e", ".[dev]"],
        cwd=str(ROOT),
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert pip.stdout is not None
    try:
        with log.open("wb") as file:
            for line in pip.stdout:
                file.write(line)
                words = progress(line.decode(errors="replace"))
                if words:
                    say(words)
        failed = pip.wait() != 0
    finally:
        pip.kill()
        pip.wait()
        shutil.rmtree(str(scratch), ignore_errors=True)
    if failed:
        raise SetupError(f"{explain(log.read_text(errors='replace'))} (pip's log: {log})")


def bootstrap(folder: Path, wanted: str, pip_args: List[str], need_gb: float) -> None:
    """Makes the environment, or installs into the one that the user brought."""
    if (folder / UNFINISHED).exists():
        say(f"removing {folder}, which an earlier run did not finish")
        shutil.rmtree(str(folder))
    ours = not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))
    python = find_python(wanted) if ours else existing_environment(folder)
    if ours or "torch" not in python.modules:
        check_disk(folder, need_gb)
    try:
        if ours:
            create_environment(folder, python)
        install(folder, pip_args)
    except BaseException:
        if ours:
            shutil.rmtree(str(folder), ignore_errors=True)
        raise
    if ours:
        (folder / UNFINISHED).unlink()


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the virtual environment of this checkout.")
    parser.add_argument("--venv", default=".venv", help="folder of the environment")
    parser.add_argument("--stamp", required=True, help="file to touch once everything is installed")
    parser.add_argument("--python", default=sys.executable, help="Python to make the environment with")
    parser.add_argument("--pip-args", default="", help="options for pip install, as one string")
    parser.add_argument("--need-gb", type=float, default=NEED_GB, help="free disk space to insist on, in GB")
    arguments = parser.parse_args()
    started = time.time()
    folder = Path(os.path.abspath(os.path.expanduser(arguments.venv)))
    try:
        bootstrap(folder, arguments.python, split_options(arguments.pip_args), arguments.need_gb)
        Path(arguments.stamp).touch()
    except SetupError as error:
        sys.exit(f"setup: {error}")
    except OSError as error:
        sys.exit(f"setup: {error.strerror or error}: {error.filename or folder}")
    except KeyboardInterrupt:
        sys.exit("setup: interrupted; nothing is left behind, try again when you like")
    say(f"ready after {time.time() - started:.0f} s")


if __name__ == "__main__":
    main()
