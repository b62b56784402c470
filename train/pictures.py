"""Pictures of what the step trains on."""

from collections.abc import Mapping
from pathlib import Path

from matplotlib.figure import Figure
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
    figure = Figure(figsize=(count + 2, len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), count, squeeze=False)
    for row, (name, images) in zip(axes, rows.items(), strict=True):
        for axis, image in zip(row, images, strict=False):
            show(axis, image)
        side(row[0], name)
    return save_figure(figure, path)
