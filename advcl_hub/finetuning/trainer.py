"""The loop of finetuning: batches, the step, validation, checkpoints, and the folder at the end."""

import copy
import sys
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from tqdm import tqdm

from advcl_hub.data import ImageData, batches
from advcl_hub.data.augmentation import WeakParams, draw_weak, weak_view
from advcl_hub.evaluation.quick import robustness
from advcl_hub.files import comfort
from advcl_hub.finetuning.encoder import Headless, linear_head, zero_head
from advcl_hub.finetuning.features import check_separable, extract_features
from advcl_hub.finetuning.objective import Losses, Objective
from advcl_hub.finetuning.presets import EXPORTED, Settings
from advcl_hub.hub.export import export_folder, verify_folder
from advcl_hub.models.branch_norm import branch_state_dict
from advcl_hub.models.pixel_space import PixelSpace
from advcl_hub.training.layout import safe_channels_last
from advcl_hub.training.loop import Loop
from advcl_hub.training.processes import Processes
from advcl_hub.training.runlog import Panel
from advcl_hub.training.seeds import epoch_order, seed_step
from advcl_hub.training.state import FILE, differences, group, load_state, pack_state, save_state, unpack_state
from advcl_hub.training.tensors import check_averageable

CLASSIFIER = "classifier"  # folder of the result, within the run's
_VAL_IMAGES = 500  # at most so many held-out images judge an epoch
_VAL_STEPS = 20  # of PGD, as evaluations report
_WORKERS = 2  # decode sets that are too large for memory


@dataclass
class Progress:
    """How far a run is.

    Attributes:
        step, seconds, finished: see `training.loop.Progress`.
        best: `epoch`, `standard` and `robust` of the best judged epoch; None before one.
        places: versions and hardware of every start that differed from the one before.
    """

    step: int = 0
    seconds: float = 0.0
    finished: bool = False
    best: dict[str, Any] | None = None
    places: list[dict[str, Any]] = field(default_factory=list)


class Finetuner(Loop):
    """One finetuning run in one folder, which holds its checkpoint, log, pictures and, at the end, the classifier.

    Args:
        model: a timm classifier with its head for the classes of the data, in evaluation mode.
        data: training images.
        held_out: those that choose the epoch, or None.
        settings: what to do.
        output: the run's folder; a checkpoint in it is continued.
        accelerator: this process among all.
        facts: what the result is made from; a checkpoint made from anything else is refused.
        place: versions and hardware.
        command: what was typed, for the record.
        arguments: of `timm.create_model`, for the export.
        new_head: whether the head is new, so that `zero_head` applies.
        checkpoint_minutes: time between checkpoints.

    Raises:
        ValueError: a batch that does not divide, a checkpoint of something else, features that cannot be computed once, or a
            folder where another process trains.
    """

    losses = Losses._fields
    panels = (
        Panel("loss", Losses._fields[:3]),
        Panel("accuracy (%)", ("train_accuracy", "val_standard", "val_robust"), percent=True),
        Panel("learning rate", ("lr",)),
    )
    remedy = "lower lr, or raise precision to float32 if it is bfloat16, in a new folder."

    state: Progress

    def __init__(
        self,
        model: nn.Module,
        data: ImageData,
        held_out: ImageData | None,
        settings: Settings,
        output: Path,
        accelerator: Accelerator,
        *,
        facts: Mapping[str, Any],
        place: Mapping[str, Any],
        command: str | None,
        arguments: Mapping[str, Any],
        new_head: bool,
        checkpoint_minutes: float,
    ) -> None:
        super().__init__(
            output,
            accelerator,
            images=len(data),
            epochs=settings.epochs,
            batch_size=settings.batch_size,
            seed=settings.seed,
            checkpoint_minutes=checkpoint_minutes,
        )
        if settings.batch_size % (self.world * settings.accumulate):
            raise ValueError(
                f"batch_size {settings.batch_size} does not divide into accumulate={settings.accumulate} parts on {self.world} "
                "processes; change one of them."
            )
        self.settings, self.facts, self.place, self.command = settings, dict(facts), dict(place), command
        self.arguments = dict(arguments)
        self.data, self.held_out = data.to(self.device), held_out
        self.labels, self.parts = self.data.labels, settings.accumulate
        with self.locked(output, accelerator):
            self.build(model, new_head=new_head)

    def build(self, model: nn.Module, *, new_head: bool) -> None:
        """Everything that is trained, as the checkpoint in the folder left it if there is one."""
        settings = self.settings
        layout = torch.channels_last if safe_channels_last(model, self.device) else torch.contiguous_format
        self.model = model.to(self.device).to(memory_format=layout)
        if settings.frozen:
            self.model.requires_grad_(False)
            linear_head(self.model).requires_grad_(True)
        self.features = self.compute_features() if settings.caches else None
        if settings.zero_head and new_head:
            zero_head(self.model)
        self.plain = copy.deepcopy(self.model)  # without branches: what is judged and exported
        pixels = PixelSpace(self.model, fit=not self.data.fitted, precision=settings.precision).to(self.device)
        self.objective = Objective(linear_head(self.model) if settings.caches else pixels, settings)
        if settings.ema_decay:
            check_averageable(self.model)
        self.ema = ModelEmaV3(self.model, decay=settings.ema_decay, use_warmup=True) if settings.ema_decay else None
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.SGD(
            self.trained, settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay
        )
        self.state, self.best = Progress(places=[self.place]), dict[str, Tensor]()
        if (self.output / FILE).is_file():
            self.restore()
        self.wrapped, self.stepper = self.prepare(self.objective)

    def compute_features(self) -> Tensor:
        """Features (N, D) of all training images."""
        images, _ = next(batches(self.data, min(2, len(self.data)), device=self.device))
        check_separable(self.model, images / 255, fit=not self.data.fitted)
        return extract_features(
            Headless(self.model),
            self.data,
            self.device,
            fit=not self.data.fitted,
            precision=self.settings.precision,
            processes=Processes.current(),
            workers=_WORKERS,
            progress=True,
        )

    def remaining_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """This process's share of every batch from the current step on: images in [0, 1], or features, and labels."""
        self.objective.train()
        share = self.batch_size // self.world
        for mine in self.remaining_rows():
            if self.features is not None:
                for rows in mine.to(self.device).split(share):
                    yield self.features[rows], self.labels[rows]
                continue
            for images, rows in batches(self.data, share, device=self.device, order=mine, workers=_WORKERS):
                yield images / 255, self.labels[rows]

    def augment(self, images: Tensor, mine: slice) -> Tensor:
        """The part `mine` of a batch (N, C, H, W), each image by its own choice of all that are drawn for the batch."""
        if self.settings.augment == "none":
            return images
        drawn = draw_weak(
            max(self.batch_size, len(images)),
            padding=max(1, max(images.shape[-2:]) // 8),
            flip=self.settings.augment == "crop-flip",
            device=self.device,
        )
        return weak_view(images, WeakParams(*(choice[mine][: len(images)] for choice in drawn)))

    def train_step(self, inputs: Tensor, labels: Tensor | None) -> None:
        """One optimizer step; `Objective.forward` is the method."""
        assert labels is not None
        seed_step(self.seed, self.state.step, 0)
        # Random numbers are drawn for the whole batch and cut, so that an image's do not depend on the number of processes.
        mine = slice(self.rank * len(inputs), (self.rank + 1) * len(inputs))
        if self.features is None:
            inputs = self.augment(inputs, mine)
        noise = self.objective.noise(torch.Size((self.batch_size, *inputs.shape[1:])), self.device)
        noise = None if noise is None else noise[mine]
        self.optimizer.param_groups[0]["lr"] = self.learning_rate()
        parts = self.settings.accumulate
        size = len(inputs) // parts
        sums: list[Tensor] = []
        for part in range(parts):
            rows = slice(part * size, (part + 1) * size)
            with nullcontext() if part == parts - 1 else self.accelerator.no_sync(self.wrapped):
                losses = self.wrapped(inputs[rows], labels[rows], None if noise is None else noise[rows])
                self.accelerator.backward(losses.total / parts)
            sums.append(torch.stack([x.detach() for x in losses]))
        self.stepper.step()
        self.stepper.zero_grad()
        if self.ema:
            self.ema.update(self.model, self.state.step + 1)
        self.stepped(list(torch.stack(sums).mean(0)))

    def learning_rate(self) -> float:
        """Of the step to come: divided by 10 at each milestone that has passed."""
        epoch = self.state.step / self.steps_per_epoch
        return self.settings.lr * 0.1 ** sum(epoch >= milestone for milestone in self.settings.milestones)

    def begin(self) -> None:
        """Saves a picture of some augmented images, then opens the folder."""
        if self.state.step == 0:
            self.picture_batch()
        super().begin()

    def picture_batch(self) -> None:
        """What the network is trained on, to batch.png: images, augmented and, once it is trained, adversarial."""
        if self.features is not None or not self.main:
            return
        seed_step(self.seed, self.state.step, 0)
        order = epoch_order(self.images, self.seed, 0)[:10]
        images, rows = next(batches(self.data, len(order), device=self.device, order=order))
        shown = {"image": images / 255}
        augmented = self.augment(images / 255, slice(None))
        if self.settings.augment != "none":
            shown["augmented"] = augmented
        noise = self.objective.noise(augmented.shape, self.device)
        if noise is not None and self.state.step:
            shown["adversarial"] = self.objective.attack(augmented, self.labels[rows], noise)
            shown["difference"] = 0.5 + (shown["adversarial"] - augmented) / (2 * self.settings.eps)
        self.output.mkdir(parents=True, exist_ok=True)
        with comfort("Drawing batch.png", errors=Exception):
            from advcl_hub.training.pictures import save_views  # needs matplotlib, which need not be there

            save_views(self.output / "batch.png", shown)

    def write_checkpoint(self) -> None:
        """Writes the checkpoint, after making sure that the weights are finite."""
        tensors = pack_state(self.model, self.optimizer, self.ema.module if self.ema else None)
        self.require_finite(all(v.isfinite().all() for v in tensors.values()), "weights are")
        tensors |= {f"best.{key}": value for key, value in self.best.items()}
        save_state(self.output, {**asdict(self.state), "facts": self.facts}, tensors)

    def restore(self) -> None:
        """Continues the checkpoint in the folder. Raises ValueError if it is one of something else."""
        info, tensors = load_state(self.output)
        if found := differences(info.pop("facts", {}), plain(self.facts)):
            raise ValueError(
                f"{self.output} holds an unfinished run of something else; choose another output, or undo:\n  "
                + "\n  ".join(found.values())
            )
        unpack_state(tensors, self.model, self.optimizer, self.ema.module if self.ema else None)
        self.state, self.best = Progress(**info), group(tensors, "best")
        if self.state.places[-1] != plain(self.place):
            self.state.places.append(self.place)
            if self.main:
                tqdm.write("Note: other hardware or versions than before; not bit by bit as one run.", file=sys.stderr)

    @property
    def judged(self) -> bool:
        """Whether epochs are judged at all."""
        return self.held_out is not None

    def weights(self) -> dict[str, Tensor]:
        """The plain state dict of what would be exported now, on the CPU."""
        state = (self.ema.module if self.ema else self.model).state_dict()
        return {
            k: v.detach().cpu().clone(memory_format=torch.contiguous_format)
            for k, v in branch_state_dict(state, EXPORTED).items()
        }

    def judge(self) -> None:
        """Clean and, if training attacks, PGD-20 accuracy on held-out images; keeps the weights of the epoch where the last of
        them is highest."""
        if self.main and self.held_out is not None:
            s = self.settings
            images = self.held_out.subset(self.held_out.balanced_positions(min(_VAL_IMAGES, len(self.held_out))))
            weights = self.weights()
            self.plain.load_state_dict(weights)
            measured = robustness(
                self.plain,
                images,
                eps=s.eps,
                step_size=s.step_size,
                steps=_VAL_STEPS if s.attacks else 0,
                seed=s.seed,
                device=self.device,
                fit=not images.fitted,
            )
            found = {"standard": measured.standard, **({"robust": measured.robust} if s.attacks else {})}
            epoch, score = self.state.step // self.steps_per_epoch, "robust" if s.attacks else "standard"
            told = ", ".join(f"{name} {value:.1%}" for name, value in found.items())
            tqdm.write(f"epoch {epoch}: {measured.images} held-out images: {told}", file=sys.stderr)
            if self.log:
                self.log.write(self.state.step, epoch=epoch, **{f"val_{name}": value for name, value in found.items()})
            if self.state.best is None or found[score] > self.state.best[score]:
                self.best = weights
                self.state.best = {"epoch": epoch, "chosen_by": score, **found, "images": measured.images}
        self.accelerator.wait_for_everyone()
        self.meter.restart()

    def finish(self) -> None:
        """The last judgement, then, by the main process, the export and its check."""
        self.judge()
        self.draw(now=True)
        if not self.main:
            return
        self.picture_batch()
        self.plain.load_state_dict(self.best or self.weights())
        results = {
            "kind": "classifier",
            **self.facts,
            "epoch": self.state.best["epoch"] if self.state.best else self.epochs,
            "chosen": "the best epoch on held-out images" if self.state.best else "the last epoch",
            "branch": EXPORTED,
            "step": self.state.step,
            "seconds": round(self.state.seconds, 1),
            "places": self.state.places,
            "command": self.command,
            "figures": {"held_out": self.state.best} if self.state.best else {},
        }
        folder = export_folder(
            self.plain.cpu(),
            self.output / CLASSIFIER,
            results=plain(results),
            model_args=self.arguments,
            label_names=self.data.classes,
        )
        verify_folder(folder)


def plain(record: Any) -> Any:
    """A record as JSON has it: tuples become lists."""
    if isinstance(record, Mapping):
        return {str(key): plain(value) for key, value in record.items()}
    return [plain(value) for value in record] if isinstance(record, list | tuple) else record
