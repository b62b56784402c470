"""Pretrains an encoder by a recipe. Start, stop and continue with the same command:

    python -m train.pretrain cifar10_resnet18 data.root=DIR pseudo_labels.path=FILE --output runs/resnet18
    accelerate launch -m train.pretrain ...                                # several processes

Killed at any moment, it continues from the last complete checkpoint as if nothing had happened: every step seeds its random
numbers from (seed, step, rank) and every epoch its order from (seed, epoch), so no random state has to survive.
"""

import argparse
import copy
import json
import logging
import os
import shlex
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import yaml
from accelerate import Accelerator
from timm.utils import ModelEmaV3
from torch import Tensor
from tqdm import tqdm

from advcl_hub.cli.common import script
from advcl_hub.data import batches
from advcl_hub.evaluation import Robustness, robustness
from advcl_hub.files import check_writable, comfort, replacing
from advcl_hub.hub.export import check_exportable, verify_folder
from advcl_hub.models.branch_norm import branch_state_dict
from advcl_hub.pretraining import METHODS
from advcl_hub.records import counted
from advcl_hub.records.environment import backends
from advcl_hub.training.loop import Loop, open_accelerator
from advcl_hub.training.runlog import Panel
from advcl_hub.training.seeds import seed_step
from advcl_hub.training.state import FILE, differences, pack_state, unpack_state
from advcl_hub.training.stop import StopRequest, duration
from advcl_hub.training.tensors import check_averageable
from train.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from train.export import export_checkpoint, usage_lines
from train.inputs import check_same_recipe, continue_provenance, load_labels, load_training_data, provenance
from train.network import build_network, build_optimizer, build_schedule, compile_encoder, plain_encoder
from train.probe import linear_probe, with_linear_head
from train.recipe import RECIPES, Recipe, load_recipe
from train.start import open_start

# Its successor does less for buffers, and torch 2.8 does not have it.
warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
log = logging.getLogger("advcl")


class Trainer(Loop):
    """One pretraining run in one folder, which holds its checkpoint, log, pictures and, at the end, the export.

    Args:
        recipe: what to train.
        output: the run's folder; a checkpoint in it is continued.

    Raises:
        ValueError: the recipe does not fit the data, the hardware or the checkpoint in the folder, or another process trains
            there.
        FileNotFoundError: data or label files are missing.
    """

    remedy = "lower optimizer.lr or use speed.mixed_precision=no in a new folder."

    state: Checkpoint

    def __init__(self, recipe: Recipe, output: Path) -> None:
        # The checkpoint has the first process's running averages. Where these decide the attack, all begin a step with them.
        broadcast = METHODS[recipe.method].Objective.attacks_in_evaluation
        accelerator = open_accelerator(mixed_precision=recipe.speed.mixed_precision, broadcast_buffers=broadcast)
        check_writable(output)
        check_exportable()
        with self.locked(output, accelerator):
            self.build(recipe, output, accelerator)

    def build(self, recipe: Recipe, output: Path, accelerator: Accelerator) -> None:
        """Data and everything that is trained, as the checkpoint in the folder left it if there is one."""
        checkpoint = load_checkpoint(output) if (output / FILE).is_file() else None
        if checkpoint:
            check_same_recipe(checkpoint.recipe, recipe, output)
        with accelerator.main_process_first():  # one process downloads, the others find the files
            start = open_start(recipe)
            data, self.held_out = load_training_data(recipe)
        self.losses = METHODS[recipe.method].Losses._fields
        self.panels = panels(self.losses)
        super().__init__(
            output,
            accelerator,
            images=len(data),
            epochs=recipe.epochs,
            batch_size=recipe.batch_size,
            seed=recipe.seed,
            checkpoint_minutes=recipe.checkpoint_minutes,
        )
        self.recipe = recipe
        self.core = build_network(recipe, data.shape, self.device, start)
        if recipe.judge.every:
            with_linear_head(self.core.encoder, len(data.classes))  # what judge() would refuse is refused now
        with accelerator.main_process_first():  # one process clusters, the others find the cache
            labels = load_labels(recipe, data, self.device)
        self.data = data.to(self.device)
        self.labels = labels.labels.to(self.device) if labels else None

        if recipe.ema_decay:
            check_averageable(self.core)
        self.ema = ModelEmaV3(self.core, decay=recipe.ema_decay, use_warmup=True) if recipe.ema_decay else None
        self.optimizer = build_optimizer(recipe, self.core)
        self.schedule = build_schedule(recipe, self.optimizer, self.steps_per_epoch)
        facts = provenance(data, labels, start.facts if start else None, accelerator)
        facts["hardware"]["backends"] = backends(self.device)
        self.state = Checkpoint(0, 0.0, recipe, facts, {})
        if checkpoint:
            where = continue_provenance(checkpoint.provenance, self.state.provenance, output)
            unpack_state(checkpoint.tensors, self.core, self.optimizer, self.ema.module if self.ema else None)
            self.state = replace(checkpoint, recipe=recipe, provenance=where, tensors={})
        if recipe.speed.compile:
            compile_encoder(recipe, self.core, data.shape)
        self.model, self.stepper = self.prepare(self.core)

    def train_step(self, images: Tensor, labels: Tensor | None) -> None:
        """One optimizer step; the network's forward is the method."""
        seed_step(self.recipe.seed, self.state.step, self.rank)
        self.schedule.step_update(self.state.step)
        losses = self.model(images, labels)
        self.accelerator.backward(losses.total)
        self.stepper.step()
        self.stepper.zero_grad()
        if self.ema:
            self.ema.update(self.core, self.state.step + 1)
        self.stepped(losses)

    def remaining_batches(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        """This process's share (uint8 images, pseudo-labels) of every batch from the current step on."""
        self.model.train()
        share = self.recipe.batch_size // self.world
        for mine in self.remaining_rows():
            for images, rows in batches(self.data, share, device=self.device, order=mine, workers=self.recipe.data.workers):
                yield images, None if self.labels is None else self.labels[rows]

    def write_checkpoint(self) -> None:
        """Writes the checkpoint, after making sure that the weights are finite."""
        tensors = pack_state(self.core, self.optimizer, self.ema.module if self.ema else None)
        self.require_finite(all(v.isfinite().all() for v in tensors.values()), "weights are")
        save_checkpoint(self.output, replace(self.state, tensors=tensors))

    @property
    def judged(self) -> bool:
        """Whether the recipe wants a probe after this epoch."""
        every = self.recipe.judge.every
        return bool(every) and self.state.step // self.steps_per_epoch % every == 0

    def judge(self) -> Robustness | None:
        """A linear probe of the branch and weights that would be exported, on held-out images, clean and under PGD."""
        result = None
        if self.main and self.held_out is not None:
            rule, branch = self.recipe.judge, self.recipe.objective.export_branch
            weights = (self.ema.module if self.ema else self.core).encoder.state_dict()
            state = branch_state_dict(weights, branch)
            encoder = plain_encoder(self.recipe, self.data.shape, state, self.state.provenance)
            train = self.data.sample(rule.train_images, self.recipe.seed)
            held_out = self.held_out.sample(rule.val_images, self.recipe.seed)
            eps = self.recipe.attack.eps
            probe = linear_probe(encoder, train, self.device)
            result = robustness(probe, held_out, eps=eps, step_size=eps / 4, steps=rule.steps, device=self.device)
            epoch = self.state.step / self.steps_per_epoch
            tqdm.write(
                f"epoch {epoch:g}: linear probe on {result.images} held-out images: standard {result.standard:.1%}, "
                f"robust {result.robust:.1%} (PGD-{rule.steps}, eps {eps * 255:g}/255)",
                file=sys.stderr,
            )
            if self.log:
                self.log.write(self.state.step, epoch=epoch, probe_standard=result.standard, probe_robust=result.robust)
        self.accelerator.wait_for_everyone()
        self.meter.restart()
        return result

    def begin(self) -> None:
        """Opens the folder: recipe, a picture of the first batch's views, log, and a first checkpoint."""
        if self.main:
            self.output.mkdir(parents=True, exist_ok=True)
            with replacing(self.output / "recipe.yaml") as draft:
                draft.write_text(yaml.safe_dump(self.recipe.to_dict(), sort_keys=False), encoding="utf-8")
            size = sum(p.numel() for p in self.core.encoder.parameters())
            log.info(
                f"{self.recipe.method} of {self.recipe.model}, {size:,} parameters; {len(self.data):,} images of "
                f"{self.data.name}, {counted(self.recipe.epochs, 'epoch')} of {counted(self.steps_per_epoch, 'step')}; "
                f"{self.device.type}, processes: {self.world}"
            )
        if self.state.step == 0:
            self.picture_views()
        super().begin()

    def picture_views(self) -> None:
        """Saves what the method makes of the first images to views.png; all processes make the adversarial views together."""
        rows = torch.arange(min(10, len(self.data)))
        images = next(batches(self.data, len(rows), device=self.device, order=rows))[0]
        seed_step(self.recipe.seed, 0, self.rank)
        labels = None if self.labels is None else self.labels[rows.to(self.device)]
        network = copy.deepcopy(self.core)  # the passes move batch-norm statistics: a start that was killed must not leave them
        shown = {"image": images / 255, **network.pictures(images, labels)}
        if self.main:
            with comfort("Drawing views.png", errors=Exception):
                from advcl_hub.training.pictures import save_views  # needs matplotlib, which need not be there

                save_views(self.output / "views.png", shown)

    def finish(self) -> None:
        """The last judgement, then, by the main process, the export and its check."""
        result = self.judge() if self.recipe.judge.every else None
        self.draw(now=True)
        if not self.main:
            return
        figures = {"linear_probe_held_out": vars(result)} if result else {}
        folder = export_checkpoint(load_checkpoint(self.output), self.output / "export", figures=figures)
        verify_folder(folder)
        log.info(
            "Finished in %.0f s of training. Exported to %s\n%s",
            self.state.seconds,
            folder,
            usage_lines(folder),
        )


def panels(losses: Sequence[str]) -> tuple[Panel, ...]:
    """What curves.png shows of a method with these losses."""
    return (
        Panel("loss", tuple(losses)),
        Panel("linear probe, held-out images (%)", ("probe_standard", "probe_robust"), percent=True),
        Panel("learning rate", ("lr",)),
    )


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="python -m train.pretrain", description=__doc__.split("\n")[0].rstrip(":") + ".")
    parser.epilog = (
        f"Recipes: {', '.join(sorted(path.stem for path in RECIPES.glob('*.yaml')))}. Their keys: Recipe in train/recipe.py."
    )
    parser.add_argument("recipe", help="name of a file in train/recipes, or a path")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="settings of the recipe to change, e.g. attack.steps=3",
    )
    parser.add_argument("--output", type=Path, help="folder of the run (default: runs/RECIPE)")
    parser.add_argument("--time-budget", type=duration, help="stop with a checkpoint after so long: 90s, 9m, 2h")
    args = parser.parse_intermixed_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("timm").setLevel(logging.WARNING)
    output = args.output or Path("runs") / Path(args.recipe).stem
    with script("Interrupted. The last checkpoint, if there is one, is whole: the same command continues from it."):
        recipe = load_recipe(args.recipe, args.overrides)
        finished = pretrain(recipe, output, StopRequest(args.time_budget))
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()  # else its threads may outlive the interpreter, which aborts then
    if not finished and int(os.environ.get("RANK", 0)) == 0:
        world = int(os.environ.get("WORLD_SIZE", 1))
        # On CPUs `accelerate launch --num_processes` starts one process; torchrun starts them everywhere.
        launcher = f"torchrun --nproc_per_node {world}" if world > 1 else "python"
        print(
            f"Stopped with a checkpoint in {output}. To continue, run the same command again:\n"
            f"  {launcher} -m train.pretrain {shlex.join(argv)}"
        )


def pretrain(recipe: Recipe, output: Path, stop: StopRequest) -> bool:
    """Starts or continues a run. Returns whether it is finished; a run that was finished before costs nothing."""
    record = output / "export" / "results.json"
    if (output / FILE).is_file() and record.is_file():
        checkpoint = load_checkpoint(output)
        check_same_recipe(checkpoint.recipe, recipe, output)
        if checkpoint.finished and json.loads(record.read_text(encoding="utf-8")).get(
            "finished"
        ):  # not exported by hand on the way
            if differences(checkpoint.recipe.to_dict(), recipe.to_dict()):
                Trainer(recipe, output).unlock()  # which refuses other images, labels or weights than those of the run
            log.info("%s is finished already.\n%s", output, usage_lines(output / "export"))
            return True
    trainer = Trainer(recipe, output)
    with stop:  # from here on an interruption has something to save
        return trainer.run(stop)


if __name__ == "__main__":
    main()
