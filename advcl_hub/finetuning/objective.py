"""The losses of finetuning and the attacks inside them: cross-entropy, PGD adversarial training, TRADES."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from advcl_hub.attacks import pgd
from advcl_hub.finetuning.presets import EXPORTED, Settings
from advcl_hub.models.branch_norm import add_branches

_TRADES_START = 0.001  # deviation of the noise that TRADES starts from


class Losses(NamedTuple):
    """Scalars of one step; `total = natural + beta * robust` in TRADES, else that of the two which is trained.

    `train_accuracy` is that of the batch as the network classified it in training: adversarial with PGD, else clean.
    """

    total: Tensor
    natural: Tensor
    robust: Tensor
    train_accuracy: Tensor


class Objective(nn.Module):
    """One forward pass of finetuning, attack included, so that it can be wrapped for several processes.

    Args:
        network: inputs to logits (N, K); images in [0, 1] where there is an attack. It gets the settings' batch-norm branches.
        settings: what is trained, and how. With a frozen encoder the network stays in evaluation mode for good.
    """

    def __init__(self, network: nn.Module, settings: Settings) -> None:
        super().__init__()
        self.network, self.settings = network, settings
        self.switch = add_branches(network, settings.branches) if len(settings.branches) > 1 else None

    def train(self, mode: bool = True) -> "Objective":
        """Training mode, but for a frozen encoder, whose statistics must not move."""
        super().train(mode)
        if self.settings.frozen:
            self.network.eval()
        return self

    def noise(self, shape: torch.Size, device: torch.device) -> Tensor | None:
        """Where the attack on images of this shape starts, in units of its own; None without an attack."""
        if self.settings.objective == "pgd":
            return torch.empty(shape, device=device).uniform_(-1, 1)
        return torch.randn(shape, device=device) if self.settings.attacks else None

    def forward(self, inputs: Tensor, labels: Tensor, noise: Tensor | None) -> Losses:
        """Losses of a batch.

        Args:
            inputs: float (N, C, H, W) in [0, 1], or features (N, D).
            labels: int64 (N,).
            noise: of `self.noise`, like the inputs.
        """
        s, nothing = self.settings, inputs.new_zeros(())
        adversarial = inputs if noise is None else self.attack(inputs, labels, noise)
        if s.objective == "trades":
            clean = self._logits(inputs, "clean")
            # The official code computes the clean logits twice, which moves running averages once more; the loss is the same.
            robust = F.kl_div(self._logits(adversarial).log_softmax(1), clean.softmax(1), reduction="batchmean")
            natural = F.cross_entropy(clean, labels)
            return Losses(natural + s.beta * robust, natural.detach(), robust.detach(), _accuracy(clean, labels))
        logits = self._logits(adversarial)
        loss = F.cross_entropy(logits, labels)
        natural, robust = (nothing, loss.detach()) if s.attacks else (loss.detach(), nothing)
        return Losses(loss, natural, robust, _accuracy(logits, labels))

    def attack(self, images: Tensor, labels: Tensor, noise: Tensor) -> Tensor:
        """Adversarial images, detached; the network is in evaluation mode meanwhile.

        PGD (arXiv 1706.06083) raises the cross-entropy from a uniform start; TRADES (arXiv 1901.08573, section 4) the
        divergence of the adversarial from the clean prediction, from 0.001 times normal noise. As in the published code, the
        start may leave [0, 1]; the adversarial images do not.
        """
        s = self.settings
        with _evaluating(self.network):
            if s.objective == "pgd":
                start = images + s.eps * noise

                def loss(x: Tensor) -> Tensor:
                    return F.cross_entropy(self._logits(x), labels, reduction="sum")
            else:
                start = images + _TRADES_START * noise
                with torch.no_grad():
                    clean = self._logits(images, "clean").softmax(1)

                def loss(x: Tensor) -> Tensor:
                    return F.kl_div(self._logits(x).log_softmax(1), clean, reduction="sum")

            return pgd(loss, images, eps=s.eps, step_size=s.step_size, steps=s.steps, start=start)

    def _logits(self, inputs: Tensor, branch: str = EXPORTED) -> Tensor:
        if self.switch is None:
            return self.network(inputs)
        with self.switch.use(branch):
            return self.network(inputs)


@contextmanager
def _evaluating(network: nn.Module) -> Iterator[None]:
    training = network.training
    network.eval()
    try:
        yield
    finally:
        network.train(training)


def _accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    return (logits.detach().argmax(1) == labels).float().mean()
