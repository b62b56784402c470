"""File systems that lack what nobody needs, and results that cannot be saved: the work goes on."""

import builtins
import errno
import fcntl
import json
import os
import threading
import warnings
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import advcl_hub
from advcl_hub import files
from advcl_hub.cli import main
from advcl_hub.evaluation import Evaluation
from advcl_hub.evaluation.journal import Journal
from advcl_hub.finetuning import Finetuned
from advcl_hub.hub.export import replacing_folder
from advcl_hub.training import loop, runlog
from advcl_hub.training.processes import ALONE
from advcl_hub.training.runlog import read_log
from advcl_hub.training.stop import StopRequest
from tests.support import warm
from tests.support.small_encoders import SMALL_RESNET, export_encoder, save_encoder

CONFIG = advcl_hub.Protocol(steps=1, check_images=0)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_encoder(tmp_path_factory.mktemp("encoders") / "resnet", num_classes=10, **SMALL_RESNET)


def tune(classifier: Path, output: Path) -> Finetuned:
    return advcl_hub.finetune(classifier, "fake:24", "sff", epochs=2, batch_size=8, lr=0.1, output=output)


def measure(classifier: Path, output: Path | None) -> Evaluation:
    return advcl_hub.evaluate(classifier, "fake:20", CONFIG, output=output, progress=False)


def failing(number: int) -> Any:
    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


def said(caught: list[warnings.WarningMessage], word: str) -> list[str]:
    return [str(entry.message) for entry in caught if word in str(entry.message)]


@pytest.mark.parametrize(
    ("module", "name", "number", "word"),
    [
        (os, "chmod", errno.EPERM, "permissions"),
        (os, "chmod", errno.ENOTSUP, "permissions"),
        (os, "fsync", errno.EINVAL, "synced"),
        (fcntl, "flock", errno.ENOLCK, "locked"),
    ],
)
def test_what_a_file_system_lacks_is_said_once(
    classifier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: Any, name: str, number: int, word: str
) -> None:
    monkeypatch.setattr(module, name, failing(number))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert tune(classifier, tmp_path / "run").finished
        assert measure(tmp_path / "run" / "classifier", tmp_path / "out").standard <= 1
    assert len(said(caught, word)) == 1
    assert {path.name for path in (tmp_path / "out").iterdir()} > {"results.json", "images.csv", "report.md"}


def test_an_error_of_the_disk_remains_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", failing(errno.EIO))
    with (
        pytest.raises(OSError, match=r"a\.txt could not be written: .*Input/output error"),
        files.replacing(tmp_path / "a.txt") as draft,
    ):
        draft.write_text("x", encoding="utf-8")
    assert not list(tmp_path.iterdir())


def test_a_folder_appears_where_permissions_cannot_be_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "chmod", failing(errno.EPERM))
    with pytest.warns(UserWarning, match="permissions"), replacing_folder(tmp_path / "e") as draft:
        (draft / "config.json").write_text("{}", encoding="utf-8")
    assert [path.name for path in (tmp_path / "e").iterdir()] == ["config.json"]


# ----------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("broken", ["curves", "batch.png", "tensorboard", "no tensorboard"])
def test_training_goes_on_without_its_pictures(
    classifier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    word = {"curves": "curves.png", "batch.png": "batch.png"}.get(broken, "TensorBoard")
    if broken == "curves":
        monkeypatch.setattr(loop, "save_curves", failing(errno.ENOSPC))
    elif broken == "batch.png":
        monkeypatch.setattr("advcl_hub.training.pictures.save_views", failing(errno.ENOSPC))
    elif broken == "tensorboard":
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "tensorboard").touch()
    else:
        real = builtins.__import__

        def absent(name: str, *rest: Any) -> Any:
            if name.startswith("torch.utils.tensorboard"):
                raise ImportError("No module named 'tensorboard'")
            return real(name, *rest)

        monkeypatch.setattr(builtins, "__import__", absent)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert tune(classifier, tmp_path / "run").finished
    (warning,) = said(caught, word)
    assert warning.endswith("the work goes on without.")
    assert read_log(tmp_path / "run")[-1]["step"] == 6


def test_a_board_that_fails_on_the_way_is_closed_once(tmp_path: Path) -> None:
    log = runlog.RunLog(tmp_path, 0)
    log.board.close()
    log.board.add_scalar = failing(errno.ENOSPC)
    with pytest.warns(UserWarning, match=r"TensorBoard's log failed \(OSError: .*No space left"):
        log.write(1, loss=1.0)
    log.write(2, loss=0.5)
    log.close()
    assert [record["step"] for record in read_log(tmp_path)] == [1, 2]


def test_a_checkpoint_that_cannot_be_written_is_an_error(
    classifier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("advcl_hub.finetuning.trainer.save_state", failing(errno.ENOSPC))
    with pytest.raises(OSError, match="No space left"):
        tune(classifier, tmp_path / "run")


def test_a_run_in_a_thread_goes_without_signals(classifier: Path, tmp_path: Path) -> None:
    finished: list[bool] = []
    thread = threading.Thread(target=lambda: finished.append(tune(classifier, tmp_path / "run").finished))
    thread.start()
    thread.join()
    with StopRequest():
        pass
    assert finished == [True]


def test_a_batch_of_one_image_is_refused_in_our_words(tmp_path: Path) -> None:
    encoder = save_encoder(tmp_path / "encoder")  # its last feature map is of one pixel
    options = {"epochs": 1, "output": tmp_path / "run", "size": 16}
    with pytest.raises(ValueError, match=r"It takes two images for each .* batch_size of at least 2, in another folder"):
        advcl_hub.finetune(encoder, "fake:16", "sff", batch_size=1, **options)
    with pytest.raises(ValueError, match="batch_size of at least 4"):
        advcl_hub.finetune(encoder, "fake:16", "sff", batch_size=2, accumulate=2, **options | {"output": tmp_path / "other"})


# --------------------------------------------------------------------------------------------------------- evaluating


def full(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "replace", failing(errno.ENOSPC))


def test_figures_that_cannot_be_saved_are_returned(classifier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = measure(classifier, None)
    with monkeypatch.context() as patched, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        full(patched)
        found = measure(classifier, tmp_path / "out")
    (warning,) = said(caught, "")
    assert warning.startswith("The results could not be saved ([Errno 28] No space left on device): ")
    assert f"{tmp_path / 'out'} has no results.json, but the figures are returned; the same call tries again" in warning
    assert found.record["accuracy"] == whole.record["accuracy"] and found.images == whole.images
    kept = list((tmp_path / "out" / "unfinished").iterdir())
    assert len(kept) == 1 and not (tmp_path / "out" / "results.json").exists()
    with monkeypatch.context() as patched:
        patched.setattr(Journal, "write", lambda *_: pytest.fail("something was measured again"))
        again = measure(classifier, tmp_path / "out")
    assert again.record["accuracy"] == whole.record["accuracy"]
    assert {"results.json", "images.csv"} < {path.name for path in (tmp_path / "out").iterdir()}
    assert not kept[0].exists()


@pytest.mark.parametrize("as_json", [True, False])
def test_the_command_prints_what_it_cannot_save(
    classifier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, as_json: bool
) -> None:
    command = ["evaluate", str(classifier), "--data", "fake:20", "--steps", "1", "--check-images", "0"]
    command += ["--output", str(tmp_path / "out"), *(["--json"] if as_json else [])]
    with monkeypatch.context() as patched:
        full(patched)
        result = CliRunner().invoke(main, command)
    assert result.exit_code == 1 and "Results:" not in result.output
    assert (
        f"Error: {tmp_path / 'out'} has no results.json: free some space or make it writable, and repeat the command"
        in result.stderr
    )
    assert "warning: The results could not be saved" in result.stderr
    assert json.loads(result.stdout)["kind"] == "evaluation" if as_json else "resnet" in result.stdout
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0 and ("Results:" in result.stdout) is not as_json


def test_a_disk_that_is_full_on_the_way_loses_no_figure(
    classifier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = measure(classifier, None)
    begun: list[str] = []
    append = Journal._append

    def fills_up(journal: Journal, entry: dict[str, Any]) -> None:
        begun.append(next(iter(entry)))
        if len(begun) > 2:
            journal.file.write('{"unit": "half a li')
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        append(journal, entry)

    monkeypatch.setattr(Journal, "_append", fills_up)
    with pytest.warns(UserWarning, match=r"0\.jsonl could not be written .* the evaluation goes on"):
        found = measure(classifier, tmp_path / "out")
    assert len(begun) == 3 and found.record["accuracy"] == whole.record["accuracy"]


def test_a_torn_line_is_cut_when_the_journal_goes_on(tmp_path: Path) -> None:
    folder = tmp_path / "unfinished"
    first = Journal(folder, {"a": 1}, ALONE)
    first.write("x/0", {"v": [1]}, 0.5)
    first.close()
    with (folder / "0.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"unit": "x/1", "se')
    second = Journal(folder, {"a": 1}, ALONE)
    second.write("x/1", {"v": [2]}, 0.5)
    second.close()
    assert Journal(folder, {"a": 1}, ALONE).units == {"x/0": {"v": [1]}, "x/1": {"v": [2]}}


def test_without_matplotlib_and_tensorboard_all_work_is_done(tmp_path: Path) -> None:
    """In a process of its own, where neither can be imported."""
    export_encoder(tmp_path / "encoder")
    program = """
import sys, warnings
from importlib.abc import MetaPathFinder
class Missing(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] in ("matplotlib", "tensorboard"):
            raise ModuleNotFoundError(f"No module named {name!r}")
for name in [name for name in sys.modules if name.partition(".")[0] in ("matplotlib", "tensorboard") or "tensorboard" in name]:
    del sys.modules[name]
sys.meta_path.insert(0, Missing())
import importlib.util
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name in ("matplotlib", "tensorboard") else found(name, package)
import advcl_hub
run = advcl_hub.finetune("encoder", "fake:40", "sff", size=16, epochs=1, batch_size=8, cpu=True, output="run")
result = advcl_hub.evaluate(run.folder, "fake:20", advcl_hub.Protocol(steps=1, check_images=0), output="out", progress=False)
print(run.finished, result.robust is not None)
"""
    done = warm.run("-c", program, cwd=tmp_path)
    assert done.stdout.split() == ["True", "True"], done.stderr
    assert "Pictures need matplotlib" in done.stderr and "TensorBoard's log failed" in done.stderr
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"results.json", "images.csv", "report.md"}
