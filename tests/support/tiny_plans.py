"""A plan for a small network, and what the command says when it refuses one."""

from pathlib import Path

import pytest
import yaml

from train import flagship


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


def refusal(*arguments: object) -> str:
    """What the command says before it does anything; in this process."""
    with pytest.raises(SystemExit) as refused:
        flagship.main([str(argument) for argument in arguments])
    return str(refused.value)
