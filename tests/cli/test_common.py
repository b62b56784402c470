"""Commands: whatever goes wrong is one sentence and an exit code; any text can be printed."""

import io
import json
import os
import select
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import timm
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors import SafetensorError

from advcl_hub.cli import main
from advcl_hub.cli.common import TRACEBACK, any_text, one_sentence, script, user_errors
from advcl_hub.hub.export import export_folder
from tests.support import ROOT

UNEXPECTED = [
    (RuntimeError("boom\nmore"), "RuntimeError: boom more."),
    (SafetensorError("header too large"), "SafetensorError: header too large."),
    (AssertionError(), "AssertionError()."),
    (KeyError("sha256"), "KeyError('sha256')."),
    (json.JSONDecodeError("Expecting value", "", 0), "JSONDecodeError: Expecting value"),
    (torch.OutOfMemoryError("CUDA out of memory."), "lower the batch size. (OutOfMemoryError: CUDA out of memory.)"),
]
EXPECTED = [
    (ValueError("is wrong: do that.\n  a second line"), "is wrong: do that.\n  a second line"),
    (OSError("no such place."), "no such place."),
    (FloatingPointError("not finite."), "not finite."),
    (ValueError("the class \x1b[2J\u202e"), "the class \\x1b[2J\\u202e"),
]


def raising(error: BaseException) -> Callable[[], None]:
    def function() -> None:
        raise error

    return function


def as_command(error: BaseException) -> Any:
    return CliRunner().invoke(click.command()(user_errors(raising(error))), [])


def as_script(error: BaseException) -> Any:
    with pytest.raises(SystemExit) as caught, script():
        raise error
    return caught.value


@pytest.mark.parametrize(("error", "said"), [*UNEXPECTED, *EXPECTED])
def test_one_sentence_and_exit_code_1(error: Exception, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TRACEBACK, raising=False)
    done = as_command(error)
    assert done.exit_code == 1 and done.output.startswith("Error: ") and said in done.output
    assert "Traceback" not in done.output
    where = "(Set ADVCL_HUB_TRACEBACK=1 to see where.)" in done.output
    assert where == (any(error is e for e, _ in UNEXPECTED) and not isinstance(error, torch.OutOfMemoryError))
    assert str(as_script(error).code) == f"error: {done.output.removeprefix('Error: ').rstrip()}"


@pytest.mark.parametrize("error", [RuntimeError("boom"), ValueError("boom")])
def test_the_traceback_on_request(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(TRACEBACK, "1")
    as_script(error)
    assert "Traceback" in (said := capsys.readouterr().err) and "raise error" in said
    done = as_command(error)
    assert done.exit_code == 1 and "Traceback" in done.output and "Error: " in done.output


def test_clicks_own_exceptions_and_interruptions(monkeypatch: pytest.MonkeyPatch) -> None:
    assert as_command(click.UsageError("wrong option")).exit_code == 2
    assert as_command(click.Abort()).exit_code == 1 and as_command(click.exceptions.Exit(3)).exit_code == 3
    assert as_script(click.UsageError("wrong option")).code == "error: wrong option"
    done = as_command(KeyboardInterrupt())
    assert done.exit_code == 130 and "goes on from there" in done.output
    with pytest.raises(KeyboardInterrupt), script():
        raise KeyboardInterrupt
    with pytest.raises(SystemExit, match="the same command"), script("Start the same command again."):
        raise KeyboardInterrupt
    assert as_script(SystemExit(7)).code == 7


def run(code: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    kept = {name: value for name, value in os.environ.items() if name not in (TRACEBACK, "LC_ALL", "LANG", "PYTHONIOENCODING")}
    environment = kept | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | variables
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, encoding="utf-8", errors="replace"
    )


def piped(command: str) -> "subprocess.CompletedProcess[str]":
    environment = {name: value for name, value in os.environ.items() if name != TRACEBACK} | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(["bash", "-c", command], env=environment, capture_output=True, encoding="utf-8")


@pytest.mark.slow
def test_a_reader_that_has_left_is_no_error() -> None:
    command = f"{sys.executable} -m advcl_hub.cli list --json | head -c 1; exit ${{PIPESTATUS[0]}}"
    done = piped(command)
    assert done.stdout == "{" and done.returncode in (0, 1)
    assert "Traceback" not in done.stderr and "Error" not in done.stderr
    text = "from advcl_hub.cli.common import script\nwith script():\n    print('x' * 10**6, flush=True)"
    command = f'{sys.executable} -c "{text}" | head -c 1; exit ${{PIPESTATUS[0]}}'
    done = piped(command)
    assert done.stdout == "x" and done.returncode == 1
    assert "Traceback" not in done.stderr and "Error" not in done.stderr
    with pytest.raises(SystemExit, match="Broken pipe"), script():  # of a worker, say
        raise BrokenPipeError(32, "Broken pipe")


def ended_by_a_broken_pipe() -> Any:
    """The exit code of a command, or what it says."""
    with pytest.raises(SystemExit) as caught, one_sentence(SystemExit):
        raise BrokenPipeError(32, "Broken pipe")
    return caught.value.code


@pytest.mark.parametrize("left", ["", "left in the buffer"])
def test_what_a_reader_that_has_left_did_not_take_is_thrown_away(left: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w", encoding="utf-8") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        stream.write(left)
        assert ended_by_a_broken_pipe() == 1
        print("what comes after", flush=True)


def closed() -> io.TextIOWrapper:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    stream.close()
    return stream


@pytest.mark.parametrize("stdout", [io.StringIO(), closed()], ids=["no file", "closed"])
def test_a_broken_pipe_is_told_where_stdout_is_none(stdout: io.TextIOBase, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", stdout)
    assert ended_by_a_broken_pipe() == "[Errno 32] Broken pipe"


def test_a_broken_pipe_is_told_where_pipes_cannot_be_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(select, "poll")  # as on Windows
    assert ended_by_a_broken_pipe() == "[Errno 32] Broken pipe"


ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
COMMAND = "import sys; sys.argv = ['advcl-hub', *{!r}]; from advcl_hub.cli import main; main()"


@pytest.fixture(scope="module")
def cats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier, and images in folders named like its classes."""
    folder = tmp_path_factory.mktemp("cats")
    names = ["chat à l'école", "猫"]
    torch.manual_seed(0)
    cfg = {"input_size": (3, 16, 16), "mean": (0.0,) * 3, "std": (1.0,) * 3}
    model = timm.create_model("resnet8_cifar", num_classes=2, pretrained_cfg_overlay=cfg)
    results = {"kind": "classifier", "origin": "猫", "notes": ["école 猫"]}
    export_folder(model.eval(), folder / "model", results=results, label_names=names)
    for name in names:
        (folder / "data" / "test" / name).mkdir(parents=True)
        for i in range(3):
            pixels = np.random.RandomState(i).randint(0, 255, (16, 16, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(folder / "data" / "test" / name / f"{i}.png")
    return folder


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_what_an_encoding_lacks_is_escaped(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", stream)
    any_text()
    stream.write("猫")
    stream.flush()
    assert stream.buffer.getvalue() == b"\\u732b"  # type: ignore[attr-defined]


def test_a_stream_without_an_encoding_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", stream := io.StringIO())
    any_text()
    print("猫")
    assert stream.getvalue() == "猫\n"


@pytest.mark.slow
def test_any_text_can_be_printed(cats: Path, tmp_path: Path) -> None:
    before = "import advcl_hub.cli, advcl_hub.evaluation; assert sys.stdout.errors != 'backslashreplace'; "  # a library call
    done = run(COMMAND.format(["info", str(cats / "model")]).replace("main()", before + "main()"), **ASCII)
    assert done.returncode == 0 and "Error" not in done.stderr, done.stderr
    words = ["evaluate", str(cats / "model"), "--data", f"folder:{cats / 'data'}", "--output", str(tmp_path / "out")]
    done = run(COMMAND.format([*words, "--steps", "1", "--check-images", "0", "--device", "cpu"]), **ASCII)
    assert done.returncode == 0 and "Results: " in done.stdout, done.stderr
    text = ascii("école 猫")
    code = f"from advcl_hub.cli.common import script\nwith script():\n    print({text}); raise ValueError({text})"
    done = run(code, **ASCII)
    assert done.returncode == 1 and "UnicodeEncodeError" not in done.stderr and "error: " in done.stderr
    assert "Traceback" not in done.stderr and "cole" in done.stdout and "cole" in done.stderr


@pytest.mark.parametrize("module", ["export", "kept", "pretrain", "trial", "pseudo_labels", "demo", "flagship"])
def test_the_commands_of_train_say_one_sentence(module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib

    found = importlib.import_module(f"train.{module}")
    entry = {
        "export": ("load_checkpoint", ["run"]),
        "kept": ("unpack", ["kept", str(tmp_path / "new")]),
        "pretrain": ("load_recipe", ["recipe"]),
        "trial": ("load_recipe", ["recipe", "--output", str(tmp_path)]),
        "pseudo_labels": ("load_data", ["--data", "digits", "--encoder", "pixels", "--output", str(tmp_path)]),
        "demo": ("run_demo", ["--output", str(tmp_path)]),
        "flagship": ("load_plan", ["plan", "--rehearse"]),
    }
    name, words = entry[module]
    monkeypatch.setattr(found, name, lambda *args, **options: 1 / 0)
    monkeypatch.setattr(sys, "argv", ["x", *words])
    monkeypatch.delenv(TRACEBACK, raising=False)
    with pytest.raises(SystemExit) as caught:
        found.main()
    assert caught.value.code == "error: ZeroDivisionError: division by zero. (Set ADVCL_HUB_TRACEBACK=1 to see where.)"


def test_the_group_itself_still_works() -> None:
    assert CliRunner().invoke(main, ["list"]).exit_code == 0
