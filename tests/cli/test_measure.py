"""advcl-hub evaluate and report, as typed: what they print and leave, after a kill, with several processes, on bad input."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from advcl_hub.data import load_data
from advcl_hub.evaluation import Protocol, evaluate
from advcl_hub.evaluation.journal import Journal
from advcl_hub.hub.export import export_folder
from advcl_hub.models import resnet_cifar  # noqa: F401
from advcl_hub.training.processes import ALONE
from tests.support import ROOT, warm
from tests.support.commands import invoke, run, start
from tests.support.held import HELD
from tests.support.hub_client import nobody, open_client
from tests.support.hub_server import serve_hub
from train.probe import linear_probe

DATA = ("--data", "fake:60", "--eps", "1/255")
ATTACKED = (*DATA, "--images", "12", "--autoattack", "standard", "--batch-size", "10", "--check-images", "10")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier that gets two thirds of the fake images right, of which PGD at 1/255 breaks about half."""
    torch.manual_seed(0)
    overlay = {"input_size": (3, 16, 16)}
    encoder = timm.create_model("resnet8_cifar", num_classes=0, channels=[4, 4, 8], pretrained_cfg_overlay=overlay)
    data = load_data("fake:300", "train", size=16)
    probe = linear_probe(encoder, data, "cpu")
    folder = tmp_path_factory.mktemp("models") / "probe"
    provenance = {"kind": "classifier", "provenance": {"pseudo_labels": {"encoder": "some_encoder"}}}
    return export_folder(probe, folder, results=provenance, model_args={"channels": [4, 4, 8]}, label_names=data.classes)


def what_was_measured(folder: Path) -> tuple[str, dict[str, Any]]:
    """images.csv and results.json without what differs from run to run."""
    record = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    return (folder / "images.csv").read_text(encoding="utf-8"), {
        k: v for k, v in record.items() if k not in ("seconds", "date", "command", "hardware")
    }


@pytest.fixture(scope="module")
def uninterrupted(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process measures that nobody disturbs."""
    output = tmp_path_factory.mktemp("whole") / "evaluation"
    run("evaluate", model, *ATTACKED, "--output", output, short=True)
    return output


def test_the_folder_and_the_table(model: Path, uninterrupted: Path) -> None:
    left = {path.name for path in uninterrupted.iterdir()}
    assert left == {"results.json", "images.csv", "report.md", "curves.png", "per_class.png", "examples.png"}
    record = json.loads((uninterrupted / "results.json").read_text(encoding="utf-8"))
    assert record["data"] | {"sha256": None} == {
        "name": "fake:60",
        "split": "test",
        "images": 12,
        "of": 60,
        "selection": "class-balanced",
        "sha256": None,
    }
    assert record["model"]["provenance"]["provenance"]["pseudo_labels"] == {"encoder": "some_encoder"}
    assert record["model"]["name"].endswith("/probe")
    assert record["model"]["file_sha256"] == record["model"]["provenance"]["sha256"]["model.safetensors"]
    assert record["protocol"]["eps"] == 1 / 255 and record["protocol"]["step_size"] == 1 / 255 / 4
    assert "--autoattack standard" in record["command"] and record["versions"]["torch"] == torch.__version__
    table = invoke("report", uninterrupted).output
    assert "SA" in table and "PGD-20" in table and "Square" in table and "eps 1/255 in pixels of [0, 1]" in table


def test_asked_again_it_answers_from_the_folder_and_overwrites_nothing(model: Path, uninterrupted: Path) -> None:
    before = what_was_measured(uninterrupted)
    again = invoke("evaluate", model, *ATTACKED, "--output", uninterrupted)
    assert again.exit_code == 0 and "holds this evaluation already" in again.output and "Square" in again.output
    other = invoke("evaluate", model, *ATTACKED, "--seed", "1", "--output", uninterrupted)
    assert other.exit_code == 1 and "holds an evaluation with another protocol" in other.output
    assert what_was_measured(uninterrupted) == before


@pytest.mark.slow
def test_after_kills_it_ends_as_if_nothing_had_happened(model: Path, uninterrupted: Path, tmp_path: Path) -> None:
    output = tmp_path / "evaluation"
    for units, processes in ((2, 1), (6, 2)):
        held = f"after_units({units})"
        with start("evaluate", model, *ATTACKED, "--output", output, processes=processes, held=held, short=True) as process:
            process.wait_for(HELD)
            os.killpg(process.pid, signal.SIGKILL)
        assert not (output / "results.json").exists()
    for path in output.glob("unfinished/*.jsonl"):
        path.write_text(path.read_text(encoding="utf-8")[:-9], encoding="utf-8")  # cut short in the middle of a line
    refused = invoke("evaluate", model, *ATTACKED, "--seed", "1", "--output", output)
    assert refused.exit_code == 1 and "unfinished evaluation with another protocol" in refused.output
    run("evaluate", model, *ATTACKED, "--output", output, short=True)
    assert what_was_measured(output) == what_was_measured(uninterrupted)
    assert not (output / "unfinished").exists()


def test_ctrl_c_says_how_to_go_on(model: Path, tmp_path: Path) -> None:
    with start("evaluate", model, *ATTACKED, "--output", tmp_path / "e", held="after_units(5)", short=True) as process:
        process.wait_for(HELD)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate()
    assert process.returncode == 130 and "goes on from there with the same command" in err and "Traceback" not in err


@pytest.mark.slow
def test_two_processes_share_the_images_and_say_it_once(model: Path, uninterrupted: Path, tmp_path: Path) -> None:
    said = run("evaluate", model, *ATTACKED, "--output", tmp_path / "e", processes=2, short=True)
    assert said.count("PGD-20") == 2  # the header and the line below the table
    assert what_was_measured(tmp_path / "e") == what_was_measured(uninterrupted)
    assert json.loads((tmp_path / "e" / "results.json").read_text(encoding="utf-8"))["hardware"]["processes"] == 2


SCRIPT = """
import sys, advcl_hub
from advcl_hub.training.processes import Processes
result = advcl_hub.evaluate(sys.argv[1], "fake:60", advcl_hub.Protocol(eps=1 / 255, check_images=10), output=sys.argv[2])
sys.stdout.write(f"figures {Processes.current().count} {result.standard} {result.robust}\\n")  # whole: the processes share it
"""


@pytest.mark.slow
def test_a_script_under_torchrun_shares_the_images_too(model: Path, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT, encoding="utf-8")
    done = warm.run(tmp_path / "script.py", model, tmp_path / "e", processes=2, code=0)
    alone = evaluate(model, "fake:60", Protocol(eps=1 / 255, check_images=0), progress=False)
    assert done.stdout.count(f"figures 2 {alone.standard} {alone.robust}") == 2


def test_two_runs_into_one_folder_do_not_mix(tmp_path: Path) -> None:
    first = Journal(tmp_path / "e" / "unfinished", {"a": 1}, ALONE)
    with pytest.raises(ValueError, match=f"Another process is evaluating into {tmp_path / 'e'}: wait for it"):
        Journal(tmp_path / "e" / "unfinished", {"a": 1}, ALONE)
    first.write("unit/0", {"x": [1]}, 1.0)
    first.close()
    assert Journal(tmp_path / "e" / "unfinished", {"a": 1}, ALONE).units == {"unit/0": {"x": [1]}}


def test_report_puts_several_side_by_side(model: Path, uninterrupted: Path, tmp_path: Path) -> None:
    invoke("evaluate", model, *DATA, "--steps", "2", "--n", "20", "--check-images", "0", "--output", tmp_path / "b")
    text = invoke("report", uninterrupted, tmp_path / "b").output
    assert "[1]" in text and "[2]" in text and "WARNING" in text and "class-balanced 20 test images of 60" in text
    latex = invoke("report", uninterrupted, tmp_path / "b" / "results.json", "--format", "latex").output
    assert latex.count(r" \\") == 3 and r"\bottomrule" in latex
    assert len(json.loads(invoke("report", uninterrupted, "--json").output)) == 1


def test_report_leaves_out_what_is_not_finished_and_says_so(uninterrupted: Path, tmp_path: Path) -> None:
    (tmp_path / "begun" / "unfinished").mkdir(parents=True)
    done = invoke("report", tmp_path / "begun", uninterrupted)
    assert done.exit_code == 0 and done.stdout == invoke("report", uninterrupted).stdout
    assert done.stderr == f"warning: {tmp_path / 'begun'} is left out: its evaluation is not finished.\n"
    alone = invoke("report", tmp_path / "begun")
    assert alone.exit_code == 1 and "is left out" in alone.stderr and "nothing to report" in alone.stderr


def damaged(model: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in model.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-3] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    return copy


def encoder(model: Path, tmp_path: Path) -> Path:
    network = timm.create_model("resnet8_cifar", num_classes=0, channels=[4, 4, 8])
    return export_folder(network, tmp_path / "encoder", results={}, model_args={"channels": [4, 4, 8]})


def pickled(model: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "pickled"
    folder.mkdir()
    (folder / "config.json").write_bytes((model / "config.json").read_bytes())
    torch.save({}, folder / "pytorch_model.bin")
    return folder


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (None, ["resnet81_cifar", *DATA], "neither a folder nor a model that timm knows. Near: resnet8_cifar"),
        (None, ["resnet20_cifar", *DATA], "resnet20_cifar has no weights that timm could open"),
        (None, ["resnet18.nobody", *DATA], "there are resnet18.a1_in1k"),
        (None, ["./nowhere", *DATA], "nowhere is no folder"),
        (None, ["local-dir:nowhere", *DATA], "nowhere is no folder"),
        (None, ["{tmp}", *DATA], "has no config.json"),
        (damaged, ["{made}", *DATA], "is not the file that was exported"),
        (encoder, ["{made}", *DATA], "encoder without a classifier"),
        (pickled, ["{made}", *DATA], "pickled weights are not read"),
        (None, ["{model}", "--data", "cifar11"], "cifar11"),
        (None, ["{model}", "--data", "folder:{tmp}/none"], "none"),
        (None, ["{model}", "--data", "fake:60", "--eps", "8"], "expected a distance of pixels in [0, 1]: did you mean 8/255?"),
        (None, ["{model}", "--data", "fake:60", "--eps", "x"], "'x' is not a number such as 8/255"),
        (None, ["{model}", *DATA, "--n", "61"], "61 images were asked for, fake:60 has 60"),
        (None, ["{model}", *DATA, "--batch-size", "0"], "batch_size is 0, expected at least 1"),
        (None, ["{model}", *DATA, "--device", "cuda:77"], "cuda:77 cannot be used"),
        (None, ["{model}", *DATA, "--corruptions", "{tmp}/none"], "none"),
    ],
)
def test_bad_input_is_one_clear_line_before_work_starts(
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    make: Callable[[Path, Path], Path] | None,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    made = make(model, tmp_path) if make else ""
    before = set(tmp_path.iterdir())
    result = invoke("evaluate", *(a.format(tmp=tmp_path, made=made, model=model) for a in arguments))
    assert message in result.output and "Traceback" not in result.output, result.output
    assert result.exit_code in (1, 2) and set(tmp_path.iterdir()) == before


def test_a_model_of_the_hub_brings_its_provenance(model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "hub" / "org" / "probe")
    with serve_hub(tmp_path / "hub") as address:
        environment = os.environ | {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
        arguments = ["hf-hub:org/probe@main", *DATA, "--steps", "0", "--output", tmp_path / "e"]
        warm.run("-m", "advcl_hub.cli", "evaluate", *arguments, env=environment, code=0)
    record = json.loads((tmp_path / "e" / "results.json").read_text(encoding="utf-8"))
    assert record["model"]["provenance"]["provenance"]["pseudo_labels"] == {"encoder": "some_encoder"}
    local = invoke("evaluate", model, *DATA, "--steps", "0", "--json", "--output", tmp_path / "f")
    assert json.loads(local.output)["accuracy"] == record["accuracy"]


def typed(*arguments: str) -> tuple[int, str]:
    result = invoke(*arguments)
    return result.exit_code, result.output


def test_no_network_is_said(tmp_path: Path) -> None:
    with open_client(nobody(), tmp_path / "home") as client:
        code, said = client(typed, "evaluate", "hf-hub:someone/something", *DATA, "--output", str(tmp_path / "out"))
    assert code == 1 and "someone/something cannot be fetched from the Hub" in said and "check the network" in said


@pytest.mark.parametrize("content", ["{", "{}", '{"kind": "encoder"}', "[]"])
def test_report_refuses_what_is_no_evaluation(tmp_path: Path, content: str) -> None:
    assert "has no results.json" in invoke("report", tmp_path).output
    (tmp_path / "results.json").write_text(content, encoding="utf-8")
    result = invoke("report", tmp_path)
    assert result.exit_code == 1 and "is not the result of an evaluation" in result.output


@pytest.mark.slow
def test_help_names_every_option_and_imports_no_more_than_it_needs() -> None:
    code = "import sys; from advcl_hub import cli; print(sorted({'matplotlib', 'pyautoattack'} & set(sys.modules)))"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT, encoding="utf-8"
    ).stdout
    assert loaded.strip() == "[]"
    for command in ("evaluate", "report"):
        assert invoke(command, "--help").exit_code == 0
    assert "--autoattack [standard|rand]" in invoke("evaluate", "--help").output
