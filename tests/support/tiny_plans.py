"""Plans for a small network, and what the command says when it carries out one, or refuses it."""

import json
import os
from pathlib import Path

import pytest
import yaml

from tests.support import ROOT, warm
from tests.support.forked import HELD_AT
from train import flagship
from train.plan import Inputs, load_plan
from train.plan_folder import Record


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
    path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    return path


def tiny_chain(folder: Path) -> Path:
    """From a teacher to the figures of a student's classifier; the epochs of LP-AFF never fit its share."""
    settings = {
        "model": "resnet8_cifar",
        "model_kwargs.channels": [16, 16, 16],
        "data.source": "fake:40",
        "data.size": 16,
        "data.val_fraction": 0,
        "batch_size": 8,
        "optimizer.lr": 0.01,
        "attack.steps": 1,
        "judge.every": 0,
        "speed.compile": False,
    }
    lp_aff = {"epochs": 100000, "head-epochs": 2, "clusters": 3, "steps": 1}
    slf, figures = {"protocol": "slf", "epochs": 2}, {"n": 10, "check-images": 0, "steps": 1}
    stages = {
        "ask_teacher": {"run": "benchmark", "recipe": "cifar10_resnet18_simclr", "settings": settings},
        "teacher": {"run": "pretrain", "of": "ask_teacher", "share": 0.01},
        "ask_student": {"run": "benchmark", "of": "teacher", "recipe": "cifar10_resnet18_deacl", "settings": settings},
        "student": {"run": "pretrain", "of": "ask_student", "share": 0.01},
        "again": {"run": "lp_aff", "of": "student", "share": 0.1, "settings": lp_aff},
        "encoder": {"run": "export", "of": "again"},
        "slf": {"run": "finetune", "of": "encoder", "share": 0.5, "settings": slf},
        "figures": {"run": "evaluate", "of": "slf", "settings": figures},
    }
    path = folder / "chain.yaml"
    values = {"name": "resnet8_cifar.chain", "minutes": 1.0, "data": "fake:40", "stages": stages}
    path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    return path


def refusal(*arguments: object) -> str:
    """What the command says before it does anything; in this process."""
    with pytest.raises(SystemExit) as refused:
        flagship.main([str(argument) for argument in arguments])
    return str(refused.value)


def start(*arguments: object, held: str = "") -> warm.Warm:
    """Starts `python -m train.flagship ARGUMENTS`; `held` says where its pretraining waits: see tests.support.held."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), HELD_AT: held}
    return warm.start(ROOT / "tests" / "support" / "forked.py", *arguments, env=environment)


def call(*arguments: object, code: int = 0) -> str:
    """What the command says."""
    with start(*arguments) as process:
        said = "".join(process.communicate(timeout=1500))
    assert process.returncode == code, said[-4000:]
    return said


def measured(plan: Path, output: Path, epochs: int, benchmark: str = "benchmark") -> None:
    """As if the benchmark were done: so many epochs fit, whatever this machine does besides."""
    flagship.Flagship(Record(load_plan(str(plan), Inputs()), False), Inputs(), output, output / "kept").lock.close()
    (output / benchmark).mkdir()
    way = {"images_per_second": 1.0, "share_of_matrix_rate": 0.1}
    record = {"chosen": "eager", "epochs": epochs, "ways": {"eager": way}, "fit_seconds": 1.0}
    (output / benchmark / "trial.json").write_text(json.dumps(record), encoding="utf-8")
