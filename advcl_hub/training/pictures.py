"""Pictures of what a step trains on, and a way to save any figure whole or not at all."""

import warnings
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import FixedFormatter, FuncFormatter
from torch import Tensor

from advcl_hub.files import replacing


def save_views(path: Path, rows: Mapping[str, Tensor], columns: int = 10) -> Path:
    """A grid of what a step trains on, with one named row a view and one column an image.

    Args:
        path: PNG file.
        rows: name -> float images (N, C, H, W) in [0, 1].
        columns: images shown.
    """
    count = min(columns, len(next(iter(rows.values()))))
    size = max(max(images.shape[-2:]) for images in rows.values())
    gap = max(1, size // 10)
    # One picture on one axis: an axis for each of them takes a second to draw.
    canvas = np.ones((len(rows) * (size + gap) - gap, count * (size + gap) - gap, 3))
    for row, images in enumerate(rows.values()):
        for column, image in enumerate(images[:count].detach().float().clamp(0, 1).cpu().permute(0, 2, 3, 1).numpy()):
            top, left = row * (size + gap), column * (size + gap)
            canvas[top : top + image.shape[0], left : left + image.shape[1]] = image
    figure = Figure(figsize=(count + 2, len(rows)), layout="constrained")
    axis = figure.subplots()
    axis.imshow(canvas, interpolation="nearest")
    axis.set_yticks([row * (size + gap) + size / 2 for row in range(len(rows))], list(rows), fontsize=9)
    axis.set_xticks([])
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    return save_figure(figure, path)


def save_figure(figure: Figure, path: Path) -> Path:
    """Writes a PNG whole or not at all.

    A `$` in its text is a dollar sign, as in names of others, and begins no formula.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _without_formulas(figure)
    with replacing(path) as draft, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing", UserWarning)  # letters that the font lacks are drawn as boxes
        figure.savefig(draft, dpi=110)
    return path


def _without_formulas(figure: Figure) -> None:
    for text in figure.findobj(Text):
        text.set_parse_math(False)
    for axis in figure.findobj(Axis):  # numbers may be formulas, as those of a logarithmic axis are
        axis.offsetText.set_parse_math(True)
        for formatter, ticks in (
            (axis.get_major_formatter(), axis.get_major_ticks()),
            (axis.get_minor_formatter(), axis.get_minor_ticks()),
        ):
            if not isinstance(formatter, FixedFormatter | FuncFormatter):  # which show names
                for text in (text for tick in ticks for text in (tick.label1, tick.label2)):
                    text.set_parse_math(True)
