"""Plans whose encoders are made from each other: teacher, student, LP-AFF; what is kept and released of them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from advcl_hub.hub.export import WEIGHTS, load_folder
from advcl_hub.opening import weights_sha256
from advcl_hub.records import RESULTS
from advcl_hub.training.runlog import read_log
from advcl_hub.training.stop import StopRequest
from tests.support.checkouts import copy_checkout, run
from tests.support.hub_client import Client
from tests.support.tiny_plans import call, measured, tiny_chain
from train import flagship, kept
from train.plan import Inputs, load_plan
from train.plan_folder import Record


def read(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


@pytest.fixture(scope="module")
def chained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    """A plan, the folder in which it was carried out, and what that said."""
    folder = tmp_path_factory.mktemp("chained")
    plan = tiny_chain(folder)
    measured(plan, folder / "runs", 2, "ask_teacher")
    return plan, folder / "runs", call(plan, "--output", folder / "runs")


@pytest.mark.slow
def test_each_stage_takes_what_the_stage_before_it_made(chained: tuple[Path, Path, str]) -> None:
    _, output, said = chained
    assert "Finished." in said and "| figures | done |" in said
    encoders = {"teacher": output / "teacher" / "export", "student": output / "student" / "export"}
    teacher, student = (load_folder(folder).state_dict() for folder in encoders.values())
    record = read(encoders["student"] / RESULTS)
    assert record["provenance"]["start_from"]["weights_sha256"] == weights_sha256(load_folder(encoders["teacher"]))
    assert not torch.equal(teacher["conv1.weight"], student["conv1.weight"])
    encoder = read(output / "encoder" / RESULTS)
    assert encoder["method"].startswith("LP-AFF") and encoder["dtype"] == "float16"
    assert encoder["encoder"]["provenance"]["sha256"] == record["sha256"]
    figures = read(output / "figures" / RESULTS)["model"]["provenance"]
    assert figures["encoder"]["provenance"]["sha256"] == encoder["sha256"]


@pytest.mark.slow
def test_lp_aff_that_is_too_slow_begins_anew_with_the_same_clusters_and_head(chained: tuple[Path, Path, str]) -> None:
    _, output, said = chained
    epochs = read(output / kept.PLAN)["stages"]["again"]["epochs"]
    assert f"All epochs of again do not fit its share: it begins anew, with {epochs}." in said and epochs < 100_000
    first, anew = output / "again", output / f"again-{epochs}ep"
    assert read(anew / "export" / RESULTS)["settings"]["epochs"] == epochs and not (first / "export").exists()
    (labels,), (same) = (sorted((folder / "labels").iterdir()) for folder in (first, anew))
    assert [file.read_bytes() for file in same] == [labels.read_bytes()]
    seen = read_log(first / "head")
    assert read_log(anew / "head")[: len(seen)] == seen and "| again | done | " in said


@pytest.mark.slow
def test_earlier_encoders_are_kept_as_far_as_they_fit(
    chained: tuple[Path, Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, output, said = chained
    folders = kept.unpack(output / "kept", tmp_path / "back")
    assert list(folders) == ["encoder", "slf", "student", "teacher"] and "Not kept" not in said
    for name in ("teacher", "student"):
        made, back = (load_folder(folder).state_dict() for folder in (output / name / "export", folders[name]))
        assert all(torch.equal(value.half(), back[key].half()) for key, value in made.items())
    assert {"again-run/lp_aff.json", "again-run/log.jsonl"} <= {
        path.relative_to(tmp_path / "back").as_posix() for path in (tmp_path / "back").rglob("*")
    }
    monkeypatch.setattr(kept, "FILES", 6)  # as of a network whose weights have more parts
    again = flagship.Flagship(Record(load_plan(str(plan), Inputs()), False), Inputs(), output, tmp_path / "kept")
    again.keep()
    again.lock.close()
    assert len(list((tmp_path / "kept").iterdir())) == 6
    assert list(kept.unpack(tmp_path / "kept", tmp_path / "fewer")) == ["encoder", "slf", "student"]
    note = "Not kept, because it does not fit beside the rest: teacher"
    assert (tmp_path / "kept" / kept.SUMMARY).read_text(encoding="utf-8").splitlines()[-1] == note


@pytest.mark.slow
def test_of_a_chain_the_last_encoder_and_its_classifier_are_released(
    chained: tuple[Path, Path, str], tmp_path: Path, client: Client
) -> None:
    checkout = copy_checkout(tmp_path / "checkout")
    assert client(run, checkout, chained[1] / "kept", "--licence", "mit") == ""
    entries = read(checkout / "advcl_hub" / "hub" / "released.json")["releases"]
    new = {name: entry for name, entry in entries.items() if name.startswith("resnet8_cifar.chain")}
    assert list(new) == ["resnet8_cifar.chain", "resnet8_cifar.chain_slf"]
    encoder = read(chained[1] / "encoder" / RESULTS)
    assert new["resnet8_cifar.chain"]["files"][WEIGHTS]["sha256"] == encoder["sha256"][WEIGHTS]
    card = (checkout / "model_cards" / "resnet8_cifar.chain" / "README.md").read_text(encoding="utf-8")
    assert "LP-AFF" in card and "DeACL" in card


def test_lp_aff_is_measured_by_the_epochs_after_its_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long the clusters and the head take: the commands, one by one, without running them."""
    output, commands = tmp_path / "runs", list[list[str]]()
    plan = load_plan(str(tiny_chain(tmp_path)), Inputs())

    def write_log(folder: Path, pace: float) -> None:
        records = [{"step": step, "epoch": float(step), "seconds": pace * step} for step in (1, 2)]
        folder.mkdir(parents=True)
        (folder / "log.jsonl").write_text("\n".join(map(json.dumps, records)), encoding="utf-8")

    def pretend(command: list[str], log: Path, stop: StopRequest, *rest: Any) -> None:
        commands.append(command)
        folder = Path(command[command.index("--output") + 1])
        if len(commands) == 1:
            (folder / "labels").mkdir(parents=True)
            (folder / "labels" / "clusters").touch()
            assert not stop.requested
            write_log(folder / "head", 1.0)
            assert not stop.requested  # the head's epochs are others
            write_log(folder / "full", 2.05)  # the share is 6 s
            assert stop.requested

    monkeypatch.setattr(flagship, "run_command", pretend)
    made = flagship.Flagship(Record(plan, False), Inputs(), output, output / "kept")
    made._lp_aff("again", StopRequest())
    made.lock.close()
    first, anew = output / "again", output / "again-2ep"
    assert [command[command.index("--output") + 1] for command in commands] == [str(first), str(anew)]
    assert commands[0][4] == str(output / "student" / "export") and commands[-1][-4:-2] == ["--epochs", "2"]
    assert (anew / "labels" / "clusters").is_file() and (anew / "head" / "log.jsonl").is_file() and not (anew / "full").exists()
    assert made.at.done("again") is False and made.at.state("encoder") == "waits for again"
