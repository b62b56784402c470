"""Plans: the one that is shipped, rehearsed by its command; kills, budgets, failures, and what is refused."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from advcl_hub.export import RESULTS, WEIGHTS
from advcl_hub.files import lock
from advcl_hub.parts import LIMIT
from advcl_hub.training.runlog import read_log
from advcl_hub.training.state import FILE
from advcl_hub.training.stop import StopRequest
from train import flagship, kept
from train.checkpoint import load_checkpoint
from train.flagship import fewer_epochs
from train.plan import PLANS, Inputs, load_plan, options, pretrain_command

ROOT = Path(__file__).parents[1]
SHIPPED = sorted(path.stem for path in PLANS.glob("*.yaml"))
STAGES = ["benchmark", "pretrain", "encoder", "slf", "aff", "slf_figures", "aff_figures"]


def call(*arguments: object, code: int = 0) -> str:
    """What the command says."""
    command = [sys.executable, "-m", "train.flagship", *map(str, arguments)]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=1500
    )
    assert done.returncode == code, done.stdout[-4000:]
    return done.stdout


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1"}


def refusal(*arguments: object) -> str:
    """What the command says before it does anything; in this process."""
    with pytest.raises(SystemExit) as refused:
        flagship.main([str(argument) for argument in arguments])
    return str(refused.value)


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a rehearsal of the first plan, and what it said."""
    output = tmp_path_factory.mktemp("rehearsed") / "runs"
    return output, call("resnet18_advcl", "--rehearse", "--output", output)


# ------------------------------------------------------------------------------------------------------------ a rehearsal


def test_a_rehearsal_does_every_stage_and_says_what_came_out(rehearsed: tuple[Path, str]) -> None:
    output, said = rehearsed
    plan = load_plan("resnet18_advcl", Inputs(), rehearse=True)
    assert list(plan.stages) == STAGES
    table = [line.split(" | ") for line in said.splitlines() if line.startswith("| ") and line.count(" | ") == 4]
    assert [row[:2] for row in table[2:]] == [[f"| {name}", "done"] for name in STAGES]
    assert "of the matrix rate" in table[2][-1] and "epochs fit" in table[2][-1]
    assert "SA " in table[-1][-1] and "PGD " in table[-1][-1] and "20 images" in table[-1][-1]
    assert f"release.py {output / 'kept'}" in said
    trial = json.loads((output / "benchmark" / "trial.json").read_text())
    record = json.loads((output / "pretrain" / "export" / RESULTS).read_text())
    chosen = json.loads((output / kept.PLAN).read_text())["stages"]["pretrain"]
    assert record["finished"] and record["recipe"]["epochs"] == chosen["epochs"] == max(1, trial["epochs"])
    assert record["recipe"]["speed"]["compile"] == chosen["compiled"] == (trial["chosen"] == "compiled")
    assert record["recipe"]["attack"]["steps"] == 3 and record["recipe"]["model_kwargs"]["zero_init_last"] is False
    if shutil.which("g++"):  # else the plan is eager, and says why
        assert trial["not_compiled"] is None and set(trial["ways"]) == {"eager", "compiled"}
        graphs = trial["ways"]["compiled"]["graphs"]
        kinds = [graph["graph"].rpartition(" ")[2] for graph in graphs if graph["seconds"] > 0]
        assert kinds.count("forward") >= 5 and kinds.count("backward") >= 5  # three branches, two of them attacked, too
    for way in trial["ways"].values():
        assert way["images_per_second"] > 0 and way["share_of_matrix_rate"] > 0
        assert way["data_and_views_share"] * way["seconds"][0] == pytest.approx(trial["data_and_views_seconds"])
    figures = json.loads((output / "aff_figures" / RESULTS).read_text())
    assert (
        figures["model"]["provenance"]["encoder"]["provenance"]["dtype"] == figures["model"]["provenance"]["dtype"] == "float16"
    )


def test_what_is_kept_is_small_and_whole(rehearsed: tuple[Path, str], tmp_path: Path) -> None:
    output, _ = rehearsed
    files = list((output / "kept").iterdir())
    assert len(files) <= 8 and max(file.stat().st_size for file in files) <= LIMIT
    folders = kept.unpack(output / "kept", tmp_path / "back")
    assert list(folders) == ["encoder", "slf", "aff"]
    for name, made in {"encoder": "encoder", "slf": "slf/float16", "aff": "aff/float16"}.items():
        assert (folders[name] / WEIGHTS).read_bytes() == (output / made / WEIGHTS).read_bytes()
    (head,) = (output / "kept").glob("slf-*.safetensors")
    assert head.stat().st_size < 2_000  # the encoder's parts are shared
    kept_files = {path.relative_to(tmp_path / "back").as_posix() for path in (tmp_path / "back").rglob("*")}
    wanted = {"pretrain-run/log.jsonl", "pretrain-run/curves.png", "aff_figures/results.json", "benchmark/trial.json"}
    assert wanted | {"logs/pretrain.log", "slf_figures/images.csv"} <= kept_files


def test_the_same_call_repeats_nothing_and_fills_a_new_folder(rehearsed: tuple[Path, str], tmp_path: Path) -> None:
    output, _ = rehearsed
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*") if path.is_file() and "kept" not in path.parts}
    said = call("resnet18_advcl", "--rehearse", "--output", output, "--keep", tmp_path / "kept")
    assert "== " not in said and "Finished." in said
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert {path.name for path in (tmp_path / "kept").iterdir()} == {path.name for path in (output / "kept").iterdir()}


def test_a_rehearsed_plan_is_released_by_name(rehearsed: tuple[Path, str], tmp_path: Path) -> None:
    """In a copy of the checkout; as weights that are too large for the package are."""
    checkout = tmp_path / "checkout"
    for part in ("advcl_hub", "model_cards", "train"):
        shutil.copytree(ROOT / part, checkout / part, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "README.md", checkout)

    def python(program: str, *arguments: object) -> str:
        command = [sys.executable, "-c", program, *map(str, arguments)]
        env = environment() | {"PYTHONPATH": str(checkout), "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, cwd=checkout, env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    release = "from model_cards import release; release.BUNDLED_BYTES = 0; release.main()"
    said = python(release, rehearsed[0] / "kept", "--licence", "apache-2.0", "--note", "A rehearsal.")
    names = [f"resnet8_cifar.rehearsal{head}" for head in ("", "_slf", "_aff")]
    assert all(f"model_cards/{name}/README.md" in said for name in names)
    parts = {path.name for path in (checkout / "model_cards" / "weights").glob("*.safetensors")}
    assert {part.rpartition("-")[0] for part in parts} == set(names) and len(parts) == 3
    card = (checkout / "model_cards" / names[0] / "README.md").read_text()
    assert "linear head on the frozen encoder (SLF)" in card and "adversarial full finetuning (AFF)" in card
    assert "A rehearsal." in card
    readme = (checkout / "README.md").read_text()
    assert all(f"[`{name}`]" in readme for name in names)
    program = (
        "import sys, torch, timm, advcl_hub\n"
        "x = torch.linspace(0, 1, 768).reshape(1, 3, 16, 16)\n"
        "one = timm.create_model(sys.argv[1], pretrained=True).eval()\n"
        "two = timm.create_model('local-dir:' + sys.argv[2], pretrained=True).eval()\n"
        "print(torch.equal(one(x), two(x)), one.num_classes, advcl_hub.verify(sys.argv[1]) < 1e-3)\n"
    )
    made = ["encoder", "slf/float16", "aff/float16"]
    for name, folder, classes in zip(names, made, (0, 10, 10), strict=True):
        assert python(program, name, rehearsed[0] / folder).split() == ["True", str(classes), "True"]


# ------------------------------------------------------------------------------------------------- kills, budgets, failures


def tiny_plan(folder: Path) -> Path:
    """A plan for a small network, which saves every second."""
    settings = {
        "data.source": "fake:40",
        "data.size": 16,
        "data.val_fraction": 0,
        "batch_size": 8,
        "judge.every": 0,
        "model_kwargs.channels": [16, 16, 16],
        "pseudo_labels.ks": [2],
        "pseudo_labels.cache": str(folder / "labels"),
        "attack.steps": 1,
        "checkpoint_minutes": 0.02,
    }
    stages = {
        "benchmark": {"run": "benchmark", "share": 0.1, "recipe": "digits_demo", "settings": settings},
        "pretrain": {"run": "pretrain", "of": "benchmark", "share": 0.7},
        "encoder": {"run": "export", "of": "pretrain"},
        "slf": {"run": "finetune", "of": "encoder", "share": 0.1, "settings": {"protocol": "slf", "epochs": 2}},
        "aff": {"run": "finetune", "of": "encoder", "share": 0.1, "settings": {"protocol": "sff", "epochs": 2}},
    }
    path = folder / "plan.yaml"
    values = {"name": "resnet8_cifar.tiny", "minutes": 1.0, "data": "fake:40", "stages": stages}
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


def wait_for(condition: Any, process: "subprocess.Popen[str]") -> None:
    for _ in range(3000):
        if condition():
            return
        assert process.poll() is None, process.communicate()[0][-3000:]
        time.sleep(0.1)
    raise AssertionError("it never came")


def start(*arguments: object) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "train.flagship", *map(str, arguments)]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def measured(output: Path, epochs: int) -> None:
    """As if the benchmark were done: so many epochs fit, whatever this machine does besides."""
    (output / "benchmark").mkdir(parents=True)
    way = {"images_per_second": 1.0, "share_of_matrix_rate": 0.1}
    record = {"chosen": "eager", "epochs": epochs, "ways": {"eager": way}}
    (output / "benchmark" / "trial.json").write_text(json.dumps(record))


def wait_until_free(output: Path) -> None:
    """Until the system has ended what was killed."""
    for _ in range(600):
        with (output / "lock").open("a") as file:
            if lock(file):
                return
        time.sleep(0.1)
    raise AssertionError("the lock stays")


def test_killed_within_a_stage_it_goes_on(tmp_path: Path) -> None:
    plan, output = tiny_plan(tmp_path), tmp_path / "runs"
    measured(output, 10**6)
    process = start(plan, "--output", output)
    wait_for(lambda: (output / "pretrain" / FILE).is_file() and load_checkpoint(output / "pretrain").step > 0, process)
    process.kill()  # it alone: what it started works on
    assert "A process is at work in" in refusal(plan, "--output", output)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    wait_until_free(output)
    (output / "benchmark" / "trial.json").write_text((output / "benchmark" / "trial.json").read_text().replace("1000000", "2"))

    steps = load_checkpoint(output / "pretrain").step
    process = start(plan, "--output", output)
    wait_for(lambda: load_checkpoint(output / "pretrain").step > steps, process)
    os.killpg(process.pid, signal.SIGTERM)  # as batch systems do: to the command and to what it started
    said = process.communicate()[0]
    assert process.returncode == 0 and "| pretrain | stopped |" in said and "Next: pretrain. The same command goes on:" in said
    assert "== benchmark" not in said and "1000000 epochs, eager" in said and "| encoder | waits for pretrain |" in said
    checkpoint = load_checkpoint(output / "pretrain")
    assert checkpoint.recipe.epochs == 10**6 and checkpoint.step > steps
    log = [entry["step"] for entry in read_log(output / "pretrain")]
    assert log == sorted(set(log)) and log[0] == 1
    so_far = kept.unpack(output / "kept", tmp_path / "back")["pretrain"]
    record = json.loads((so_far / RESULTS).read_text())
    assert (record["finished"], record["step"]) == (False, checkpoint.step)


def test_a_failed_stage_leaves_the_others_and_what_is_done_stays_done(tmp_path: Path) -> None:
    plan, output = tiny_plan(tmp_path), tmp_path / "runs"
    measured(output, 2)
    (output / "slf").mkdir()
    (output / "slf" / "classifier").write_text("in the way")
    said = call(plan, "--output", output, code=1)
    assert "| slf | failed |" in said and "is not an earlier export" in said and "the same call tries it again" in said
    assert "| pretrain | done |" in said and "| encoder | done |" in said and "| aff | done |" in said
    assert list(kept.unpack(output / "kept", tmp_path / "back")) == ["encoder", "aff"]
    (output / "slf" / "classifier").unlink()
    shutil.rmtree(output / "aff")  # as if the last call had been killed between two stages
    said = call(plan, "--output", output)
    assert [line for line in said.splitlines() if line.startswith("== ")] == ["== slf", "== aff"] and "Finished." in said
    assert list(kept.unpack(output / "kept", tmp_path / "again")) == ["encoder", "slf", "aff"]


def test_the_weights_of_pretraining_are_kept_until_they_are_exported(tmp_path: Path) -> None:
    plan, output = tiny_plan(tmp_path), tmp_path / "runs"
    measured(output, 2)
    output.joinpath("encoder").mkdir()
    (output / "encoder" / "thesis.tex").write_text("in the way")
    said = call(plan, "--output", output, code=1)
    assert "| pretrain | done |" in said and "| encoder | failed |" in said and "| slf | waits for encoder |" in said
    folder = kept.unpack(output / "kept", tmp_path / "back")["pretrain"]
    assert json.loads((folder / RESULTS).read_text())["finished"] is True


def test_without_time_nothing_is_begun(tmp_path: Path) -> None:
    plan, output = tiny_plan(tmp_path), tmp_path / "runs"
    said = call(plan, "--output", output, "--time-budget", "3s")
    assert "| benchmark | to do |" in said and "Next: benchmark." in said and not (output / "benchmark").exists()
    assert (output / "kept" / "summary.md").is_file()


# ---------------------------------------------------------------------------------------------------------------- refused


def test_two_plans_in_one_folder_are_refused(rehearsed: tuple[Path, str], tmp_path: Path) -> None:
    shutil.copy(rehearsed[0] / kept.PLAN, tmp_path)
    before = (tmp_path / kept.PLAN).read_bytes()
    for arguments in (["resnet18_advcl", "--labels", tmp_path / kept.PLAN], [tiny_plan(tmp_path)]):
        said = refusal(*arguments, "--output", tmp_path)
        assert said.startswith(f"error: {tmp_path} holds another plan; choose another --output, or undo:\n  plan.")
        assert "there, " in said and (tmp_path / kept.PLAN).read_bytes() == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stages": {"slf": {"settings": {"protocol": "slf", "epoch": 3}}}}, "stages.slf: No such option"),
        ({"stages": {"slf": {"settings": {"protocol": "lsf"}}}}, "stages.slf: Invalid value for '--protocol'"),
        ({"stages": {"benchmark": {"settings": {"atack.steps": 3}}}}, "stages.benchmark: Unknown key 'atack'"),
        ({"stages": {"benchmark": {"recipe": "cifar11"}}}, "No recipe 'cifar11'"),
        ({"stages": {"pretrain": {"shares": 1}}}, "Unknown key 'stages.pretrain.shares'. Did you mean 'stages.pretrain.share'"),
        ({"stages": {"pretrain": {"share": 0.9}}}, "the shares of the stages add up to 1.2, more than 1"),
        ({"stages": {"pretrain": {"settings": {"epochs": 1}}}}, "pretrain has no settings of its own"),
        ({"stages": {"slf": {"of": "pretrain"}}}, "stages.slf: of is 'pretrain', expected an earlier stage that runs export"),
        ({"stages": {"slf": {"run": "fine-tune"}}}, "stages.slf: run must be one of benchmark, pretrain, export"),
        ({"stages": {"slf": {"settings": {"protocol": "sff", "preset": "deacl"}}}}, "stages.slf: The preset deacl has no sff"),
        ({"stages": {"slf": {"settings": {"milestones": [1]}}}}, "stages.slf: "),
        ({"stages": {"logs": {"run": "export", "of": "pretrain"}}}, "stages.logs: the name is taken by the plan's own files"),
        (
            {"stages": {"two": {"run": "export", "of": "pretrain"}}},
            "stages encoder and two are exports: a plan makes one encoder",
        ),
        ({"stages": {"encoder": {"of": None}}}, "stages.encoder: export needs `of`: a stage that runs pretrain"),
        ({"stages": {"a b": {"run": "export", "of": "pretrain"}}}, "stages.a b: a name has letters, digits and _ only"),
        ({"name": "resnet18_cifar.tiny"}, "it makes a resnet8_cifar, the plan's name is resnet18_cifar.tiny"),
        ({"name": "resnet8.tiny"}, "timm has no architecture 'resnet8'"),
        ({"minutes": 0}, "minutes must be positive"),
        ({"minutes": "many"}, "minutes must be float, got 'many'"),
        ({"data": ...}, "data is missing"),
    ],
)
def test_a_plan_with_a_mistake_is_refused_before_anything_starts(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = tiny_plan(tmp_path)
    values = yaml.safe_load(path.read_text())
    for key, value in change.items():
        if value is ...:
            del values[key]
        elif isinstance(value, dict):
            for name, fields in value.items():
                values[key].setdefault(name, {}).update(fields)
        else:
            values[key] = value
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    said = refusal(path, "--output", tmp_path / "runs")
    assert said.startswith("error: ") and message in said and not (tmp_path / "runs").exists()


def test_missing_inputs_are_named(tmp_path: Path) -> None:
    assert "needs labels" in refusal("resnet18_advcl") and "--labels FILE sets" in refusal("resnet18_advcl")
    assert f"--root is {tmp_path / 'no'}, which does not exist" in refusal("resnet18_advcl", "--root", tmp_path / "no")
    assert "--labels is no.safetensors, which does not exist" in refusal("resnet18_advcl", "--labels", "no.safetensors")


def test_unknown_plans_and_missing_rehearsals_are_named(tmp_path: Path) -> None:
    assert "No plan 'resnet19'. Known: " in refusal("resnet19") and SHIPPED[0] in refusal("resnet19")
    assert "has no rehearsal" in refusal(tiny_plan(tmp_path), "--rehearse")


def test_a_damaged_record_is_named(tmp_path: Path) -> None:
    (tmp_path / kept.PLAN).write_text("{")
    assert f"{tmp_path / kept.PLAN} is damaged" in refusal(tiny_plan(tmp_path), "--output", tmp_path)


# ------------------------------------------------------------------------------------------------------------- the numbers


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_plan_is_whole(name: str) -> None:
    plan = load_plan(name, Inputs(Path("DATA"), Path("LABELS")))
    assert 0.9 < sum(stage.share for stage in plan.stages.values()) < 0.96  # the rest is for starts of processes
    assert load_plan(name, Inputs(), rehearse=True).stages.keys() == plan.stages.keys()
    for stage in plan.stages.values():
        if stage.run == "evaluate":
            assert options(stage)[:4] == ["--n", "1000", "--autoattack", "standard"]


def test_there_are_four_probes_at_most() -> None:
    plan = load_plan("resnet18_advcl", Inputs(labels=Path("L")))
    for epochs in range(1, 40):
        command = pretrain_command(plan.stages["benchmark"], Inputs(labels=Path("L")), epochs, True, Path("run"))
        every = int(next(word.partition("=")[2] for word in reversed(command) if word.startswith("judge.every=")))
        assert 1 <= epochs // every + (epochs % every > 0) <= 4


def test_warm_up_and_probes_keep_their_share_of_the_epochs() -> None:
    plan = load_plan("resnet18_advcl", Inputs(labels=Path("L")))
    command = pretrain_command(plan.stages["benchmark"], Inputs(Path("D"), Path("L")), 60, True, Path("run"))
    assert command[1:4] == ["-m", "train.pretrain", "cifar10_resnet18_100ep"]
    said = dict(word.split("=", 1) for word in command[4:-2])
    assert (said["epochs"], said["optimizer.warmup_epochs"], said["judge.every"]) == ("60", "3.0", "15")  # 5 of 100 epochs
    assert (said["attack.steps"], said["attack.step_size"], said["speed.compile"]) == ("3", "4/255", "true")
    assert (said["data.root"], said["pseudo_labels.path"], command[-2:]) == ("D", "L", ["--output", "run"])


@pytest.mark.parametrize(
    ("records", "share", "spent", "expected"),
    [
        ([(0.1, 3.0), (0.6, 5.0)], 100.0, 8.0, None),  # 4 s an epoch, 3 s to start: 37.6 s are left to do
        ([(0.1, 3.0), (0.6, 5.0)], 48.7, 8.0, None),  # just so: 8 + 3 + 9.4 * 4 = 48.6
        ([(0.1, 3.0), (0.6, 5.0)], 48.5, 8.0, 9),
        ([(0.1, 3.0), (0.6, 5.0)], 31.0, 8.0, 5),  # 20 s for a new run
        ([(0.1, 3.0), (0.6, 5.0)], 1.0, 8.0, 1),
        ([(0.5, 3.0)], 40.0, 5.0, 5),  # 6 s an epoch, as far as is known: 33 s are left
        ([], 1.0, 8.0, None),
    ],
)
def test_finetuning_is_shortened_to_its_share(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    records: list[tuple[float, float]],
    share: float,
    spent: float,
    expected: int | None,
) -> None:
    """Analytic, for 10 epochs."""
    monkeypatch.setattr(flagship, "load_state", lambda folder: ({"facts": {"settings": {"epochs": 10}}}, {}))
    lines = [{"step": i, "epoch": epoch, "seconds": seconds} for i, (epoch, seconds) in enumerate(records)]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert fewer_epochs(tmp_path, share, spent) == expected


def test_a_finetuning_that_is_too_slow_begins_anew_beside_its_first_piece(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The commands, one by one, without running them; the next call goes on with the shorter one."""
    output, commands = tmp_path / "runs", list[list[str]]()
    plan = load_plan(str(tiny_plan(tmp_path)), Inputs())

    def pretend(command: list[str], *rest: Any) -> None:
        commands.append(command)
        folder = Path(command[command.index("--output") + 1]) if "--output" in command else Path(command[5])
        if "--epochs" in command and "--time-budget" not in command and command.count("--epochs") == 2:
            (folder / "classifier").mkdir(parents=True)
            (folder / "classifier" / RESULTS).write_text("{}")

    monkeypatch.setattr(flagship, "run_command", pretend)
    monkeypatch.setattr(flagship, "fewer_epochs", lambda *args: 1)
    made = flagship.Flagship(flagship.Record(plan, False), Inputs(), output, output / "kept")
    made._finetune("slf", StopRequest())
    ends = [command[command.index("finetune") + 2 :] if "finetune" in command else command[4:] for command in commands]
    assert ends[0][-4:] == ["--output", str(output / "slf"), "--time-budget", "2s"] and ends[0].count("--epochs") == 1
    assert ends[1][-4:] == ["--epochs", "1", "--output", str(output / "slf-1ep")]
    assert ends[2][:2] == [str(output / "slf-1ep" / "classifier"), str(output / "slf-1ep" / "float16")] and len(ends) == 3
    made.lock.close()
    again = flagship.Flagship(flagship.Record(plan, False), Inputs(), output, output / "kept")
    assert (again.record.stages["slf"].measured, again.record.stages["slf"].epochs) == (True, 1)
    assert again.folder("slf") == output / "slf-1ep" and again.folder("pretrain") == output / "pretrain"
    again.lock.close()
