"""The libraries that our commands import, imported once for the processes of tests.support.warm: not the project itself."""

# ruff: noqa: E402  # what is imported reads the environment

import os

ENVIRONMENT = dict(os.environ)  # under which they were imported
os.environ["OMP_NUM_THREADS"] = "1"  # a process with threads must not be forked

import accelerate  # noqa: F401
import matplotlib.backends.backend_agg
import matplotlib.figure  # noqa: F401
import pyarrow.parquet  # noqa: F401
import pyautoattack  # noqa: F401
import sklearn.cluster
import sklearn.datasets
import sklearn.neighbors  # noqa: F401
import timm.data
import timm.optim
import timm.scheduler  # noqa: F401
import torch.utils.flop_counter
import torch.utils.tensorboard  # noqa: F401
import torchvision.transforms.v2  # noqa: F401
from huggingface_hub import HfApi, ModelCard  # noqa: F401
