"""From a model and a data set to figures that can stand in a paper: `advcl_hub.evaluate`."""

import datetime
import json
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from itertools import chain, product
from pathlib import Path
from typing import Any
from warnings import warn

import torch
from torch import nn

from advcl_hub.data import ImageData, matching
from advcl_hub.data.corruptions import SEVERITIES
from advcl_hub.errors import how_to_install, need
from advcl_hub.evaluation import autoattack, checks, inputs
from advcl_hub.evaluation.acceleration import TRIAL, accelerated
from advcl_hub.evaluation.borrowing import borrowed, check_computes
from advcl_hub.evaluation.checks import Check
from advcl_hub.evaluation.journal import Journal, Payload
from advcl_hub.evaluation.measure import Measurement
from advcl_hub.evaluation.protocol import Protocol
from advcl_hub.evaluation.results import Evaluation, finished, per_class, proportion
from advcl_hub.files import check_writable, replacing
from advcl_hub.models.pixel_space import PixelSpace, unwrapped
from advcl_hub.models.preprocessing import data_config, pretrained_cfg
from advcl_hub.modes import as_usual
from advcl_hub.opening import LoadedModel, load_model, weights_sha256
from advcl_hub.records import tables
from advcl_hub.records.environment import hardware, versions
from advcl_hub.records.reading import FORMAT
from advcl_hub.training.processes import Processes, join

FEWEST = 20  # images that checks should see
UNFINISHED = "unfinished"  # folder of the journal, within the output


@as_usual()
def evaluate(
    model: str | Path | nn.Module,
    data: str | ImageData,
    protocol: Protocol | None = None,
    *,
    split: str = "test",
    root: str | Path | None = None,
    n: int | None = None,
    first: bool = False,
    class_order: str | None = None,
    corruptions: str | Path | None = None,
    output: str | Path | None = None,
    device: str | torch.device | None = None,
    progress: bool = True,
    command: str | None = None,
) -> Evaluation:
    """Measures accuracy on clean, adversarial and corrupted images, and looks for signs of false robustness.

    The model's own preprocessing (size, mean, standard deviation of its pretrained cfg) is inside the attacked function: eps
    counts in pixels of [0, 1] at the size of the images. Images smaller than the model's, all of one size, are attacked as they
    are and enlarged inside. Data sets of larger ones, or of different sizes, are brought to the model's size before. Both as
    timm does it (`timm.data.create_transform`).

    Under torchrun or accelerate launch, call it in every process: they share the images, and each returns the whole result.

    Args:
        model: a timm model, also wrapped (DataParallel, averaged or compiled), or a name or folder that `load_model` opens. It
            comes back as and where it was.
        data: labelled images, or a source that `load_data` knows. Classes are matched by name where the model names its own.
        protocol: attack, seed, batch size; by default PGD-20 at 8/255 in l_inf.
        split, root: for `load_data`, where data is a name.
        n: so many images, class-balanced and the same everywhere (`ImageData.balanced_positions`); None takes all.
        first: take the first n images instead, as RobustBench does.
        class_order: how a model that does not name its classes numbers folders: `natural` as timm (2 before 10, without regard
            to case), or `plain` as torchvision's ImageFolder. None takes timm's, with a warning where that matters.
        corruptions: a folder in the layout of CIFAR-10-C, or `generated` for our own small set.
        output: folder for results.json, images.csv, pictures and a report. While the evaluation is unfinished it keeps what was
            measured, so that the same call goes on after a kill. None writes nothing.
        device: by default a GPU if there is one.
        progress: show a bar with the time left.
        command: what was typed, for the record.

    Returns:
        The figures with everything needed to repeat them.

    Raises:
        ValueError: a model without classifier, class counts that differ, a value out of range, a folder `output` that holds
            something else or is in use, or what `load_model` and `load_data` raise.
        OSError: a file that cannot be read or written, or no way to the Hub.
        ImportError: AutoAttack was asked for and pyautoattack is not installed.
    """
    protocol = protocol or Protocol()
    if protocol.autoattack:
        need("pyautoattack", "AutoAttack", "eval")
    folder = None if output is None else Path(output)
    if folder is not None:
        check_writable(folder)
        if find_spec("matplotlib") is None:
            warn(f"Pictures need matplotlib: {how_to_install('eval')}. The work goes on without.", stacklevel=3)
    device = join(device)
    with _collect_warnings() as messages:  # what is said about the model and the data belongs to the result
        loaded = LoadedModel(_name(unwrapped(model)), model) if isinstance(model, nn.Module) else load_model(model)
        network = unwrapped(loaded.model)
        check_computes(network)
        if not isinstance(data, str | ImageData):
            raise ValueError(f"data is a {type(data).__name__}, expected a name such as folder:PATH, or ImageData.")
        if isinstance(data, str):
            images = matching.load_images(data, split, root, network)
        else:
            images = matching.fit_images(network, data)
        matching.check_fits(network, images)
        original = PixelSpace(network, fit=not images.fitted, precision=protocol.precision)
        chosen = _select(images, n, first)
        named = matching.in_model_order(network, chosen, class_order)
    corrupted = None if corruptions is None else inputs.Corrupted(corruptions, chosen)
    facts = {
        "model": _model_facts(replace(loaded, model=network), images),
        "data": _data_facts(images, chosen, split if isinstance(data, str) else None, first, class_order),
        "protocol": protocol.to_dict(),
        "corrupted": corrupted and corrupted.facts,
        "versions": versions(),
    }
    if folder is not None and (standing := finished(folder, facts)) is not None:
        warn(
            f"{folder} holds this evaluation already, from {standing.record['date']}: nothing was measured again.", stacklevel=3
        )
        return standing

    processes = Processes.current()
    with borrowed(original, device), ExitStack() as stack:
        classifier = accelerated(original, inputs.first_images(named, min(TRIAL, protocol.batch_size), device) / 255, protocol)
        fits = inputs.try_classifier(classifier, named, protocol, device)
        journal = Journal(folder and folder / UNFINISHED, {**facts, "device": device.type}, processes)
        stack.callback(journal.close)
        protocol = replace(protocol, batch_size=_agree(journal, fits))
        measurement = Measurement(classifier, named, protocol, journal, device, progress)
        with closing(measurement.meter):
            found = _measure(measurement, corrupted)
        record = {
            "kind": "evaluation",
            "format": FORMAT,
            **facts,
            "classes": list(named.classes),
            **found.figures,
            "checks": checks.as_records(found.checks),
            "warnings": [*messages, *found.warnings],
            "batch_size": protocol.batch_size,
            "command": command,
            "hardware": hardware(device, processes.count),
            "seconds": round(journal.total_seconds(), 1),
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }
        evaluation = Evaluation(json.loads(json.dumps(record)), found.columns)
        if folder is not None:
            saved = processes.rank != 0 or _write(folder, evaluation, measurement)
            if all(processes.gather(saved)):  # the journal goes when the results stand
                journal.remove()
    return evaluation


@contextmanager
def _collect_warnings() -> Iterator[list[str]]:
    """Collects the texts of user warnings, each once, and passes all warnings on at the end, also if that is an error."""
    texts: list[str] = []
    caught: list[warnings.WarningMessage] = []
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            yield texts
    finally:
        for entry in caught:
            if issubclass(entry.category, UserWarning):
                if str(entry.message) in texts:
                    continue
                texts.append(str(entry.message))
                warnings.warn(entry.message, entry.category, stacklevel=5)  # at the line that called `evaluate`
            else:
                warnings.warn_explicit(entry.message, entry.category, entry.filename, entry.lineno)


def _name(model: nn.Module) -> str:
    return pretrained_cfg(model).get("architecture") or type(model).__name__


def _select(images: ImageData, n: int | None, first: bool) -> ImageData:
    whole = len(images)
    if not whole:
        raise ValueError("No images to evaluate on.")
    if n is None:
        if first:
            raise ValueError("The first images were asked for without saying how many: give n.")
        return images
    if not 1 <= n <= whole:
        raise ValueError(f"{n} images were asked for, {images.name} has {whole}")
    return images.subset(torch.arange(n)) if first else images.subset(images.balanced_positions(n))


def _data_facts(
    images: ImageData, chosen: ImageData, split: str | None, first: bool, class_order: str | None
) -> dict[str, Any]:
    of = images.source_length or len(images)
    selection = "the first" if first else "class-balanced"
    if len(chosen) == len(images):
        selection = "all" if len(images) == of else "the given"
    return {
        "name": images.name,
        "split": split,
        "images": len(chosen),
        "of": of,
        "selection": selection,
        "sha256": chosen.fingerprint(),
        **({"class_order": class_order} if class_order else {}),  # records from before it existed stay valid
    }


def _agree(journal: Journal, fits: int) -> int:
    """The batch size that fits all processes' memory, or the one that an unfinished evaluation began with."""
    unit = "batch size"
    smallest = min(journal.processes.gather(fits))
    if unit not in journal.units:
        journal.write(unit, {"value": [smallest]}, 0.0)
    return journal.units[unit]["value"][0]


def _write(folder: Path, evaluation: Evaluation, measurement: Measurement) -> bool:
    """Writes pictures, the report, images.csv, and last, when everything else stands, results.json.

    Returns:
        Whether results.json stands; there is a warning if it does not, or if something else is missing.
    """
    drawn: list[Path] = []
    failed: Exception | None = None
    try:
        try:
            from advcl_hub.evaluation import pictures  # matplotlib takes a second to import, and need not be there

            pictures.save_all(folder, evaluation, measurement, drawn)
        finally:
            with replacing(folder / "report.md") as draft:
                draft.write_text(tables.page(evaluation.record, [path.name for path in drawn]), encoding="utf-8")
    except Exception as error:  # hours of measuring are not lost for a picture
        failed = error
    try:
        evaluation.save(folder)
    except OSError as error:
        warn(
            f"The results could not be saved ({error.__cause__ or error}): {folder} has no results.json, but the figures are "
            "returned; the same call tries again, and measures only what was not kept there.",
            stacklevel=4,
        )
        return False
    if failed:
        warn(f"A picture or the report could not be made ({failed!r}); the figures are complete.", stacklevel=4)
    return True


def _model_facts(loaded: LoadedModel, images: ImageData) -> dict[str, Any]:
    model = loaded.model
    config = data_config(model)
    return {
        "name": loaded.name,
        "architecture": _name(model),
        "parameters": sum(p.numel() for p in model.parameters()),
        "weights_sha256": weights_sha256(model),
        "file_sha256": loaded.file_sha256,
        "input_size": matching.input_size(model),
        "mean": config.get("mean", (0.0,)),
        "std": config.get("std", (1.0,)),
        "attacked_at": images.shape,
        "fitted_inside": matching.fitted(model, images),
        "provenance": loaded.provenance,
    }


@dataclass
class _Found:
    """What was measured: figures and columns by name, and the checks."""

    protocol: Protocol
    figures: dict[str, Any] = field(default_factory=dict)
    columns: dict[str, list[Any]] = field(default_factory=dict)
    checks: list[Check] = field(default_factory=list)
    checked: int = 0

    @property
    def warnings(self) -> list[str]:
        said = [f"{check.name}: no. {check.detail}." for check in self.checks if not check.passed]
        if self.protocol.precision != "float32":
            said.insert(
                0, f"Screening only: measured in {self.protocol.precision}. Measure in float32 before you report a figure."
            )
        if not self.protocol.check_images and (self.protocol.attacks_with_pgd or self.protocol.autoattack):
            said.append("Not checked for false robustness (check_images=0).")
        elif self.protocol.check_images and self.checked < FEWEST:
            said.append(f"Only {self.checked} images were checked for false robustness, which shows little.")
        if self.protocol.check_images and self.protocol.autoattack and not self.protocol.attacks_with_pgd:
            said.append(
                "Not checked with PGD (steps=0): of the checks for false robustness only those of the model and AutoAttack."
            )
        return said


def _measure(measurement: Measurement, corrupted: inputs.Corrupted | None) -> _Found:
    """All measurements of the protocol, in their order."""
    protocol, data, labels = measurement.protocol, measurement.data, measurement.data.labels.tolist()
    unable = autoattack.left_out(protocol, data.shape, measurement.classes) if protocol.autoattack else {}
    found, n = _Found(protocol), len(data)
    clean = measurement.clean()
    right = [p for p, correct in enumerate(clean["correct"]) if correct]
    survives: dict[str, list[bool]] = {"standard": clean["correct"]}
    found.columns = {"index": measurement.indices, "label": labels, "prediction": clean["prediction"]}
    attacked: list[Payload] = []

    if protocol.attacks_with_pgd:
        pgd = {"position": right, **measurement.pgd("pgd", right, protocol)}
        pgd["survives"] = [restart < 0 for restart in pgd.get("restart", [])]
        survives["pgd"], found.columns["pgd_prediction"] = _after(pgd, clean["correct"], clean["prediction"])
        attacked.append(pgd)
    columns: dict[str, Any] = {}
    if protocol.autoattack:
        left, predictions = clean["correct"], clean["prediction"]
        for name, payload in autoattack.run(measurement, right, unable).items():
            left, predictions = _after(payload, left, predictions)
            survives[name], columns[name] = left, proportion(sum(left), n)
            attacked.append(payload)
        if columns:  # of a single class there is nothing to attack
            survives["autoattack"], found.columns["autoattack_prediction"] = left, predictions

    worst = [all(flags) for flags in zip(*survives.values(), strict=True)]
    found.columns |= survives | {"worst_case": worst}
    named: dict[str, list[bool]] = {key: survives[key] for key in ("standard", "pgd", "autoattack") if key in survives}
    named["worst_case"] = worst
    found.figures["accuracy"] = {key: proportion(sum(flags), n) for key, flags in named.items()}
    if columns:
        found.figures["autoattack_columns"] = columns
    if unable:
        found.figures["autoattack_left_out"] = unable
    found.figures["per_class"] = per_class(named, labels, data.classes)
    if protocol.check_images:
        _check(measurement, found, survives, attacked)
    elif protocol.autoattack:  # what the figure is of must be said, also without checks
        whole = checks.all_of_autoattack(list(columns), measurement.classes, protocol.autoattack, unable)
        found.checks = [] if whole.passed else [whole]
    if corrupted is not None:
        found.figures["corruptions"] = _corruptions(measurement, corrupted)
    return found


def _after(payload: Payload, survives: list[bool], predictions: list[int]) -> tuple[list[bool], list[int]]:
    """Which images still survive after an attack on some of them, and the predictions on what it made of them."""
    survives, predictions = list(survives), list(predictions)
    columns = (payload.get(key, []) for key in ("position", "survives", "prediction"))
    for position, survived, prediction in zip(*columns, strict=True):
        survives[position], predictions[position] = survived, prediction
    return survives, predictions


def _check(measurement: Measurement, found: _Found, survives: dict[str, list[bool]], attacked: list[Payload]) -> None:
    protocol, data = measurement.protocol, measurement.data
    sample = data.balanced_positions(min(protocol.check_images, len(data))).tolist()
    found.checked = len(sample)
    images, labels = measurement.load(sample[: protocol.batch_size])
    found.checks = checks.model_checks(measurement.classifier, images, labels, protocol)
    if attacked:
        keys = ("distance", "excess", "finite")
        distances, excess, finite = (list(chain.from_iterable(p.get(key, []) for p in attacked)) for key in keys)
        found.checks += checks.budget_checks(distances, excess, finite, protocol)
    if protocol.attacks_with_pgd:
        right = [p for p in sample if survives["standard"][p]]
        survivors = [p for p in sample if survives["pgd"][p]]
        classes = measurement.classes
        curves = checks.draw_curves(measurement, sample, survivors)
        found.figures["curves"] = vars(curves)
        found.checks += checks.gradient_checks(measurement, right)
        found.checks += checks.curve_checks(
            curves, measurement.labels[sample].cpu(), len(right) / len(sample), protocol, classes
        )
        found.checks.append(checks.noise_check(measurement, survivors, len(sample)))
    if protocol.autoattack:
        after = {name: column["value"] for name, column in found.figures.get("autoattack_columns", {}).items()}
        robust = sum(survives["pgd"]) / len(data) if "pgd" in survives else None
        unable = found.figures.get("autoattack_left_out", {})
        found.checks += checks.autoattack_checks(after, robust, measurement.classes, protocol.autoattack, unable)


def _corruptions(measurement: Measurement, corrupted: inputs.Corrupted) -> dict[str, Any]:
    """Accuracy by corruption and severity, and the mean over the corruptions that the field averages."""
    table: dict[str, list[float]] = {name: [] for name in corrupted.names}
    for name, severity in product(corrupted.names, SEVERITIES):
        stage = f"{name} {severity}"
        known = measurement.knows(stage)
        images = measurement.data if known else replace(measurement.data, images=corrupted.load(name, severity))
        correct = measurement.on(images).clean(stage)["correct"]
        table[name].append(sum(correct) / len(correct))
    averaged = [accuracy for name in corrupted.averaged for accuracy in table[name]]
    return {"mean": sum(averaged) / len(averaged), "by_severity": table}
