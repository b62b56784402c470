"""Pictures of an evaluation: accuracy over eps and steps, per class and corruption; adversarial examples with predictions."""

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

from advcl_hub.evaluation.measure import Measurement
from advcl_hub.evaluation.protocol import Protocol
from advcl_hub.evaluation.results import Evaluation
from advcl_hub.records import pixels
from advcl_hub.training.pictures import save_figure

_COLUMNS = {"standard": "clean", "pgd": "PGD", "autoattack": "AutoAttack"}
_COLOURS = {"standard": "#4c72b0", "pgd": "#dd8452", "autoattack": "#8c2d04"}
_EXAMPLES = 8
_CANDIDATES = 64


def save_all(folder: Path, evaluation: Evaluation, measurement: Measurement, drawn: list[Path]) -> None:
    """All pictures that the evaluation has figures for; their paths are added to `drawn` one by one."""
    record = evaluation.record
    drawn.append(save_per_class(folder / "per_class.png", record))
    if "curves" in record:
        drawn.append(save_curves(folder / "curves.png", record))
    if "pgd" in record["accuracy"]:
        drawn += save_examples(folder / "examples.png", evaluation, measurement)
    if "corruptions" in record:
        drawn.append(save_corruptions(folder / "corruptions.png", record))


def save_curves(path: Path, record: Mapping[str, Any]) -> Path:
    """Accuracy on the images of the checks over eps and over the number of steps."""
    curves, protocol, n = record["curves"], record["protocol"], record["curves"]["images"]
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    scale, unit = (255, "eps (of 255)") if protocol["norm"] == "Linf" else (1, "eps")
    shown = curves["eps"][:-1]  # the last one is the very large eps of the checks
    left.plot([eps * scale for eps, _ in shown], [100 * a for _, a in shown], "o-", color=_COLOURS["pgd"])
    left.axvline(protocol["eps"] * scale, color="grey", linewidth=1, linestyle="--")
    left.set(xlabel=f"{unit}, {protocol['norm']}", ylabel="accuracy (%)", title=f"PGD-{protocol['steps']}", ylim=(-2, 102))
    clean = curves["eps"][0][1]
    steps = [(0, clean), *curves["steps"]]
    right.plot(range(len(steps)), [100 * a for _, a in steps], "o-", color=_COLOURS["pgd"])
    right.set_xticks(range(len(steps)), ["clean", *(str(count) for count, _ in curves["steps"])])
    right.set(xlabel="steps", title=f"eps {pixels(protocol['eps'], protocol['norm'])}, {protocol['loss']}")
    for axis in (left, right):
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{record['model']['name']} on {n} images of {record['data']['name']}", fontsize=10)
    return save_figure(figure, path)


def save_per_class(path: Path, record: Mapping[str, Any]) -> Path:
    """Clean and robust accuracy of every class; of many classes, the 30 with the lowest robust accuracy."""
    table, last = record["per_class"], "autoattack" if "autoattack" in record["accuracy"] else "worst_case"
    names = list(table)
    if len(names) > 30:
        names = sorted(names, key=lambda name: table[name][last] / table[name]["images"])[:30]
    columns = [key for key in _COLUMNS if key in record["accuracy"]]
    figure = Figure(figsize=(max(6, 0.6 * len(names) + 2), 3.4), layout="constrained")
    axis = figure.subplots()
    width = 0.8 / len(columns)
    for i, key in enumerate(columns):
        heights = [100 * table[name][key] / table[name]["images"] for name in names]
        bars = axis.bar(np.arange(len(names)) + (i - (len(columns) - 1) / 2) * width, heights, width, color=_COLOURS[key])
        axis.bar_label(bars, fmt="%.0f", fontsize=7)
        total = 100 * record["accuracy"][key]["value"]
        bars.set_label(f"{_COLUMNS[key]} ({total:.1f} %)")
    short = [name if len(name) <= 16 else f"{name[:15]}." for name in names]
    axis.set_xticks(range(len(names)), short, rotation=35 if len(names) > 5 else 0, ha="right" if len(names) > 5 else "center")
    axis.set(ylabel="accuracy (%)", ylim=(0, 105))
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(ncols=len(columns), loc="outside upper right", frameon=False, fontsize=9)
    worst = f", the {len(names)} worst of {len(table)} classes" if len(names) < len(table) else ""
    title = f"{record['model']['name']}, {record['data']['images']:,} images of {record['data']['name']}{worst}"
    axis.set_title(title, fontsize=10, loc="left")
    return save_figure(figure, path)


def save_corruptions(path: Path, record: Mapping[str, Any]) -> Path:
    """Accuracy by corruption and severity, as a table of colours."""
    found = record["corruptions"]
    names, values = list(found["by_severity"]), 100 * np.array(list(found["by_severity"].values()))
    figure = Figure(figsize=(5.5, 0.4 * len(names) + 1.4), layout="constrained")
    axis = figure.subplots()
    axis.imshow(values, vmin=0, vmax=100, cmap="RdYlGn", aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        axis.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=9)
    axis.set_yticks(range(len(names)), [name.replace("_", " ") for name in names])
    axis.set_xticks(range(values.shape[1]), [str(severity + 1) for severity in range(values.shape[1])])
    axis.set(xlabel="severity")
    axis.set_title(f"accuracy (%), mean {100 * found['mean']:.1f}\n{record['corrupted']['set']}", fontsize=10)
    return save_figure(figure, path)


def save_examples(path: Path, evaluation: Evaluation, measurement: Measurement) -> list[Path]:
    """Of up to 64 images that PGD broke, those that are taken for something else with the most confidence, of different classes
    while there are such. Images that it could not break stand in where there are none."""
    protocol = measurement.protocol
    labels = evaluation.images["label"]
    right = [p for p, correct in enumerate(evaluation.images["standard"]) if correct]
    broken = [p for p in right if not evaluation.images["pgd"][p]]
    candidates = _one_a_class(broken or right, labels)[: min(_CANDIDATES, protocol.batch_size)]
    if not candidates:
        return []
    images, truth = measurement.load(candidates)
    indices = [measurement.indices[p] for p in candidates]
    adversarial = measurement.adversarial(images, truth, indices, protocol, restart=0)
    with torch.no_grad():
        probability, wrong = measurement.classifier(adversarial).softmax(1).max(1)
    order = (probability + (wrong != truth).float()).argsort(descending=True).tolist()
    chosen = _one_a_class(order, truth.tolist())[:_EXAMPLES]
    classifiers = {"": (measurement.classifier, adversarial[chosen])}
    save_adversarial_examples(path, classifiers, images[chosen], truth[chosen], measurement.data.classes, protocol)
    return [path]


def _one_a_class(order: Sequence[int], labels: Sequence[int]) -> list[int]:
    """`order` with the first of every class in front, then the second of every class, and so on."""
    queues: dict[int, list[int]] = {}
    for position in order:
        queues.setdefault(labels[position], []).append(position)
    return [position for turn in zip_longest(*queues.values()) for position in turn if position is not None]


def save_adversarial_examples(
    path: Path,
    classifiers: Mapping[str, tuple[nn.Module, Tensor]],
    images: Tensor,
    labels: Tensor,
    classes: Sequence[str],
    protocol: Protocol,
) -> Path:
    """For each classifier: the perturbations (magnified to full range) and the perturbed images, with predictions.

    Args:
        path: PNG file.
        classifiers: by name a function from images in [0, 1] to logits, and the adversarial images (N, C, H, W) for it.
        images: float (N, C, H, W) in [0, 1]; labels: int64 (N,); classes: names.
        protocol: for the title.
    """
    several, truth, count = len(classifiers) > 1, labels.tolist(), len(images)
    height = 1 + 2 * len(classifiers)
    figure = Figure(figsize=(1.25 * count + 2, 1.5 * height), layout="constrained")
    axes = figure.subplots(height, count, squeeze=False)
    for j, (name, (classifier, adversarial)) in enumerate(classifiers.items()):
        if j == 0:
            probability, predicted = _predict(classifier, images)
            for i in range(count):
                told = "" if several else f"\n{classes[predicted[i]]} {probability[i]:.0%}"
                show(axes[0, i], images[i], classes[truth[i]] + told)
        probability, predicted = _predict(classifier, adversarial)
        noise_row, image_row = axes[1 + 2 * j], axes[2 + 2 * j]
        delta = adversarial - images
        factor = 0.5 / max(delta.abs().max().item(), 1e-9)
        for i in range(count):
            show(noise_row[i], 0.5 + factor * delta[i])
            colour = "green" if predicted[i] == truth[i] else "red"
            show(image_row[i], adversarial[i], f"{classes[predicted[i]]} {probability[i]:.0%}", colour)
        side(noise_row[0], f"{name}\nperturbation,\nx {factor:.0f}".strip())
        side(image_row[0], f"{name}\nperturbed,\nprediction".strip())
    side(axes[0, 0], "image" if several else "image,\nclass and\nprediction")
    attack = f"PGD-{protocol.steps}, {protocol.norm}, eps {pixels(protocol.radius, protocol.norm)}"
    figure.suptitle(f"{attack}; predictions on perturbed images: green right, red wrong", fontsize=10)
    return save_figure(figure, path)


@torch.no_grad()
def _predict(classifier: nn.Module, images: Tensor) -> tuple[list[float], list[int]]:
    probability, prediction = classifier(images).softmax(1).max(1)
    return probability.tolist(), prediction.tolist()


def side(axis: Axes, text: str) -> None:
    """Names a row at its first picture."""
    axis.set_ylabel(text, rotation=0, ha="right", va="center", fontsize=9)


def show(axis: Axes, image: Tensor, title: str = "", colour: str = "black") -> None:
    """Draws a float (C, H, W) image in [0, 1], grey or RGB."""
    array = image.detach().float().clamp(0, 1).cpu().permute(1, 2, 0).numpy()
    axis.imshow(np.broadcast_to(array, (*array.shape[:2], 3)), interpolation="nearest")
    axis.set(xticks=[], yticks=[])
    lines = [line if len(line) <= 20 else f"{line[:10]}..{line[-8:]}" for line in title.splitlines()]
    axis.set_title("\n".join(lines), color=colour, fontsize=9 if max(map(len, lines), default=0) < 17 else 7)
    for spine in axis.spines.values():
        spine.set_visible(False)
