"""Exports a run's encoder, or a classifier on its frozen features, to a folder that timm opens:

python -m train.export runs/resnet18 --dtype float16 --output exports/resnet18
python -m train.export runs/resnet18 --linear-head --output exports/resnet18_linear
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from advcl_hub.cli.common import script
from advcl_hub.hub.export import export_folder, verify_folder
from advcl_hub.hub.projector import projector_from_state
from train.checkpoint import Checkpoint, load_checkpoint
from train.inputs import load_training_data
from train.network import plain_encoder
from train.probe import linear_probe


def encoder_of(checkpoint: Checkpoint, branch: str | None = None, ema: bool | None = None) -> nn.Module:
    """One branch of a checkpoint's encoder as the stock timm model; arguments and errors as of `Checkpoint.encoder_state`."""
    shape = tuple(checkpoint.provenance["data"]["shape"])
    return plain_encoder(checkpoint.recipe, shape, checkpoint.encoder_state(branch, ema), checkpoint.provenance)


def export_checkpoint(
    checkpoint: Checkpoint,
    folder: Path,
    *,
    branch: str | None = None,
    ema: bool | None = None,
    dtype: str = "float32",
    classifier: nn.Module | None = None,
    classes: Sequence[str] = (),
    figures: dict[str, Any] | None = None,
    projector: bool = False,
) -> Path:
    """Writes one branch of a checkpoint's encoder, or a classifier made from it, as a timm folder.

    Args:
        checkpoint: a training state.
        folder: where to.
        branch, ema: see `Checkpoint.encoder_state`.
        dtype: see `advcl_hub.hub.export.export_folder`.
        classifier: a linear probe of `encoder_of` (see `train.probe`), to write in its place.
        classes: its class names.
        figures: measured results to record.
        projector: write the run's projection head, too, averaged or not as the encoder.

    Raises:
        ValueError: no such branch, no averaged weights, no projection head (or one wanted with a classifier), a classifier of
            another encoder, or the folder is something else.
        OSError: the folder cannot be written.
    """
    recipe = checkpoint.recipe
    encoder = encoder_of(checkpoint, branch, ema)
    if classifier is not None:
        state = classifier.state_dict()
        if not all(key in state and torch.equal(state[key].cpu(), value) for key, value in encoder.state_dict().items()):
            raise ValueError("The classifier was not made from this encoder of the run: fit it to `encoder_of`.")
    head = projector_from_state(checkpoint.projector_state(ema)) if projector else None
    results = {
        "kind": "encoder" if classifier is None else "classifier",
        "protocol": None if classifier is None else "linear head (L-BFGS) on frozen features without augmentation",
        "recipe": recipe.to_dict(),
        "step": checkpoint.step,
        "finished": checkpoint.finished,
        "seconds": round(checkpoint.seconds, 1),
        "branch": branch or recipe.objective.export_branch,
        "ema": bool(recipe.ema_decay) if ema is None else ema,
        "provenance": checkpoint.provenance,
        "figures": figures or {},
    }
    return export_folder(
        encoder if classifier is None else classifier,
        folder,
        results=results,
        model_args=recipe.model_kwargs,
        label_names=classes,
        dtype=dtype,
        projector=head,
    )


def usage_lines(folder: Path) -> str:
    """What to type to use an exported encoder."""
    return (
        f"Load it:      import advcl_hub, timm\n"
        f'              encoder = timm.create_model("local-dir:{folder}", pretrained=True)\n'
        f'Finetune it:  model = timm.create_model("local-dir:{folder}", pretrained=True, num_classes=10)\n'
        f"              advcl-hub finetune {folder} --data folder:pets --protocol slf\n"
        f"Check a copy: advcl-hub verify {folder}\n"
        f"Share it:     advcl-hub push {folder} ORG/NAME --dry-run"
    )


def classifier_lines(folder: Path, checkpoint: Checkpoint) -> str:
    """What to type to use an exported classifier."""
    data = checkpoint.recipe.data
    root = f" --root {data.root}" if data.root else ""
    return (
        f"Load it:      import advcl_hub, timm\n"
        f'              model = timm.create_model("local-dir:{folder}", pretrained=True)\n'
        f"Evaluate it:  advcl-hub evaluate {folder} --data {data.source}{root}"
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m train.export", description=__doc__.split("\n")[0].rstrip(":") + ".")
    parser.add_argument("run", type=Path, help="folder of a pretraining run")
    parser.add_argument("--output", type=Path, help="folder to write (default: RUN/export, RUN/classifier)")
    parser.add_argument("--branch", help="batch-norm branch (default: the one the recipe's objective exports)")
    parser.add_argument("--ema", action=argparse.BooleanOptionalAction, help="averaged weights (default: if there are any)")
    parser.add_argument("--linear-head", action="store_true", help="a classifier: a linear head fitted to the frozen features")
    parser.add_argument("--keep-projector", action="store_true", help="write the projection head, too: projector.safetensors")
    parser.add_argument("--dtype", choices=("float32", "float16"), default="float32")
    args = parser.parse_args()
    if args.linear_head and args.keep_projector:
        parser.error("--keep-projector goes with the encoder, not with --linear-head: export both, to two folders")
    output = args.output or args.run / ("classifier" if args.linear_head else "export")
    with script():
        checkpoint = load_checkpoint(args.run)
        chosen = {"branch": args.branch, "ema": args.ema}
        classifier, classes = None, tuple[str, ...]()
        if args.linear_head:
            encoder, (data, _) = encoder_of(checkpoint, **chosen), load_training_data(checkpoint.recipe)
            classifier = linear_probe(encoder, data, "cuda" if torch.cuda.is_available() else "cpu").cpu()
            classes = data.classes
        export_checkpoint(
            checkpoint,
            output,
            **chosen,
            dtype=args.dtype,
            classifier=classifier,
            classes=classes,
            projector=args.keep_projector,
        )
        if not checkpoint.finished:
            print(f"Note: the run is not finished (step {checkpoint.step}).")
        verify_folder(output)
        print(classifier_lines(output, checkpoint) if args.linear_head else usage_lines(output))


if __name__ == "__main__":
    main()
