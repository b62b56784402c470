"""From an encoder and a data set to a classifier in a folder: `advcl_hub.finetune`."""

import json
import logging
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from advcl_hub.data import ImageData, few_shot, matching, train_val_split
from advcl_hub.errors import need
from advcl_hub.files import check_writable, slug, without_local_paths
from advcl_hub.finetuning.encoder import Encoder, open_encoder, set_head
from advcl_hub.finetuning.presets import Settings, choose_settings, fit_to_images, without_effect
from advcl_hub.hub.export import check_exportable, check_replaceable
from advcl_hub.modes import as_usual
from advcl_hub.records import RESULTS, counted
from advcl_hub.records.environment import hardware, versions
from advcl_hub.training.state import FILE, differences
from advcl_hub.training.stop import StopRequest

if TYPE_CHECKING:
    from torch import nn

log = logging.getLogger("advcl")
_FEW_STEPS = 300  # so few leave a model near its start, at a preset's learning rate


@dataclass(frozen=True)
class Finetuned:
    """A finetuning run.

    Attributes:
        output: the run's folder: log, curves, TensorBoard.
        folder: the classifier, for `timm.create_model("local-dir:FOLDER", pretrained=True)` and `evaluate`.
        record: its results.json; empty while the run is not finished.
        finished: whether all epochs are done.
    """

    output: Path
    folder: Path
    record: dict[str, Any]
    finished: bool

    def load(self) -> "nn.Module":
        """The classifier, in evaluation mode."""
        from advcl_hub.hub.export import load_folder

        return load_folder(self.folder)


@as_usual()
def finetune(
    model: str | Path,
    data: str | ImageData,
    protocol: str = "slf",
    *,
    preset: str = "advcl",
    root: str | Path | None = None,
    split: str = "train",
    size: int | None = None,
    shots: int | None = None,
    keep_head: bool = False,
    class_order: str | None = None,
    output: str | Path | None = None,
    cpu: bool = False,
    time_budget: float | None = None,
    checkpoint_minutes: float = 5.0,
    command: str | None = None,
    **overrides: Any,
) -> Finetuned:
    """Finetunes an encoder on labelled images under a protocol of the field.

        advcl_hub.finetune("resnet18_cifar.advcl_c10", "folder:pets", "slf", epochs=10, output="runs/pets")

    Stop it whenever you like: the same call continues it exactly, and returns at once when it is finished. The test split is
    never touched; the result is the last epoch, or with `val_fraction` the best one on held-out images.

    Under torchrun or accelerate launch, call it in every process.

    Args:
        model: a registered name, `hf-hub:ORG/NAME`, `local-dir:FOLDER` or a folder; `random:` before it draws new weights.
        data: labelled images, or a source that `load_data` knows. Images of another size than the encoder's are fitted as
            `evaluate` fits them: larger sets are scaled down, smaller ones enlarged inside the attacked function.
        protocol: `slf`, `alf`, `aff` or `sff`, see `PROTOCOLS`.
        preset: whose values to take: `advcl`, `dynacl`, `acl` or `deacl`, see `PRESETS`. Of a small data set a preset's
            batch is at most one eighth. Where all weights are trained, its learning rate is at most 0.1 for a batch of 128
            images, and in proportion for a smaller one.
        root, split: for `load_data`, where data is a name.
        size: side of the images, in pixels, instead of the encoder's own.
        shots: so many images of every class, drawn with the seed; None takes all.
        keep_head: start from the classifier that the model has, not from a new one.
        class_order: with `keep_head`, how that classifier numbers folders if it does not name its classes, as in `evaluate`.
        output: folder of the run; by default runs/finetuned/MODEL/DATA-PROTOCOL...
        cpu: compute on the CPU even where there is a GPU.
        time_budget: stop with a checkpoint after so many seconds.
        checkpoint_minutes: time between checkpoints.
        command: what was typed, for the record.
        overrides: values of `Settings` that replace the preset's, by name.

    Returns:
        The run, with the classifier's folder.

    Raises:
        ValueError: an unknown name or a value out of range, a model without a head to replace, images that do not fit it,
            one class only, labels out of range, a folder that holds another run.
        OSError: a file that cannot be read or written, or no way to the Hub.
        ImportError: accelerate is not installed, or this version of timm is not known here.
        FloatingPointError: the loss is not finite any more; the last checkpoint is.
    """
    need("accelerate", "Finetuning", "finetune")
    if not isinstance(model, str | Path):
        raise ValueError(
            f"model is a {type(model).__name__}, expected a name or a folder: timm.models.save_for_hf(model, FOLDER, "
            "safe_serialization=True) writes one."
        )
    from advcl_hub.finetuning.trainer import CLASSIFIER, Finetuner, plain
    from advcl_hub.training.loop import open_accelerator

    stop, seed = StopRequest(time_budget), overrides.get("seed", 0)
    data_name = data.name if isinstance(data, ImageData) else data
    settings = choose_settings(protocol, preset, data=data_name, size=size, overrides=overrides)
    if idle := without_effect(protocol, overrides):
        warnings.warn(f"Without effect in {protocol}, and left out: {', '.join(idle)}.", stacklevel=3)
        overrides = {name: value for name, value in overrides.items() if name not in idle}
    folder = (
        Path(output)
        if output
        else default_output(model, data_name, protocol, preset, split, size, shots, keep_head, class_order, overrides)
    )
    check_writable(folder)
    check_replaceable(folder / CLASSIFIER)
    check_exportable()
    accelerator = open_accelerator(cpu=cpu)
    with accelerator.main_process_first():  # one process downloads, the others find the files
        encoder = open_encoder(model, size=size, seed=seed)
        if isinstance(data, str):
            whole = matching.load_images(data, split, root, encoder.model)
        else:
            whole = matching.fit_images(encoder.model, data)
    named = not matching.class_names(encoder.model) or matching.names_all_classes(encoder.model, whole)
    if keep_head and named and len(whole.classes) == getattr(encoder.model, "num_classes", 0):  # else `set_head` refuses
        whole = matching.in_model_order(encoder.model, whole, class_order)
    if class_order and not keep_head:
        raise ValueError("class_order says how a classifier numbers classes: give it with keep_head, or leave it out.")
    check_labels(whole)
    chosen = whole if shots is None else few_shot(whole, shots, seed)
    train, held_out = train_val_split(chosen, settings.val_fraction, seed) if settings.val_fraction else (chosen, None)
    settings = choose_settings(protocol, preset, data=whole.name, size=max(whole.shape[1:]), overrides=overrides)
    settings = fit_to_images(settings, len(train), accelerator.num_processes, overrides)
    set_head(encoder.model, whole, settings, keep=keep_head)
    matching.check_fits(encoder.model, whole)
    facts = {
        "protocol": protocol,
        "preset": preset,
        "settings": settings.to_dict(),
        "kept_head": keep_head,
        "encoder": encoder.facts,
        "data": {
            "name": whole.name,
            "split": split if isinstance(data, str) else None,
            "images": len(train),
            "of": whole.source_length or len(whole),
            "shots": shots,
            "held_out": len(held_out) if held_out else 0,
            "shape": whole.shape,
            "classes": whole.classes,
            "sha256": chosen.fingerprint(),
        },
    }
    result = folder / CLASSIFIER
    if (standing := finished(folder, result, plain(facts))) is not None:
        if accelerator.is_main_process:
            log.info("%s is finished already.", folder)
        return Finetuned(folder, result, standing, True)
    steps = settings.epochs * (len(train) // settings.batch_size)
    if accelerator.is_main_process:
        log.info("%s", describe(encoder, train, held_out, settings, accelerator))
        if 0 < steps < _FEW_STEPS:
            warnings.warn(
                f"{len(train)} images in batches of {settings.batch_size} are {counted(steps, 'step')} in "
                f"{counted(settings.epochs, 'epoch')}, few for a learning rate of {settings.lr:g}: consider more epochs"
                + (", smaller batches, or a higher rate." if settings.frozen else "."),  # all weights might diverge
                stacklevel=3,
            )
    trainer = Finetuner(
        encoder.model,
        train,
        held_out,
        settings,
        folder,
        accelerator,
        facts=facts,
        place={"versions": versions(), "hardware": hardware(accelerator.device, accelerator.num_processes)},
        command=command,
        arguments=encoder.arguments,
        new_head=not keep_head,
        checkpoint_minutes=checkpoint_minutes,
    )
    with stop:  # from here on an interruption has something to save
        done = trainer.run(stop)
    if done and accelerator.is_main_process:
        (folder / FILE).unlink(missing_ok=True)
    accelerator.wait_for_everyone()
    record = json.loads((result / RESULTS).read_text(encoding="utf-8")) if done else {}
    return Finetuned(folder, result, record, done)


def check_labels(data: ImageData) -> None:
    """Raises ValueError unless there are two classes at least, and every label is one of them."""
    if len(data.classes) < 2:
        raise ValueError(f"{data.name} has one class only ({', '.join(data.classes)}): there is nothing to tell apart.")
    low, high = int(data.labels.min()), int(data.labels.max())
    if low < 0 or high >= len(data.classes):
        raise ValueError(f"{data.name} has labels from {low} to {high}, its {len(data.classes)} classes go from 0.")


def finished(output: Path, folder: Path, facts: dict[str, Any]) -> dict[str, Any] | None:
    """The record of the run that already stands in a folder, None if it is not finished.

    Raises:
        ValueError: what stands there was made from something else, and would be lost.
    """
    if (output / FILE).is_file() or not (folder / RESULTS).is_file():
        return None
    record = json.loads((folder / RESULTS).read_text(encoding="utf-8"))
    recorded = {key: record.get(key) for key in facts}
    if found := differences(without_local_paths(recorded), without_local_paths(facts)):  # exports name no local paths
        raise ValueError(
            f"{output} holds a run of something else: choose another output, remove that folder, or give its settings:\n  "
            + "\n  ".join(found.values())
        )
    return record


def describe(encoder: Encoder, train: ImageData, held_out: ImageData | None, settings: Settings, accelerator: Any) -> str:
    """What is about to happen, in two lines."""
    size = sum(p.numel() for p in encoder.model.parameters())
    held = f" ({len(held_out):,} held out to choose the epoch)" if held_out else ""
    return (
        f"{encoder.facts['name']}: {encoder.facts['architecture']}, {size:,} parameters; {len(train):,} images of "
        f"{train.name}, {len(train.classes)} classes{held}\n"
        f"{settings.describe()}; preset {settings.preset}; {accelerator.device.type}, processes: {accelerator.num_processes}"
    )


def default_output(
    model: str | Path,
    data: str,
    protocol: str,
    preset: str,
    split: str,
    size: int | None,
    shots: int | None,
    keep_head: bool,
    class_order: str | None,
    overrides: dict[str, Any],
) -> Path:
    """runs/finetuned/MODEL/DATA-PROTOCOL..., with everything that was said but the root of the data."""
    said = [slug(data), *([split] if split != "train" else []), protocol, *([preset] if preset != "advcl" else [])]
    said += [f"size{size}"] if size else []
    said += [f"{shots}shot"] if shots else []
    said += ["keep-head"] if keep_head else []
    said += [f"order-{class_order}"] if class_order else []
    said += [f"{key}{_short(value)}" for key, value in overrides.items()]
    return Path("runs", "finetuned", slug(str(model)), slug("-".join(said)))


def _short(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "-".join(map(_short, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)
