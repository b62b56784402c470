"""LP-AFF, the "++" of DynACL++: an encoder is finetuned adversarially on clusters of its features, in place of labels.

Source: Luo et al., arXiv 2303.01289, with the values of its code (github.com/PKU-ML/DYNACL: assign_label.py at commit 7bf56a6,
LPAFT.py at 418c4a9, LPAFT_AFF.py at 1f0ad5c). Three stages:

1. k-means, K = 10, on features of the images as they are, in evaluation mode, from the clean batch-norm branch.
2. LP: the head alone, from zero, with cross-entropy on clean images; the encoder is frozen in evaluation mode.
3. AFF: all weights, from the adversarial branch and the head of stage 2, with TRADES.

The head is then thrown away: what comes out is an encoder, to be finetuned and evaluated as any other.
"""

import json
import logging
import time
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from advcl_hub.data import ImageData, matching, train_val_split
from advcl_hub.errors import need
from advcl_hub.files import check_writable, replacing, slug, without_local_paths
from advcl_hub.finetuning.encoder import RANDOM, Encoder, open_encoder, set_head
from advcl_hub.finetuning.presets import ONE, Settings, choose_settings, fit_to_images, without_effect
from advcl_hub.finetuning.runner import Finetuned, default_output, finetune, finished
from advcl_hub.hub.export import check_exportable, check_replaceable, export_folder, verify_folder
from advcl_hub.modes import as_usual
from advcl_hub.records import RESULTS
from advcl_hub.training.state import differences

if TYPE_CHECKING:
    from advcl_hub.pretraining.pseudo_labels import PseudoLabels

log = logging.getLogger("advcl")

LABELS, HEAD, FULL, EXPORT = "labels", "head", "full", "export"  # folders within the run's
REQUEST = "lp_aff.json"  # what the run in the folder is made from
PRESET = "dynacl"  # whose values count where the two tables below say nothing
HEAD_VALUES: dict[str, Any] = {"batch_size": 512, "lr": 0.01, "milestones": (), "weight_decay": 1e-4}
FULL_VALUES: dict[str, Any] = {"epochs": 25, "batch_size": 512, "lr": 0.1, "milestones": (10, 20), "weight_decay": 1e-4}
FULL_VALUES["branches"] = ONE  # clean images, too, go through the adversarial branch
SHARED = ("batch_size", "augment", "accumulate", "precision", "seed", "zero_head")  # overrides that the head's stage takes, too
_WORKERS = 2  # decode sets that are too large for memory


@as_usual()
def lp_aff(
    model: str | Path,
    data: str | ImageData,
    *,
    root: str | Path | None = None,
    split: str = "train",
    size: int | None = None,
    clean: str | Path | None = None,
    clusters: int = 10,
    head_epochs: int = 10,
    output: str | Path | None = None,
    cpu: bool = False,
    time_budget: float | None = None,
    checkpoint_minutes: float = 5.0,
    command: str | None = None,
    **overrides: Any,
) -> Finetuned:
    """Finetunes an encoder adversarially on clusters of its features, and writes the encoder that comes out.

        better = advcl_hub.lp_aff("runs/resnet18/export", "cifar10", root="DATA", output="runs/pp")
        tuned = advcl_hub.finetune(better.folder, "cifar10", "slf", root="DATA")

    Labels of the data are never read; there need not be any. Stop it whenever you like: the same call continues it exactly, and
    returns at once when it is finished. Under torchrun or accelerate launch, call it in every process.

    The folder has `labels` (the clusters, a label file), `head` and `full` (runs of `finetune`: slf, then aff with the head
    kept) and `export` (the encoder).

    Different from the authors' code:

    - Its k-means (kmeans_pytorch) takes the features as they are, and one random start; ours scales them to unit length, and
      keeps the best of three k-means++ starts, as `make_pseudo_labels` does everywhere.
    - Its TRADES starts from the image itself, where the gradient is zero with one batch-norm branch; ours from 0.001 times
      normal noise. Other differences are those of `finetune`.
    - On CIFAR-100 its head has 100 outputs for the 10 clusters.

    Args:
        model: what `finetune` takes. Of a network with several batch-norm branches, the export of the adversarial one.
        data: images, or a source that `load_data` knows.
        root, split, size: as in `finetune`.
        clean: the encoder whose features are clustered, for the authors' way the export of the clean branch; None: `model`.
        clusters: their number K, at least 2.
        head_epochs: epochs of the head's stage, whose learning rate is constant.
        output: folder of the run; by default runs/finetuned/MODEL/DATA-lp-aff...
        cpu, time_budget, checkpoint_minutes, command: as in `finetune`. Clustering cannot be stopped; killed, it starts again.
        overrides: values of `Settings` for the stage of all weights. Those in `SHARED` count for the head's stage, too, and
            the seed for k-means. As in `finetune`, milestones scale with `epochs`, the step of the attack with `eps`, and
            the batch and the second stage's learning rate fit the number of images.

    Returns:
        The run, whose `folder` is the encoder's.

    Raises:
        ValueError: an unknown name or a value out of range, fewer images than clusters or than a batch, a model without a
            linear head, images that do not fit it, new weights (`random:`) to cluster, a folder that holds another run.
        OSError: a file that cannot be read or written, or no way to the Hub.
        ImportError: accelerate or scikit-learn is not installed.
        FloatingPointError: see `finetune`.
    """
    need("accelerate", "Finetuning", "finetune")
    need("sklearn", "Clustering for pseudo-labels", "pretrain")
    for name, given in {"model": model, "clean": clean or ""}.items():
        if not isinstance(given, str | Path):
            raise ValueError(f"{name} is a {type(given).__name__}, expected a name or a folder.")
    if clusters < 2:
        raise ValueError(f"clusters is {clusters}, expected at least 2")
    if str(clean or model).startswith(RANDOM):
        raise ValueError(f"{clean or model} has new weights, whose features say nothing: name a trained encoder in clean.")
    from advcl_hub.finetuning.trainer import CLASSIFIER
    from advcl_hub.pretraining.pseudo_labels import make_pseudo_labels  # what finetunes on labels does not need
    from advcl_hub.training.loop import open_accelerator

    deadline = None if time_budget is None else time.monotonic() + time_budget
    if idle := without_effect("aff", overrides):
        warnings.warn(f"Without effect in aff, and left out: {', '.join(idle)}.", stacklevel=3)
        overrides = {name: value for name, value in overrides.items() if name not in idle}
    stage_values(head_epochs, overrides)  # refuses unknown names and values before anything is opened
    folder = Path(output) if output else _default_output(model, data, split, size, clean, clusters, head_epochs, overrides)
    check_writable(folder)
    for result in (folder / HEAD / CLASSIFIER, folder / FULL / CLASSIFIER, folder / EXPORT):
        check_replaceable(result)
    check_exportable()

    accelerator = open_accelerator(cpu=cpu)
    seed = overrides.get("seed", 0)
    with accelerator.main_process_first():  # one process downloads, the others find the files
        encoder = open_encoder(model, size=size, seed=seed)
        clustered = open_encoder(clean) if clean else encoder
        images = unlabelled(data, split, root, encoder)
    trained = round(len(images) * (1 - overrides.get("val_fraction", 0.0)))
    values = stage_values(head_epochs, overrides, images=trained, processes=accelerator.num_processes)
    head = choose_settings("slf", PRESET, overrides=values["slf"])
    full = choose_settings("aff", PRESET, overrides=values["aff"])
    if trained < full.batch_size:
        raise ValueError(f"A batch of {full.batch_size} needs as many training images; there are {trained}. Lower batch_size.")
    facts = {
        "encoder": encoder.facts,
        "clustered": clustered.facts if clean else None,  # None: the encoder itself
        "clusters": clusters,
        "images": {
            "name": images.name,
            "split": split if isinstance(data, str) else None,
            "shape": list(images.shape),
            "sha256": images.fingerprint(),
        },
        "head_settings": head.to_dict(),
        "settings": full.to_dict(),
    }
    _check_trainable(encoder, images, clusters, head)
    if (record := finished(folder / EXPORT, folder / EXPORT, facts)) is not None:
        if accelerator.is_main_process:
            log.info("%s is finished already.", folder)
        return Finetuned(folder, folder / EXPORT, record, True)
    _check_same(folder, facts)

    with accelerator.main_process_first():  # one process clusters, the others find its file
        labels = make_pseudo_labels(
            images,
            clustered.source,
            (clusters,),
            seed,
            cache_dir=folder / LABELS,
            device=accelerator.device,
            workers=_WORKERS,
        )
    pseudo = labelled(images, labels)
    if full.val_fraction:
        train_val_split(pseudo, full.val_fraction, seed)  # its errors, before the head is trained
    if accelerator.is_main_process:
        with replacing(folder / REQUEST) as draft:
            draft.write_text(json.dumps(without_local_paths(facts), indent=2) + "\n", encoding="utf-8")

    runs: dict[str, Finetuned] = {}
    for name, protocol in ((HEAD, "slf"), (FULL, "aff")):
        runs[name] = finetune(
            runs[HEAD].folder if runs else model,
            pseudo,
            protocol,
            preset=PRESET,
            size=None if runs else size,  # of the head's stage on, it is the network's own
            keep_head=bool(runs),
            output=folder / name,
            cpu=cpu,
            time_budget=None if deadline is None else max(0.0, deadline - time.monotonic()),
            checkpoint_minutes=checkpoint_minutes,
            command=command,
            **values[protocol],
        )
        if not runs[name].finished:
            return Finetuned(folder, folder / EXPORT, {}, False)
    if accelerator.is_main_process:
        _export(runs[HEAD], runs[FULL], folder / EXPORT, encoder.arguments, facts, labels, command)
    accelerator.wait_for_everyone()
    record = json.loads((folder / EXPORT / RESULTS).read_text(encoding="utf-8"))
    return Finetuned(folder, folder / EXPORT, record, True)


def stage_values(
    head_epochs: int, overrides: Mapping[str, Any], *, images: int | None = None, processes: int = 1
) -> dict[str, dict[str, Any]]:
    """What replaces the preset's values in each stage, by its protocol: `slf` for the head, `aff` for all weights.

    Args:
        head_epochs: of the head's stage.
        overrides: values of `Settings`; see `lp_aff`.
        images: how many are trained on, to which batch and learning rate are fitted if they are not given; None leaves the
            authors'.
        processes: that share a batch.

    Raises:
        ValueError: an unknown name, or a value out of range.
    """
    full = {**FULL_VALUES, **overrides}
    if "epochs" in overrides and "milestones" not in overrides:
        full["milestones"] = tuple(m * full["epochs"] / FULL_VALUES["epochs"] for m in FULL_VALUES["milestones"])
    head = {**HEAD_VALUES, "epochs": head_epochs, **{name: overrides[name] for name in SHARED if name in overrides}}
    settings = choose_settings("aff", PRESET, overrides=full)
    choose_settings("slf", PRESET, overrides=head)
    if images is not None:
        fitted = fit_to_images(settings, images, processes, overrides)
        head["batch_size"] = full["batch_size"] = fitted.batch_size
        full["lr"] = fitted.lr
    return {"slf": head, "aff": full}


def unlabelled(data: str | ImageData, split: str, root: str | Path | None, encoder: Encoder) -> ImageData:
    """The images as `finetune` takes them for this encoder, with label -1: what follows cannot depend on the true ones."""
    whole = (
        matching.load_images(data, split, root, encoder.model)
        if isinstance(data, str)
        else matching.fit_images(encoder.model, data)
    )
    return replace(whole, labels=torch.full_like(whole.labels, -1), classes=())


def labelled(images: ImageData, labels: "PseudoLabels") -> ImageData:
    """The images with their clusters as labels, and `cluster 0`, `cluster 1` ... as names of classes."""
    (count,) = labels.ks
    return replace(images, labels=labels.labels[:, 0].to(images.labels.device), classes=_names(count))


def _names(clusters: int) -> tuple[str, ...]:
    return tuple(f"cluster {number}" for number in range(clusters))


def _check_trainable(encoder: Encoder, images: ImageData, clusters: int, head: Settings) -> None:
    """Raises ValueError, as `finetune` would after the clustering, for a head that is not linear or images that do not fit."""
    blank = replace(images, labels=torch.zeros_like(images.labels), classes=_names(clusters))
    set_head(encoder.model, blank, head)
    matching.check_fits(encoder.model, blank)


def _check_same(folder: Path, facts: Mapping[str, Any]) -> None:
    """Raises ValueError if another run has begun to train in the folder; clusters alone are no run yet."""
    from advcl_hub.finetuning.trainer import plain

    if not ((folder / REQUEST).is_file() and (folder / HEAD).exists()):
        return
    recorded = json.loads((folder / REQUEST).read_text(encoding="utf-8"))
    if found := differences(recorded, plain(without_local_paths(facts))):
        raise ValueError(
            f"{folder} holds an unfinished run of something else; choose another output, or undo:\n  "
            + "\n  ".join(found.values())
        )


def _export(
    head: Finetuned,
    full: Finetuned,
    folder: Path,
    arguments: Mapping[str, Any],
    facts: Mapping[str, Any],
    labels: "PseudoLabels",
    command: str | None,
) -> None:
    """Writes the encoder of the finished run, without its head, and verifies what was written.

    The record has the keys of a finetuned classifier's, with the values of the stage of all weights, so that cards read it; but
    `encoder` is what LP-AFF started from, and `seconds` are those of both stages.
    """
    from advcl_hub.finetuning.trainer import plain

    encoder, first, last = full.load(), head.record, full.record
    encoder.reset_classifier(0)  # type: ignore[operator]
    source = f"the features of {labels.provenance['encoder']}"
    results = {
        "kind": "encoder",
        "method": "LP-AFF (arXiv 2303.01289)",
        **facts,
        "pseudo_labels": {**labels.provenance, "sha256": labels.fingerprint()},
        "protocol": last["protocol"],
        "preset": last["preset"],
        "data": last["data"] | {"split": facts["images"]["split"]},
        "head": {key: first[key] for key in ("epoch", "step", "seconds", "places", "sha256")},
        **{key: last[key] for key in ("epoch", "chosen", "branch", "step", "places", "figures")},
        "seconds": round(first["seconds"] + last["seconds"], 1),
        "command": command,
        "notes": [
            f"LP-AFF was the last stage of the training: adversarial finetuning on {facts['clusters']} clusters of {source} in "
            "place of labels; the finetuning above is that stage."
        ],
    }
    verify_folder(export_folder(encoder, folder, results=plain(results), model_args=arguments))


def _default_output(
    model: str | Path,
    data: str | ImageData,
    split: str,
    size: int | None,
    clean: str | Path | None,
    clusters: int,
    head_epochs: int,
    overrides: Mapping[str, Any],
) -> Path:
    """runs/finetuned/MODEL/DATA-lp-aff..., with all that decides the result but the root of the data."""
    chosen: dict[str, Any] = {"clean": slug(str(clean))} if clean else {}
    chosen |= {"clusters": clusters} if clusters != 10 else {}
    chosen |= {"head_epochs": head_epochs} if head_epochs != 10 else {}
    name = data.name if isinstance(data, ImageData) else data
    return default_output(model, name, "lp-aff", "advcl", split, size, None, False, None, {**chosen, **overrides})
