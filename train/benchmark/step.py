"""The training step: the published one against ours, one way of saving time after the other."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from advcl_hub.attacks import uniform_start
from advcl_hub.pretraining import AdvCL, Attack
from advcl_hub.pretraining.views import make_views
from train.benchmark.published import published_losses
from train.benchmark.report import Row, Section
from train.benchmark.timing import count_flops, matmul_rate, peak_memory, race
from train.network import build_network, build_optimizer, compile_encoder
from train.recipe import Optimizer, PseudoLabelSource, Recipe, Speed, require

PUBLISHED = "published step"


@dataclass(frozen=True)
class Mode:
    """A way to run the step. All but `published` are settings of a recipe."""

    name: str
    speed: Speed = field(default_factory=Speed)
    attack: Attack = field(default_factory=Attack)

    @property
    def dtype(self) -> torch.dtype:
        """In which the network's matrix products run."""
        return torch.bfloat16 if self.speed.mixed_precision == "bf16" else torch.float32


def modes(compiled: bool) -> list[Mode]:
    """The published step, then each shortcut on top of the one before, then attacks of fewer and larger steps.

    Args:
        compiled: whether torch.compile is one of the shortcuts.
    """
    layout = Speed(channels_last=True)
    bf16 = replace(layout, mixed_precision="bf16")
    fastest = replace(bf16, compile=compiled)
    return [
        Mode(PUBLISHED),
        Mode("ours: clean views once"),
        Mode("+ channels-last", layout),
        Mode("+ bf16", bf16),
        *([Mode("+ compile", fastest)] if compiled else []),
        Mode("attack 3 x 4/255", fastest, Attack(step_size=4 / 255, steps=3)),
        Mode("attack 1 x 10/255", fastest, Attack(step_size=10 / 255, steps=1)),
    ]


class Contestant:
    """A network of its own that takes training steps on one batch.

    Args:
        mode: how.
        model: name of a timm architecture for 32x32 images.
        images: uint8 (N, 3, H, W).
    """

    def __init__(self, mode: Mode, model: str, images: Tensor) -> None:
        self.recipe = Recipe(
            model=model,
            speed=mode.speed,
            attack=mode.attack,
            optimizer=Optimizer(lr=0.01),  # small enough for one batch, seen again and again
            pseudo_labels=PseudoLabelSource(encoder="pixels"),  # never made: the labels are random
        )
        channels, height, width = images.shape[1:]
        shape = (channels, height, width)
        self.mode, self.images = mode, images
        network = build_network(self.recipe, shape, images.device)
        assert isinstance(network, AdvCL)
        self.network = network
        self.model: nn.Module = self.network  # what a step calls: with several processes, the network as they share it
        self.optimizer = build_optimizer(self.recipe, self.network)
        labels = [torch.randint(k, (len(images),)) for k in self.recipe.pseudo_labels.ks]
        self.labels = torch.stack(labels, 1).to(images.device)
        self.loss = torch.zeros(())
        if mode.speed.compile:
            compile_encoder(self.recipe, self.network, shape)

    def step(self) -> None:
        """The batch gathered, views, attack, loss, gradient, update."""
        images = _batch(self.images)
        if self.mode.name == PUBLISHED:
            views = make_views(images, self.recipe.views)
            noise = uniform_start(torch.zeros(2, *views.weak.shape, device=views.weak.device), self.recipe.attack.eps)
            total = published_losses(self.network, views, noise, self.labels)[0]
        else:
            with torch.autocast(self.images.device.type, torch.bfloat16, enabled=self.mode.dtype == torch.bfloat16):
                total = self.model(images, self.labels).total
        total.backward()
        self.loss = total.detach()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def forward(self) -> None:
        """One view through encoder and projection head: what a forward-equivalent is."""
        with torch.no_grad():
            self.network.project([self.images / 255], "clean")


def measure(
    model: str, images: Tensor, chosen: Sequence[Mode], rounds: int, tell: Callable[[str], None] = lambda text: None
) -> Section:
    """Steps of all modes on the same images (uint8 (N, C, H, W), where they are), in turns."""
    device, n = images.device, len(images)
    contestants = {mode.name: Contestant(mode, model, images) for mode in chosen}
    times = race({name: c.step for name, c in contestants.items()}, device, rounds, tell=tell)
    for name, contestant in contestants.items():
        require(bool(contestant.loss.isfinite()), f"The loss of {name!r} is not finite: its time means nothing.")
    recipe = contestants[chosen[0].name].recipe
    views = race({"": lambda: make_views(_batch(images), recipe.views)}, device, rounds)[""].median
    rates = {dtype: matmul_rate(device, dtype) for dtype in {mode.dtype for mode in chosen}}
    few = images[:8]  # the operations of an image do not depend on how many there are, but for the losses' small part
    forward = count_flops(Contestant(chosen[0], model, few).forward)
    flops: dict[tuple[bool, Attack], int] = {}
    rows = []
    for mode in chosen:
        tell(f"memory, operations: {mode.name}")
        contestant, timing = contestants[mode.name], times[mode.name]
        kind = (mode.name == PUBLISHED, mode.attack)
        if kind not in flops:
            flops[kind] = count_flops(Contestant(replace(mode, speed=Speed()), model, few).step)
        memory = peak_memory(contestant.step, device)
        achieved = flops[kind] * (n / len(few)) / timing.median
        more = {
            "forwards an image": f"{flops[kind] / forward:.1f}",
            "GFLOP/s": achieved / 1e9,
            "of matrix rate": f"{achieved / rates[mode.dtype]:.0%}",
            "memory, MB": "" if memory is None else memory / 1e6,
            "data and views": f"{views / timing.median:.1%}",
        }
        rows.append(Row(mode.name, timing, n, more))
    products = ", ".join(f"{str(d).removeprefix('torch.')} {r / 1e9:,.0f}" for d, r in sorted(rates.items(), key=str))
    note = (
        f"{model}, batch {n}; median of {rounds} rounds in turns (slowest to fastest). Matrix products reach {products} "
        "GFLOP/s here. One forward: a view through encoder and projection head. Memory: the most that a step holds besides "
        "weights and momentum. Data and views: gathering the batch and augmenting it, the same for all here. The last two do "
        "another attack than the others."
    )
    return Section("step", "Training step", rows, note=note)


def _batch(images: Tensor) -> Tensor:
    """The images gathered in another order, as the loop does from the set in memory."""
    return images[torch.randperm(len(images), device=images.device)]
