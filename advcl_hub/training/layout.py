"""Whether a network may be trained channels-last."""

import torch
from torch import nn


def safe_channels_last(network: nn.Module, device: torch.device) -> bool:
    """False on a CPU if one of the network's convolutions would corrupt memory; timm's RepVGG and MobileOne have such.

    oneDNN issue 6035: the float32 gradient of a strided 1x1 convolution's weight is written past its buffer if image or weight
    is channels-last and the image has fewer channels than a vector register has lanes, at most 16. bfloat16 was not
    seen to crash and is treated alike.
    """
    return device.type != "cpu" or not any(
        isinstance(module, nn.Conv2d)
        and module.kernel_size == (1, 1)
        and max(module.stride) > 1
        and module.groups == 1
        and module.in_channels < 16
        for module in network.modules()
    )
