"""Image encoders for small images, registered with timm by this import; and what any timm model needs around it."""

from advcl_hub.models.preact_resnet_cifar import PreActResNetCifar, preact_resnet18_cifar, wrn28_10_cifar, wrn34_10_cifar
from advcl_hub.models.resnet_cifar import (
    ResNetCifar,
    resnet8_cifar,
    resnet10_cifar,
    resnet18_cifar,
    resnet20_cifar,
    resnet34_cifar,
    resnet50_cifar,
)

__all__ = [
    "PreActResNetCifar",
    "ResNetCifar",
    "preact_resnet18_cifar",
    "resnet8_cifar",
    "resnet10_cifar",
    "resnet18_cifar",
    "resnet20_cifar",
    "resnet34_cifar",
    "resnet50_cifar",
    "wrn28_10_cifar",
    "wrn34_10_cifar",
]
