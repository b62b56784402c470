"""Exports a run's encoder, or a classifier on its frozen features, to a folder that timm opens:

python -m train.export runs/resnet18 --dtype float16 --output exports/resnet18
python -m train.export runs/resnet18 --linear-head --output exports/resnet18_linear
"""

import argparse
from pathlib import Path
from typing import Any

import torch

from advcl_hub.cli.common import script
from advcl_hub.hub.export import export_folder, verify_folder
from train.checkpoint import Checkpoint, load_checkpoint
from train.inputs import load_training_data
from train.network import plain_encoder
from train.probe import linear_probe


def export_checkpoint(
    checkpoint: Checkpoint,
    folder: Path,
    *,
    branch: str | None = None,
    ema: bool | None = None,
    dtype: str = "float32",
    linear_head: bool = False,
    figures: dict[str, Any] | None = None,
) -> Path:
    """Writes one branch of a checkpoint's encoder as a timm folder.

    Args:
        checkpoint: a training state.
        folder: where to.
        branch, ema: see `Checkpoint.encoder_state`.
        dtype: see `advcl_hub.hub.export.export_folder`.
        linear_head: add a linear classifier, fitted to the frozen features of the run's training images (`train.probe`).
        figures: measured results to record.

    Raises:
        ValueError: no such branch, no averaged weights, or the folder is something else.
        OSError: a head was asked for, and the data are not where the recipe says.
    """
    recipe = checkpoint.recipe
    state = checkpoint.encoder_state(branch, ema)
    shape = tuple(checkpoint.provenance["data"]["shape"])
    model, classes = plain_encoder(recipe, shape, state), tuple[str, ...]()
    if linear_head:
        data, _ = load_training_data(recipe)
        model, classes = linear_probe(model, data, "cuda" if torch.cuda.is_available() else "cpu").cpu(), data.classes
    results = {
        "kind": "classifier" if linear_head else "encoder",
        "protocol": "linear head (L-BFGS) on frozen features without augmentation" if linear_head else None,
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
        model,
        folder,
        results=results,
        model_args=recipe.model_kwargs,
        label_names=classes,
        dtype=dtype,
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
    parser = argparse.ArgumentParser(prog="python -m train.export", description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, help="folder of a pretraining run")
    parser.add_argument("--output", type=Path, help="folder to write (default: RUN/export, RUN/classifier)")
    parser.add_argument("--branch", help="batch-norm branch (default: the one the recipe's objective exports)")
    parser.add_argument("--ema", action=argparse.BooleanOptionalAction, help="averaged weights (default: if there are any)")
    parser.add_argument("--linear-head", action="store_true", help="a classifier: a linear head fitted to the frozen features")
    parser.add_argument("--dtype", choices=("float32", "float16"), default="float32")
    args = parser.parse_args()
    output = args.output or args.run / ("classifier" if args.linear_head else "export")
    with script():
        checkpoint = load_checkpoint(args.run)
        export_checkpoint(
            checkpoint,
            output,
            branch=args.branch,
            ema=args.ema,
            dtype=args.dtype,
            linear_head=args.linear_head,
        )
        if not checkpoint.finished:
            print(f"Note: the run is not finished (step {checkpoint.step}).")
        verify_folder(output)
        print(classifier_lines(output, checkpoint) if args.linear_head else usage_lines(output))


if __name__ == "__main__":
    main()
