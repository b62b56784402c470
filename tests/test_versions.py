"""The script that runs the tests with the lowest and the newest versions: what it derives and what it says."""

import importlib
import os
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from tests.support import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.fixture(scope="module")
def versions() -> Iterator[Any]:
    """The module .ci/versions.py, which imports its neighbour bootstrap.py."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / ".ci"))
        yield importlib.import_module("versions")


def test_lowest_versions_are_those_of_dependencies_and_extras(versions: Any) -> None:
    project = {
        "name": "own",
        "dependencies": ["numpy>=2.1", "pyyaml >= 6.0.1, < 7", 'tomli>=2.0; python_version < "3.11"'],
        "optional-dependencies": {"plots": ["numpy>=2.1", "matplotlib>=3.8,<4"], "dev": ["own[plots]", "types-PyYAML[x]>=6"]},
    }
    assert versions.lowest(project) == ["matplotlib==3.8", "numpy==2.1", "pyyaml==6.0.1", "tomli==2.0", "types-PyYAML==6"]


@pytest.mark.parametrize(
    ("dependencies", "sentence"),
    [
        (["torch<3"], "names no lowest version of torch<3: write torch>= and a version"),
        (["numpy>=2.1", "numpy>=2.2"], "has numpy==2.1 and numpy==2.2 as lowest versions: write one"),
    ],
)
def test_a_requirement_without_one_lowest_version_is_refused(dependencies: list[str], sentence: str, versions: Any) -> None:
    with pytest.raises(versions.SetupError) as refusal:
        versions.lowest({"name": "own", "dependencies": dependencies})
    assert sentence in str(refusal.value)


def test_every_requirement_has_a_lowest_version_in_its_range(versions: Any) -> None:
    declared = [*PROJECT["dependencies"], *(one for packages in PROJECT["optional-dependencies"].values() for one in packages)]
    requirements = [one for one in map(Requirement, declared) if one.name != PROJECT["name"]]
    lowest = dict(one.split("==") for one in versions.lowest(PROJECT))
    assert lowest.keys() == {one.name for one in requirements}
    assert all(one.specifier.contains(lowest[one.name]) for one in requirements)


def test_pythons_are_those_that_the_metadata_names(versions: Any) -> None:
    named = {
        text.rpartition(" ")[2] for text in PROJECT["classifiers"] if text.startswith("Programming Language :: Python :: 3.")
    }
    tested = {name.partition("-")[2] for name in versions.NAMES}
    assert named <= tested and f"lowest-{PROJECT['requires-python'].removeprefix('>=')}" in versions.NAMES


def test_a_python_is_found_on_the_path_and_under_pyenv(versions: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path / "pyenv"))
    assert versions.find_python(version) is None
    python = write_python(tmp_path / "pyenv" / "versions" / f"{version}.99" / "bin" / "python")
    assert versions.find_python(version).version == sys.version_info[:3]
    python.rename(tmp_path / f"python{version}")
    assert versions.find_python(version).version == sys.version_info[:3]


def write_python(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n', encoding="utf-8")
    path.chmod(0o755)
    return path


TESTS = """
import pytest
def test_passes(): pass
def test_passes_too(): pass
def test_fails(): assert False
def test_is_skipped(): pytest.skip("no reason")
"""


def run(versions: Any, folder: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> Any:
    """Runs the script on a small project, without making environments; returns its exit code."""
    (folder / "test_small.py").write_text(TESTS, encoding="utf-8")
    (folder / "pyproject.toml").write_text('[project]\nname = "own"\ndependencies = ["torch"]\n', encoding="utf-8")

    def find_python(version: str) -> Any:
        return None if version == "3.12" else versions.Python(sys.executable, (3, 11, 99), set())

    for name, value in {
        "ROOT": folder,
        "FOLDER": folder / ".versions",
        "find_python": find_python,
        "create_environment": lambda environment, python: write_python(environment / "bin" / "python"),
        "install": lambda environment, pip_args: None,
    }.items():
        monkeypatch.setattr(versions, name, value)
    for name in [name for name in os.environ if name.startswith("PYTEST_")]:  # of the run that this test is in
        monkeypatch.delenv(name)
    monkeypatch.setattr(sys, "argv", ["versions.py", *arguments])
    with pytest.raises(SystemExit) as end:
        versions.main()
    return int(end.value.code)  # type: ignore[arg-type]


def test_one_failure_does_not_stop_the_other_environments(
    versions: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    only = ("--only", "lowest-3.11", "--only", "newest-3.12", "--only", "newest-3.13")
    assert run(versions, tmp_path, monkeypatch, *only) == 1
    said = capsys.readouterr().out
    assert "lowest-3.11: pyproject.toml names no lowest version of torch" in said
    assert "newest-3.12 is skipped: no Python 3.12" in said and "newest-3.13: 1 test failed" in said
    head, line, lowest, missing, newest = said.strip().splitlines()[-5:]
    packages = "torch | torchvision | timm | huggingface-hub | accelerate | numpy"
    assert head == f"| environment | Python | {packages} | passed / failed / skipped | minutes |"
    assert {text.count("|") for text in (head, line, lowest, missing, newest)} == {11}
    assert missing == "| newest-3.12 | not found |  |  |  |  |  |  | no result | 0 |"
    assert lowest == "| lowest-3.11 | 3.11.99 |  |  |  |  |  |  | no result | 0 |"
    assert newest.startswith("| newest-3.13 | 3.11.99 | ") and newest.endswith(" | 2 / 1 / 1 | 0 |")
    assert sorted(path.name for path in (tmp_path / ".versions").iterdir()) == ["newest-3.13.xml"]


def test_options_go_to_pytest_and_an_environment_can_be_kept(
    versions: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(versions, tmp_path, monkeypatch, "--only", "newest-3.11", "--keep", "-k", "passes") == 0
    assert capsys.readouterr().out.endswith(" | 2 / 0 / 0 | 0 |\n")
    assert (tmp_path / ".versions" / "newest-3.11").is_dir()


def test_no_tests_are_a_failure(
    versions: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(versions, tmp_path, monkeypatch, "--only", "newest-3.11", "-k", "nothing") == 1
    assert "pytest ended with exit code 5 although no test failed" in capsys.readouterr().out
