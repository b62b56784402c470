"""The networks that `convert` is tested with have the keys of the published code."""

import re

import pytest

from tests.support.published_networks import Published, acl, acl_finetuned, advcl, advcl_finetuned, kuangliu

# The keys were read in the published files: models/resnet_cifar_multibn_ensembleFC.py and models/resnet_cifar.py of
# LijieFan/AdvCL, models/resnet_multi_bn.py and models/resnet.py of VITA-Group/Adversarial-Contrastive-Learning and of
# PKU-ML/DYNACL, models/resnet.py of kuangliu/pytorch-cifar. Here without the numbers of blocks and branches, and the leaves.
STEM = {"conv1", "bn1"}
MULTI = {"conv1", "bn1.bn_list.*", "conv2", "bn2.bn_list.*", "downsample.conv", "downsample.bn.bn_list.*"}
PROJECTION = {f"fc.{part}" for part in ("fc1", "bn1.bn_list.*", "fc2", "bn2.bn_list.*", "fc3", "bn3.bn_list.*")}
SINGLE = {"conv1", "bn1", "conv2", "bn2"}


@pytest.mark.parametrize(
    ("network", "blocks", "rest"),
    [
        (
            advcl(),
            MULTI,
            {"conv1", "bn1.bn_list.*", "fc_002", "fc_010", "fc_050", "fc_100", "fc_500"}
            | {f"head_{name}.{i}" for name in ("ce", "proj", "pred") for i in (0, 1, 3)},
        ),
        (
            advcl_finetuned(),
            SINGLE | {"shortcut.0", "shortcut.1"},
            STEM | {"linear"} | {f"head_{name}.{i}" for name in ("proj", "pred") for i in (0, 2)},
        ),
        (acl(), MULTI, {"normalize", "conv1", "bn1.bn_list.*"} | PROJECTION),
        (acl_finetuned(), SINGLE | {"downsample.0", "downsample.1"}, STEM | {"normalize", "fc"}),
        (kuangliu(), SINGLE | {"shortcut.0", "shortcut.1"}, STEM | {"linear"}),
        (kuangliu(depth=50), SINGLE | {"conv3", "bn3", "shortcut.0", "shortcut.1"}, STEM | {"linear"}),
    ],
)
def test_keys_are_those_of_the_published_code(network: Published, blocks: set[str], rest: set[str]) -> None:
    parts = {re.sub(r"bn_list\.\d", "bn_list.*", key.rpartition(".")[0]) for key in network.state_dict()}
    inside = {part for part in parts if re.match(r"layer[1-4]\.\d+\.", part)}
    assert {part.split(".", 2)[2] for part in inside} == blocks
    assert parts - inside == rest
