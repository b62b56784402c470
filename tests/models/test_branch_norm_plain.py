"""Which branch a plain network and a plain state dict are of, also where one name begins with another."""

import pytest
import timm
import torch
from torch import nn

from advcl_hub.models.branch_norm import BranchNorm, add_branches, branch_state_dict, without_branches

NAMES = ("clean", "adv", "adv_ce")


@pytest.fixture(scope="module")
def network() -> nn.Module:
    """A network whose branches have weights 0, 1 and 2, in the order of their names."""
    network = timm.create_model("resnet8_cifar", num_classes=0)
    add_branches(network, NAMES)
    for module in network.modules():
        for value, name in enumerate(NAMES) if isinstance(module, BranchNorm) else ():
            nn.init.constant_(module.bn_branches[name].weight, value)
    return network


@pytest.mark.parametrize(("value", "name"), list(enumerate(NAMES)))
def test_the_weights_are_those_of_the_branch_that_was_named(network: nn.Module, value: float, name: str) -> None:
    plain, state = without_branches(network, name).state_dict(), branch_state_dict(network.state_dict(), name)
    assert plain.keys() == state.keys() == timm.create_model("resnet8_cifar", num_classes=0).state_dict().keys()
    assert all(torch.equal(plain[key], state[key]) for key in plain)
    assert state["bn1.weight"].unique().tolist() == [value]
