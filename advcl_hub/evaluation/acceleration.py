"""A classifier in a form that is faster to attack: the same function up to rounding, with no other figures."""

import copy
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from advcl_hub.errors import reason_of
from advcl_hub.evaluation.checks import difference
from advcl_hub.evaluation.protocol import Protocol

TRIAL = 16  # images; of fewer than 16 torch computes convolutions otherwise, and would compile twice


def accelerated(classifier: nn.Module, images: Tensor, protocol: Protocol) -> nn.Module:
    """A faster copy of a classifier in evaluation mode; the classifier itself where there is none, as for a random one.

    Batch norms that follow a convolution in timm's residual blocks are folded into it, convolutions compute channels-last where
    that is faster, and with `protocol.compile` torch compiles the whole, one graph for many batch sizes. The copy is tried on
    `images`, there and back, and taken if its logits are the classifier's up to rounding. Parameters of the copy want no
    gradient; gradients with respect to its images are contiguous. The classifier is not changed.

    Args:
        classifier: images in [0, 1] to logits.
        images: (N, C, H, W) to try the copy on; best `TRIAL` of them.
        protocol: its `precision` and `compile`.

    Raises:
        ValueError: `protocol.compile` is set, and the classifier works but cannot be compiled.
    """
    try:
        with torch.no_grad():
            expected = classifier(images)
    except Exception as error:  # whoever measures will say what is wrong with it
        if protocol.compile and isinstance(error, torch.OutOfMemoryError):
            raise ValueError(f"{len(images)} images do not fit the memory: leave out --compile (compile=True).") from None
        return classifier
    if not isinstance(expected, Tensor) or expected.ndim != 2 or not expected.isfinite().all():
        return classifier
    try:
        copied = _copy(classifier, images, protocol)
        images = images.clone().requires_grad_()
        logits = copied(images)
        if logits.requires_grad:
            torch.autograd.grad(logits.sum(), images, allow_unused=True)
        deviation = difference(logits.detach(), expected)
        if deviation <= protocol.tolerance:
            return copied
        reason = f"its logits would change by {deviation:.1e}, as they do if it is random"
    except Exception as error:
        reason = reason_of(error)
    if protocol.compile:
        raise ValueError(f"The model cannot be compiled, so leave out --compile (compile=True): {reason}")
    return classifier


def _copy(classifier: nn.Module, images: Tensor, protocol: Protocol) -> nn.Module:
    copied = copy.deepcopy(classifier).requires_grad_(False)
    for parent, conv, norm in [place for module in copied.modules() for place in _folding_places(module)]:
        setattr(parent, conv, fuse_conv_bn_eval(getattr(parent, conv), getattr(parent, norm)))
        setattr(parent, norm, nn.Identity().eval())
    convolutions = [module for module in copied.modules() if isinstance(module, nn.Conv2d)]
    # On GPUs channels-last is fast on tensor cores, which true float32 does not use.
    if convolutions and (images.device.type == "cpu" or protocol.precision != "float32"):
        for convolution in convolutions:
            convolution.to(memory_format=torch.channels_last)
        copied.register_forward_pre_hook(lambda module, inputs: (_ChannelsLast.apply(inputs[0]), *inputs[1:]))
    if protocol.compile:
        torch.compiler.reset()  # torch keeps a few graphs of a function for the whole process: other models have used them up
        copied.forward = torch.compile(copied.forward, dynamic=True)
    return copied


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
    """Whether these are an ordinary convolution and batch norm that does the same to every image, watched by nobody."""
    if type(conv) is not nn.Conv2d or type(norm) is not nn.BatchNorm2d or conv.training or norm.training:
        return False
    return norm.running_mean is not None and norm.running_var is not None and _is_plain(conv) and _is_plain(norm)


def _is_plain(module: nn.Module) -> bool:
    """Whether nobody has hooks on a module or has replaced its forward (parametrizations change its type)."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return not any(hooks) and "forward" not in vars(module)


class _ChannelsLast(torch.autograd.Function):
    """Another memory format on the way in only: attacks view gradients, and draw random numbers in their memory's order."""

    @staticmethod
    def forward(ctx: Any, images: Tensor) -> Tensor:
        return images.contiguous(memory_format=torch.channels_last)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.contiguous()
