"""The loop around a training step: progress with an ETA, log and curves, checkpoints, stops, exact continuation."""

import os
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, broadcast_object_list
from torch import Tensor, nn

from advcl_hub.files import comfort
from advcl_hub.training.ambient import detach, refuse_engines, switched_on, undisturbed
from advcl_hub.training.lock import RunLock
from advcl_hub.training.progress import progress_bar
from advcl_hub.training.runlog import Meter, Panel, RunLog, save_curves
from advcl_hub.training.seeds import epoch_order
from advcl_hub.training.state import FILE
from advcl_hub.training.stop import StopRequest

_PATIENCE = timedelta(hours=12)  # one process clusters and probes while the others wait, beyond NCCL's ten minutes
_AGREE_EVERY = 10  # steps between agreements of several GPUs on stopping and saving
_DRAW_EVERY = 20  # times as long as drawing the curves takes


class Progress(Protocol):
    """How far a run is: optimizer steps, seconds spent training over all starts, and whether all epochs are done."""

    step: int
    seconds: float
    finished: bool


def open_accelerator(cpu: bool = False, mixed_precision: str = "no", **ddp: Any) -> Accelerator:
    """Accelerate for this process and those that a launcher started beside it.

    Neither accelerate's environment variables nor an earlier Accelerator of this process decide anything but the device, and
    both stay as they are.

    Args:
        cpu: compute on the CPU even where there is a GPU.
        mixed_precision: `no` or `bf16`.
        ddp: options of `DistributedDataParallelKwargs`.

    Raises:
        ValueError: accelerate sees another number of processes than were launched, or the environment asks for an engine such
            as DeepSpeed.
    """
    refuse_engines()
    # Without a GPU "cpu" has to be said: else several CPU processes would each train alone.
    cpu = cpu or switched_on("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    with undisturbed():
        accelerator = Accelerator(
            cpu=cpu,
            mixed_precision=mixed_precision,
            kwargs_handlers=[
                DistributedDataParallelKwargs(gradient_as_bucket_view=True, **ddp),
                InitProcessGroupKwargs(timeout=_PATIENCE),
            ],
        )
        detach(accelerator)
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if accelerator.num_processes != launched:
        raise ValueError(f"{launched} processes were launched, but accelerate sees {accelerator.num_processes}.")
    if cpu != (accelerator.device.type == "cpu"):  # an earlier Accelerator of this process computed elsewhere
        if accelerator.num_processes > 1:
            raise ValueError(f"These processes were joined to compute on {accelerator.device}: start new ones.")
        accelerator.state.device = torch.device("cpu") if cpu else PartialState().default_device
    return accelerator


class Loop(ABC):
    """A run in one folder. A subclass says what a step is, what a checkpoint holds, and what comes at the end.

    A subclass locks the folder before it reads the checkpoint in it; see `locked`.

    Args:
        output: the run's folder.
        accelerator: this process among all.
        images: number of training images.
        epochs: each takes whole batches only, from an order of its own.
        batch_size: images a step, over all processes.
        seed: of the order.
        checkpoint_minutes: time between checkpoints.

    Raises:
        ValueError: the batch does not divide by the number of processes, or is larger than the set.
    """

    losses: Sequence[str]  # names of what a step returns; the first is minimised
    panels: Sequence[Panel]  # of curves.png
    remedy: ClassVar[str]  # what to try after a loss that is not finite

    state: Progress
    optimizer: torch.optim.Optimizer
    saved_at = 0.0  # on the clock of time.monotonic()
    draw_from = 0.0  # and not before, unless the run stops
    parts = 1  # of a process's batch, each with a pass of its own
    lock: RunLock | None = None  # of the main process

    def __init__(
        self,
        output: Path,
        accelerator: Accelerator,
        *,
        images: int,
        epochs: int,
        batch_size: int,
        seed: int,
        checkpoint_minutes: float,
    ) -> None:
        self.output, self.accelerator = output, accelerator
        self.main, self.device = accelerator.is_main_process, accelerator.device
        self.rank, self.world = accelerator.process_index, accelerator.num_processes
        if batch_size % self.world:
            raise ValueError(f"batch_size {batch_size} does not divide by {self.world} processes; change batch_size.")
        if images < batch_size:
            raise ValueError(f"A batch of {batch_size} needs as many training images; there are {images}. Lower batch_size.")
        self.images, self.epochs, self.batch_size, self.seed = images, epochs, batch_size, seed
        self.checkpoint_seconds = 60 * checkpoint_minutes
        self.steps_per_epoch = images // batch_size
        self.total_steps = epochs * self.steps_per_epoch
        self.meter = Meter(self.device, len(self.losses))
        self.log: RunLog | None = None
        self.bar = progress_bar(disable=True)

    @contextmanager
    def locked(self, output: Path, accelerator: Accelerator) -> Iterator[None]:
        """Keeps other trainings out of the folder from this `with` block, which prepares the run, to the end of `run`.

        A folder that is not there yet is made and locked by `run`: what is prepared and never run leaves no trace.

        Raises:
            ValueError: another process trains there.
        """
        self.lock_folder(output, accelerator, running=False)
        try:
            yield
        except BaseException:
            self.unlock()
            raise

    def lock_folder(self, output: Path, accelerator: Accelerator, *, running: bool) -> None:
        """Locks the folder in the main process, if it is there or is to be made because the run begins.

        Raises:
            ValueError: another process trains there, or did so since this run was prepared; in all processes.
        """
        refused = None
        if accelerator.is_main_process and not self.lock and (running or output.is_dir()):
            try:
                self.lock = RunLock(output)
                if running and not self.state.step and (output / FILE).exists():
                    raise ValueError(f"Another process began to train in {output} at the same time: repeat the command.")
            except (ValueError, OSError) as error:
                self.unlock()
                refused = error
        (refused,) = broadcast_object_list([refused])
        if refused:
            raise refused

    def unlock(self) -> None:
        """Lets other trainings into the folder."""
        if self.lock:
            self.lock.release()
            self.lock = None

    def prepare(self, model: nn.Module) -> tuple[nn.Module, Any]:
        """The model and the optimizer as accelerate runs them, in the run's precision and with all processes."""
        with undisturbed(self.accelerator):
            wrapped, stepper = self.accelerator.prepare(model, self.optimizer)
        stepper.accelerator_state, stepper.gradient_state = self.accelerator.state, self.accelerator.gradient_state
        return wrapped, stepper

    @abstractmethod
    def remaining_batches(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        """This process's share (inputs, labels) of every batch from the current step on."""

    @abstractmethod
    def train_step(self, inputs: Tensor, labels: Tensor | None) -> None:
        """One optimizer step."""

    @abstractmethod
    def write_checkpoint(self) -> None:
        """Writes the state to the folder; called in the main process alone."""

    @property
    @abstractmethod
    def judged(self) -> bool:
        """Whether `judge` follows the epoch that ends with this step; the last epoch's belongs to `finish`."""

    @abstractmethod
    def judge(self) -> Any:
        """Measures the run on held-out images; called in every process."""

    @abstractmethod
    def finish(self) -> None:
        """What comes after the last step; called in every process."""

    def run(self, stop: StopRequest) -> bool:
        """Trains to the end, or until a stop is requested. Returns whether the run is finished.

        Raises:
            ValueError: another process trains in the folder, or did so since this run was prepared.
        """
        self.lock_folder(self.output, self.accelerator, running=True)
        try:
            self.begin()
            self.train(stop)
        except FloatingPointError:
            with suppress(Warning):  # where it is an error that the picture fails, this one still comes first
                self.draw(now=True)  # the curves that one wants to see
            raise
        finally:
            self.bar.close()
            if self.log:
                self.log.close()
            self.unlock()
        self.accelerator.wait_for_everyone()
        return self.state.finished

    def train(self, stop: StopRequest) -> None:
        """The steps that are left, and what comes after the last one."""
        for inputs, labels in self.remaining_batches():
            with self.explain_batch_norm():
                self.train_step(inputs, labels)
            stopping, saving = self.agree(stop.requested, self.saved_at + self.checkpoint_seconds < time.monotonic())
            if self.state.step % self.steps_per_epoch % max(1, min(50, self.steps_per_epoch // 4)) == 0:
                self.record()
            if stopping or saving or self.judgement_due or self.state.step == self.total_steps:
                self.save()
                if self.judgement_due and not stopping:
                    self.judge()
                if not self.state.finished:  # else `finish` draws
                    self.draw(now=stopping)
            if stopping:
                break
        if self.state.finished:
            self.bar.close()
            self.finish()

    @contextmanager
    def explain_batch_norm(self) -> Iterator[None]:
        """Says what to change where a batch norm cannot normalise a batch of one value."""
        try:
            yield
        except ValueError as error:
            if "Expected more than 1 value per channel" not in str(error):
                raise
            least = 2 * self.world * self.parts
            raise ValueError(
                "A batch norm of the network got a single value per channel, and cannot train on one. It takes two images for "
                f"each process and each part of a batch (here {self.world} and {self.parts}): start with a batch_size of "
                f"at least {least}, in another folder."
            ) from error

    def begin(self) -> None:
        """Opens the folder: the log, and a first checkpoint."""
        if self.main:
            self.output.mkdir(parents=True, exist_ok=True)
            self.log = RunLog(self.output, self.state.step)
        self.draw_from = time.monotonic() + _DRAW_EVERY  # as if it took a second
        self.bar = progress_bar(total=self.total_steps, initial=self.state.step, unit="step", disable=not self.main)
        if self.state.step == 0:
            self.save()
        self.saved_at = time.monotonic()
        if self.judgement_due:  # the last start was stopped before it
            self.judge()
        self.meter.restart()

    def remaining_rows(self) -> Iterator[Tensor]:
        """For every epoch that is left, the rows (int64) that this process takes, batch after batch."""
        share = self.batch_size // self.world
        for epoch in range(self.state.step // self.steps_per_epoch, self.epochs):
            order = epoch_order(self.images, self.seed, epoch)[: self.steps_per_epoch * self.batch_size]
            shares = order.view(self.steps_per_epoch, self.world, share)
            yield shares[self.state.step - epoch * self.steps_per_epoch :, self.rank].flatten()

    def stepped(self, losses: Sequence[Tensor]) -> None:
        """Counts a step and its losses, in the order of `self.losses`."""
        self.state.step += 1
        self.meter.add(torch.stack([x.detach() for x in losses]))
        self.bar.update()

    def agree(self, stopping: bool, saving: bool) -> tuple[bool, bool]:
        """What the main process wants: all processes must stop and save at the same step."""
        if self.world == 1:
            return stopping, saving
        if self.device.type != "cpu" and self.state.step % _AGREE_EVERY:  # to agree is to wait for the device
            return False, False
        flags = broadcast_object_list([stopping, saving])
        return flags[0], flags[1]

    @property
    def judgement_due(self) -> bool:
        """Whether this step ends an epoch that is judged before the next one."""
        return 0 < self.state.step < self.total_steps and self.state.step % self.steps_per_epoch == 0 and self.judged

    def record(self) -> None:
        """Writes the mean losses since the last record. Raises FloatingPointError if they are not finite."""
        if not self.meter.count:
            return
        means, steps, seconds = self.meter.take(self.accelerator)
        self.require_finite(bool(np.isfinite(means).all()), "loss is")
        self.state.seconds += seconds
        epoch = self.state.step / self.steps_per_epoch
        self.bar.set_postfix(epoch=f"{epoch:.1f}", loss=f"{means[0]:.4f}", refresh=False)
        if self.log:
            self.log.write(
                self.state.step,
                epoch=epoch,
                **dict(zip(self.losses, means, strict=True)),
                lr=self.optimizer.param_groups[0]["lr"],
                images_per_second=steps * self.batch_size / seconds,
                seconds=self.state.seconds,
            )

    def require_finite(self, finite: bool, what: str) -> None:
        """Raises FloatingPointError that names the last checkpoint unless `what` is finite."""
        if not finite:
            raise FloatingPointError(
                f"The {what} not finite at step {self.state.step}: stopped. The last checkpoint, with a finite loss, is "
                f"{self.output / FILE}; {self.remedy}"
            )

    def save(self) -> None:
        """Writes the checkpoint, after making sure that the losses so far are finite."""
        self.record()
        self.state.finished = self.state.step == self.total_steps
        if self.main:
            self.write_checkpoint()
        self.saved_at = time.monotonic()
        self.meter.restart()

    def draw(self, now: bool = False) -> None:
        """Draws the curves, which training can do without, in the main process: `now`, or if that takes little of the time."""
        start = time.monotonic()
        if self.main and (now or start > self.draw_from):
            with comfort("Drawing curves.png", errors=Exception):
                save_curves(self.output, self.panels)
            end = time.monotonic()
            self.draw_from = end + _DRAW_EVERY * (end - start)
            self.meter.restart()
