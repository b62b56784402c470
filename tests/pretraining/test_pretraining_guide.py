"""The guide beside the methods: its programs run as they stand, and what comes out opens in timm."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from advcl_hub.pretraining import AdvCL, Objective
from tests.support import ROOT

GUIDE = ROOT / "advcl_hub" / "pretraining" / "README.md"


def test_the_loop_of_the_guide_trains_and_its_export_opens_in_timm(tmp_path: Path) -> None:
    loop, export = re.findall(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)
    assert "range(2)" in loop
    program = tmp_path / "program.py"
    program.write_text(f"{loop.replace('range(2)', 'range(1)')}\n{export}", encoding="utf-8")  # an epoch less: the same lines
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(program)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, encoding="utf-8", timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    epoch, contrastive, pseudo_label = done.stdout.split()
    assert epoch == "0" and 0 < float(contrastive) < 60 and 0 < float(pseudo_label) < 3  # log 2 and log 10 for a chance
    encoder = timm.create_model(f"local-dir:{tmp_path / 'runs/own'}", pretrained=True)
    stock = timm.create_model("resnet8_cifar", num_classes=0)
    assert encoder.state_dict().keys() == stock.state_dict().keys()
    assert not torch.equal(encoder.bn1.running_mean, stock.bn1.running_mean)


def test_the_defaults_are_those_of_the_paper() -> None:
    network = AdvCL(timm.create_model("resnet8_cifar", num_classes=0))
    assert list(network.heads) == ["2", "10", "50", "100", "500"]
    assert (network.attack.eps, network.attack.step_size, network.attack.steps) == (8 / 255, 2 / 255, 5)
    assert network.objective.pseudo_label_weight == 0.2 and network.objective.temperature == 0.5


def encoder() -> nn.Module:
    return timm.create_model("resnet8_cifar", num_classes=0)


def test_what_a_loop_of_ones_own_gets_wrong_is_one_sentence() -> None:
    with pytest.raises(ValueError, match=r"mean \(0\.485, 0\.456, 0\.406\).*pretrained_cfg_overlay"):
        AdvCL(timm.create_model("resnet10t", num_classes=0))
    with pytest.raises(ValueError, match=r"ks is empty.*pseudo_label_weight"):
        AdvCL(encoder(), ks=())
    AdvCL(encoder(), Objective(pseudo_label_weight=0), ks=())
    network, images = AdvCL(encoder(), ks=(2, 10)), torch.zeros(4, 3, 32, 32, dtype=torch.uint8)
    with pytest.raises(ValueError, match="pass the labels of the batch"):
        network(images)
    with pytest.raises(ValueError, match=r"labels are \(4, 5\), expected \(4, 2\)"):
        network(images, torch.zeros(4, 5, dtype=torch.int64))
    with pytest.raises(ValueError, match="expected uint8 images"):
        network(images.float(), torch.zeros(4, 2, dtype=torch.int64))
