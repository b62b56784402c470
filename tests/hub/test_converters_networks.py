"""The networks that `convert` is tested with have the keys of the published code."""

import re
from typing import Any

import pytest

from tests.support.published_networks import (
    Published,
    Solo,
    acl,
    acl_finetuned,
    advcl,
    advcl_finetuned,
    deacl,
    kuangliu,
    profeat,
    solo_moco,
    solo_simclr,
    solo_simsiam,
)

# The keys were read in the published files: models/resnet_cifar_multibn_ensembleFC.py and models/resnet_cifar.py of
# LijieFan/AdvCL, models/resnet_multi_bn.py and models/resnet.py of VITA-Group/Adversarial-Contrastive-Learning and of
# PKU-ML/DYNACL, models/resnet.py of kuangliu/pytorch-cifar; solo/methods of vturrisi/solo-learn (base.py, simclr.py,
# simsiam.py, mocov2plus.py), the same and solo/models/resnet_add_normalize.py of pantheon5100/DeACL, utils.py and
# models/resnet.py of val-iisc/ProFeAT. Here without the numbers of blocks and branches, and the leaves.
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


@pytest.mark.parametrize(
    ("network", "copies", "rest"),
    [
        (solo_simclr(), {"backbone"}, {"classifier", "projector.0", "projector.2"}),
        (
            solo_simsiam(),
            {"backbone"},
            {"classifier"} | {f"projector.{i}" for i in (0, 1, 3, 4, 6, 7)} | {f"predictor.{i}" for i in (0, 1, 3)},
        ),
        (
            solo_moco(),
            {"backbone", "momentum_backbone"},
            {"classifier", "momentum_classifier", "queue", "queue_ptr"}
            | {f"{name}.{i}" for name in ("projector", "momentum_projector") for i in (0, 2)},
        ),
        (
            deacl(),
            {"backbone", "momentum_backbone"},
            {"classifier", "classifier_adv", "backbone.normalize", "momentum_backbone.normalize"},
        ),
        (profeat(), {"backbone"}, {"classifier", "projector.0", "projector.2", "backbone.normalize"}),
        (profeat(finetuned=True), {"backbone"}, {"fc", "backbone.normalize"}),
    ],
)
def test_keys_of_solo_learn_and_its_followers(network: Solo, copies: set[str], rest: set[str]) -> None:
    parts = {key.rpartition(".")[0] or key for key in network.state_dict()}
    for copy in copies:
        below = {part.removeprefix(f"{copy}.") for part in parts if part.startswith(f"{copy}.")} - {"normalize"}
        inside = {part for part in below if part.startswith("layer")}
        assert {part.split(".", 2)[2] for part in inside} == SINGLE | {"downsample.0", "downsample.1"}
        assert below - inside == STEM
        parts -= {f"{copy}.{part}" for part in below}
        stem: Any = network.get_submodule(f"{copy}.conv1")
        assert (stem.kernel_size, stem.stride, stem.padding) == ((3, 3), (1, 1), (2, 2))
    assert parts == rest


def test_simsiams_head_has_no_biases_before_its_batch_norms() -> None:
    keys = {key for key in solo_simsiam().state_dict() if key.startswith("projector.")}
    assert {"projector.6.bias", "projector.7.running_var"} <= keys
    assert not {"projector.0.bias", "projector.3.bias", "projector.7.weight"} & keys
