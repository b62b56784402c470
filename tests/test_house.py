"""The layout: imports run down the floors, the README names every file, and every test file has the name of a module."""

import ast
import functools
import graphlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import ROOT

# From the top down. A room imports rooms of lower floors; along a floor, and within a room, there are no circles.
FLOORS = (
    ("model_cards",),
    ("train",),
    ("cli",),
    ("finetuning",),
    ("evaluation", "pretraining"),
    ("opening",),
    ("hub",),
    ("data", "records", "training"),
    ("attacks", "models"),
    ("errors", "files", "modes", "private"),
)
FLOOR_OF = {room: len(FLOORS) - floor for floor, rooms in enumerate(FLOORS) for room in rooms}


@functools.cache
def modules() -> dict[str, set[str]]:
    """By dotted name the imports of every module but the front door, advcl_hub/__init__.py."""
    found = {}
    for top in ("advcl_hub", "train", "model_cards"):
        for path in sorted(ROOT.glob(f"{top}/**/*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            if name != "advcl_hub":
                package = name if path.stem == "__init__" else name.rpartition(".")[0]
                found[name] = imported(path.read_text(encoding="utf-8"), package)
    return found


def room_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if parts[0] == "advcl_hub" else parts[0]


def imported(source: str, package: str) -> set[str]:
    """Returns the dotted names of ours that a module of `package` imports, anywhere in its code."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, *filter(None, [node.module])])
            names.update(f"{base}.{alias.name}" for alias in node.names)
    ours = {name for name in names if name.partition(".")[0] in ("advcl_hub", "train", "model_cards")}
    return ours - {"advcl_hub", "advcl_hub.__version__"}


@pytest.mark.parametrize(
    ("statement", "expected"),
    [
        ("import advcl_hub.data", {"data"}),
        ("from advcl_hub.models.branch_norm import add_branches", {"models"}),
        ("from advcl_hub import hub, __version__", {"hub"}),
        ("def late():\n    from train.pretrain import pretrain", {"train"}),
        ("from . import resnet_cifar", {"models"}),
        ("from ..hub.cards import card", {"hub"}),
        ("from model_cards import release", {"model_cards"}),
        ("import timm.data, trainer, advcl_hub", set()),
    ],
)
def test_imported_reads_every_form_of_import(statement: str, expected: set[str]) -> None:
    assert {room_of(name) for name in imported(statement, package="advcl_hub.models")} == expected


def test_every_room_has_a_floor() -> None:
    assert {room_of(name) for name in modules()} == set(FLOOR_OF)


def test_imports_never_run_up_the_floors() -> None:
    upwards = {
        f"{name} imports {target}"
        for name, names in modules().items()
        for target in map(room_of, names)
        if FLOOR_OF[target] > FLOOR_OF[room_of(name)]
    }
    assert not upwards


def test_imports_between_rooms_have_no_circles() -> None:
    graph: dict[str, set[str]] = {}
    for name, names in modules().items():
        graph.setdefault(room_of(name), set()).update({*map(room_of, names)} - {room_of(name)})
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError and names the circle


def test_imports_between_modules_have_no_circles() -> None:
    known = modules()
    graph: dict[str, set[str]] = {}
    for name, names in known.items():
        # `from advcl_hub.data import matching` names a module, `from advcl_hub.data import ImageData` something in one.
        targets = {target if target in known else target.rpartition(".")[0] for target in names}
        graph[name] = targets & known.keys() - {name}
    graphlib.TopologicalSorter(graph).prepare()


def test_the_library_sends_nobody_to_files_of_a_checkout() -> None:
    """They are not in the wheel. One docstring names the script that writes the data file beside it."""
    inside = {path.stem for top in ("train", "model_cards") for path in ROOT.glob(f"{top}/*.py") if path.stem != "__init__"}
    reference = re.compile(rf"\b(train|model_cards)[./]({'|'.join(inside)})\b")
    naming = {
        str(path.relative_to(ROOT))
        for path in ROOT.glob("advcl_hub/**/*.py")
        if reference.search(path.read_text(encoding="utf-8"))
    }
    assert naming == {"advcl_hub/hub/released.py"}


def named_in_the_readme() -> Iterator[Path]:
    """Yields every path that the README's tree names. A line's own folder, if it begins with one, holds what it names."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    folders = [ROOT]
    for line in text.partition("\n## Where things are\n")[2].split("```")[1].strip("\n").splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        first, *others = re.findall(r"[\w/]+(?:\.(?:py|yaml|md|json)\b|/(?=[\s,)]))", line)
        folders[depth + 1 :] = [folders[depth] / first] if first.endswith("/") else []
        yield folders[depth] / first
        yield from (folders[-1] / name for name in others)


def test_the_readme_names_every_file_of_the_library_in_its_place() -> None:
    named = list(named_in_the_readme())
    assert not [str(path.relative_to(ROOT)) for path in named if not path.exists()]
    modules = [path for path in ROOT.glob("advcl_hub/**/*.py") if not path.stem.startswith("__")]
    assert not [str(path.relative_to(ROOT)) for path in modules if path not in named]


def test_every_test_file_has_the_name_of_a_module() -> None:
    """tests/ROOM/test_MODULE.py or test_MODULE_aspect.py, or, of several modules, test_ROOM_aspect.py."""
    strangers = []
    for path in sorted(ROOT.glob("tests/*/**/test_*.py")):
        room = path.relative_to(ROOT / "tests").parts[0]
        places = [ROOT / "advcl_hub" / room, ROOT / room, *([path.parent] if room == "support" else [])]
        home = next(place for place in places if place.is_dir())
        names = {room, *(inside.stem for inside in home.rglob("*") if inside.suffix == ".py" or inside.is_dir())}
        if not any(re.match(rf"test_{re.escape(name)}(_|$)", path.stem) for name in names):
            strangers.append(str(path.relative_to(ROOT)))
    assert not strangers
    loose = {path.stem.removeprefix("test_") for path in Path(ROOT / "tests").glob("test_*.py")}
    of_modules = {name for name in loose if (ROOT / "advcl_hub" / f"{name.partition('_')[0]}.py").is_file()}
    assert loose - of_modules == {
        "house",
        "packaging",
        "versions",
        "encoding",
        "readme",
        "mutations",
    }  # of the project as a whole
