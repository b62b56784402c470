"""Makes a file of pseudo-labels, and shows its clusters:

    python -m train.pseudo_labels --data cifar10 --root DIR --encoder resnet18.a1_in1k --output DIR

The first split is clustered; images of the other splits get the nearest of its centres (`advcl_hub.pretraining.pseudo_labels`).
"""

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

import torch

from advcl_hub.cli.common import script
from advcl_hub.data import load_data
from advcl_hub.pretraining import make_pseudo_labels
from advcl_hub.pretraining.pseudo_labels import PAPER_KS
from train.cluster_report import cluster_stats, draw_report, format_stats


def _parser() -> argparse.ArgumentParser:
    summary = (__doc__ or "").split("\n")[0].rstrip(":") + "."
    parser = argparse.ArgumentParser(prog="python -m train.pseudo_labels", description=summary)
    add = parser.add_argument
    add("--data", required=True, help="source as in advcl_hub.data.load_data: cifar10, folder:PATH, ...")
    add("--root", type=Path, help="folder that holds the data")
    add("--download", action="store_true", help="fetch the data into --root if absent")
    add("--size", type=int, help="height and width of the images; training has to use the same")
    add("--splits", nargs="+", default=["train", "test"], help="the first is clustered, the others assigned")
    add("--encoder", required=True, help="timm model, hf-hub:org/name, local-dir:FOLDER, or pixels")
    add("--k", type=int, nargs="+", default=list(PAPER_KS), help="numbers of clusters")
    add("--seed", type=int, default=0, help="of the k-means++ starts")
    add("--output", type=Path, required=True, help="folder for the label file and its picture")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="of the encoder")
    add("--batch-size", type=int, default=256, help="images a forward pass")
    add("--workers", type=int, default=0, help="processes that decode the images of large data sets")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Makes a label file, or finds it in --output, and reports on its clusters."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    args = _parser().parse_args(arguments)
    with script():
        splits = {
            split: load_data(args.data, split, root=args.root, size=args.size, download=args.download) for split in args.splits
        }
        first = args.splits[0]
        data = splits.pop(first)
        pseudo = make_pseudo_labels(
            data,
            args.encoder,
            args.k,
            args.seed,
            split=first,
            held_out=splits,
            cache_dir=args.output,
            device=args.device,
            batch_size=args.batch_size,
            workers=args.workers,
        )
        print(format_stats(cluster_stats(pseudo.labels, pseudo.ks, data.labels)))
        picture = (args.output / pseudo.provenance["file"]).with_suffix(".png")
        draw_report(pseudo.labels, pseudo.ks, data, picture, pseudo.provenance["encoder"])
        print(f"Picture: {picture}")


if __name__ == "__main__":
    main()
