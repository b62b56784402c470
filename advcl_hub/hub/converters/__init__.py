"""Strict conversion of encoders that others published: every key is accounted for, or nothing is written.

convert("epoch_1000.ckpt", "exports/advcl")     # a checkpoint file becomes a folder that timm opens
"""

from advcl_hub.hub.converters.layouts import LAYOUTS
from advcl_hub.hub.converters.runner import Conversion, convert

__all__ = ["LAYOUTS", "Conversion", "convert"]
