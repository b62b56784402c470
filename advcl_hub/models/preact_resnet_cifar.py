"""Pre-activation residual networks for 32x32 images, on timm's ResNetV2.

`preact_resnet18_cifar` is the network of github.com/kuangliu/pytorch-cifar. `wrn28_10_cifar` and
`wrn34_10_cifar` are Wide ResNets (Zagoruyko and Komodakis 2016, arXiv 1605.07146), the large networks of
adversarial training on CIFAR.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

from timm.layers.classifier import ClassifierHead
from timm.layers.create_conv2d import create_conv2d
from timm.layers.norm_act import BatchNormAct2d
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnetv2 import ResNetV2
from torch import Tensor, nn

from advcl_hub.models.resnet_cifar import TIMM_STEM_STRIDE, check_output_stride, check_stages, cifar_cfg, correct_reductions
from advcl_hub.private import feature_take_indices

__all__ = ["PreActResNetCifar"]


class PreActResNetCifar(ResNetV2):
    """timm's `ResNetV2` of basic blocks with batch norm, a 3x3 stem of stride 1 and a linear head.

    Input (N, in_chans, H, W); the last feature map is (N, C, H/4, W/4) with three stages and (N, C, H/8, W/8)
    with four. Images are floats in [0, 1]: the default configuration has mean 0 and std 1.

    Args:
        layers: Number of blocks in each stage; three or four stages.
        channels: Width of each stage.
        stem_chs: Width of the stem.
        final_norm: Whether a batch norm and ReLU follow the last block. They do in He et al. 2016
            (arXiv 1603.05027), Wide ResNets and the PreActResNet-18 of Rice et al. 2020, not in kuangliu's.
        in_chans: Number of image channels.
        num_classes: Number of classes, 0 for pooled features.
        output_stride: Most that the input may be reduced: 2, 4 or 8. Later stages are dilated instead.
        global_pool: Pooling before the classifier: "avg", "max", "avgmax", "catavgmax", or "" for none.
        drop_rate: Dropout rate before the classifier.
        conv_layer: Makes a convolution, called as (in_chs, out_chs, kernel_size, ...).
        norm_layer: Batch norm that includes the activation.
        **kwargs: Other arguments of timm's `ResNetV2`, e.g. `drop_path_rate`, `zero_init_last`.

    Raises:
        ValueError: `layers` and `channels` do not describe three or four stages; or another `output_stride`.
    """

    def __init__(
        self,
        layers: Sequence[int],
        channels: Sequence[int],
        stem_chs: int,
        final_norm: bool = True,
        in_chans: int = 3,
        num_classes: int = 10,
        output_stride: int = 8,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        conv_layer: Callable[..., Any] = create_conv2d,
        norm_layer: Callable[..., Any] = BatchNormAct2d,
        **kwargs: Any,
    ):
        check_stages(layers, channels)
        check_output_stride(output_stride)
        super().__init__(
            list(layers),
            tuple(channels),
            stem_chs=stem_chs,
            in_chans=in_chans,
            num_classes=0,
            output_stride=TIMM_STEM_STRIDE * output_stride,
            drop_rate=drop_rate,
            conv_layer=conv_layer,
            norm_layer=norm_layer,
            basic=True,
            bottle_ratio=1.0,
            **kwargs,
        )
        factory = {key: kwargs[key] for key in ("device", "dtype") if key in kwargs}
        self.num_classes = num_classes
        conv = conv_layer(in_chans, stem_chs, 3, **factory)
        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        self.stem = nn.Sequential(OrderedDict(conv=conv))
        # A matrix, as in the published networks and as linear probes expect; timm has a 1x1 convolution here.
        self.head = ClassifierHead(self.num_features, num_classes, global_pool, drop_rate, **factory)
        if num_classes > 0:
            nn.init.normal_(self.head.fc.weight, std=0.01)
            nn.init.zeros_(self.head.fc.bias)
        self.head_hidden_size = self.num_features * self.head.global_pool.feat_mult()
        if not final_norm:
            self.norm = nn.Identity()
        correct_reductions(self.feature_info)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Features after the stem and after each stage; the arguments of timm's `forward_intermediates`.

        Args:
            x: Images (N, in_chans, H, W).
            indices: Levels to return, 0 for the stem, negative from the end; an int n: the last n; None: all.
            norm: Whether the final norm is applied to the feature of the last stage.
            stop_early: Whether to skip the stages after the last level asked for.
            output_fmt: "NCHW", the only layout of a convolutional network.
            intermediates_only: Whether to return the list of levels alone.

        Returns:
            The levels asked for, as (N, C, H/r, W/r) with r the reduction in `feature_info`; unless
            `intermediates_only`, in a pair after the result of `forward_features`.

        Raises:
            ValueError: If `output_fmt` is not "NCHW".
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt={output_fmt!r}: only 'NCHW' is available")
        taken, last = feature_take_indices(len(self.feature_info), indices)
        x = self.stem(x)
        levels = [x]
        for stage in self.stages[:last] if stop_early else self.stages:
            x = stage(x)
            levels.append(x)
        if len(levels) == len(self.feature_info):  # the final norm belongs to the last stage
            x = self.norm(x)
            levels[-1] = x if norm else levels[-1]
        intermediates = [level for index, level in enumerate(levels) if index in taken]
        return intermediates if intermediates_only else (x, intermediates)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """timm's `ResNetV2.prune_intermediate_layers`; `indices` counts the levels of `feature_info`."""
        taken, _ = feature_take_indices(len(self.feature_info), indices)
        super().prune_intermediate_layers(taken, prune_norm, prune_head)
        return taken


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return cifar_cfg(first_conv="stem.conv", classifier="head.fc", **kwargs)


default_cfgs = generate_default_cfgs(
    {
        "preact_resnet18_cifar": _cfg(),
        "wrn28_10_cifar": _cfg(pool_size=(8, 8)),
        "wrn34_10_cifar": _cfg(pool_size=(8, 8)),
    }
)


def _create_preact(variant: str, pretrained: bool, model_args: dict[str, Any]) -> PreActResNetCifar:
    levels = tuple(range(1 + len(model_args["layers"])))  # the stem and every stage
    feature_cfg = {"out_indices": levels, "flatten_sequential": True}
    return build_model_with_cfg(PreActResNetCifar, variant, pretrained, feature_cfg=feature_cfg, **model_args)


def _wide_resnet_args(depth: int, widen_factor: int) -> dict[str, Any]:
    """Arguments of WRN-depth-widen_factor (arXiv 1605.07146, table 1)."""
    channels = tuple(widen_factor * width for width in (16, 32, 64))
    return {"layers": ((depth - 4) // 6,) * 3, "channels": channels, "stem_chs": 16}


@register_model
def preact_resnet18_cifar(pretrained: bool = False, **kwargs: Any) -> PreActResNetCifar:
    """PreActResNet-18 for 32x32 images, without a norm after the last block: 11.17 M parameters."""
    channels = (64, 128, 256, 512)
    model_args = {"layers": (2, 2, 2, 2), "channels": channels, "stem_chs": 64, "final_norm": False}
    return _create_preact("preact_resnet18_cifar", pretrained, model_args | kwargs)


@register_model
def wrn28_10_cifar(pretrained: bool = False, **kwargs: Any) -> PreActResNetCifar:
    """WRN-28-10 for 32x32 images: 36.48 M parameters."""
    return _create_preact("wrn28_10_cifar", pretrained, _wide_resnet_args(28, 10) | kwargs)


@register_model
def wrn34_10_cifar(pretrained: bool = False, **kwargs: Any) -> PreActResNetCifar:
    """WRN-34-10 for 32x32 images: 46.16 M parameters."""
    return _create_preact("wrn34_10_cifar", pretrained, _wide_resnet_args(34, 10) | kwargs)
