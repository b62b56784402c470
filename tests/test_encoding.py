"""Text is UTF-8 wherever it is read or written, whatever the system's own encoding is."""

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import ROOT
from tests.support.image_files import encode, pixels, write
from tests.support.small_encoders import export_encoder

SOURCES = sorted(path for room in ("advcl_hub", "train", "model_cards", "tests") for path in ROOT.glob(f"{room}/**/*.py"))

# Finetunes, evaluates and writes a card, as somebody with a system of another encoding does.
PROGRAM = """
import sys
from pathlib import Path
import advcl_hub
from advcl_hub.hub.cards import add_to_results, write_card
here = Path(sys.argv[1])
run = advcl_hub.finetune(here / "encoder", f"folder:{here / 'data'}", epochs=1, batch_size=4, cpu=True, output=here / "run")
protocol = advcl_hub.Protocol(steps=1, check_images=0)
advcl_hub.evaluate(run.folder, f"folder:{here / 'data'}", protocol, output=here / "evaluation", progress=False)
add_to_results(run.folder, [here / "evaluation"], ("très long",), "mit")
write_card(run.folder, "Größe")
"""


def texts_without_encoding(tree: ast.AST) -> Iterator[ast.Call]:
    """Calls that read or write text without saying in which encoding."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and not any(keyword.arg in ("encoding", None) for keyword in node.keywords):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            given = {keyword.arg: keyword.value for keyword in node.keywords}
            process = name in ("run", "Popen", "check_output") and bool({"text", "universal_newlines"} & given.keys())
            whole = name == "read_text" or (name == "write_text" and len(node.args) < 2)
            if process or whole or (name in MODE_AT and opens_text(node, given.get("mode"))):
                yield node


# Where the mode stands among the arguments: of open as a function, it is one place further.
MODE_AT = {"open": 0, "fdopen": 1, "TemporaryFile": 0, "NamedTemporaryFile": 0}
OTHERS = ("Image.open", "gzip.open", "os.open")  # of another kind: bytes, or file descriptors


def opens_text(call: ast.Call, mode: ast.expr | None) -> bool:
    name = ast.unparse(call.func)
    place = 1 if name == "open" else MODE_AT[name.rpartition(".")[2]]
    mode = mode or (call.args[place] if len(call.args) > place else None)
    if name in OTHERS or mode is None:
        return name not in OTHERS and "Temporary" not in name  # temporary files are binary where nothing is said
    return isinstance(mode, ast.Constant) and isinstance(mode.value, str) and set(mode.value) <= set("rwaxt+")


def test_every_file_says_its_encoding() -> None:
    silent = [
        f"{path.relative_to(ROOT)}:{call.lineno}: {ast.unparse(call)}"
        for path in SOURCES
        for call in texts_without_encoding(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert not silent


@pytest.mark.parametrize(
    ("silent", "right"),
    [
        ('open("x")', 'open("x", encoding="utf-8")'),
        ('path.open("a")', 'path.open("rb")'),
        ("path.read_text()", 'path.read_text(encoding="utf-8")'),
        ("subprocess.run(x, text=True)", "subprocess.run(x)"),
        ('tempfile.TemporaryFile("w")', "tempfile.TemporaryFile()"),
        ("Path(x).open()", "Image.open(x)"),
    ],
)
def test_the_search_finds_what_it_looks_for(silent: str, right: str) -> None:
    assert list(texts_without_encoding(ast.parse(silent)))
    assert not list(texts_without_encoding(ast.parse(right)))


@pytest.mark.slow
def test_an_ascii_locale_changes_nothing(tmp_path: Path) -> None:
    names = ["école", "猫"]
    for split in ("train", "test"):
        for name in names:
            for i in range(6):
                write(tmp_path / "data" / split / name / f"{name}{i}.png", encode(pixels(16, 16)))
    export_encoder(tmp_path / "encoder")
    (tmp_path / "program.py").write_text(PROGRAM, encoding="utf-8")
    other = {name: value for name, value in os.environ.items() if name != "LANG" and not name.startswith("LC_")}
    other |= {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-X", "warn_default_encoding", str(tmp_path / "program.py"), str(tmp_path)],
        env=other,
        cwd=ROOT,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    ours = [
        line
        for line in done.stderr.splitlines()
        if "EncodingWarning" in line and str(ROOT) in line and "site-packages" not in line
    ]
    assert not ours
    results = json.loads((tmp_path / "run" / "classifier" / "results.json").read_text(encoding="utf-8"))
    assert results["data"]["classes"] == names
    assert (tmp_path / "run" / "classifier" / "README.md").read_text(encoding="utf-8").count("école") >= 1
    assert json.loads((tmp_path / "evaluation" / "results.json").read_text(encoding="utf-8"))["classes"] == names
    assert "très long" in (tmp_path / "run" / "classifier" / "README.md").read_text(encoding="utf-8")
