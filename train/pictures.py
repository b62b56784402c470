"""Pictures: the views that the step trains on, and adversarial examples with the predictions they change."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

from advcl_hub.evaluation import PixelSpace, pgd_cross_entropy
from advcl_hub.files import replacing


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
            _show(axis, image)
        row[0].set_ylabel(name, rotation=0, ha="right", va="center")
    return _save(figure, path)


def save_adversarial_examples(
    path: Path,
    models: Mapping[str, nn.Module],
    images: Tensor,
    labels: Tensor,
    classes: Sequence[str],
    *,
    eps: float,
    step_size: float,
    steps: int,
) -> Path:
    """For each model: images, their PGD perturbations (magnified to full range) and the perturbed images, with predictions.

    Args:
        path: PNG file.
        models: name -> timm classifier.
        images: float (N, C, H, W) in [0, 1]; labels: int64 (N,); classes: names.
        eps, step_size, steps: the attack, as in `advcl_hub.evaluation.evaluate`.
    """
    count, height = len(images), 1 + 2 * len(models)
    figure, axes = plt.subplots(height, count, figsize=(1.15 * count + 2, 1.3 * height), squeeze=False, layout="constrained")
    for axis, image, label in zip(axes[0], images, labels.tolist(), strict=True):
        _show(axis, image, classes[label])
    axes[0, 0].set_ylabel("image", rotation=0, ha="right", va="center")
    for i, (name, model) in enumerate(models.items()):
        classifier = PixelSpace(model).eval()
        adversarial = pgd_cross_entropy(classifier, images, labels, eps=eps, step_size=step_size, steps=steps)
        with torch.no_grad():
            predicted = classifier(adversarial).argmax(1).tolist()
        noise_row, image_row = axes[1 + 2 * i], axes[2 + 2 * i]
        for j in range(count):
            _show(noise_row[j], 0.5 + (adversarial[j] - images[j]) / (2 * eps))
            _show(
                image_row[j],
                adversarial[j],
                classes[predicted[j]],
                "green" if predicted[j] == labels[j] else "red",
            )
        noise_row[0].set_ylabel(f"{name}:\nperturbation", rotation=0, ha="right", va="center")
        image_row[0].set_ylabel("perturbed,\nprediction", rotation=0, ha="right", va="center")
    figure.suptitle(f"PGD-{steps}, eps = {eps * 255:.0f}/255 (perturbations magnified)")
    return _save(figure, path)


def _show(axis: Axes, image: Tensor, title: str = "", colour: str = "black") -> None:
    array = image.detach().float().clamp(0, 1).cpu().permute(1, 2, 0).numpy()
    axis.imshow(np.broadcast_to(array, (*array.shape[:2], 3)), interpolation="nearest")
    axis.set(xticks=[], yticks=[])
    axis.set_title(title, color=colour, fontsize=9)
    for spine in axis.spines.values():
        spine.set_visible(False)


def _save(figure: Figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as draft:
        figure.savefig(draft, dpi=110)
    plt.close(figure)
    return path
