"""A grid of encoders, data sets, protocols and shots: each finetuned, each evaluated, all in one table."""

import logging
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from advcl_hub.data import ImageData, matching, train_val_split
from advcl_hub.data.sources import balanced_holdout, read_source
from advcl_hub.evaluation.protocol import Protocol
from advcl_hub.evaluation.results import Evaluation, folder_name
from advcl_hub.evaluation.runner import evaluate
from advcl_hub.files import check_writable, slug
from advcl_hub.finetuning import grid
from advcl_hub.finetuning.encoder import open_encoder
from advcl_hub.finetuning.presets import choose_settings, without_effect
from advcl_hub.finetuning.runner import finetune
from advcl_hub.hub.cards.provenance import finetunings, is_lp_aff
from advcl_hub.opening import load_model
from advcl_hub.records import counted
from advcl_hub.training.processes import Processes

log = logging.getLogger("advcl")


@dataclass(frozen=True)
class Transfer:
    """What a grid gave.

    Attributes:
        cells: those that are finished, in the order of the table.
        finished: whether that is all of them.
        output: folder with report.md, results.csv, comparison.png and a folder a cell.
    """

    cells: list[grid.Cell]
    finished: bool
    output: Path

    def table(self) -> str:
        """The results as a markdown table with what the figures mean; a bar in a name is a slash, and `<` is `&lt;`."""
        return grid.markdown(self.cells)


def transfer(
    models: Mapping[str, str | Path] | Sequence[str | Path],
    to: Sequence[str],
    protocols: Sequence[str] = ("slf",),
    *,
    shots: Sequence[int | None] = (None,),
    held_out: float = 0.0,
    preset: str = "advcl",
    root: str | Path | None = None,
    n: int | None = 1000,
    evaluation: Protocol | None = None,
    output: str | Path = "runs/transfer",
    cpu: bool = False,
    time_budget: float | None = None,
    command: str | None = None,
    **overrides: Any,
) -> Transfer:
    """Finetunes every encoder on every data set under every protocol, and evaluates each on test or held-out training images.

    To choose among encoders, evaluate them on `held_out` training images instead, and keep the test split for the one that is
    chosen. Stop it whenever you like: the same call goes on, and takes from the folder what is finished.

    Args:
        models: what `finetune` takes, by the name that the table shows, or without names.
        to: sources that `load_data` knows, with a training and, unless `held_out` is given, a test split.
        protocols, preset, root, cpu, overrides: as in `finetune`, for every cell.
        shots: training images of every class; None takes all.
        held_out: share of every class of the training images, in [0, 1), that is evaluated on instead of the test split, and
            not trained on; 0 takes the test split. Give at most the `data.val_fraction` of the pretraining, such as 0.02: then
            an encoder that was pretrained on the same data has not seen these images either.
        n: class-balanced images to evaluate on; None, or more than there are, takes all.
        evaluation: how to attack; by default PGD-20 at the eps of the training.
        output: folder of the grid. Its report shows every cell in the folder, those of earlier calls included.
        time_budget: stop after so many seconds, in training with a checkpoint.
        command: what was typed, for the records.

    Raises:
        ValueError, OSError, ImportError: as in `finetune` and `evaluate`; what can be known is said before any training.
    """
    deadline = None if time_budget is None else time.monotonic() + time_budget
    named = _named(models)
    folder = Path(output)
    check_writable(folder)
    attack = evaluation or Protocol(eps=overrides.get("eps"))
    _check(named, to, protocols, shots, held_out, preset, root, overrides)
    cells: list[grid.Cell] = []
    wanted = list(dict.fromkeys(product(named.items(), protocols, shots, to)))
    for number, ((name, model), protocol, shot, data) in enumerate(wanted, 1):
        left = None if deadline is None else deadline - time.monotonic()
        if left is not None and left <= 0:
            break
        if Processes.current().rank == 0:
            count = "" if shot is None else f", {counted(shot, 'shot')}"
            log.info("\n[%d of %d] %s, %s on %s%s", number, len(wanted), name, protocol.upper(), data, count)
        relevant = {key: value for key, value in overrides.items() if key not in without_effect(protocol, overrides)}
        label = data + (f"-held-out-{held_out:g}" if held_out else "")
        place = folder / slug(name) / slug(label) / (protocol + (f"-{shot}shot" if shot else ""))
        train, test = _split(model, data, root, held_out) if held_out else (data, data)
        tuned = finetune(
            model,
            train,
            protocol,
            preset=preset,
            root=root,
            shots=shot,
            output=place,
            cpu=cpu,
            time_budget=left,
            command=command,
            **relevant,
        )
        if not tuned.finished:
            break
        measured, result = _evaluate(tuned.folder, test, attack, root, n, place, cpu, command)
        cells.append(grid.Cell(name, protocol, shot, label, tuned.record, result.record, measured, held_out))
        if Processes.current().rank == 0:
            grid.save(folder, cells)
        Processes.current().wait()
    return Transfer(cells, len(cells) == len(wanted), folder)


def _named(models: Mapping[str, str | Path] | Sequence[str | Path]) -> dict[str, str]:
    if isinstance(models, Mapping):
        named = {name: str(model) for name, model in models.items()}
    else:
        named = {str(model): str(model) for model in models}
        if len(named) < len(models):
            raise ValueError("The same model was given twice.")
    if len({slug(name) for name in named}) < len(named):
        raise ValueError(f"These names cannot be told apart as folders: {', '.join(named)}. Give them names: NAME=MODEL.")
    if not named:
        raise ValueError("No model was given.")
    return named


def _check(
    named: Mapping[str, str],
    to: Sequence[str],
    protocols: Sequence[str],
    shots: Sequence[int | None],
    held_out: float,
    preset: str,
    root: str | Path | None,
    overrides: Mapping[str, Any],
) -> None:
    """Raises what any cell would raise about its settings, its model or its data, before the first one trains."""
    for protocol in protocols:
        choose_settings(protocol, preset, overrides=overrides)
    if not to or not protocols or not shots:
        raise ValueError("A grid needs a data set and a protocol at least, and a number of shots or None.")
    if not 0 <= held_out < 1:
        raise ValueError(f"held_out is {held_out}, expected a share of the training images in [0, 1); 0 takes the test split.")
    most = max((count or 0 for count in shots), default=0)
    for source in to:
        stored = read_source(source, "train", root, False)
        labels, rest = stored.labels, ""
        if held_out:
            labels, rest = labels[~balanced_holdout(labels, held_out, seed=0)], f" after {held_out:g} of them are held out"
        else:
            read_source(source, "test", root, False)
        fewest = min(int((labels == label).sum()) for label in range(len(stored.classes)))
        if fewest < most:
            raise ValueError(f"{most} images of every class were asked for, {source} has {fewest} of one class{rest}.")
    for name, model in named.items():
        stages = finetunings(open_encoder(model).facts["provenance"])
        if held_out and (seen := {str((stage.get("data") or {}).get("name")) for stage in stages if not is_lp_aff(stage)}):
            warnings.warn(
                f"{name} was finetuned with labels of {', '.join(sorted(seen))}: it may have seen the held-out images.",
                stacklevel=5,
            )


def _split(model: str, data: str, root: str | Path | None, share: float) -> tuple[ImageData, ImageData]:
    """The training images as the model takes them: those to train on, and the share of every class that is held out."""
    train, held_out = train_val_split(matching.load_images(data, "train", root, open_encoder(model).model), share)
    # Without the length of the whole split: "all of N" counts held-out images.
    return train, replace(held_out, name=f"{held_out.name} (held out {share:g} of train)", source_length=None)


def _evaluate(
    classifier: Path,
    data: str | ImageData,
    attack: Protocol,
    root: str | Path | None,
    n: int | None,
    place: Path,
    cpu: bool,
    command: str | None,
) -> tuple[Path, Evaluation]:
    """The evaluation and its folder, within the cell's: one for each way to measure, so that another way costs no training."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # evaluate will say the same of the data
        images = matching.load_images(data, "test", root, load_model(classifier).model) if isinstance(data, str) else data
    name, available = data if isinstance(data, str) else data.name, len(images)
    count = n if n is not None and n < available else None
    output = place / "evaluations" / folder_name(name, attack, {"n": count, "first": False})
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*holds this evaluation already")  # a grid goes on: that is no news
        device = "cpu" if cpu else None
        return output, evaluate(classifier, data, attack, root=root, n=count, output=output, device=device, command=command)
