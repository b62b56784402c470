"""Measures a recipe's training step on this machine, eager and compiled, and says how many epochs fit into a time:

    python -m train.trial cifar10_resnet18_100ep data.root=DIR pseudo_labels.path=FILE --fit 14m --output runs/trial

It takes the steps of `train.pretrain` itself, keeps nothing of them, and leaves trial.json in the output folder.
"""

import argparse
import copy
import datetime
import json
import logging
import math
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.utils import clear_compilation_metrics, get_compilation_metrics

from advcl_hub.cli.common import script
from advcl_hub.errors import reason_of
from advcl_hub.files import check_writable, replacing, without_local_paths
from advcl_hub.records import counted
from advcl_hub.records.environment import hardware, versions
from advcl_hub.training.stop import duration
from train.benchmark.report import Row, Section
from train.benchmark.timing import Timing, clock, count_flops, matmul_rate, peak_memory, race
from train.pretrain import Trainer
from train.recipe import Recipe, load_recipe, require

TRIAL = "trial.json"
EAGER, COMPILED = "eager", "compiled"
_SPARE = 0.06  # share of the time that probes, checkpoints, the log and the start of the process may take
log = logging.getLogger("advcl")


@dataclass(frozen=True)
class Way:
    """How the step runs in one way.

    Attributes:
        timing: seconds of a step.
        first: seconds of the first step, which compiles and fills caches.
        memory: most bytes that a step holds besides weights and optimizer state; None where the system does not tell.
        graphs: what was compiled: seconds of each graph, forward and backward passes apart.
    """

    timing: Timing
    first: float
    memory: int | None
    graphs: tuple[tuple[str, float], ...] = ()

    @property
    def start_up(self) -> float:
        """Seconds that the first step takes longer than any other."""
        return max(0.0, self.first - self.timing.median)

    def epochs(self, seconds: float, steps_per_epoch: int) -> int:
        """Epochs that fit into so many seconds, the first step's included; 0 if not even one does."""
        return max(0, math.floor((seconds * (1 - _SPARE) - self.start_up) / (self.timing.median * steps_per_epoch)))


def choose(ways: dict[str, Way], seconds: float, steps_per_epoch: int) -> tuple[str, int]:
    """The way in which most epochs fit into so many seconds, and their number; if several are equal, the first."""
    fits = {name: way.epochs(seconds, steps_per_epoch) for name, way in ways.items()}
    best = max(fits, key=lambda name: fits[name])
    return best, fits[best]


def measure(recipe: Recipe, folder: Path, rounds: int, tell: Callable[[str], None]) -> tuple[dict[str, Way], Trainer, str]:
    """Steps of the recipe, eager and, if it asks for that, compiled, in turns.

    Args:
        recipe: what to train; its `speed.compile` says whether to try the compiler.
        folder: of the run that it would be; nothing is written there.
        rounds: samples of each way.
        tell: hears what is being done.

    Returns:
        The ways by name, the trainer that runs eagerly, and why the compiled one is missing (empty if it is not).
    """
    trainers = {EAGER: Trainer(replace(recipe, speed=replace(recipe.speed, compile=False)), folder)}
    eager, failure = trainers[EAGER], ""
    first = {EAGER: clock(_stepper(eager), eager.device)}
    graphs: tuple[tuple[str, float], ...] = ()
    if recipe.speed.compile:
        tell("compiling")
        try:
            compiled = Trainer(recipe, folder)
            clear_compilation_metrics()
            first[COMPILED] = clock(_stepper(compiled), compiled.device)
            trainers[COMPILED] = compiled
        except Exception as error:  # whatever a compiler raises, the eager step still runs
            failure = reason_of(error)
        else:
            graphs = tuple(_graphs())
    steps = {name: _stepper(trainer) for name, trainer in trainers.items()}
    times = race(steps, eager.device, rounds, warm_up=2, tell=tell)
    finite = {name: bool(trainer.meter.sums.isfinite().all()) for name, trainer in trainers.items()}
    require(finite[EAGER], "The loss of the eager step is not finite: lower optimizer.lr or use speed.mixed_precision=no.")
    if not finite.get(COMPILED, True):
        del steps[COMPILED]
        failure = "its loss is not finite"
    memory = {name: peak_memory(step, eager.device) for name, step in steps.items()}
    ways = {name: Way(times[name], first[name], memory[name], graphs if name == COMPILED else ()) for name in steps}
    return ways, eager, failure


def _batches(trainer: Trainer) -> Iterator[tuple[Tensor, Tensor | None]]:
    """The batches of a run that never ends."""
    while True:
        trainer.state.step = 0
        yield from trainer.remaining_batches()


def _stepper(trainer: Trainer) -> Callable[[], None]:
    """The next step of such a run, with its batch."""
    batches = _batches(trainer)
    return lambda: trainer.train_step(*next(batches))


def _graphs() -> list[tuple[str, float]]:
    """Names and seconds of the graphs that were compiled since the metrics were cleared; torch tells them as it likes."""
    graphs = []
    for metric in get_compilation_metrics():
        kind = "forward" if getattr(metric, "is_forward", True) else "backward"
        name, microseconds = getattr(metric, "compile_id", "?"), getattr(metric, "duration_us", None)
        graphs.append((f"{name} {kind}", (microseconds or 0) / 1e6))
    return graphs


def report(ways: dict[str, Way], trainer: Trainer) -> tuple[Section, dict[str, Any]]:
    """The table of a trial, and its numbers for trial.json."""
    recipe, device = trainer.recipe, trainer.device
    dtype = torch.bfloat16 if recipe.speed.mixed_precision == "bf16" else torch.float32
    rate, flops = matmul_rate(device, dtype), step_flops(recipe, trainer)
    batches = _batches(trainer)
    views = race({"": lambda: trainer.core.augment(next(batches)[0])}, device, 3)[""].median
    rows, numbers = [], {}
    for name, way in ways.items():
        seconds = way.timing.median
        share = flops / seconds / rate
        numbers[name] = {
            "seconds": [seconds, way.timing.low, way.timing.high],
            "images_per_second": recipe.batch_size / seconds,
            "share_of_matrix_rate": share,
            "data_and_views_share": views / seconds,
            "memory_bytes": way.memory,
            "first_step_seconds": way.first,
            "graphs": [{"graph": graph, "seconds": spent} for graph, spent in way.graphs],
        }
        more = {
            "TFLOP/s": f"{flops / seconds / 1e12:.3g}",
            "of matrix rate": f"{share:.0%}",
            "data and views": f"{views / seconds:.1%}",
            "memory, MB": "" if way.memory is None else way.memory / 1e6,
            "first step, s": f"{way.first:.1f}",
        }
        rows.append(Row(name, way.timing, recipe.batch_size, more))
    precision = str(dtype).removeprefix("torch.")
    note = (
        f"{recipe.method} with {recipe.model}, batch {recipe.batch_size}, "
        f"{counted(trainer.core.attack.steps, 'attack step')}, {precision}; steps of the trainer "
        f"itself, in turns: median (slowest to fastest). Matrix products reach {rate / 1e12:.3g} TFLOP/s here. "
        f"Memory: the most that a step holds besides weights and optimizer state."
    )
    return Section("trial", "Training step of the recipe", rows, note=note), {
        "matrix_flops_per_second": rate,
        "step_flops": flops,
        "data_and_views_seconds": views,
        "ways": numbers,
    }


def step_flops(recipe: Recipe, trainer: Trainer) -> float:
    """Floating-point operations of a step's forward and backward passes: those of 8 images, times the batch."""
    few = min(8, recipe.batch_size)
    network = copy.deepcopy(trainer.core)
    images = torch.zeros(few, *trainer.data.shape, dtype=torch.uint8, device=trainer.device)
    labels = None if trainer.labels is None else trainer.labels[:few]
    return count_flops(lambda: network(images, labels).total.backward()) * recipe.batch_size / few


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m train.trial", description=__doc__.split("\n")[0].rstrip(":") + ".")
    parser.add_argument("recipe", help="name of a file in train/recipes, or a path")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of the recipe to change")
    parser.add_argument("--fit", type=duration, default=3600.0, metavar="TIME", help="say how many epochs fit: 90s, 9m, 2h")
    parser.add_argument("--rounds", type=int, default=10, help="measurements of each way (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("runs/trial"), help="folder (default: %(default)s)")
    argv = sys.argv[1:] if argv is None else argv
    args = parser.parse_intermixed_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with script():
        require(args.rounds >= 1, f"--rounds must be at least 1, got {args.rounds}.")
        check_writable(args.output)
        record = run(load_recipe(args.recipe, args.overrides), args.output, args.fit, args.rounds)
        record["command"] = without_local_paths(f"python -m train.trial {shlex.join(argv)}")
        args.output.mkdir(parents=True, exist_ok=True)
        with replacing(args.output / TRIAL) as draft:
            draft.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def run(recipe: Recipe, folder: Path, seconds: float, rounds: int) -> dict[str, Any]:
    """Measures, prints the table, and returns what trial.json holds."""
    began = time.monotonic()
    machine = hardware(torch.device("cuda" if torch.cuda.is_available() else "cpu"), 1)
    log.info("%s; torch %s", machine["name"], torch.__version__)
    ways, trainer, failure = measure(recipe, folder / "run", rounds, lambda text: log.info("trial: %s", text))
    section, numbers = report(ways, trainer)
    chosen, epochs = choose(ways, seconds, trainer.steps_per_epoch)
    log.info("\n%s\n", section.table())
    if failure:
        log.info("Not compiled: %s", failure)
    for way in ways.values():
        for graph, spent in way.graphs:
            log.info("compiled in %5.1f s: graph %s", spent, graph)
    fits = [f"{name} {way.epochs(seconds, trainer.steps_per_epoch)}" for name, way in ways.items()]
    fits += [] if recipe.speed.compile else ["compiled not measured (speed.compile is false)"]
    log.info(
        "Epochs of %s that fit into %.0f s: %s. Best: %s, %s. (The trial took %.0f s.)",
        counted(trainer.steps_per_epoch, "step"),
        seconds,
        ", ".join(fits),
        chosen,
        counted(epochs, "epoch"),
        time.monotonic() - began,
    )
    return {
        "recipe": without_local_paths(recipe.to_dict()),
        "chosen": chosen,
        "epochs": epochs,
        "fit_seconds": seconds,
        "steps_per_epoch": trainer.steps_per_epoch,
        "not_compiled": failure or None,
        **numbers,
        "hardware": machine,
        "versions": versions(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


if __name__ == "__main__":
    main()
