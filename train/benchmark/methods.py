"""The training step of every pretraining method, and what folded batch norms save in the attack."""

from collections.abc import Callable
from functools import partial
from typing import Any

import timm
import torch
from torch import Tensor, nn

from advcl_hub.pretraining import METHODS, Method, create_method
from advcl_hub.pretraining.method import constant_parameters
from advcl_hub.pretraining.pseudo_labels import PAPER_KS
from train.benchmark.report import Row, Section
from train.benchmark.timing import race


class Unfolded(nn.Module):
    """Stands for a method's folded copy: the encoder itself, in evaluation mode while it is attacked."""

    def __init__(self, method: Method) -> None:
        super().__init__()
        self.method = (method,)  # in a tuple: a module would hold itself

    def refresh(self, encoder: nn.Module) -> None:
        """Nothing to do: this is the encoder."""

    def forward(self, images: Tensor) -> Tensor:
        """Features in evaluation mode; only the images get a gradient."""
        method = self.method[0]
        method.encoder.eval()
        with constant_parameters(method.encoder), method.branch.use("adv"):
            features: Tensor = method.encoder(images)
        method.encoder.train()
        return features


def measure(
    model: str, images: Tensor, rounds: int, tell: Callable[[str], None] = print, dtype: torch.dtype = torch.bfloat16
) -> Section:
    """Steps of all methods on the same images (uint8 (N, C, H, W), where they are), in turns, under autocast.

    Those that attack in evaluation mode run a second time with the encoder itself in place of the folded copy.
    """
    device, shape = images.device, tuple(images.shape[1:])
    labels = torch.stack([torch.arange(len(images), device=device) % k for k in PAPER_KS], 1)
    networks: dict[str, Method] = {}
    for name in METHODS:
        networks[name] = _make(name, model, shape, device)
        if networks[name].objective.attacks_in_evaluation:
            networks[f"{name}, not folded"] = plain = _make(name, model, shape, device)
            plain.attack_copy = Unfolded(plain)

    def step(network: Method) -> None:
        with torch.autocast(device.type, dtype):
            losses = network(images, labels if network.objective.uses_labels else None)
        losses.total.backward()
        network.zero_grad()

    times = race({name: partial(step, network) for name, network in networks.items()}, device, rounds, tell=tell)
    rows = []
    for name, timing in times.items():
        whole = times.get(f"{name}, not folded")
        gain = f"{whole.median / timing.median:.2f}" if whole else ""
        steps, length = networks[name].attack.steps, networks[name].attack.step_size
        attack = f"{steps} x {255 * length:g}/255" if steps else ""
        rows.append(Row(name, timing, len(images), {"attack": attack, "by folding": gain}))
    note = (
        f"{model}, batch {len(images)}, channels-last, {str(dtype).removeprefix('torch.')}: augmentations, forward and "
        "backward pass, without the optimizer. By folding: how many times longer the step takes where the attack runs through "
        "the encoder itself in evaluation mode."
    )
    return Section("methods", "Training steps of the methods", rows, note=note)


def _make(name: str, model: str, shape: tuple[int, ...], device: torch.device) -> Method:
    pixels = {"input_size": shape, "mean": (0.0,) * shape[0], "std": (1.0,) * shape[0]}
    encoder: Any = timm.create_model(model, num_classes=0, pretrained_cfg_overlay=pixels)
    projector = nn.Sequential(nn.Linear(encoder.num_features, 128))
    network = create_method(name, encoder, ks=PAPER_KS, projector=projector, memory_format=torch.channels_last)
    return network.to(device).to(memory_format=torch.channels_last).train()
