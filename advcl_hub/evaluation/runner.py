"""From a model and a data set to figures that can stand in a paper: `advcl_hub.evaluate`."""

import datetime
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from warnings import warn

import torch
from torch import nn

from advcl_hub.data import ImageData
from advcl_hub.evaluation import autoattack, checks, inputs, tables
from advcl_hub.evaluation.checks import Check, Curves
from advcl_hub.evaluation.classifier import LoadedModel, PixelSpace, frozen, load_model, weights_sha256
from advcl_hub.evaluation.extras import need
from advcl_hub.evaluation.journal import Journal
from advcl_hub.evaluation.measure import Measurement
from advcl_hub.evaluation.processes import Processes, choose
from advcl_hub.evaluation.protocol import Protocol
from advcl_hub.evaluation.results import FORMAT, Evaluation, finished, hardware, per_class, proportion, versions
from advcl_hub.files import check_writable, replacing


def evaluate(
    model: str | Path | nn.Module,
    data: str | ImageData,
    protocol: Protocol | None = None,
    *,
    split: str = "test",
    root: str | Path | None = None,
    n: int | None = None,
    first: bool = False,
    corruptions: str | Path | None = None,
    output: str | Path | None = None,
    device: str | torch.device | None = None,
    progress: bool = True,
    command: Sequence[str] = (),
) -> Evaluation:
    """Measures accuracy on clean, adversarial and corrupted images, and looks for signs of false robustness.

    The model's own preprocessing (size, mean, standard deviation of its pretrained cfg) is inside the attacked function: eps
    counts in pixels of [0, 1] at the size of the images. Images larger than the model's input, or of different sizes, are
    brought to the model's size when they are loaded; smaller ones are attacked as they are and enlarged inside.

    Under torchrun or accelerate launch, call it in every process: they share the images, and each returns the whole result.

    Args:
        model: a timm model, or a name or folder that `load_model` opens. It comes back in the mode it had.
        data: labelled images, or a source that `load_data` knows.
        protocol: attack, seed, batch size; by default PGD-20 at 8/255 in l_inf.
        split, root: for `load_data`, where data is a name.
        n: so many images, class-balanced and the same everywhere (`ImageData.balanced_positions`); None takes all.
        first: take the first n images instead, as RobustBench does.
        corruptions: a folder in the layout of CIFAR-10-C, or `generated` for our own small set.
        output: folder for results.json, images.csv, pictures and a report. While the evaluation is unfinished it keeps what was
            measured, so that the same call goes on after a kill. None writes nothing.
        device: by default a GPU if there is one.
        progress: show a bar with the time left.
        command: what was typed, for the record.

    Returns:
        The figures with everything needed to repeat them.

    Raises:
        ValueError: a model without classifier, class counts that differ, a value out of range, an unfinished evaluation of
            something else in `output`, or what `load_model` and `load_data` raise.
        OSError: a file that cannot be read or written, or no way to the Hub.
        ImportError: AutoAttack was asked for and pyautoattack is not installed.
    """
    protocol = protocol or Protocol()
    if protocol.autoattack:
        need("pyautoattack", "AutoAttack")
    folder = None if output is None else Path(output)
    if folder is not None:
        need("matplotlib", "A folder with pictures")
        check_writable(folder)
    device = choose(device)
    loaded = LoadedModel(type(model).__name__, model) if isinstance(model, nn.Module) else load_model(model)
    network = loaded.model
    images = data if isinstance(data, ImageData) else inputs.load_images(data, split, root, network)
    if not len(images):
        raise ValueError("No images to evaluate on.")
    inputs.check_fits(network, images)
    whole = len(images)
    if n is not None:
        images = images.subset(torch.arange(min(n, whole))) if first else images.subset(images.balanced_positions(n))
    corrupted = None if corruptions is None else inputs.Corrupted(corruptions, images)
    images = inputs.in_model_order(network, images)

    tensors = [*network.parameters(), *network.buffers()]
    home = tensors[0].device if tensors else device
    classifier = PixelSpace(network, resize=inputs.enlarges(network, images), precision=protocol.precision).to(device)
    with frozen(classifier):
        protocol = replace(protocol, batch_size=inputs.fitting_batch_size(classifier, images, protocol.batch_size, device))
        facts = {
            "model": _model_facts(loaded, images),
            "data": {
                "name": images.name,
                "split": split if isinstance(data, str) else None,
                "images": len(images),
                "of": images.source_length or whole,
                "selection": "all" if len(images) == whole else "the first" if first else "class-balanced",
                "sha256": images.fingerprint(),
            },
            "protocol": protocol.to_dict(),
            "corrupted": corrupted and {"set": corrupted.title, "generated": corrupted.generated},
            "versions": versions(),
        }
        if folder is not None and (standing := finished(folder, facts)) is not None:
            warn(
                f"{folder} holds this evaluation already, from {standing.record['date']}: nothing was measured again.",
                stacklevel=2,
            )
            return standing
        processes = Processes.current()
        journal = Journal(folder and folder / "unfinished", {**facts, "device": device.type}, processes)
        measurement = Measurement(classifier, images, protocol, journal, device, progress)
        found = _measure(measurement, corrupted)
        measurement.meter.close()
        record = {
            "kind": "evaluation",
            "format": FORMAT,
            **facts,
            "classes": list(images.classes),
            **found.figures,
            "checks": checks.as_records(found.checks),
            "warnings": found.warnings,
            "command": shlex.join(command) if command else None,
            "hardware": hardware(device, processes.count),
            "seconds": round(journal.total_seconds(), 1),
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }
        evaluation = Evaluation(record, found.columns)
        if folder is not None:
            if processes.rank == 0:
                from advcl_hub.evaluation import pictures  # takes a second to import

                drawn = pictures.save_all(folder, evaluation, measurement)
                evaluation.save(folder)
                with replacing(folder / "report.md") as draft:
                    draft.write_text(tables.page(record, [path.name for path in drawn]))
            processes.wait()  # the journal goes when the results stand
            journal.remove()
    network.to(home)
    return evaluation


def _model_facts(loaded: LoadedModel, images: ImageData) -> dict[str, Any]:
    model = loaded.model
    cfg = getattr(model, "pretrained_cfg", None) or {}
    shape = inputs.input_size(model)
    return {
        "name": loaded.name,
        "architecture": cfg.get("architecture") or type(model).__name__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "weights_sha256": weights_sha256(model),
        "file_sha256": loaded.file_sha256,
        "input_size": shape,
        "mean": cfg.get("mean", (0.0,)),
        "std": cfg.get("std", (1.0,)),
        "attacked_at": images.shape,
        "enlarged_inside": inputs.enlarges(model, images),
        "provenance": loaded.provenance,
    }


@dataclass
class _Found:
    """What was measured: figures and columns by name, and the checks."""

    protocol: Protocol
    figures: dict[str, Any] = field(default_factory=dict)
    columns: dict[str, list[Any]] = field(default_factory=dict)
    checks: list[Check] = field(default_factory=list)

    @property
    def warnings(self) -> list[str]:
        said = [f"{check.name}: no. {check.detail}." for check in self.checks if not check.passed]
        if self.protocol.precision != "float32":
            said.insert(
                0, f"Screening only: measured in {self.protocol.precision}. Measure in float32 before you report a figure."
            )
        if not self.protocol.check_images:
            said.append("Not checked for false robustness (check_images=0).")
        return said


def _measure(measurement: Measurement, corrupted: inputs.Corrupted | None) -> _Found:
    """All measurements of the protocol, in their order."""
    protocol, data, labels = measurement.protocol, measurement.data, measurement.data.labels.tolist()
    found, n, classes = _Found(protocol), len(data), len(data.classes)
    attacked = protocol.steps > 0 and protocol.radius > 0

    clean = measurement.clean()
    right = [p for p, correct in enumerate(clean["correct"]) if correct]
    survives: dict[str, list[bool]] = {"standard": clean["correct"]}
    found.columns = {"index": measurement.indices, "label": labels, "prediction": clean["prediction"]}
    distances: list[float] = []

    if attacked:
        pgd = measurement.pgd("pgd", right, protocol)
        survives["pgd"], predictions = [False] * n, list(clean["prediction"])
        for position, restart, prediction in zip(right, pgd.get("restart", []), pgd.get("prediction", []), strict=True):
            survives["pgd"][position], predictions[position] = restart < 0, prediction
        found.columns["pgd_prediction"] = predictions
        distances += pgd.get("distance", [])

    columns: dict[str, Any] = {}
    if protocol.autoattack:
        left, predictions = list(clean["correct"]), list(clean["prediction"])
        for name, payload in autoattack.run(measurement, right, classes).items():
            for position, survived, prediction in zip(
                payload["position"], payload.get("survives", []), payload.get("prediction", []), strict=True
            ):
                left[position], predictions[position] = survived, prediction
            distances += payload.get("distance", [])
            survives[name] = list(left)
            columns[name] = proportion(sum(left), n)
        survives["autoattack"] = left
        found.columns["autoattack_prediction"] = predictions

    worst = [all(flags) for flags in zip(*survives.values(), strict=True)]
    found.columns |= survives | {"worst_case": worst}
    named: dict[str, list[bool]] = {key: survives[key] for key in ("standard", "pgd", "autoattack") if key in survives} | {
        "worst_case": worst
    }
    found.figures["accuracy"] = {key: proportion(sum(flags), n) for key, flags in named.items()}
    if columns:
        found.figures["autoattack_columns"] = columns
    found.figures["per_class"] = per_class(named, labels, data.classes)

    if protocol.check_images:
        found.checks, curves = _check(measurement, right, survives, distances, attacked)
        if curves is not None:
            found.figures["curves"] = vars(curves)
        if columns:
            after = {name: column["value"] for name, column in columns.items()}
            robust = sum(survives.get("pgd", clean["correct"])) / n
            found.checks += checks.autoattack_checks(after, robust, classes, protocol.autoattack or "")
    if corrupted is not None:
        found.figures["corruptions"] = _corruptions(measurement, corrupted)
    return found


def _check(
    measurement: Measurement, right: list[int], survives: dict[str, list[bool]], distances: list[float], attacked: bool
) -> tuple[list[Check], Curves | None]:
    protocol, data = measurement.protocol, measurement.data
    count = min(protocol.check_images, len(data))
    sample = data.balanced_positions(count).tolist()
    chosen = set(sample)
    images, labels = measurement.load(sample[: protocol.batch_size])
    found = checks.model_checks(measurement.classifier, images, labels, protocol)
    if not attacked:
        return found, None
    right = [p for p in right if p in chosen]
    found.append(checks.distance_check(distances, protocol))
    found += checks.gradient_checks(measurement, right, protocol)
    curves, more = checks.attack_checks(measurement, sample, right, protocol, len(data.classes))
    survivors = [p for p in right if survives["pgd"][p]]
    return [*found, *more, checks.noise_check(measurement, survivors, protocol, count)], curves


def _corruptions(measurement: Measurement, corrupted: inputs.Corrupted) -> dict[str, Any]:
    """Accuracy by corruption and severity, and the mean of all of them."""
    table: dict[str, list[float]] = {name: [] for name in corrupted.names}
    for name, severity in corrupted.sets():
        images = replace(measurement.data, images=corrupted.load(name, severity))
        correct = measurement.on(images).clean(f"{name} {severity}")["correct"]
        table[name].append(sum(correct) / len(correct))
    mean = sum(map(sum, table.values())) / sum(map(len, table.values()))
    return {"set": corrupted.title, "mean": mean, "by_severity": table}
