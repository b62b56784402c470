"""advcl-hub: image encoders that stay adversarially robust after finetuning.

Importing this package registers its architectures with timm, so that `timm.create_model("resnet18_cifar")` works.
"""

from importlib.metadata import PackageNotFoundError, version

from advcl_hub import models as models
from advcl_hub.evaluation import Protocol as Protocol
from advcl_hub.evaluation import evaluate as evaluate
from advcl_hub.finetuning import finetune as finetune
from advcl_hub.finetuning import transfer as transfer

try:
    __version__ = version("advcl-hub")
except PackageNotFoundError:  # a checkout that was never installed
    __version__ = "0+unknown"
