"""Plans: the one that is shipped, rehearsed by its command; kills, budgets, failures, and what is refused."""

import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from advcl_hub.files import lock
from advcl_hub.hub.export import WEIGHTS
from advcl_hub.hub.parts import LIMIT
from advcl_hub.records import RESULTS
from advcl_hub.training.runlog import read_log
from advcl_hub.training.stop import StopRequest
from tests.support import ROOT, warm
from tests.support.checkouts import copy_checkout
from tests.support.held import HELD
from tests.support.tiny_plans import call, measured, refusal, start, tiny_plan
from train import flagship, kept
from train.checkpoint import load_checkpoint
from train.plan import Inputs, load_plan
from train.plan_folder import Record

STAGES = ["benchmark", "pretrain", "encoder", "slf", "aff", "slf_figures", "aff_figures"]


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a rehearsal of the first plan, and what it said."""
    output = tmp_path_factory.mktemp("rehearsed") / "runs"
    return output, call("resnet18_advcl", "--rehearse", "--output", output)


def models(output: Path) -> dict[str, Path]:
    """The exported folders; a classifier's name tells if its epochs were shortened to its share."""
    stages = json.loads((output / kept.PLAN).read_text(encoding="utf-8"))["stages"]
    shortened = {name: f"-{stages[name]['epochs']}ep" if stages[name]["epochs"] else "" for name in ("slf", "aff")}
    return {"encoder": output / "encoder"} | {n: output / f"{n}{end}" / "float16" for n, end in shortened.items()}


# ------------------------------------------------------------------------------------------------------------ a rehearsal


@pytest.mark.slow
def test_a_rehearsal_does_every_stage_and_says_what_came_out(rehearsed: tuple[Path, str]) -> None:
    output, said = rehearsed
    plan = load_plan("resnet18_advcl", Inputs(), rehearse=True)
    assert list(plan.stages) == STAGES
    table = [line.split(" | ") for line in said.splitlines() if line.startswith("| ") and line.count(" | ") == 4]
    assert [row[:2] for row in table[2:]] == [[f"| {name}", "done"] for name in STAGES]
    assert "of the matrix rate" in table[2][-1] and "epochs fit" in table[2][-1]
    assert "SA " in table[-1][-1] and "PGD " in table[-1][-1] and "20 images" in table[-1][-1]
    assert "Rehearsed: every stage works here." in said and "release" not in said
    trial = json.loads((output / "benchmark" / "trial.json").read_text(encoding="utf-8"))
    record = json.loads((output / "pretrain" / "export" / RESULTS).read_text(encoding="utf-8"))
    chosen = json.loads((output / kept.PLAN).read_text(encoding="utf-8"))["stages"]["pretrain"]
    assert record["finished"] and record["recipe"]["epochs"] == chosen["epochs"] == max(1, trial["epochs"])
    assert record["recipe"]["speed"]["compile"] == chosen["compiled"] == (trial["chosen"] == "compiled")
    assert record["recipe"]["attack"]["steps"] == 3 and record["recipe"]["model_kwargs"]["zero_init_last"] is False
    if shutil.which("g++"):  # else the plan is eager, and says why
        assert trial["not_compiled"] is None and set(trial["ways"]) == {"eager", "compiled"}
        graphs = trial["ways"]["compiled"]["graphs"]
        assert len(graphs) >= 5 and all(graph["seconds"] >= 0 for graph in graphs)  # three branches, two attacked, too
    for way in trial["ways"].values():
        assert way["images_per_second"] > 0 and way["share_of_matrix_rate"] > 0
        assert way["data_and_views_share"] * way["seconds"][0] == pytest.approx(trial["data_and_views_seconds"])
    figures = json.loads((output / "aff_figures" / RESULTS).read_text(encoding="utf-8"))
    assert (
        figures["model"]["provenance"]["encoder"]["provenance"]["dtype"] == figures["model"]["provenance"]["dtype"] == "float16"
    )


@pytest.mark.slow
def test_what_is_kept_is_small_and_whole(rehearsed: tuple[Path, str], tmp_path: Path) -> None:
    output, _ = rehearsed
    files = list((output / "kept").iterdir())
    assert len(files) <= 8 and max(file.stat().st_size for file in files) <= LIMIT
    folders = kept.unpack(output / "kept", tmp_path / "back")
    assert list(folders) == ["encoder", "slf", "aff"]
    for name, made in models(output).items():
        assert (folders[name] / WEIGHTS).read_bytes() == (made / WEIGHTS).read_bytes()
    (head,) = (output / "kept").glob("slf-*.safetensors")
    assert head.stat().st_size < 2_000  # the encoder's parts are shared
    kept_files = {path.relative_to(tmp_path / "back").as_posix() for path in (tmp_path / "back").rglob("*")}
    wanted = {"pretrain-run/log.jsonl", "pretrain-run/curves.png", "aff_figures/results.json", "benchmark/trial.json"}
    assert wanted | {"logs/pretrain.log", "slf_figures/images.csv"} <= kept_files


@pytest.mark.slow
def test_the_same_call_repeats_nothing_and_fills_a_new_folder(rehearsed: tuple[Path, str], tmp_path: Path) -> None:
    output, _ = rehearsed
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*") if path.is_file() and "kept" not in path.parts}
    said = call("resnet18_advcl", "--rehearse", "--output", output, "--keep", tmp_path / "kept")
    assert "== " not in said and "Rehearsed: " in said
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert {path.name for path in (tmp_path / "kept").iterdir()} == {path.name for path in (output / "kept").iterdir()}


@pytest.mark.slow
def test_a_rehearsed_plan_is_released_by_name(rehearsed: tuple[Path, str], tmp_path: Path) -> None:
    """In a copy of the checkout; as weights that are too large for the package are."""
    checkout = copy_checkout(tmp_path / "checkout")
    shutil.copytree(ROOT / "train", checkout / "train", ignore=shutil.ignore_patterns("__pycache__"))

    def python(program: str, *arguments: object) -> str:
        env = os.environ | {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
        return warm.run("-c", program, *arguments, cwd=checkout, env=env, code=0).stdout

    release = "from model_cards import release; release.BUNDLED_BYTES = 0; release.main()"
    said = python(release, rehearsed[0] / "kept", "--licence", "apache-2.0", "--note", "A try.", "--rehearsal")
    names = [f"resnet8_cifar.rehearsal{head}" for head in ("", "_slf", "_aff")]
    assert all(f"model_cards/{name}/README.md" in said for name in names)
    parts = {path.name for path in (checkout / "model_cards" / "weights").glob("*.safetensors")}
    assert {part.rpartition("-")[0] for part in parts} == set(names) and len(parts) == 3
    card = (checkout / "model_cards" / names[0] / "README.md").read_text(encoding="utf-8")
    assert "linear head on the frozen encoder (SLF)" in card and "adversarial full finetuning (AFF)" in card
    assert "A try." in card
    readme = (checkout / "README.md").read_text(encoding="utf-8")
    assert all(f"[`{name}`]" in readme for name in names)
    program = (
        "import sys, torch, timm, advcl_hub\n"
        "x = torch.linspace(0, 1, 768).reshape(1, 3, 16, 16)\n"
        "one = timm.create_model(sys.argv[1], pretrained=True).eval()\n"
        "two = timm.create_model('local-dir:' + sys.argv[2], pretrained=True).eval()\n"
        "print(torch.equal(one(x), two(x)), one.num_classes, advcl_hub.verify(sys.argv[1]) < 1e-3)\n"
    )
    for name, folder, classes in zip(names, models(rehearsed[0]).values(), (0, 10, 10), strict=True):
        assert python(program, name, folder).split() == ["True", str(classes), "True"]


# ------------------------------------------------------------------------------------------------- kills, budgets, failures


def wait_until_free(output: Path) -> None:
    """Until the system has ended what was killed."""
    for _ in range(600):
        with (output / "lock").open("a", encoding="utf-8") as file:
            if lock(file):
                return
        time.sleep(0.1)
    raise AssertionError("the lock stays")


@pytest.mark.slow
def test_killed_within_a_stage_it_goes_on(tmp_path: Path) -> None:
    plan, output = tiny_plan(tmp_path), tmp_path / "runs"
    measured(plan, output, 10**6)
    with start(plan, "--output", output, held="at_step(3)") as process:
        process.wait_for(HELD)
        process.kill()  # it alone: what it started works on
        assert "A process is at work in" in refusal(plan, "--output", output)
    wait_until_free(output)
    (output / "benchmark" / "trial.json").write_text(
        (output / "benchmark" / "trial.json").read_text(encoding="utf-8").replace("1000000", "2"), encoding="utf-8"
    )

    with start(plan, "--output", output, held="at_step(5)") as process:
        process.wait_for(HELD)
        os.killpg(process.pid, signal.SIGTERM)  # as batch systems do: to the command and to what it started
        said = "".join(process.communicate())
    assert process.returncode == 0 and "| pretrain | stopped |" in said and "Next: pretrain. The same command goes on:" in said
    assert "== benchmark" not in said and "1,000,000 epochs, eager" in said and "| encoder | waits for pretrain |" in said
    checkpoint = load_checkpoint(output / "pretrain")
    assert checkpoint.recipe.epochs == 10**6 and checkpoint.step == 6
    log = [entry["step"] for entry in read_log(output / "pretrain")]
    assert log == sorted(set(log)) and log[0] == 1
    so_far = kept.unpack(output / "kept", tmp_path / "back")["pretrain"]
    record = json.loads((so_far / RESULTS).read_text(encoding="utf-8"))
    assert (record["finished"], record["step"]) == (False, checkpoint.step)


@pytest.mark.slow
def test_a_failed_stage_leaves_the_others_and_what_is_done_stays_done(tmp_path: Path) -> None:
    plan, output = tiny_plan(tmp_path), tmp_path / "runs"
    measured(plan, output, 2)
    (output / "slf").mkdir()
    (output / "slf" / "classifier").write_text("in the way", encoding="utf-8")
    said = call(plan, "--output", output, code=1)
    assert "| slf | failed |" in said and "is not an earlier export" in said and "The same call tries it again." in said
    assert "| pretrain | done |" in said and "| encoder | done |" in said and "| aff | done |" in said
    assert list(kept.unpack(output / "kept", tmp_path / "back")) == ["encoder", "aff"]
    (output / "slf" / "classifier").unlink()
    for folder in output.glob("aff*"):  # also aff-1ep, where all epochs did not fit on a busy machine
        shutil.rmtree(folder)  # as if the last call had been killed between two stages
    said = call(plan, "--output", output)
    assert [line for line in said.splitlines() if line.startswith("== ")] == ["== slf", "== aff"], said
    assert "Finished." in said
    assert list(kept.unpack(output / "kept", tmp_path / "again")) == ["encoder", "slf", "aff"]


@pytest.mark.slow
def test_the_weights_of_pretraining_are_kept_until_they_are_exported(tmp_path: Path) -> None:
    plan, output = tiny_plan(tmp_path), tmp_path / "runs"
    measured(plan, output, 2)
    output.joinpath("encoder").mkdir()
    (output / "encoder" / "thesis.tex").write_text("in the way", encoding="utf-8")
    said = call(plan, "--output", output, code=1)
    assert "| pretrain | done |" in said and "| encoder | failed |" in said and "| slf | waits for encoder |" in said
    folder = kept.unpack(output / "kept", tmp_path / "back")["pretrain"]
    assert json.loads((folder / RESULTS).read_text(encoding="utf-8"))["finished"] is True


def test_without_time_nothing_is_begun(tmp_path: Path) -> None:
    plan, output = tiny_plan(tmp_path), tmp_path / "runs"
    said = call(plan, "--output", output, "--time-budget", "3s")
    assert "| benchmark | to do |" in said and "Next: benchmark." in said and not (output / "benchmark").exists()
    assert (output / "kept" / "summary.md").is_file()


# ---------------------------------------------------------------------------------------------------------------- refused


def test_two_plans_in_one_folder_are_refused(tmp_path: Path) -> None:
    record = Record(load_plan("resnet18_advcl", Inputs(), rehearse=True), True)
    flagship.Flagship(record, Inputs(), tmp_path, tmp_path / "kept").lock.close()
    before = (tmp_path / kept.PLAN).read_bytes()
    said = refusal("resnet18_advcl", "--labels", tmp_path / kept.PLAN, "--output", tmp_path)
    assert said == f"error: {tmp_path} holds a rehearsal: choose another --output."
    assert (tmp_path / kept.PLAN).read_bytes() == before
    (tmp_path / kept.PLAN).write_text(before.decode().replace('"rehearsal": true', '"rehearsal": false'), encoding="utf-8")
    said = refusal(tiny_plan(tmp_path), "--output", tmp_path)
    assert said.startswith(f"error: {tmp_path} holds another plan; choose another --output, or undo:\n  plan.")
    assert "plan.name: 'resnet8_cifar.rehearsal' there, 'resnet8_cifar.tiny' now" in said


@pytest.mark.slow
def test_folders_that_would_lose_something_are_refused(rehearsed: tuple[Path, str], tmp_path: Path) -> None:
    """What an earlier run kept, when its output is lost; stages without their record; a keep folder among the runs."""
    plan = tiny_plan(tmp_path)
    call_ = ["resnet18_advcl", "--rehearse", "--output"]
    assert "of an earlier run of this plan" in refusal(*call_, tmp_path / "new", "--keep", rehearsed[0] / "kept")
    assert len(list((rehearsed[0] / "kept").glob("*.safetensors"))) == 3
    (tmp_path / "runs" / "pretrain").mkdir(parents=True)
    assert "holds pretrain and no plan.json: choose another --output" in refusal(plan, "--output", tmp_path / "runs")
    for keep in ("runs2", ".", "runs2/logs/x"):
        said = refusal(plan, "--output", tmp_path / "runs2", "--keep", tmp_path / keep)
        assert f"give a folder outside of {tmp_path / 'runs2'}" in said


@pytest.mark.parametrize("content", ["{", "[1]", '{"a": 1}', "5"])
def test_a_damaged_record_makes_its_stage_run_again(tmp_path: Path, content: str) -> None:
    plan, output = tiny_plan(tmp_path), tmp_path / "runs"
    measured(plan, output, 2)
    (output / "benchmark" / "trial.json").write_text(content, encoding="utf-8")
    made = flagship.Flagship(Record(load_plan(str(plan), Inputs()), False), Inputs(), output, output / "kept")
    assert not made.at.done("benchmark") and "| benchmark | to do |" in made.at.summary()
    made.lock.close()


def test_missing_inputs_are_named(tmp_path: Path) -> None:
    assert "needs pseudo-labels" in refusal("resnet18_advcl") and "--labels FILE sets" in refusal("resnet18_advcl")
    assert f"--root is {tmp_path / 'no'}, which does not exist" in refusal("resnet18_advcl", "--root", tmp_path / "no")
    assert "--labels is no.safetensors, which does not exist" in refusal("resnet18_advcl", "--labels", "no.safetensors")


def test_data_that_the_last_stage_would_refuse_is_refused_first(tmp_path: Path) -> None:
    path = tiny_plan(tmp_path)
    path.write_text(
        path.read_text(encoding="utf-8").replace("data: fake:40\nstages", "data: cifar11\nstages"), encoding="utf-8"
    )
    assert "unknown data source 'cifar11'; did you mean 'cifar10'?" in refusal(path, "--output", tmp_path / "runs")
    assert not (tmp_path / "runs" / "benchmark").exists()


def test_a_damaged_record_is_named(tmp_path: Path) -> None:
    (tmp_path / kept.PLAN).write_text("{", encoding="utf-8")
    assert f"{tmp_path / kept.PLAN} is damaged" in refusal(tiny_plan(tmp_path), "--output", tmp_path)


# ------------------------------------------------------------------------------------------------- finetuning in its share


def test_a_finetuning_that_is_too_slow_begins_anew_beside_its_first_try(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The commands, one by one, without running them; the next call goes on with the shorter one."""
    output, commands = tmp_path / "runs", list[list[str]]()
    plan = load_plan(str(tiny_plan(tmp_path)), Inputs())

    def pretend(command: list[str], log: Path, stop: StopRequest, *rest: Any) -> None:
        commands.append(command)
        folder = Path(command[command.index("--output") + 1]) if "--output" in command else Path(command[5])
        if command.count("--epochs") == 2:
            (folder / "classifier").mkdir(parents=True)
            (folder / "classifier" / RESULTS).write_text("{}", encoding="utf-8")
        elif "--output" in command:  # the first try: 100 s an epoch, where the share is 6
            folder.mkdir()
            records = [{"step": 1, "epoch": 0.1, "seconds": 1.0}, {"step": 2, "epoch": 0.2, "seconds": 11.0}]
            (folder / "log.jsonl").write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
            assert stop.requested

    monkeypatch.setattr(flagship, "run_command", pretend)
    made = flagship.Flagship(Record(plan, False), Inputs(), output, output / "kept")
    made._finetune("slf", StopRequest())
    ends = [command[command.index("finetune") + 2 :] if "finetune" in command else command[4:] for command in commands]
    assert ends[0][-2:] == ["--output", str(output / "slf")] and ends[0].count("--epochs") == 1
    assert ends[1][-4:] == ["--epochs", "1", "--output", str(output / "slf-1ep")]
    assert ends[2][:2] == [str(output / "slf-1ep" / "classifier"), str(output / "slf-1ep" / "float16")] and len(ends) == 3
    made.lock.close()
    again = flagship.Flagship(Record(plan, False), Inputs(), output, output / "kept")
    assert (again.at.record.stages["slf"].measured, again.at.record.stages["slf"].epochs) == (True, 1)
    assert again.at.folder("slf") == output / "slf-1ep" and again.at.folder("pretrain") == output / "pretrain"
    again.lock.close()
