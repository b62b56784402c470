"""Strict conversion of encoders that others published: every key is accounted for, or nothing is written.

convert("epoch_1000.ckpt", "exports/advcl")     # a checkpoint file becomes a folder that timm opens
"""

from .layouts import LAYOUTS
from .runner import Conversion, convert

__all__ = ["LAYOUTS", "Conversion", "convert"]
