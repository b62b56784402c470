"""Measures this project on this machine, every part beside another way to do the same:

    python -m train.benchmark                                   # all parts, on a GPU if there is one
    python -m train.benchmark --only step --batch-size 64       # one of them
    python -m train.benchmark --root DATA                       # with CIFAR-10: PGD-20 and AutoAttack, too

Prints tables; leaves results.json and benchmark.png in the output folder, anew after every part.
"""

import argparse
import datetime
import gc
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import timm
import torch
from torch.multiprocessing.spawn import ProcessRaisedException

import advcl_hub  # noqa: F401  (registers our architectures with timm)
from advcl_hub.cli.common import script
from advcl_hub.data import ImageData, load_data
from advcl_hub.data.matching import check_fits
from advcl_hub.files import check_writable, without_local_paths
from advcl_hub.opening import load_model
from advcl_hub.records import counted
from advcl_hub.records.environment import hardware, versions
from advcl_hub.training.processes import choose
from train.benchmark import methods, parts, processes, step, use
from train.benchmark.report import Section, save
from train.recipe import require

PARTS = ("step", "methods", "views", "contrastive", "processes", "evaluation", "probe", "loading")
CONTRASTIVE = (512, 1024, 2048, 4096, 8192, 16384)


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        prog="python -m train.benchmark", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=PARTS, metavar="PART", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--model", default="resnet18_cifar", help="timm architecture for 32x32 images (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, help="images a step (default: 32 on a CPU, 512 on a GPU)")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each (default: %(default)s)")
    parser.add_argument("--no-compile", action="store_true", help="leave out what torch.compile makes, and its waiting time")
    parser.add_argument("--root", help="folder with CIFAR-10; without it the evaluation is left out")
    parser.add_argument(
        "--classifier", default="resnet10_cifar.pseudo_label_at_c10_aff", help="weights to be evaluated (default: %(default)s)"
    )
    parser.add_argument("--images", type=int, help="test images to evaluate on (default: 64 on a CPU, 1000 on a GPU)")
    parser.add_argument("--largest", type=int, default=CONTRASTIVE[-1], help="global batch of the contrastive loss, at most")
    parser.add_argument("--device", help="default: a GPU if there is one")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark"), help="folder (default: %(default)s)")
    args = parser.parse_args(argv)
    with script(f"Interrupted. The parts that were finished are in {args.output}."):
        run(args, argv)


def run(args: argparse.Namespace, argv: list[str]) -> list[Section]:
    """All parts that were asked for; after each its tables, and the files anew."""
    device = choose(args.device)
    gpu = device.type == "cuda"
    args.batch_size = (512 if gpu else 32) if args.batch_size is None else args.batch_size
    args.images = (1000 if gpu else 64) if args.images is None else args.images
    require(int(os.environ.get("WORLD_SIZE", 1)) == 1, "The benchmark starts its processes itself: call it without torchrun.")
    require(args.batch_size >= 2 and args.rounds >= 1, "--batch-size must be at least 2, --rounds at least 1.")
    require(device.type in ("cpu", "cuda"), f"The benchmark's clock knows CPUs and CUDA GPUs, not {device}.")
    require(args.largest >= CONTRASTIVE[0], f"--largest must be at least {CONTRASTIVE[0]}.")
    require(timm.is_model(args.model), f"timm has no model {args.model!r}.")
    test = None
    if args.root is not None and "evaluation" in (args.only or PARTS):
        data = load_data("cifar10", "test", root=args.root)
        require(1 <= args.images <= len(data), f"--images must be from 1 to {len(data)}, got {args.images}.")
        test = data.subset(data.balanced_positions(args.images))
        check_fits(load_model(args.classifier).model, test)
    args.output.mkdir(parents=True, exist_ok=True)
    check_writable(args.output)
    if not args.no_compile and not gpu and shutil.which(os.environ.get("CXX", "g++")) is None:
        args.no_compile = True
        print("torch.compile needs a C++ compiler on a CPU: what it makes is left out.", file=sys.stderr)
    machine = hardware(device, 1)
    facts = {
        "command": without_local_paths(f"python -m train.benchmark {shlex.join(argv)}".strip()),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "hardware": machine,
        "versions": versions(),
    }
    print(f"{machine['name']}, {counted(machine['threads'], 'thread')}; torch {torch.__version__}\n", flush=True)
    sections: list[Section] = []
    for name in args.only or PARTS:
        try:
            for section in _measure(name, args, test, device):
                _tell("")
                sections.append(section)
                save(args.output, sections, facts)
                print(section.table() + "\n", flush=True)
        except (torch.OutOfMemoryError, ProcessRaisedException) as error:
            last = " ".join(str(error).strip().splitlines()[-1:])
            print(f"{name}: failed, {last} Try a smaller --batch-size.\n", flush=True)
        gc.collect()
        if gpu:
            torch.cuda.empty_cache()  # what this part leaves would count as used in the next
    print(f"{args.output}/results.json, {args.output}/benchmark.png")
    return sections


def _measure(part: str, args: argparse.Namespace, test: ImageData | None, device: torch.device) -> Iterator[Section]:
    tell: Callable[[str], None] = lambda text: _tell(f"{part}: {text}")  # noqa: E731
    gpu, batch, rounds = device.type == "cuda", args.batch_size, args.rounds
    match part:
        case "step":
            yield step.measure(args.model, _images(batch, device), step.modes(not args.no_compile), rounds, tell)
        case "methods":
            yield methods.measure(args.model, _images(batch, device), rounds, tell)
        case "views":
            workers = sorted({0, 2, min(16, os.cpu_count() or 1)} if gpu else {0, 2})
            yield parts.measure_views(_images(4096 if gpu else 512, device), min(batch, 128), rounds, workers, tell)
        case "contrastive":
            sizes = [n for n in CONTRASTIVE if n <= args.largest]
            yield parts.measure_contrastive(sizes, device, rounds, tell)
        case "processes":
            worlds = list(range(1, 1 + (torch.cuda.device_count() if gpu else min(4, torch.get_num_threads()))))
            yield processes.measure(args.model, max(2, batch // 2), worlds, rounds, device, tell)
        case "evaluation":
            if test is None:
                print("evaluation: left out, it needs CIFAR-10: --root DATA\n")
                return
            yield from use.measure_evaluation(args.classifier, test, device, rounds, not args.no_compile, tell)
        case "probe":
            yield use.measure_probe(args.model, 5000 if gpu else 1000, device, tell)
        case "loading":
            yield from use.measure_loading(rounds, tell)


def _images(count: int, device: torch.device) -> torch.Tensor:
    images = load_data(f"fake:{max(10, count)}").images
    assert isinstance(images, torch.Tensor)
    return images[:count].to(device)


def _tell(text: str) -> None:
    """What is being measured, on one line of a terminal that the next text replaces; in a log file a line each."""
    end = "\r" if sys.stderr.isatty() else "\n"
    if text or sys.stderr.isatty():
        print(f"{text[:100]:100}".rstrip() if end == "\n" else f"{text[:100]:100}", end=end, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
