"""Exports a run's encoder to a folder that timm opens:

python -m train.export runs/resnet18 --dtype float16 --output exports/resnet18
"""

import argparse
import re
import sys
from pathlib import Path
from typing import Any

from advcl_hub.export import WEIGHTS, export_folder, verify_folder
from train.checkpoint import Checkpoint, load_checkpoint
from train.network import plain_encoder


def export_checkpoint(
    checkpoint: Checkpoint,
    folder: Path,
    *,
    branch: str | None = None,
    ema: bool | None = None,
    dtype: str = "float32",
    max_shard_size: str | None = None,
    figures: dict[str, Any] | None = None,
) -> Path:
    """Writes one branch of a checkpoint's encoder as a timm folder.

    Args:
        checkpoint: a training state.
        folder: where to.
        branch, ema: see `Checkpoint.encoder_state`.
        dtype, max_shard_size: see `advcl_hub.export.export_folder`.
        figures: measured results to record.

    Raises:
        ValueError: no such branch, no averaged weights, or the folder is something else.
    """
    recipe = checkpoint.recipe
    state = checkpoint.encoder_state(branch, ema)
    shape = tuple(checkpoint.provenance["data"]["shape"])
    results = {
        "kind": "encoder",
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
        plain_encoder(recipe, shape, state),
        folder,
        results=results,
        model_args=recipe.model_kwargs,
        dtype=dtype,
        max_shard_size=max_shard_size,
    )


def usage_lines(folder: Path) -> str:
    """What to type to use an export."""
    return (
        f"Load it:      import advcl_hub, timm\n"
        f'              encoder = timm.create_model("local-dir:{folder}", pretrained=True)\n'
        f'Finetune it:  model = timm.create_model("local-dir:{folder}", pretrained=True, num_classes=10)\n'
        f"Check a copy: python -c \"from advcl_hub.export import verify_folder; print(verify_folder('{folder}'))\""
    )


def _size(text: str) -> str:
    if not re.fullmatch(r"\d+[KMG]B", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 16MB or 1GB")
    return text


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m train.export", description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, help="folder of a pretraining run")
    parser.add_argument("--output", type=Path, help="folder to write (default: RUN/export)")
    parser.add_argument("--branch", help="batch-norm branch (default: the one the recipe's objective exports)")
    parser.add_argument("--ema", action=argparse.BooleanOptionalAction, help="averaged weights (default: if there are any)")
    parser.add_argument("--dtype", choices=("float32", "float16"), default="float32")
    parser.add_argument("--max-shard-size", type=_size, help='e.g. 16MB; join with "advcl_hub.export.join_shards"')
    args = parser.parse_args()
    output = args.output or args.run / "export"
    try:
        checkpoint = load_checkpoint(args.run)
        export_checkpoint(
            checkpoint,
            output,
            branch=args.branch,
            ema=args.ema,
            dtype=args.dtype,
            max_shard_size=args.max_shard_size,
        )
        if not checkpoint.finished:
            print(f"Note: the run is not finished (step {checkpoint.step}).")
        if (output / WEIGHTS).is_file():
            verify_folder(output)
        else:
            print(
                f"Join the shards before use: python -c \"from advcl_hub.export import join_shards; join_shards('{output}')\""
            )
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(usage_lines(output))


if __name__ == "__main__":
    main()
