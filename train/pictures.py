"""Pictures of what the step trains on."""

from collections.abc import Mapping
from pathlib import Path

import matplotlib.pyplot as plt
from torch import Tensor

from advcl_hub.evaluation.pictures import save_figure, show, side


def save_views(path: Path, rows: Mapping[str, Tensor], columns: int = 10) -> Path:
    """A grid with one named row a view and one column an image.

    Args:
        path: PNG file.
        rows: name -> float images (N, C, H, W) in [0, 1].
        columns: images shown.
    """
    count = min(columns, len(next(iter(rows.values()))))
    figure, axes = plt.subplots(len(rows), count, figsize=(count + 2, len(rows)), squeeze=False, layout="constrained")
    for row, (name, images) in zip(axes, rows.items(), strict=True):
        for axis, image in zip(row, images, strict=False):
            show(axis, image)
        side(row[0], name)
    return save_figure(figure, path)
