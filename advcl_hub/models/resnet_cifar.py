"""Residual networks for 32x32 images: timm's ResNet with the stem of the CIFAR literature.

`resnet8_cifar` and `resnet20_cifar` are the three-stage networks of He et al. 2016 (arXiv 1512.03385,
section 4.2), with projection shortcuts. `resnet18_cifar`, `resnet34_cifar` and `resnet50_cifar` are those of
torchvision behind a 3x3 stem without max-pooling, the encoders of SimCLR, AdvCL and most other work on CIFAR.
`resnet10_cifar` is a compact one of our own for training on a CPU, chosen by measurement (train/RUNS.md, 2026-11-27).
Their state dict has the keys of timm's and torchvision's own ResNets.

solo-learn and the codes that follow it (DeACL, ProFeAT) pad the images of the stem by 2 pixels instead of 1, so that it
makes 34x34 maps of 32x32 images. The weights are of the same shapes:

    timm.create_model("resnet18_cifar", stem_padding=2)     # the ResNet-18 of solo-learn for CIFAR
"""

from collections.abc import Sequence
from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import Tensor, nn

from advcl_hub.private import feature_take_indices

__all__ = ["ResNetCifar"]

# timm's stem divides the resolution by 4, ours by 1 or 2. timm counts strides from its own stem.
TIMM_STEM_STRIDE = 4


class ResNetCifar(ResNet):
    """timm's `ResNet` with a 3x3 stem of stride 1 or 2, no max-pooling, and three or four stages.

    Input (N, in_chans, H, W); the last feature map is (N, C, H/4, W/4) with three stages and (N, C, H/8, W/8)
    with four, half as high and wide with `stem_stride=2`. With `stem_padding=2` it is that of images with 2 more pixels
    each way, rounded up: 5x5 for 32x32 images and four stages. Images are floats in [0, 1]: the default configuration has
    mean 0 and std 1.

    Args:
        block: `BasicBlock` or `Bottleneck` of timm.
        layers: Number of blocks in each stage; three or four stages.
        channels: Width of each stage, before the expansion of the block. The stem has the first of them.
        in_chans: Number of image channels.
        num_classes: Number of classes, 0 for pooled features.
        output_stride: Most that the input may be reduced: 2, 4 or 8 times the stride of the stem. Later stages are dilated
            instead. None is no limit.
        stem_padding: Pixels that the stem adds on each side of the image: 1, or 2 as in solo-learn and DeACL.
        stem_stride: 1, or 2: four times fewer positions from the stem on, for wider networks at the same cost.
        **kwargs: Other arguments of timm's `ResNet`, e.g. `global_pool`, `drop_path_rate`, `zero_init_last`.

    Raises:
        ValueError: `layers` and `channels` do not describe three or four stages; or another `output_stride`,
            `stem_padding` or `stem_stride`.
    """

    def __init__(
        self,
        block: Any,
        layers: Sequence[int],
        channels: Sequence[int] = (64, 128, 256, 512),
        in_chans: int = 3,
        num_classes: int = 10,
        output_stride: int | None = None,
        stem_padding: int = 1,
        stem_stride: int = 1,
        **kwargs: Any,
    ):
        check_stages(layers, channels)
        check_stem(stem_padding, stem_stride)
        check_output_stride(output_stride, stem_stride)
        width = channels[0]
        super().__init__(
            block,
            tuple(layers),
            channels=tuple(channels),
            in_chans=in_chans,
            num_classes=num_classes,
            output_stride=TIMM_STEM_STRIDE * (output_stride or 8 * stem_stride) // stem_stride,
            # Of timm's stems only the deep one has a width to choose; its convolutions are replaced below.
            stem_type="deep",
            stem_width=width // 2,
            **kwargs,
        )
        factory = {key: kwargs[key] for key in ("device", "dtype") if key in kwargs}
        conv = nn.Conv2d(in_chans, width, kernel_size=3, stride=stem_stride, padding=stem_padding, bias=False, **factory)
        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        self.add_module("conv1", conv)
        self.add_module("maxpool", nn.Identity())
        if len(layers) == 3:
            self.layer4 = nn.Sequential()  # timm's forward names four stages
        correct_reductions(self.feature_info, stem_stride)

    def forward_intermediates(
        self, x: Tensor, indices: int | list[int] | None = None, *args: Any, **kwargs: Any
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """timm's `ResNet.forward_intermediates`; `indices` counts the levels of `feature_info`."""
        taken, _ = feature_take_indices(len(self.feature_info), indices)
        return super().forward_intermediates(x, taken, *args, **kwargs)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """timm's `ResNet.prune_intermediate_layers`; `indices` counts the levels of `feature_info`."""
        taken, last = feature_take_indices(len(self.feature_info), indices)
        if last < len(self.feature_info) - 1:
            super().prune_intermediate_layers(taken, prune_norm, prune_head)
        elif prune_head:  # every stage stays
            self.reset_classifier(0, "")
        return taken


def check_stages(layers: Sequence[int], channels: Sequence[int]) -> None:
    """Refuses a number of stages that timm's networks cannot run, or depths and widths that do not match.

    Raises:
        ValueError: If there are not three or four stages, each with a depth and a width.
    """
    if len(layers) != len(channels) or len(layers) not in (3, 4):
        raise ValueError(
            f"got {len(layers)} depths {tuple(layers)} and {len(channels)} widths {tuple(channels)}: "
            "give one depth and one width a stage, for three or four stages"
        )


def check_output_stride(output_stride: int | None, stem_stride: int = 1) -> None:
    """Refuses an output stride that dilation cannot reach.

    Raises:
        ValueError: If `output_stride` is not 2, 4 or 8 times `stem_stride`.
    """
    known = [stem_stride * stride for stride in (2, 4, 8)]
    if output_stride is not None and output_stride not in known:
        raise ValueError(
            f"got output_stride={output_stride}: expected {known[0]}, {known[1]} or {known[2]} (the stem has "
            f"stride {stem_stride})"
        )


def check_stem(padding: int, stride: int) -> None:
    """Refuses a stem that would cut off the border of the image, look beyond it, or skip pixels.

    Raises:
        ValueError: If `padding` or `stride` is not 1 or 2.
    """
    if isinstance(padding, bool) or not isinstance(padding, int) or padding not in (1, 2):
        raise ValueError(
            f"got stem_padding={padding!r}: expected 1 (most codes) or 2 (solo-learn, DeACL); with less the 3x3 stem "
            "would cut off the border of the image, with more its outermost outputs would see no pixel"
        )
    if isinstance(stride, bool) or not isinstance(stride, int) or stride not in (1, 2):
        raise ValueError(f"got stem_stride={stride!r}: expected 1 or 2; with more the 3x3 stem would miss pixels")


def correct_reductions(feature_info: list[dict[str, Any]], stem_stride: int = 1) -> None:
    """Corrects, in place, the reductions that timm counts from a stem of stride 4."""
    for info in feature_info:
        info["reduction"] = max(stem_stride, info["reduction"] * stem_stride // TIMM_STEM_STRIDE)


def cifar_cfg(**kwargs: Any) -> dict[str, Any]:
    """Default configuration of an untrained 32x32 network; `kwargs` override or complete it.

    The normalisation is the identity: an attack on images in [0, 1] is an attack on the input of the network.
    """
    return {
        "num_classes": 10,
        "input_size": (3, 32, 32),
        "pool_size": (4, 4),
        "crop_pct": 1.0,
        "interpolation": "bilinear",
        "mean": (0.0, 0.0, 0.0),
        "std": (1.0, 1.0, 1.0),
        "first_conv": "conv1",
        "classifier": "fc",
        **kwargs,
    }


default_cfgs = generate_default_cfgs(
    {
        "resnet8_cifar": cifar_cfg(pool_size=(8, 8)),
        "resnet10_cifar": cifar_cfg(pool_size=(2, 2)),
        "resnet20_cifar": cifar_cfg(pool_size=(8, 8)),
        "resnet18_cifar": cifar_cfg(),
        "resnet34_cifar": cifar_cfg(),
        "resnet50_cifar": cifar_cfg(),
    }
)


def _create_resnet_cifar(variant: str, pretrained: bool, model_args: dict[str, Any]) -> ResNetCifar:
    feature_cfg = {"out_indices": tuple(range(1 + len(model_args["layers"])))}  # the stem and every stage
    return build_model_with_cfg(ResNetCifar, variant, pretrained, feature_cfg=feature_cfg, **model_args)


@register_model
def resnet8_cifar(pretrained: bool = False, **kwargs: Any) -> ResNetCifar:
    """ResNet-8 for 32x32 images: 0.08 M parameters, small enough for tests and tutorials."""
    model_args = {"block": BasicBlock, "layers": (1, 1, 1), "channels": (16, 32, 64)}
    return _create_resnet_cifar("resnet8_cifar", pretrained, model_args | kwargs)


@register_model
def resnet10_cifar(pretrained: bool = False, **kwargs: Any) -> ResNetCifar:
    """ResNet-10 (one block a stage, widths 32 to 256) behind a stem of stride 2, for training on a CPU: 1.23 M parameters."""
    model_args = {"block": BasicBlock, "layers": (1, 1, 1, 1), "channels": (32, 64, 128, 256), "stem_stride": 2}
    return _create_resnet_cifar("resnet10_cifar", pretrained, model_args | kwargs)


@register_model
def resnet20_cifar(pretrained: bool = False, **kwargs: Any) -> ResNetCifar:
    """ResNet-20 for 32x32 images (arXiv 1512.03385, section 4.2, n = 3): 0.27 M parameters."""
    model_args = {"block": BasicBlock, "layers": (3, 3, 3), "channels": (16, 32, 64)}
    return _create_resnet_cifar("resnet20_cifar", pretrained, model_args | kwargs)


@register_model
def resnet18_cifar(pretrained: bool = False, **kwargs: Any) -> ResNetCifar:
    """ResNet-18 for 32x32 images, the encoder of AdvCL (arXiv 2111.01124): 11.17 M parameters."""
    model_args = {"block": BasicBlock, "layers": (2, 2, 2, 2)}
    return _create_resnet_cifar("resnet18_cifar", pretrained, model_args | kwargs)


@register_model
def resnet34_cifar(pretrained: bool = False, **kwargs: Any) -> ResNetCifar:
    """ResNet-34 for 32x32 images: 21.28 M parameters."""
    model_args = {"block": BasicBlock, "layers": (3, 4, 6, 3)}
    return _create_resnet_cifar("resnet34_cifar", pretrained, model_args | kwargs)


@register_model
def resnet50_cifar(pretrained: bool = False, **kwargs: Any) -> ResNetCifar:
    """ResNet-50 for 32x32 images, stride in the 3x3 convolution: 23.52 M parameters."""
    model_args = {"block": Bottleneck, "layers": (3, 4, 6, 3)}
    return _create_resnet_cifar("resnet50_cifar", pretrained, model_args | kwargs)
