"""Batch norms in evaluation mode folded into the convolutions before them: the same function up to rounding, and faster."""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_conv_bn_weights

from advcl_hub.models.branch_norm import branch_state_dict, without_branches
from advcl_hub.models.companion import Companion


class Folded(NamedTuple):
    """The dotted names of a convolution and of the batch norm that was folded into it, and the batch norm's epsilon."""

    convolution: str
    norm: str
    eps: float


def fold_batch_norms(model: nn.Module) -> list[Folded]:
    """Folds, in place, the batch norms that follow a convolution in timm's ResNets; each becomes an identity.

    Only where timm's own forward gives the output of the one to the other alone, both are in evaluation mode, and neither has
    hooks. Networks without such places stay as they are.

    Returns:
        What was folded.
    """
    names = {id(module): f"{name}." if name else "" for name, module in model.named_modules()}
    folded = []
    for parent, convolution, norm in [place for module in model.modules() for place in _folding_places(module)]:
        prefix, eps = names[id(parent)], getattr(parent, norm).eps
        setattr(parent, convolution, fuse_conv_bn_eval(getattr(parent, convolution), getattr(parent, norm)))
        setattr(parent, norm, nn.Identity().eval())
        folded.append(Folded(prefix + convolution, prefix + norm, eps))
    return folded


class FoldedCopy(Companion):
    """One branch of an encoder as it computes in evaluation mode, batch norms folded: to attack an encoder while it is trained.

        attacked = FoldedCopy(encoder, "adv")
        ...
        attacked.refresh(encoder)               # once a step, as the weights have changed
        features = attacked(images)             # those of encoder.eval() up to float32 rounding

    Args:
        encoder: with batch-norm branches (`add_branches`); it is not changed.
        branch: whose batch norms the copy has.
    """

    def __init__(self, encoder: nn.Module, branch: str) -> None:
        plain = without_branches(encoder, branch).eval()
        folded = fold_batch_norms(plain)
        super().__init__(plain)
        self.branch, self.folded = branch, folded

    @torch.no_grad()
    def refresh(self, encoder: nn.Module) -> None:
        """Takes over the encoder's weights and running statistics."""
        state, ours = branch_state_dict(encoder.state_dict(), self.branch), self.network.state_dict()
        for convolution, norm, eps in self.folded:
            own = {key.removeprefix(f"{norm}."): state.pop(key) for key in list(state) if key.startswith(f"{norm}.")}
            kernel, bias = state[f"{convolution}.weight"], state.get(f"{convolution}.bias")
            statistics = own["running_mean"], own["running_var"], eps, own.get("weight"), own.get("bias")
            folded = fuse_conv_bn_weights(kernel, bias, *statistics)
            state[f"{convolution}.weight"], state[f"{convolution}.bias"] = folded
        for name, value in state.items():
            ours[name].copy_(value)


def _folding_places(module: nn.Module) -> Iterator[tuple[nn.Module, str, str]]:
    """Parent, convolution, batch norm: where timm's own forward gives the output of the one to the other alone."""
    places: list[tuple[nn.Module, str, str]] = []
    if type(module) in (BasicBlock, Bottleneck):
        places = [(module, f"conv{i}", f"bn{i}") for i in (1, 2, 3)]
        shortcut = module.downsample
        if type(shortcut) is nn.Sequential and _is_plain(shortcut):
            places += [(shortcut, conv, norm) for conv, norm in pairwise(shortcut._modules)]
    elif isinstance(module, ResNet):
        own = (type(module).forward, type(module).forward_features)
        places = [(module, "conv1", "bn1")] if own == (ResNet.forward, ResNet.forward_features) else []
    if not {"forward", "forward_features"} & vars(module).keys():  # replaced on this very module
        yield from (place for place in places if _can_fold(*(getattr(place[0], name, None) for name in place[1:])))


def _can_fold(conv: Any, norm: Any) -> bool:
    """Whether these are an ordinary convolution and batch norm without hooks, which does the same to every image."""
    if type(conv) is not nn.Conv2d or type(norm) is not nn.BatchNorm2d or conv.training or norm.training:
        return False
    return norm.running_mean is not None and norm.running_var is not None and _is_plain(conv) and _is_plain(norm)


def _is_plain(module: nn.Module) -> bool:
    """Whether nobody has hooks on a module or has replaced its forward (parametrizations change its type)."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return not any(hooks) and "forward" not in vars(module)
