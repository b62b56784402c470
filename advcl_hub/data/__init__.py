"""Every data set becomes the same thing: uint8 images, labels, indices and class names.

A new source is added in sources.py; `load_data` lists those that there are.
"""

from advcl_hub.data.image_data import ImageData, batches, few_shot, load_data, train_val_split

__all__ = ["ImageData", "batches", "few_shot", "load_data", "train_val_split"]
