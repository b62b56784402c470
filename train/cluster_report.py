"""What clusters look like: purity and sizes as a table, and a picture with example images."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from advcl_hub.data import ImageData, batches
from advcl_hub.training.pictures import save_figure


def purity(labels: Tensor, classes: Tensor) -> float:
    """Fraction of images whose class is the most frequent one of their cluster.

    Args:
        labels: clusters, integers (N,) from 0.
        classes: classes of the same images, integers (N,) from 0.

    Raises:
        ValueError: no images, negative entries, or labels and classes of different length.
    """
    return int(_contingency(labels, classes).amax(dim=1).sum()) / len(labels)


def _contingency(labels: Tensor, classes: Tensor) -> Tensor:
    """(clusters, classes) counts of images."""
    fits = labels.ndim == 1 and labels.shape == classes.shape and len(labels) > 0
    if not fits or min(labels.min(), classes.min()) < 0:
        raise ValueError(
            "Expected labels and classes of the same images, (N,) and not negative, "
            f"got {tuple(labels.shape)} and {tuple(classes.shape)}."
        )
    labels, classes = labels.long().cpu(), classes.long().cpu()
    width = int(classes.max()) + 1
    pairs = torch.bincount(labels * width + classes, minlength=(int(labels.max()) + 1) * width)
    return pairs.view(-1, width)


class ClusterStats(NamedTuple):
    """How the clusters of one K agree with the classes (nan where there are none), and how large they are.

    Sizes int64 (k,) count images, ascending, empty clusters included.
    """

    k: int
    purity: float
    nmi: float
    sizes: Tensor


def cluster_stats(labels: Tensor, ks: Sequence[int], classes: Tensor) -> list[ClusterStats]:
    """Compares clusters (N, len(ks)) with class labels (N,); images without one (-1) only count as sizes."""
    from sklearn.metrics import normalized_mutual_info_score  # here: most of a second that cached labels need not

    classes = classes.cpu()
    known = classes >= 0
    stats = []
    for k, column in zip(ks, labels.T.cpu(), strict=True):
        pure, nmi = math.nan, math.nan
        if known.any():
            pure = purity(column[known], classes[known])
            nmi = float(normalized_mutual_info_score(classes[known], column[known]))
        stats.append(ClusterStats(k, pure, nmi, torch.bincount(column, minlength=k).sort().values))
    return stats


def format_stats(stats: Sequence[ClusterStats]) -> str:
    """A table with a row per K; smallest, median and largest are those of the clusters that have images."""
    lines = ["    K  purity    NMI  smallest  median  largest  empty"]
    for k, pure, nmi, sizes in stats:
        used = sizes[sizes > 0]
        low, middle, high = int(used[0]), round(float(used.double().quantile(0.5))), int(used[-1])
        row = f"{k:>5}  {pure:>6.3f}  {nmi:>5.3f}  {low:>8}  {middle:>6}  {high:>7}  {k - len(used):>5}"
        lines.append(row)
    return "\n".join(lines)


def draw_report(labels: Tensor, ks: Sequence[int], data: ImageData, path: str | Path, encoder: str) -> None:
    """Draws agreement with the classes, cluster sizes, and images of the first 10 clusters of one K, as PNG.

    Args:
        labels: clusters int64 (N, len(ks)) of the N images of the data.
        ks: the numbers of clusters; images are shown for K = 10, or else the K nearest to it.
        data: the images.
        path: the PNG file.
        encoder: what the clusters are of, for the title.
    """
    figure = Figure(figsize=(16, 9), layout="constrained")
    figure.suptitle(f"{data.name}, {len(data):,} images: clusters of {encoder}", fontsize=15)
    panels = figure.subplot_mosaic([["agreement", "images"], ["sizes", "images"]], width_ratios=(1, 1.7))
    stats = cluster_stats(labels, ks, data.labels)
    _draw_agreement(panels["agreement"], stats)
    _draw_sizes(panels["sizes"], stats)
    column = min(range(len(ks)), key=lambda j: abs(ks[j] - 10))
    _draw_images(panels["images"], labels[:, column].cpu(), ks[column], data)
    save_figure(figure, Path(path))


def _draw_agreement(axes: Axes, stats: Sequence[ClusterStats]) -> None:
    positions = torch.arange(len(stats)).numpy()
    for offset, values, colour, label in (
        (-0.2, [one.purity for one in stats], "#3b6fb6", "purity"),
        (0.2, [one.nmi for one in stats], "#b9c9e0", "normalised mutual information"),
    ):
        bars = axes.bar(positions + offset, values, 0.38, color=colour, label=label)
        axes.bar_label(bars, fmt="%.2f", fontsize=9, padding=2)
    axes.set_xticks(positions, [str(one.k) for one in stats])
    axes.set(xlabel="K", ylim=(0, 1.2), yticks=[0, 0.25, 0.5, 0.75, 1])
    axes.set_title("Agreement with the classes", loc="left")
    axes.legend(frameon=False, loc="upper left", ncols=2)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_sizes(axes: Axes, stats: Sequence[ClusterStats]) -> None:
    colours = colormaps["viridis"](torch.linspace(0, 0.88, len(stats)).numpy())
    for one, colour in zip(stats, colours, strict=True):
        relative = one.sizes.flip(0) / one.sizes.float().mean()
        places = (torch.arange(one.k) + 0.5) / one.k
        axes.plot(places.numpy(), relative.numpy(), ".-", color=colour, label=f"K = {one.k}")
    axes.axhline(1, color="grey", lw=0.8, ls=":")
    axes.set(yscale="log", xticks=[], xlabel="clusters, from the largest to the smallest")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.set_title("Cluster sizes, relative to the mean", loc="left")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_images(axes: Axes, labels: Tensor, k: int, data: ImageData) -> None:
    """A row of random images for each of the first clusters; a dot marks those not of the main class."""
    rows, columns, gap = min(k, 10), 12, 0.04
    generator = torch.Generator().manual_seed(0)
    classes = data.labels.cpu()
    names = []
    for row in range(rows):
        members = (labels == row).nonzero()[:, 0]
        names.append(f"{row}   {len(members):,} images")
        if len(members) == 0:
            continue
        main = int(classes[members].mode().values)
        if main >= 0:
            names[-1] += f"\n{(classes[members] == main).float().mean():.0%} {data.classes[main]}"
        chosen = data.subset(members[torch.randperm(len(members), generator=generator)[:columns]])
        images, _ = next(iter(batches(chosen, columns)))
        for column, image in enumerate(images.cpu()):
            extent = (column + gap, column + 1 - gap, row + 1 - gap, row + gap)
            axes.imshow(image.permute(1, 2, 0).numpy(), extent=extent, cmap="gray", vmin=0, vmax=255)
            if main != int(chosen.labels[column]):
                axes.plot(column + 0.86, row + 0.14, "o", color="#e4572e", ms=6, mec="white")
    axes.set(xlim=(0, columns), ylim=(rows, 0), xticks=[], aspect="equal")
    axes.set_yticks(torch.arange(rows).numpy() + 0.5, names)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    title = f"Random images of clusters 0 to {rows - 1} at K = {k} (dot: not of the cluster's main class)"
    axes.set_title(title, loc="left")
