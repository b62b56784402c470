"""The measurements: clean, PGD and AutoAttack, image by image, each batch a unit that is never measured twice."""

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from tqdm import tqdm

from advcl_hub.attacks import LOSSES, distance, excess, iterates, last, seeded_start
from advcl_hub.data import ImageData, batches
from advcl_hub.evaluation.journal import Journal, Payload
from advcl_hub.evaluation.protocol import Protocol
from advcl_hub.training.progress import progress_bar

Work = Callable[[Tensor, Tensor, list[int]], Payload]


class Measurement:
    """Applies attacks to images in batches, in the order of the data; shares the batches among all processes.

    Args:
        classifier: images in [0, 1] to logits, in evaluation mode.
        data: labelled images, N.
        protocol: how to attack.
        journal: what is known already, and where new results go.
        device: where to compute.
        progress: whether to show a bar with an ETA.
    """

    def __init__(
        self,
        classifier: nn.Module,
        data: ImageData,
        protocol: Protocol,
        journal: Journal,
        device: torch.device,
        progress: bool = True,
    ) -> None:
        self.classifier, self.data, self.protocol, self.journal, self.device = classifier, data, protocol, journal, device
        self.labels = data.labels.to(device)
        self.indices = data.indices.tolist()
        self.meter = _Meter(classifier, progress and journal.processes.rank == 0)

    def measure(self, stage: str, positions: list[int], work: Work, cost: int) -> Payload:
        """The results of `work` for the images at these positions, in their order, from the journal where it has them.

        Args:
            stage: name of the measurement.
            positions: which images.
            work: takes images (B, C, H, W) in [0, 1], labels (B,) and indices; returns lists of length B.
            cost: passes through the network an image, for the ETA; a pass with gradient counts three.
        """
        size = self.protocol.batch_size
        chunks = {f"{stage}/{i // size}": positions[i : i + size] for i in range(0, len(positions), size)}
        missing = [unit for unit in chunks if unit not in self.journal.units]
        mine = missing[self.journal.processes.rank :: self.journal.processes.count]
        self.meter.begin(stage, sum(len(chunks[unit]) for unit in mine) * cost)
        done = 0
        for unit in mine:
            torch.manual_seed(self.protocol.seed)  # a unit's numbers depend on nothing that was done before it
            started = time.monotonic()
            images, labels = self.load(chunks[unit])
            payload = work(images, labels, [self.indices[p] for p in chunks[unit]])
            self.journal.write(unit, payload, time.monotonic() - started)
            done += len(chunks[unit]) * cost
            self.meter.reach(done)
        self.journal.exchange(missing)
        results: Payload = {}
        for unit in chunks:
            for key, values in self.journal.units[unit].items():
                results.setdefault(key, []).extend(values)
        return results

    def knows(self, stage: str) -> bool:
        """Whether the whole stage is in the journal, so that nothing has to be loaded for it."""
        count = -(-len(self.data) // self.protocol.batch_size)
        return all(f"{stage}/{i}" in self.journal.units for i in range(count))

    def load(self, positions: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Images (B, C, H, W) in [0, 1] and labels (B,), on the device."""
        order = torch.tensor(positions)
        ((images, rows),) = batches(self.data, len(positions), device=self.device, order=order)
        return images / 255, self.labels[rows]

    @property
    def classes(self) -> int:
        """Number of classes that the model tells apart."""
        return len(self.data.classes)

    def on(self, data: ImageData) -> "Measurement":
        """The same with other images, one for each of these and of the same label."""
        other = copy.copy(self)
        other.data = data
        return other

    def clean(self, stage: str = "clean") -> Payload:
        """`correct` and `prediction` of every image as it is."""

        def work(images: Tensor, labels: Tensor, indices: list[int]) -> Payload:
            with torch.no_grad():
                prediction = self.classifier(images).argmax(1)
            return {"correct": (prediction == labels).tolist(), "prediction": prediction.tolist()}

        return self.measure(stage, list(range(len(self.data))), work, cost=1)

    def pgd(self, stage: str, positions: list[int], protocol: Protocol, first: int = 0) -> Payload:
        """PGD from the random starts `first` to `protocol.restarts` - 1, on the images at these positions.

        Returns:
            `restart`: the start that first broke an image, -1 if none did; the `prediction` then, or of the last start; and of
            that adversarial image the `distance` from the clean one, the `excess` over [0, 1], and whether logits are `finite`.
        """

        def work(images: Tensor, labels: Tensor, indices: list[int]) -> Payload:
            return self._pgd(images, labels, indices, protocol, first)

        return self.measure(stage, positions, work, cost=(protocol.restarts - first) * (3 * protocol.steps + 1))

    def _pgd(self, images: Tensor, labels: Tensor, indices: list[int], protocol: Protocol, first: int) -> Payload:
        broken_by, prediction = torch.full_like(labels, -1), torch.empty_like(labels)
        finite = torch.ones_like(labels, dtype=torch.bool)
        far, beyond = images.new_zeros(len(images)), images.new_zeros(len(images))
        for restart in range(first, protocol.restarts):
            left = (broken_by < 0).nonzero()[:, 0]
            if not len(left):
                break
            x, y = images[left], labels[left]
            adversarial = self.adversarial(x, y, [indices[i] for i in left.tolist()], protocol, restart)
            with torch.no_grad():
                logits = self.classifier(adversarial)
            found, finite[left] = logits.argmax(1), logits.isfinite().all(1)
            prediction[left], broken_by[left[found != y]] = found, restart
            far[left], beyond[left] = distance(adversarial, x, protocol.norm), excess(adversarial)
        return {
            "restart": broken_by.tolist(),
            "prediction": prediction.tolist(),
            "distance": far.tolist(),
            "excess": beyond.tolist(),
            "finite": finite.tolist(),
        }

    def pgd_by_steps(self, stage: str, positions: list[int], protocol: Protocol, counts: Sequence[int]) -> Payload:
        """One PGD run of max(counts) steps: for each count c, `c` says whether the image is right after so many steps."""

        def work(images: Tensor, labels: Tensor, indices: list[int]) -> Payload:
            found: Payload = {}
            for step, adversarial in enumerate(self.iterates(images, labels, indices, replace(protocol, steps=max(counts)), 0)):
                if step in counts:
                    with torch.no_grad():
                        found[str(step)] = (self.classifier(adversarial).argmax(1) == labels).tolist()
            return found

        return self.measure(stage, positions, work, cost=3 * max(counts) + len(counts))

    def adversarial(self, images: Tensor, labels: Tensor, indices: Sequence[int], protocol: Protocol, restart: int) -> Tensor:
        """The last of `iterates`."""
        return last(self.iterates(images, labels, indices, protocol, restart))

    def iterates(
        self, images: Tensor, labels: Tensor, indices: Sequence[int], protocol: Protocol, restart: int
    ) -> Iterator[Tensor]:
        """The protocol's PGD on images (B, C, H, W) with these labels and indices: its random start, then every iterate."""
        keys = [(protocol.seed, restart, index) for index in indices]
        return iterates(
            loss_of(self.classifier, labels, protocol.loss),
            images,
            eps=protocol.radius,
            step_size=protocol.step,
            steps=protocol.steps,
            norm=protocol.norm,
            start=seeded_start(images, protocol.radius, protocol.norm, keys),
        )


def loss_of(classifier: nn.Module, labels: Tensor, name: str) -> Callable[[Tensor], Tensor]:
    """A loss of `attacks.LOSSES` as `pgd` wants it: a function of images alone, summed over them."""
    return lambda x: LOSSES[name](classifier(x), labels).sum()


class _Meter:
    """A progress bar that moves with every pass through the network, also inside the hour that one batch of Square takes."""

    def __init__(self, classifier: nn.Module, show: bool) -> None:
        self.bar: tqdm | None = None
        self.done, self.limit, self.show = 0, 0, show
        classifier.register_forward_pre_hook(self._count)

    def begin(self, stage: str, total: int) -> None:
        """A stage of so many passes begins."""
        self.close()
        self.done, self.limit = 0, total
        if self.show and total:
            self.bar = progress_bar(total=total, desc=f"{stage:20}", bar_format=_BAR, delay=1)

    def _count(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        weight = 3 if torch.is_grad_enabled() and inputs[0].requires_grad else 1
        self.reach(min(self.done + weight * len(inputs[0]), self.limit - 1))

    def reach(self, done: int) -> None:
        """The stage is so far."""
        if self.bar is not None and done > self.done:
            self.bar.update(done - self.done)
        self.done = max(done, self.done)

    def close(self) -> None:
        """Ends the bar."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None


# Images that break early are not attacked further, so the time left is an upper bound.
_BAR = "{desc} {percentage:3.0f} %|{bar}| {elapsed}, at most {remaining} left"
