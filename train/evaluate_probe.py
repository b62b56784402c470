"""A linear head on a run's encoder, fitted on all training images and measured once on test images, clean and under PGD-20:

python -m train.evaluate_probe runs/advcl runs/simclr --images 2000
"""

import argparse
import json
import logging
import sys
from pathlib import Path

import torch

from advcl_hub.data import load_data
from advcl_hub.evaluation import Robustness, evaluate
from train.checkpoint import load_checkpoint
from train.inputs import load_training_data
from train.network import plain_encoder
from train.probe import linear_probe
from train.recipe import require


def evaluate_run(run: Path, images: int, steps: int = 20) -> Robustness:
    """Standard and robust accuracy on `images` test images, drawn with seed 0, of the run's own data, at the recipe's eps.

    Raises:
        FileNotFoundError: the run has no checkpoint, or the data are not where the recipe says.
        ValueError: the data set has fewer test images.
    """
    checkpoint = load_checkpoint(run)
    c, shape = checkpoint.recipe.data, checkpoint.provenance["data"]["shape"]
    test = load_data(c.source, "test", root=c.root, size=c.size, channels=shape[0])
    require(images <= len(test), f"{c.source} has {len(test)} test images, {images} were asked for.")
    train, _ = load_training_data(checkpoint.recipe)
    encoder = plain_encoder(checkpoint.recipe, tuple(shape), checkpoint.encoder_state())
    device = "cuda" if torch.cuda.is_available() else "cpu"
    probe = linear_probe(encoder, train, device)
    eps = checkpoint.recipe.attack.eps
    return evaluate(probe, test.sample(images), eps=eps, step_size=eps / 4, steps=steps, device=device)


def main() -> None:
    """Command line: one JSON line a run."""
    parser = argparse.ArgumentParser(prog="python -m train.evaluate_probe", description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--images", type=int, default=2000, help="so many test images, drawn with seed 0")
    args = parser.parse_args()
    logging.getLogger("timm").setLevel(logging.WARNING)
    try:
        for run in args.runs:
            checkpoint = load_checkpoint(run)
            result = evaluate_run(run, args.images)
            facts = {
                "run": run.name,
                "step": checkpoint.step,
                "seconds": round(checkpoint.seconds),
                "finished": checkpoint.finished,
            }
            print(json.dumps(facts | vars(result)), flush=True)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
