"""Checks that the tests notice faults: makes each of `tests.mutations` in a copy of the project, and runs its tests there.

    python -m tests.mutate                                    # all: 15 minutes on a busy core
    python -m tests.mutate --only journal --only "mean and std" --workers 2 --output mutations.md

Only the tests that the list names for a fault are run. A fault is noticed if one of them fails, or takes too long. The checkout
itself is never changed. The exit status is 1 if a fault was not noticed, or if the tests fail without a fault.
"""

import argparse
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import NamedTuple

from tests.mutations import MUTATIONS, Mutation
from tests.support import ROOT, warm

FOLDERS = ("advcl_hub", "train", "model_cards", "tests", ".ci")
FILES = ("pyproject.toml", "README.md", "CHANGELOG.md", "Makefile", "LICENSE")
LIMIT = 300.0  # seconds for the tests of one fault
# The process is a fork of one that has modules of the checkout's tests.
PYTEST = """
import sys
for name in [name for name in sys.modules if name.partition(".")[0] == "tests"]:
    del sys.modules[name]
import advcl_hub, pytest
print(advcl_hub.__file__, flush=True)
sys.exit(pytest.main(["-x", "-q", "--no-header", "-p", "no:cacheprovider", *sys.argv[1:]]))
"""


class Run(NamedTuple):
    """How some tests went: whether all passed, which one failed if not (or `timeout`), what they printed, and the seconds."""

    passed: bool
    failed: str
    output: str
    seconds: float


def copy_project(root: Path) -> Path:
    """Copies what the tests need to a new folder, which it returns."""
    for name in FOLDERS:
        shutil.copytree(ROOT / name, root / name)
    for name in FILES:
        shutil.copy2(ROOT / name, root / name)
    return root


def run_tests(root: Path, tests: Sequence[str], limit: float | None = None) -> Run:
    """Runs tests in a copy up to the first that fails, for at most `limit` seconds."""
    # Without bytecode: that of a file which changed twice in a second, to the same size, would be taken for the new one's.
    settings = {"PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    settings["ADVCL_TEST_DATA"] = os.environ.get("ADVCL_TEST_DATA", str(ROOT.parent / "shared" / "data"))
    started, failed = time.monotonic(), ""
    with warm.start("-c", PYTEST, *tests, cwd=root, env=os.environ | settings) as process:
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            failed = "timeout"
            os.killpg(process.pid, signal.SIGKILL)  # those of tests.support.warm have groups of their own, and end later
            process.wait()
        output, errors = process.printed()
    library = output.partition("\n")[0]
    assert not library.endswith(".py") or Path(library).is_relative_to(root), f"the tests in {root} ran with {library}"
    first = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - |$)", output, re.MULTILINE)
    failed = failed or (first[1] if first else "at the start")
    return Run(process.returncode == 0, failed, output + errors, time.monotonic() - started)


@contextmanager
def fault(root: Path, mutation: Mutation) -> Iterator[None]:
    """Makes a fault in a copy, and mends it at the end of the `with` block. Raises ValueError if it has no place there."""
    path = root / mutation.file
    text = path.read_text(encoding="utf-8")
    if text.count(mutation.old) != 1:
        raise ValueError(f"{mutation.file} has {text.count(mutation.old)} times what it should have once: {mutation.old}")
    path.write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")
    try:
        yield
    finally:
        path.write_text(text, encoding="utf-8")


def attempt(mutation: Mutation, copies: "queue.Queue[Path]") -> Run:
    """Runs the tests of a fault in a copy that has it."""
    root = copies.get()
    try:
        with fault(root, mutation):
            return run_tests(root, mutation.tests, LIMIT)
    finally:
        copies.put(root)


def table(found: Sequence[tuple[Mutation, Run]]) -> str:
    """All faults with what noticed them, as a Markdown table."""
    lines = ["| fault | file | noticed by | seconds |", "|---|---|---|---:|"]
    for mutation, run in found:
        test = "**nothing**" if run.passed else run.failed.removeprefix("tests/").replace("|", "/")
        lines.append(f"| {mutation.fault} | {mutation.file} | {test} | {run.seconds:.0f} |")
    return "\n".join([*lines, "", f"{sum(not run.passed for _, run in found)} of {len(found)} faults were noticed."])


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutate", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", action="append", metavar="TEXT", help="faults with this text in sentence or file; repeatable")
    parser.add_argument("--workers", type=int, default=1, help="faults tried at a time, each in a copy of its own (default: 1)")
    parser.add_argument("--output", type=Path, help="file for the Markdown table (default: standard output)")
    args = parser.parse_args()
    words = [word.lower() for word in args.only or [""]]
    chosen = [m for m in MUTATIONS if any(word in f"{m.fault} {m.file}".lower() for word in words)]
    if not chosen:
        parser.error(f"no fault has {' or '.join(words)} in its sentence or file: tests/mutations.py has them all")
    found: dict[Mutation, Run] = {}
    with tempfile.TemporaryDirectory(prefix="mutate-") as temporary, ThreadPoolExecutor(args.workers) as pool:
        copies: queue.Queue[Path] = queue.Queue()
        for number in range(args.workers):
            copies.put(copy_project(Path(temporary).resolve() / str(number)))
        sound = run_tests(copies.queue[0], list(dict.fromkeys(test for mutation in chosen for test in mutation.tests)))
        print(
            f"Without a fault, in {sound.seconds:.0f} s: {sound.output.strip().splitlines()[-1]}", file=sys.stderr, flush=True
        )
        if not sound.passed:
            sys.exit(sound.output)
        started = time.monotonic()
        tasks = {pool.submit(attempt, mutation, copies): mutation for mutation in chosen}
        for done, task in enumerate(as_completed(tasks), 1):
            found[tasks[task]] = run = task.result()
            left = (time.monotonic() - started) / done * (len(chosen) - done) / 60
            what = "SURVIVED" if run.passed else f"noticed by {run.failed}"
            line = f"[{done}/{len(chosen)}] {what} in {run.seconds:.0f} s: {tasks[task].fault} (about {left:.0f} min left)"
            print(line, file=sys.stderr, flush=True)
    with args.output.open("w", encoding="utf-8") if args.output else nullcontext() as file:
        print(table([(mutation, found[mutation]) for mutation in chosen]), file=file)
    sys.exit(any(run.passed for run in found.values()))


if __name__ == "__main__":
    main()
