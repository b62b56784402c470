"""The guide beside the methods: its programs run as they stand, and what comes out opens in timm."""

import copy
import io
import re
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from advcl_hub.hub import export_folder
from advcl_hub.models.branch_norm import branch_state_dict
from advcl_hub.pretraining import METHODS, AdvCL, Attack, Method, SimCLR, create_method
from tests.support import ROOT, warm

GUIDE = ROOT / "advcl_hub" / "pretraining" / "README.md"


@pytest.mark.slow
def test_the_programs_of_the_guide_run_and_the_export_opens_in_timm(tmp_path: Path) -> None:
    loop, *more = re.findall(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)
    assert "range(2)" in loop and len(more) == 2
    program = tmp_path / "program.py"
    lines = [loop.replace("range(2)", "range(1)"), *more, "print(losses.total.item())"]  # an epoch less
    program.write_text("\n".join(lines), encoding="utf-8")
    done = warm.run(program, cwd=tmp_path, code=0)
    epoch, contrastive, pseudo_label, distillation = done.stdout.split()
    assert epoch == "0" and 0 < float(contrastive) < 60 and 0 < float(pseudo_label) < 3  # log 2 and log 10 for a chance
    assert -3 < float(distillation) < -1  # a student that starts as its teacher: -1 - 2 if there were no attack
    encoder = timm.create_model(f"local-dir:{tmp_path / 'runs/own'}", pretrained=True)
    stock = timm.create_model("resnet8_cifar", num_classes=0)
    assert encoder.state_dict().keys() == stock.state_dict().keys()
    assert not torch.equal(encoder.bn1.running_mean, stock.bn1.running_mean)


OVERLAY = {"mean": (0, 0, 0), "std": (1, 1, 1), "input_size": (3, 32, 32), "crop_pct": 1.0}


def test_the_export_of_any_architecture_says_how_its_images_were_made(tmp_path: Path) -> None:
    assert "".join(repr(OVERLAY).replace("'", '"').split()) in "".join(GUIDE.read_text(encoding="utf-8").split())
    model = timm.create_model("resnet10t", num_classes=0, pretrained_cfg_overlay=OVERLAY)
    methods: dict[str, Method] = {
        "simclr": SimCLR(copy.deepcopy(model)),
        "advcl": AdvCL(copy.deepcopy(model), AdvCL.Objective(pseudo_label_weight=0), Attack(steps=1)),
    }
    for name, network in methods.items():
        network(torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8))
        plain = network.plain_encoder()
        folder = export_folder(plain, tmp_path / name, results={"kind": "encoder"})
        assert plain.state_dict().keys() == model.state_dict().keys() and not plain.training
        branch = branch_state_dict(network.encoder.state_dict(), network.objective.export_branch)
        assert all(torch.equal(value, branch[key]) for key, value in plain.state_dict().items())
        cfg = timm.create_model(f"local-dir:{folder}", pretrained=True).pretrained_cfg
        assert {key: tuple(cfg[key]) if key != "crop_pct" else cfg[key] for key in OVERLAY} == OVERLAY
        plain.set_grad_checkpointing(True)  # it is timm's own again
    with pytest.raises(ValueError, match=r"No batch-norm branch 'clear'.*'clean', 'adv'"):
        network.plain_encoder("clear")


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
    for ks in ((2, 2), (1,), (2.0,)):
        with pytest.raises(ValueError, match="expected distinct numbers of clusters"):
            AdvCL(encoder(), ks=ks)
    with pytest.raises(ValueError, match=r"ks is empty.*pseudo_label_weight"):
        AdvCL(encoder(), ks=())
    AdvCL(encoder(), AdvCL.Objective(pseudo_label_weight=0), ks=())
    network, images = AdvCL(encoder(), ks=(2, 10)), torch.zeros(4, 3, 32, 32, dtype=torch.uint8)
    with pytest.raises(ValueError, match="pass the labels of the batch"):
        network(images)
    for labels in (torch.zeros(4, 5, dtype=torch.int64), torch.zeros(4, 2)):
        with pytest.raises(ValueError, match=r"labels are torch\.\w+ \(4, \d\), expected torch\.int64 \(4, 2\)"):
            network(images, labels)
    with pytest.raises(ValueError, match=r"a classifier of 1000 classes: .*num_classes=0"):
        AdvCL(timm.create_model("resnet10t"))
    with pytest.raises(ValueError, match="A batch of one image"):
        network(images[:1], torch.zeros(1, 2, dtype=torch.int64))
    torch.save(network, io.BytesIO())
    with pytest.raises(ValueError, match="expected uint8 images"):
        network(images.float(), torch.zeros(4, 2, dtype=torch.int64))


def test_the_table_of_methods_is_complete_and_each_can_be_made_by_its_name() -> None:
    text = GUIDE.read_text(encoding="utf-8")
    projector = nn.Sequential(nn.Linear(64, 8))
    for name, kind in METHODS.items():
        network = create_method(name, encoder(), attack=Attack(steps=3), ks=(2,), projector=projector)
        assert type(network) is kind and f"| `{kind.__name__}`, `{name}` |" in text
        assert network.attack.steps == (0 if name == "simclr" else 3)
        assert network.objective.uses_labels == ("pseudo-labels |" in text.partition(f"`{name}`")[2].partition("\n")[0])
    with pytest.raises(ValueError, match="No pretraining method 'moco': known are advcl, simclr"):
        create_method("moco", encoder())
    with pytest.raises(ValueError, match=r"Unknown setting 'atack'\. Did you mean 'attack'"):
        create_method("deacl", encoder(), atack=Attack(steps=9))
    with pytest.raises(ValueError, match="ProFeAT needs the teacher's projection head"):
        create_method("profeat", encoder(), projector=None)
