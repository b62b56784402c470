"""The measurements: clean, PGD and AutoAttack, image by image, each batch a unit that is never measured twice."""

import copy
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from tqdm import tqdm

from advcl_hub.attacks import LOSSES, Norm, distance, iterates, pgd, seeded_start
from advcl_hub.data import ImageData, batches
from advcl_hub.evaluation.journal import Journal, Payload
from advcl_hub.evaluation.protocol import Protocol
from advcl_hub.progress import progress_bar

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
        for unit in mine:
            torch.manual_seed(self.protocol.seed)  # a unit's numbers depend on nothing that was done before it
            started = time.monotonic()
            images, labels = self.load(chunks[unit])
            payload = work(images, labels, [self.indices[p] for p in chunks[unit]])
            self.journal.write(unit, payload, time.monotonic() - started)
            self.meter.reach(sum(len(chunks[u]) for u in mine[: mine.index(unit) + 1]) * cost)
        self.journal.exchange(missing)
        results: Payload = {}
        for unit in chunks:
            for key, values in self.journal.units[unit].items():
                results.setdefault(key, []).extend(values)
        return results

    def load(self, positions: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Images (B, C, H, W) in [0, 1] and labels (B,), on the device."""
        order = torch.tensor(positions)
        ((images, rows),) = batches(self.data, len(positions), device=self.device, order=order)
        return images / 255, self.labels[rows]

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

    def pgd(self, stage: str, positions: list[int], protocol: Protocol) -> Payload:
        """PGD on the images at these positions: the `restart` (from 0) that first broke each, or -1 if none did; the
        `prediction` then, or of the last restart; and the `distance` of that image from the clean one."""

        def work(images: Tensor, labels: Tensor, indices: list[int]) -> Payload:
            return _pgd(self.classifier, images, labels, indices, protocol)

        return self.measure(stage, positions, work, cost=protocol.restarts * (3 * protocol.steps + 1))

    def pgd_by_steps(self, stage: str, positions: list[int], protocol: Protocol, counts: Sequence[int]) -> Payload:
        """One PGD run of max(counts) steps: for each count c, `c` says whether the image survives that many steps."""

        def work(images: Tensor, labels: Tensor, indices: list[int]) -> Payload:
            found: Payload = {}
            for step, adversarial in enumerate(
                iterates(
                    loss_of(self.classifier, labels, protocol.loss),
                    images,
                    eps=protocol.radius,
                    step_size=protocol.step,
                    steps=max(counts),
                    norm=protocol.norm,
                    start=start_of(images, indices, protocol, restart=0),
                )
            ):
                if step in counts:
                    with torch.no_grad():
                        found[str(step)] = (self.classifier(adversarial).argmax(1) == labels).tolist()
            return found

        return self.measure(stage, positions, work, cost=3 * max(counts) + len(counts))


def pgd_cross_entropy(
    classifier: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    eps: float,
    step_size: float,
    steps: int,
    norm: Norm = "Linf",
    start: Tensor | None = None,
) -> Tensor:
    """Adversarial images (N, C, H, W) that raise the cross-entropy of a classifier of images in [0, 1]."""
    loss = loss_of(classifier, labels, "ce")
    return pgd(loss, images, eps=eps, step_size=step_size, steps=steps, norm=norm, start=start)


def _pgd(classifier: nn.Module, images: Tensor, labels: Tensor, indices: list[int], protocol: Protocol) -> Payload:
    broken_by = torch.full_like(labels, -1)
    prediction, far = torch.empty_like(labels), images.new_zeros(len(images))
    for restart in range(protocol.restarts):
        left = (broken_by < 0).nonzero()[:, 0]
        if not len(left):
            break
        x, y = images[left], labels[left]
        adversarial = pgd(
            loss_of(classifier, y, protocol.loss),
            x,
            eps=protocol.radius,
            step_size=protocol.step,
            steps=protocol.steps,
            norm=protocol.norm,
            start=start_of(x, [indices[i] for i in left.tolist()], protocol, restart),
        )
        with torch.no_grad():
            found = classifier(adversarial).argmax(1)
        prediction[left], far[left] = found, distance(adversarial, x, protocol.norm)
        broken_by[left[found != y]] = restart
    return {"restart": broken_by.tolist(), "prediction": prediction.tolist(), "distance": far.tolist()}


def loss_of(classifier: nn.Module, labels: Tensor, name: str) -> Callable[[Tensor], Tensor]:
    """A loss of `attacks.LOSSES` as `pgd` wants it: a function of images alone, summed over them."""
    return lambda x: LOSSES[name](classifier(x), labels).sum()


def start_of(images: Tensor, indices: list[int], protocol: Protocol, restart: int) -> Tensor:
    """The random starts that the protocol's seed gives to images with these indices."""
    keys = [(protocol.seed, restart, index) for index in indices]
    return seeded_start(images, protocol.radius, protocol.norm, keys)


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
