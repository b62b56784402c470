"""advcl-hub: image encoders that stay adversarially robust after finetuning.

Importing this package registers its architectures and released weights with timm, so that
`timm.create_model("resnet10_cifar.pseudo_label_at_c10", pretrained=True)` works. Slow modules are imported at first use.
"""

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from advcl_hub import models as models
from advcl_hub.hub.registry import register as register
from advcl_hub.hub.registry import releases as releases

if TYPE_CHECKING:
    from advcl_hub.evaluation import Protocol as Protocol
    from advcl_hub.evaluation import evaluate as evaluate
    from advcl_hub.finetuning import finetune as finetune
    from advcl_hub.finetuning.lp_aff import lp_aff as lp_aff
    from advcl_hub.finetuning.transfer import transfer as transfer
    from advcl_hub.hub.converters import convert as convert
    from advcl_hub.hub.push_pull import pull as pull
    from advcl_hub.hub.push_pull import push as push
    from advcl_hub.hub.push_pull import verify as verify

_LAZY = {
    "Protocol": "evaluation",
    "convert": "hub.converters",
    "evaluate": "evaluation",
    "finetune": "finetuning",
    "lp_aff": "finetuning",
    "pull": "hub.push_pull",
    "push": "hub.push_pull",
    "transfer": "finetuning",
    "verify": "hub.push_pull",
}

try:
    __version__ = version("advcl-hub")
except PackageNotFoundError:  # a checkout that was never installed
    __version__ = "0+unknown"


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
