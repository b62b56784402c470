"""Strict conversion of encoders that others published: every key is accounted for, or nothing is written.

convert("epoch_1000.ckpt", "exports/advcl")     # a checkpoint file becomes a folder that timm opens
"""

from .renaming import convert_advcl, convert_kuangliu
from .runner import Conversion, convert

__all__ = ["Conversion", "convert", "convert_advcl", "convert_kuangliu"]
