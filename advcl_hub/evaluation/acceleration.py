"""A classifier in a form that is faster to attack: the same function up to rounding, with no other figures."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from advcl_hub.errors import reason_of
from advcl_hub.evaluation.checks import difference
from advcl_hub.evaluation.protocol import Protocol
from advcl_hub.models.folding import fold_batch_norms

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
    fold_batch_norms(copied)
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


class _ChannelsLast(torch.autograd.Function):
    """Another memory format on the way in only: attacks view gradients, and draw random numbers in their memory's order."""

    @staticmethod
    def forward(ctx: Any, images: Tensor) -> Tensor:
        return images.contiguous(memory_format=torch.channels_last)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.contiguous()
