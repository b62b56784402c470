"""Data sets in one form: uint8 images, labels, indices and class names. `read_source` in sources.py says how to add one."""

from advcl_hub.data.image_data import ImageData, batches, few_shot, load_data, train_val_split

__all__ = ["ImageData", "batches", "few_shot", "load_data", "train_val_split"]
