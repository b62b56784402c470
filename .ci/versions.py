"""Runs the tests with the lowest and with the newest versions that pyproject.toml allows; `make test-versions` calls it.

Each combination of versions and of a Python that is on this machine gets an environment of its own, `.versions/NAME`.
The table at the end says what was seen to work. Options that are not listed here go to pytest.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bootstrap import ROOT, Python, SetupError, create_environment, install, probe, split_options

NAMES = ("lowest-3.11", "newest-3.11", "newest-3.12", "newest-3.13", "newest-3.14")
FOLDER = ROOT / ".versions"
PACKAGES = ("torch", "torchvision", "timm", "huggingface-hub", "accelerate", "numpy")
REQUIREMENT = re.compile(r"(?P<name>[\w.-]+)(?P<extras>\[[^]]*\])?\s*(?:>=\s*(?P<lowest>[\w.]+))?")
VERSIONS = "import json, sys\nfrom importlib.metadata import version\nprint(json.dumps([*map(version, sys.argv[1:])]))"


@dataclass
class Outcome:
    """What happened in one environment."""

    name: str
    python: str
    versions: Sequence[str] = ("",) * len(PACKAGES)
    counts: Mapping[str, int] = field(default_factory=dict)  # of tests: passed, failed, skipped
    problem: str = ""  # in one sentence
    minutes: float = 0.0

    def __str__(self) -> str:
        """Returns a row of the table."""
        counts = " / ".join(str(self.counts[word]) for word in ("passed", "failed", "skipped")) if self.counts else "no result"
        return f"| {' | '.join((self.name, self.python, *self.versions, counts, f'{self.minutes:.0f}'))} |"


def table(outcomes: Iterable[Outcome]) -> str:
    """Returns the outcomes as a Markdown table."""
    columns = ("environment", "Python", *PACKAGES, "passed / failed / skipped", "minutes")
    return "\n".join((f"| {' | '.join(columns)} |", "| --- " * len(columns) + "|", *map(str, outcomes)))


def say(message: str) -> None:
    print("versions: " + message, flush=True)


def lowest(project: Mapping[str, Any]) -> list[str]:
    """Returns a constraint for pip, `name==X`, for each `name>=X` in the dependencies and extras of a project.

    Raises:
        SetupError: a requirement names no lowest version, or two name different ones.
    """
    constraints: dict[str, str] = {}
    extras = project.get("optional-dependencies", {})
    for requirement in (*project["dependencies"], *(one for packages in extras.values() for one in packages)):
        found = REQUIREMENT.match(requirement)
        if found is None or found["name"] == project["name"]:  # the project's own extras
            continue
        constraint = f"{found['name']}=={found['lowest']}"
        if found["lowest"] is None:
            raise SetupError(f"pyproject.toml names no lowest version of {requirement}: write {found['name']}>= and a version")
        if constraints.setdefault(found["name"], constraint) != constraint:
            raise SetupError(f"pyproject.toml has {constraints[found['name']]} and {constraint} as lowest versions: write one")
    return sorted(constraints.values())


def find_python(version: str) -> Python | None:
    """Returns a Python of this version ("3.12") that can make environments: from the path, or from pyenv."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    for command in (f"python{version}", *map(str, sorted(pyenv.glob(f"{version}.*/bin/python")))):
        python = probe(command)
        if python and python.version[:2] == tuple(map(int, version.split("."))) and {"venv", "ensurepip"} <= python.modules:
            return python
    return None


def run_tests(python: Path, results: Path, options: Sequence[str]) -> dict[str, int]:
    """Runs the tests and returns how many passed, failed and were skipped.

    Raises:
        SetupError: pytest ended without results.
    """
    results.unlink(missing_ok=True)
    command = [str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={results}", *options]
    # One thread a process, as in `make test`.
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False)
    if not results.exists():
        raise SetupError(f"pytest ended with exit code {done.returncode} and without results")
    suite = next(ElementTree.parse(results).iter("testsuite"))
    failed, skipped = int(suite.attrib["failures"]) + int(suite.attrib["errors"]), int(suite.attrib["skipped"])
    counts = {"passed": int(suite.attrib["tests"]) - failed - skipped, "failed": failed, "skipped": skipped}
    if done.returncode and not failed:
        raise SetupError(f"pytest ended with exit code {done.returncode} although no test failed")
    return counts


def check(name: str, python: Python, options: Sequence[str], keep: bool) -> Outcome:
    """Makes one environment, runs the tests in it, and returns how that ended."""
    outcome, folder = Outcome(name, ".".join(map(str, python.version))), FOLDER / name
    started = time.monotonic()
    try:
        shutil.rmtree(folder, ignore_errors=True)
        create_environment(folder, python)
        pip_args = split_options(os.environ.get("PIP_ARGS", ""))
        if name.startswith("lowest-"):
            constraints = lowest(tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"])
            file = FOLDER / f"{name}-constraints.txt"
            file.write_text("\n".join(constraints) + "\n", encoding="utf-8")
            pip_args += ["--constraint", str(file)]
        install(folder, pip_args)
        environment = folder / "bin" / "python"
        outcome.versions = json.loads(subprocess.check_output([environment, "-c", VERSIONS, *PACKAGES]))
        say(f"running the tests in {name} ({', '.join(map(' '.join, zip(PACKAGES, outcome.versions, strict=True)))})")
        outcome.counts = run_tests(environment, FOLDER / f"{name}.xml", options)
        if failed := outcome.counts["failed"]:
            outcome.problem = f"{failed} {'test' if failed == 1 else 'tests'} failed"
    except SetupError as error:
        outcome.problem = str(error)
    except (subprocess.CalledProcessError, ElementTree.ParseError) as error:
        outcome.problem = f"{type(error).__name__}: {error}"
    except OSError as error:
        outcome.problem = f"{error.strerror or error}: {error.filename or folder}"
    finally:
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)
    outcome.minutes = (time.monotonic() - started) / 60
    say(f"{name}: {outcome.problem or 'all tests passed'} ({outcome.minutes:.0f} minutes)")
    return outcome


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None, allow_abbrev=False)
    parser.add_argument("--only", metavar="NAME", choices=NAMES, action="append", help=f"one of {', '.join(NAMES)}; repeatable")
    parser.add_argument("--keep", action="store_true", help="keep the environments (6 to 9 GB each), to look into a failure")
    arguments, options = parser.parse_known_args()
    outcomes, interrupted = [], False
    try:
        FOLDER.mkdir(exist_ok=True)
        for name in arguments.only or NAMES:
            version = name.partition("-")[2]
            if python := find_python(version):
                outcomes.append(check(name, python, options, arguments.keep))
            else:
                say(f"{name} is skipped: no Python {version} that can make environments is on the path or under pyenv")
                outcomes.append(Outcome(name, "not found"))
    except KeyboardInterrupt:
        interrupted = True
        say("interrupted; the environment that was being tested is not in the table")
    print("\n" + table(outcomes))
    sys.exit(interrupted or not any(outcome.counts for outcome in outcomes) or any(outcome.problem for outcome in outcomes))


if __name__ == "__main__":
    main()
