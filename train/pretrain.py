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
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, broadcast_object_list
from timm.utils import ModelEmaV3
from torch import Tensor
from tqdm import tqdm

from advcl_hub.data import batches
from advcl_hub.evaluation import Robustness, robustness
from advcl_hub.export import verify_folder
from advcl_hub.files import check_writable, replacing
from advcl_hub.models.branch_norm import branch_state_dict
from advcl_hub.progress import progress_bar
from train.checkpoint import FILE, Checkpoint, load_checkpoint, pack_state, save_checkpoint, unpack_state
from train.export import export_checkpoint, usage_lines
from train.inputs import check_same_recipe, continue_provenance, load_labels, load_training_data, provenance
from train.network import build_network, build_optimizer, build_schedule, plain_encoder
from train.pictures import save_views
from train.probe import linear_probe, with_linear_head
from train.recipe import Recipe, load_recipe, require
from train.runlog import Meter, RunLog, save_curves
from train.stop import StopRequest, duration
from train.views import make_views

# Its successor does less for buffers, and torch 2.8 does not have it.
warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
log = logging.getLogger("advcl")
_ORDER, _STEP = 0, 1  # streams of random numbers: the order of an epoch, everything in a step
_PATIENCE = timedelta(hours=12)  # one process clusters and probes while the others wait, beyond NCCL's ten minutes
_AGREE_EVERY = 10  # steps between agreements of several GPUs on stopping and saving


class Trainer:
    """One pretraining run in one folder, which holds its checkpoint, log, pictures and, at the end, the export.

    Args:
        recipe: what to train.
        output: the run's folder; a checkpoint in it is continued.

    Raises:
        ValueError: the recipe does not fit the data, the hardware or the checkpoint in the folder.
        FileNotFoundError: data or label files are missing.
    """

    def __init__(self, recipe: Recipe, output: Path) -> None:
        self.recipe, self.output = recipe, output
        self.accelerator = Accelerator(
            cpu=not torch.accelerator.is_available(),  # else several CPU processes would each train alone
            mixed_precision=recipe.speed.mixed_precision,
            kwargs_handlers=[
                DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True),
                InitProcessGroupKwargs(timeout=_PATIENCE),
            ],
        )
        self.main, self.device = self.accelerator.is_main_process, self.accelerator.device
        self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes
        launched = int(os.environ.get("WORLD_SIZE", 1))
        require(self.world == launched, f"{launched} processes were launched, but accelerate sees {self.world}.")
        require(
            recipe.batch_size % self.world == 0,
            f"batch_size {recipe.batch_size} does not divide by {self.world} processes; change batch_size.",
        )
        check_writable(output)
        checkpoint = load_checkpoint(output) if (output / FILE).is_file() else None
        if checkpoint:
            check_same_recipe(checkpoint.recipe, recipe, output)
        with self.accelerator.main_process_first():  # one process downloads, the others find the files
            data, self.held_out = load_training_data(recipe)
        require(
            len(data) >= recipe.batch_size,
            f"A batch of {recipe.batch_size} needs as many training images; there are {len(data)}. Lower batch_size.",
        )
        self.core = build_network(recipe, data.shape).to(self.device)
        if recipe.judge.every:
            with_linear_head(self.core.encoder, len(data.classes))  # what judge() would refuse is refused now
        with self.accelerator.main_process_first():  # one process clusters, the others find the cache
            labels = load_labels(recipe, data, self.device)
        self.data = data.to(self.device)
        self.labels = labels.labels.to(self.device) if labels else None
        self.steps_per_epoch = len(data) // recipe.batch_size
        self.total_steps = recipe.epochs * self.steps_per_epoch

        self.ema = ModelEmaV3(self.core, decay=recipe.ema_decay, use_warmup=True) if recipe.ema_decay else None
        self.optimizer = build_optimizer(recipe, self.core)
        self.schedule = build_schedule(recipe, self.optimizer, self.steps_per_epoch)
        self.state = Checkpoint(0, 0.0, recipe, provenance(data, labels, self.accelerator), {})
        if checkpoint:
            where = continue_provenance(checkpoint.provenance, self.state.provenance, output)
            unpack_state(checkpoint, self.core, self.optimizer, self.ema.module if self.ema else None)
            self.state = replace(checkpoint, recipe=recipe, provenance=where, tensors={})
        if recipe.speed.compile:
            torch._dynamo.config.cache_size_limit = 64  # one graph for every branch, mode and layout
            self.core.encoder.compile()
        self.model, self.stepper = self.accelerator.prepare(self.core, self.optimizer)
        self.meter = Meter(self.device)
        self.log: RunLog | None = None

    def run(self, stop: StopRequest) -> bool:
        """Trains to the end, or until a stop is requested. Returns whether the run is finished."""
        self.begin()
        for images, labels in self.remaining_batches():
            self.train_step(images, labels)
            stopping, saving = self.agree(
                stop.requested, self.saved_at + 60 * self.recipe.checkpoint_minutes < time.monotonic()
            )
            if self.state.step % self.steps_per_epoch % max(1, min(50, self.steps_per_epoch // 4)) == 0:
                self.record()
            if stopping or saving or self.judgement_due or self.state.step == self.total_steps:
                self.save()
            if stopping:
                break
            if self.judgement_due:
                self.judge()
        self.bar.close()
        if self.state.finished:
            self.finish()
        if self.log:
            self.log.close()
        self.accelerator.wait_for_everyone()
        return self.state.finished

    def train_step(self, images: Tensor, labels: Tensor | None) -> None:
        """One optimizer step; `AdvCL.forward` is the method."""
        seed_step(self.recipe.seed, self.state.step, self.rank)
        self.schedule.step_update(self.state.step)
        losses = self.model(images, labels)
        self.accelerator.backward(losses.total)
        self.stepper.step()
        self.stepper.zero_grad()
        self.state.step += 1
        if self.ema:
            self.ema.update(self.core, self.state.step)
        self.meter.add(torch.stack([x.detach() for x in losses]))
        self.bar.update()

    def remaining_batches(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        """This process's share (uint8 images, pseudo-labels) of every batch from the current step on."""
        self.model.train()
        share = self.recipe.batch_size // self.world
        for epoch in range(self.state.step // self.steps_per_epoch, self.recipe.epochs):
            order = torch.randperm(
                len(self.data), generator=torch.Generator().manual_seed(mix(_ORDER, self.recipe.seed, epoch))
            )
            order = order[: self.steps_per_epoch * self.recipe.batch_size].view(self.steps_per_epoch, self.world, share)
            mine = order[self.state.step - epoch * self.steps_per_epoch :, self.rank].flatten()
            for images, rows in batches(self.data, share, device=self.device, order=mine, workers=self.recipe.data.workers):
                yield images, None if self.labels is None else self.labels[rows]

    def agree(self, stopping: bool, saving: bool) -> tuple[bool, bool]:
        """What the main process wants: all processes must stop and save at the same step."""
        if self.world == 1:
            return stopping, saving
        if self.device.type != "cpu" and self.state.step % _AGREE_EVERY:  # to agree is to wait for the device
            return False, False
        flags = broadcast_object_list([stopping, saving])
        return flags[0], flags[1]

    def record(self) -> None:
        """Writes the mean losses since the last record. Raises FloatingPointError if they are not finite."""
        if not self.meter.count:
            return
        means, steps, seconds = self.meter.take(self.accelerator)
        self.require_finite(bool(np.isfinite(means).all()), "loss is")
        self.state.seconds += seconds
        self.bar.set_postfix(epoch=f"{self.state.step / self.steps_per_epoch:.1f}", loss=f"{means[0]:.4f}", refresh=False)
        if self.log:
            self.log.write(
                self.state.step,
                epoch=self.state.step / self.steps_per_epoch,
                **dict(zip(("total", "contrastive", "pseudo_label"), means, strict=True)),
                lr=self.optimizer.param_groups[0]["lr"],
                images_per_second=steps * self.recipe.batch_size / seconds,
                seconds=self.state.seconds,
            )

    def require_finite(self, finite: bool, what: str) -> None:
        """Raises FloatingPointError that names the last checkpoint unless `what` is finite."""
        if not finite:
            raise FloatingPointError(
                f"The {what} not finite at step {self.state.step}: stopped. The last checkpoint, with a finite loss, is "
                f"{self.output / FILE}; lower optimizer.lr or use speed.mixed_precision=no in a new folder."
            )

    def save(self) -> None:
        """Writes the checkpoint, after making sure that the losses so far and the weights are finite."""
        self.record()
        self.state.finished = self.state.step == self.total_steps
        if self.main:
            tensors = pack_state(self.core, self.optimizer, self.ema.module if self.ema else None)
            self.require_finite(all(v.isfinite().all() for v in tensors.values()), "weights are")
            save_checkpoint(self.output, replace(self.state, tensors=tensors))
            save_curves(self.output)
        self.saved_at = time.monotonic()
        self.meter.restart()

    @property
    def judgement_due(self) -> bool:
        """Whether this step ends an epoch that a probe follows; the last one's belongs to `finish`."""
        epoch, in_epoch = divmod(self.state.step, self.steps_per_epoch)
        every = self.recipe.judge.every
        return bool(every) and in_epoch == 0 and epoch % every == 0 and 0 < epoch < self.recipe.epochs

    def judge(self) -> Robustness | None:
        """A linear probe of the branch and weights that would be exported, on held-out images, clean and under PGD."""
        result = None
        if self.main and self.held_out is not None:
            rule, branch = self.recipe.judge, self.recipe.objective.export_branch
            weights = (self.ema.module if self.ema else self.core).encoder.state_dict()
            encoder = plain_encoder(self.recipe, self.data.shape, branch_state_dict(weights, branch))
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
            save_curves(self.output)
        self.accelerator.wait_for_everyone()
        self.meter.restart()
        return result

    def begin(self) -> None:
        """Opens the folder: recipe, log, a picture of the first batch's views, and a first checkpoint."""
        if self.main:
            self.output.mkdir(parents=True, exist_ok=True)
            with replacing(self.output / "recipe.yaml") as draft:
                draft.write_text(yaml.safe_dump(self.recipe.to_dict(), sort_keys=False))
            self.log = RunLog(self.output, self.state.step)
            size = sum(p.numel() for p in self.core.encoder.parameters())
            log.info(
                f"{self.recipe.model}, {size:,} parameters; {len(self.data):,} images of {self.data.name}, "
                f"{self.recipe.epochs} epochs of {self.steps_per_epoch} steps; {self.device.type}, processes: {self.world}"
            )
        self.bar = progress_bar(total=self.total_steps, initial=self.state.step, unit="step", disable=not self.main)
        if self.state.step == 0:
            self.picture_views()
            self.save()
        self.saved_at = time.monotonic()
        if self.judgement_due:  # the last start was stopped before it
            self.judge()
        self.meter.restart()

    def picture_views(self) -> None:
        """Saves the views of the first images to views.png; all processes make the adversarial ones together."""
        rows = torch.arange(min(10, len(self.data)))
        images = next(batches(self.data, len(rows), device=self.device, order=rows))[0]
        seed_step(self.recipe.seed, 0, self.rank)
        views = make_views(images, self.recipe.views)
        labels = None if self.labels is None else self.labels[rows.to(self.device)]
        network = copy.deepcopy(self.core)  # the passes move batch-norm statistics: a start that was killed must not leave them
        adversarial = network.adversarial_views(views, labels)
        shown = {"image": images / 255, **views._asdict()}
        shown["high_frequency"] = views.high_frequency + 0.5
        if self.main:
            save_views(self.output / "views.png", shown | adversarial)

    def finish(self) -> None:
        """The last judgement, then, by the main process, the export and its check."""
        result = self.judge() if self.recipe.judge.every else None
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


def mix(*numbers: int) -> int:
    """A well-mixed seed of several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seeds torch's generators, on all devices, for one step of one process."""
    torch.manual_seed(mix(_STEP, seed, step, rank))


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="python -m train.pretrain", description=__doc__.split("\n")[0])
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
    try:
        recipe = load_recipe(args.recipe, args.overrides)
        finished = pretrain(recipe, output, StopRequest(args.time_budget))
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()  # else its threads may outlive the interpreter, which aborts then
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("Interrupted. The last checkpoint, if there is one, is whole: the same command continues from it.")
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
        if checkpoint.finished and json.loads(record.read_text()).get("finished"):  # not exported by hand on the way
            log.info("%s is finished already.\n%s", output, usage_lines(output / "export"))
            return True
    trainer = Trainer(recipe, output)
    with stop:  # from here on an interruption has something to save
        return trainer.run(stop)


if __name__ == "__main__":
    main()
