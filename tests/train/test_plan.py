"""Plans: what a shipped one holds, the commands that follow from it, and what is refused before anything starts."""

from datetime import date
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.small_encoders import export_teacher
from tests.support.tiny_plans import refusal, tiny_chain, tiny_plan
from train.plan import PLANS, Inputs, load_plan, options, pretrain_command
from train.recipe import load_recipe
from train.start import open_start

SHIPPED = sorted(path.stem for path in PLANS.glob("*.yaml"))


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
        command = pretrain_command(plan.stages["benchmark"], Inputs(labels=Path("L")), None, epochs, True, Path("run"))
        every = int(next(word.partition("=")[2] for word in reversed(command) if word.startswith("judge.every=")))
        assert 1 <= epochs // every + (epochs % every > 0) <= 4


def test_warm_up_and_probes_keep_their_share_of_the_epochs() -> None:
    plan = load_plan("resnet18_advcl", Inputs(labels=Path("L")))
    command = pretrain_command(plan.stages["benchmark"], Inputs(Path("D"), Path("L")), None, 60, True, Path("run"))
    assert command[1:4] == ["-m", "train.pretrain", "cifar10_resnet18_100ep"]
    said = dict(word.split("=", 1) for word in command[4:-2])
    assert (said["epochs"], said["optimizer.warmup_epochs"], said["judge.every"]) == ("60", "3.0", "15")  # 5 of 100 epochs
    assert (said["attack.steps"], said["attack.step_size"], said["speed.compile"]) == ("3", "4/255", "true")
    assert (said["data.root"], said["pseudo_labels.path"], command[-2:]) == ("D", "L", ["--output", "run"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stages": {"slf": {"settings": {"protocol": "slf", "epoch": 3}}}}, "stages.slf: No such option"),
        ({"stages": {"slf": {"settings": {"protocol": "lsf"}}}}, "stages.slf: Invalid value for '--protocol'"),
        ({"stages": {"benchmark": {"settings": {"atack.steps": 3}}}}, "stages.benchmark: Unknown key 'atack'"),
        ({"stages": {"benchmark": {"recipe": "cifar11"}}}, "No recipe 'cifar11'"),
        (
            {"stages": {"benchmark": {"recipe": "cifar10_resnet10_cpu_deacl"}}},
            "stages.benchmark: deacl starts from a clean teacher: set start_from to a run, a folder, hf-hub:ORG/NAME or a name "
            "of timm; or give `of`, a stage that makes the teacher",
        ),
        ({"stages": {"pretrain": {"shares": 1}}}, "Unknown key 'stages.pretrain.shares'. Did you mean 'stages.pretrain.share'"),
        ({"stages": {"pretrain": {"share": 0.9}}}, "the shares of the stages add up to 1.2, more than 1"),
        ({"stages": {"pretrain": {"settings": {"epochs": 1}}}}, "pretrain has no settings of its own"),
        (
            {"stages": {"slf": {"of": "pretrain"}}},
            "stages.slf: of is 'pretrain', which runs pretrain; finetune needs one that runs export",
        ),
        ({"stages": {"slf": {"of": "encodr"}}}, "stages.slf: of is 'encodr', and no earlier stage is called so"),
        ({"stages": {"slf": {"run": "fine-tune"}}}, "stages.slf: run must be one of benchmark, pretrain, lp_aff, export"),
        ({"stages": {"slf": {"settings": {"protocol": "sff", "preset": "deacl"}}}}, "stages.slf: The preset deacl has no sff"),
        ({"stages": {"slf": {"settings": {"milestones": [1]}}}}, "stages.slf: settings.milestones is not for a plan to set"),
        ({"stages": {"slf": {"settings": {"time-budget": "1s"}}}}, "settings.time-budget is not for a plan to set"),
        ({"stages": {"slf": {"settings": {"help": True}}}}, "settings.help is not for a plan to set"),
        ({"stages": {"slf": {"settings": {"val-fraction": 0.1}}}}, "settings.val-fraction is not for a plan to set"),
        ({"stages": {"slf": {"settings": {"shots": 0}}}}, "stages.slf: shots is 0, expected at least 1"),
        ({"stages": {"slf": {"settings": {"steps": 5}}}}, "stages.slf: steps changes nothing with the protocol slf"),
        ({"stages": {"f": {"run": "evaluate", "of": "slf", "settings": {"n": -5}}}}, "stages.f: n is -5, expected at least 1"),
        ({"stages": {"f": {"run": "evaluate", "of": "slf", "settings": {"batch-size": 0}}}}, "stages.f: batch_size "),
        ({"stages": {"f": {"run": "evaluate", "of": "slf", "settings": {"eps": 8}}}}, "did you mean 8/255?"),
        ({"stages": {"slf": {"settings": {1: 2}}}}, "the keys of stages.slf.settings must be text"),
        ({"stages": {"benchmark": {"settings": {"seed": date(2026, 1, 1)}}}}, "stages.benchmark: "),
        ({"stages": {"again": {"run": "pretrain", "of": "benchmark"}}}, "stages pretrain and again would train the same"),
        ({"stages": None}, "stages must be a group of settings"),
        ({"minutes": float("inf")}, "minutes must be a positive number"),
        ({"minutes": 10**400}, "minutes must be float"),
        ({"stages": {"logs": {"run": "export", "of": "pretrain"}}}, "stages.logs: the name is taken by the plan's own files"),
        (
            {"stages": {"two": {"run": "export", "of": "pretrain"}}},
            "stages encoder and two are exports: a plan releases one encoder",
        ),
        ({"stages": {"encoder": {"of": None}}}, "stages.encoder: export needs `of`: a stage that runs pretrain"),
        ({"stages": {"a b": {"run": "export", "of": "pretrain"}}}, "stages.a b: a name has letters, digits and _ only"),
        ({"name": "resnet18_cifar.tiny"}, "it makes a resnet8_cifar, the plan's name is resnet18_cifar.tiny"),
        ({"name": "resnet8_cifar"}, "name: 'resnet8_cifar' is not ARCHITECTURE.TAG"),
        ({"name": "resnet8_cifar.my tag/x"}, "is not ARCHITECTURE.TAG"),
        ({"name": "resnet8.tiny"}, "timm has no architecture 'resnet8'"),
        ({"minutes": 0}, "minutes must be a positive number"),
        ({"minutes": "many"}, "minutes must be float, got 'many'"),
        ({"data": ...}, "data is missing"),
    ],
)
def test_a_plan_with_a_mistake_is_refused_before_anything_starts(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    check_refused(tiny_plan(tmp_path), change, message)


def check_refused(path: Path, change: dict[str, Any], message: str) -> None:
    """Changes a plan, stage by stage, leaves out what is `...`, and asks the command for it."""
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    for key, value in change.items():
        if value is ...:
            del values[key]
        elif isinstance(value, dict):
            for name, fields in value.items():
                stage = values[key].setdefault(name, {})
                settings = {**stage.get("settings", {}), **fields.get("settings", {})}
                stage.update({**fields, "settings": settings} if settings else fields)
        else:
            values[key] = value
    path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    said = refusal(path, "--output", path.parent / "runs")
    assert said.startswith("error: ") and message in said and not (path.parent / "runs").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ask_student": {"of": None}}, "stages.teacher: no stage takes this encoder: name it in the `of` of one, or leave"),
        ({"ask_student": {"of": "ask_teacher"}}, "which runs benchmark; benchmark needs one that runs pretrain or lp_aff"),
        ({"ask_student": {"of": "student"}}, "stages.ask_student: of is 'student', and no earlier stage is called so"),
        ({"ask_student": {"settings": {"start_from": "x"}}}, "of and settings.start_from both say where it starts"),
        (
            {"ask_student": {"settings": {"model_kwargs.channels": [8, 8, 8]}}},
            "stages.ask_student: its network is not that of 'teacher': model_kwargs are {'zero_init_last': False, 'channels': "
            "[8, 8, 8]} here and {'zero_init_last': False, 'channels': [16, 16, 16]} there",
        ),
        ({"ask_student": {"settings": {"model": "resnet20_cifar"}}}, "it makes a resnet20_cifar, the plan's name is resnet8"),
        (
            {"ask_student": {"recipe": "cifar10_resnet18_profeat"}},
            "stages.ask_student: profeat needs its teacher's projection head, which no stage exports",
        ),
        ({"encoder": {"of": "student"}}, "stages.again: no stage takes this encoder"),
        ({"two": {"run": "export", "of": "teacher"}}, "stages encoder and two are exports: a plan releases one encoder"),
        ({"slf": {"of": "again"}}, "of is 'again', which runs lp_aff; finetune needs one that runs export"),
        ({"again": {"of": None}}, "stages.again: lp_aff needs `of`: a stage that runs pretrain"),
        ({"again": {"of": "ask_student"}}, "which runs benchmark; lp_aff needs one that runs pretrain"),
        ({"again": {"settings": {"clusters": 1}}}, "stages.again: clusters is 1, expected at least 2"),
        ({"again": {"settings": {"head-epochs": 0}}}, "stages.again: epochs is 0, expected at least 1"),
        ({"again": {"settings": {"protocol": "aff"}}}, "stages.again: No such option"),
        ({"again": {"settings": {"milestones": [1]}}}, "stages.again: settings.milestones is not for a plan to set"),
        ({"again": {"run": "lp-aff"}}, "run must be one of benchmark, pretrain, lp_aff, export"),
    ],
)
def test_a_chain_with_a_mistake_is_refused_before_its_teacher_is_trained(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    check_refused(tiny_chain(tmp_path), {"stages": change}, message)


def test_a_student_starts_from_the_encoder_of_its_teacher(tmp_path: Path) -> None:
    plan = load_plan(str(tiny_chain(tmp_path)), Inputs())
    teacher = export_teacher(tmp_path / "teacher")
    command = pretrain_command(plan.stages["ask_student"], Inputs(), teacher, 7, False, tmp_path / "run")
    recipe = load_recipe(command[3], command[4:-2])
    assert (recipe.method, recipe.start_from, recipe.epochs) == ("deacl", str(teacher), 7)
    assert (start := open_start(recipe)) is not None and start.facts["architecture"] == "resnet8_cifar"


def test_unknown_plans_and_missing_rehearsals_are_named(tmp_path: Path) -> None:
    assert "No plan 'resnet19'. Known: " in refusal("resnet19") and SHIPPED[0] in refusal("resnet19")
    assert "has no rehearsal" in refusal(tiny_plan(tmp_path), "--rehearse")
