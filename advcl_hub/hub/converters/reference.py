"""A second implementation of the published networks, from their own keys: a converted model has to agree with it."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor


def published_features(
    state: Mapping[str, Tensor], images: Tensor, branch: int | None = None, root: str = "", stem_padding: int = 1
) -> Tensor:
    """Pooled features of a published ResNet in evaluation mode.

    Nothing here knows timm's names or which layout a checkpoint follows: a part is there if its key is. So the conversion and
    this function do not make the same mistake.

    Args:
        state: the published state dict.
        images: (N, C, H, W), normalised as the network wants them, of the type of the weights.
        branch: index in `bn_list`, None for a network with one batch norm.
        root: what stands before the encoder's keys, such as `backbone.`.
        stem_padding: pixels that a 3x3 stem adds on each side of the image. No key tells.

    Returns:
        (N, D) features.
    """

    state = {key.removeprefix(root): value for key, value in state.items() if key.startswith(root)}

    def conv(x: Tensor, name: str, stride: int = 1, padding: int | None = None) -> Tensor:
        weight = state[f"{name}.weight"]
        return F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2 if padding is None else padding)

    def norm(x: Tensor, name: str) -> Tensor:
        name = name if branch is None else f"{name}.bn_list.{branch}"
        mean, var, weight, bias = (state[f"{name}.{leaf}"] for leaf in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(x, mean, var, weight, bias)

    def shortcut(x: Tensor, block: str, stride: int) -> Tensor:
        for first, second in (
            ("shortcut.0", "shortcut.1"),
            ("downsample.0", "downsample.1"),
            ("downsample.conv", "downsample.bn"),
        ):
            if f"{block}.{first}.weight" in state:
                return norm(conv(x, f"{block}.{first}", stride), f"{block}.{second}")
        return x

    def residual(x: Tensor, block: str, stride: int) -> Tensor:
        if f"{block}.conv3.weight" in state:  # a bottleneck, which has its stride in the 3x3 convolution
            y = norm(conv(x, f"{block}.conv1"), f"{block}.bn1").relu()
            y = norm(conv(y, f"{block}.conv2", stride), f"{block}.bn2").relu()
            y = norm(conv(y, f"{block}.conv3"), f"{block}.bn3")
        else:
            y = norm(conv(x, f"{block}.conv1", stride), f"{block}.bn1").relu()
            y = norm(conv(y, f"{block}.conv2"), f"{block}.bn2")
        return (y + shortcut(x, block, stride)).relu()

    large = state["conv1.weight"].shape[-1] == 7
    stem = conv(images, "conv1", 2) if large else conv(images, "conv1", padding=stem_padding)
    x = norm(stem, "bn1").relu()
    if large:
        x = F.max_pool2d(x, 3, 2, 1)
    for stage in (1, 2, 3, 4):
        number = 0
        while f"layer{stage}.{number}.conv1.weight" in state:
            x = residual(x, f"layer{stage}.{number}", 2 if stage > 1 and number == 0 else 1)
            number += 1
    return torch.flatten(F.adaptive_avg_pool2d(x, 1), 1)
