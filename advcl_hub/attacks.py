"""The threat model: perturbations of at most `eps` in the l_inf or l2 norm, around images in [0, 1].

Everything here is a pure function of a loss and images, so that training, probing and evaluation attack with the same code.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Norm = Literal["Linf", "L2"]
NORMS: tuple[Norm, ...] = get_args(Norm)


def uniform_start(images: Tensor, eps: float) -> Tensor:
    """Images plus noise drawn uniformly from [-eps, eps]; not clamped to [0, 1] (as the published AdvCL step starts).

    Args:
        images: float (..., C, H, W) in [0, 1].
        eps: radius, in the same unit as the images.
    """
    return images + torch.empty_like(images).uniform_(-eps, eps)


def seeded_start(images: Tensor, eps: float, norm: Norm, keys: Sequence[Sequence[int]]) -> Tensor:
    """A point drawn uniformly from the ball around each image, clamped to [0, 1].

    Each image's noise comes from its own key, so that batch size, order, device and number of processes do not matter.

    Args:
        images: float (N, C, H, W) in [0, 1].
        eps: radius, in the same unit.
        norm: of the ball.
        keys: N sequences of integers of at least 0, e.g. (seed, restart, index of the image).
    """
    noise = torch.stack([_noise(images.shape[1:], eps, norm, key) for key in keys]).to(images)
    return project(images + noise, images, eps, norm)


def _noise(shape: torch.Size, eps: float, norm: Norm, key: Sequence[int]) -> Tensor:
    generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence(key)))
    if norm == "Linf":
        return torch.from_numpy(generator.uniform(-eps, eps, shape))
    direction = torch.from_numpy(generator.standard_normal(shape))
    radius = eps * generator.random() ** (1 / direction.numel())
    return direction * (radius / direction.norm())


def ascend(adversarial: Tensor, gradient: Tensor, step_size: float, norm: Norm = "Linf") -> Tensor:
    """The steepest ascent step of length `step_size`: along the sign of the gradient in l_inf, along the gradient in l2.

    Where the gradient is not a number there is no step: an attack that fails is not a model that breaks.
    """
    if norm == "Linf":
        return adversarial + step_size * gradient.sign()
    tiny = torch.finfo(gradient.dtype).tiny
    gradient = gradient.nan_to_num(0.0)
    largest = gradient.abs().amax((-3, -2, -1), keepdim=True)
    gradient = gradient / largest.clamp_min(tiny)  # else its square may be 0 or infinite
    return adversarial + step_size * gradient / _lengths(gradient).clamp_min(tiny)


def project(adversarial: Tensor, images: Tensor, eps: float, norm: Norm = "Linf") -> Tensor:
    """A point within `eps` of `images` and within [0, 1]: in l_inf the nearest, in l2 that of the ball, then clamped."""
    if norm == "Linf":
        return torch.minimum(torch.maximum(adversarial, images - eps), images + eps).clamp(0.0, 1.0)
    delta = adversarial - images
    shrink = eps / _lengths(delta).clamp_min(max(eps, torch.finfo(delta.dtype).tiny))
    return (images + delta * shrink).clamp(0.0, 1.0)


def distance(adversarial: Tensor, images: Tensor, norm: Norm = "Linf") -> Tensor:
    """The norm (N,) of each perturbation; images are (N, C, H, W)."""
    delta = (adversarial - images).flatten(1)
    return delta.abs().amax(1) if norm == "Linf" else delta.norm(dim=1)


def excess(adversarial: Tensor) -> Tensor:
    """How far (N,) each image leaves [0, 1], 0 if it does not."""
    return torch.maximum(-adversarial, adversarial - 1).clamp_min(0).flatten(1).amax(1)


def _lengths(tensor: Tensor) -> Tensor:
    return tensor.flatten(-3).norm(dim=-1)[..., None, None, None]


def pgd(
    loss: Callable[[Tensor], Tensor],
    images: Tensor,
    *,
    eps: float,
    step_size: float,
    steps: int,
    norm: Norm = "Linf",
    start: Tensor | None = None,
) -> Tensor:
    """Projected gradient descent (Madry et al., arXiv 1706.06083): the last iterate of `steps` ascent steps on `loss`.

    Args:
        loss: maps perturbed images to a scalar. Sum over the images, so that no image's gradient depends on the batch size.
        images: float (..., C, H, W) in [0, 1], the centre of the ball.
        eps: radius, in the unit of the images (8/255 in l_inf in the AdvCL paper).
        step_size: length of one step, in the same unit.
        steps: number of steps; 0 returns the start.
        norm: in which eps and step_size are measured.
        start: where to start; by default uniform in the l_inf ball, projected (`seeded_start` draws from the l2 ball).

    Returns:
        Perturbed images of the shape of `images`, detached. The mode of the model is the caller's: evaluation mode to measure
        robustness, training mode inside the AdvCL step.
    """
    return last(iterates(loss, images, eps=eps, step_size=step_size, steps=steps, norm=norm, start=start))


def last(run: Iterator[Tensor]) -> Tensor:
    """The last of some iterates, without keeping the others."""
    return deque(run, maxlen=1).pop()


def iterates(
    loss: Callable[[Tensor], Tensor],
    images: Tensor,
    *,
    eps: float,
    step_size: float,
    steps: int,
    norm: Norm = "Linf",
    start: Tensor | None = None,
) -> Iterator[Tensor]:
    """The start of `pgd` and each of its `steps` iterates, detached."""
    images = images.detach()
    adversarial = (project(uniform_start(images, eps), images, eps, norm) if start is None else start).detach()
    yield adversarial
    for _ in range(steps):
        with torch.enable_grad():
            leaf = adversarial.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(loss(leaf), leaf)
        adversarial = project(ascend(adversarial, gradient, step_size, norm), images, eps, norm)
        yield adversarial


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy (N,) of logits (N, K)."""
    return F.cross_entropy(logits, labels, reduction="none")


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """The best wrong logit minus the right one (N,), positive where misclassified (Carlini & Wagner, arXiv 1608.04644)."""
    others = logits.scatter(1, labels[:, None], -torch.inf)
    return others.amax(1) - logits.gather(1, labels[:, None])[:, 0]


def dlr(logits: Tensor, labels: Tensor) -> Tensor:
    """Difference of logits ratio (N,), invariant to shift and scale of the logits (Croce & Hein, arXiv 2003.01690, eq. 6).

    Raises:
        ValueError: fewer than three classes.
    """
    if logits.shape[1] < 3:
        raise ValueError(f"The DLR loss needs at least 3 classes, the model has {logits.shape[1]}: use ce or margin.")
    top = logits.topk(3).values
    return margin(logits, labels) / (top[:, 0] - top[:, 2] + 1e-12)


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"ce": cross_entropy, "margin": margin, "dlr": dlr}
