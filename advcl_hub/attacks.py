"""The threat model: l_inf perturbations of at most `eps` around images in [0, 1].

Everything here is a pure function of a loss and images, so that training, probing and evaluation attack with the same code.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def uniform_start(images: Tensor, eps: float) -> Tensor:
    """Images plus noise drawn uniformly from [-eps, eps]; not clamped to [0, 1] (as the published AdvCL step starts).

    Args:
        images: float (..., C, H, W) in [0, 1].
        eps: radius, in the same unit as the images.
    """
    return images + torch.empty_like(images).uniform_(-eps, eps)


def ascend(adversarial: Tensor, gradient: Tensor, step_size: float) -> Tensor:
    """The steepest ascent step in l_inf: `step_size` along the sign of the gradient."""
    return adversarial + step_size * gradient.sign()


def project(adversarial: Tensor, images: Tensor, eps: float) -> Tensor:
    """The nearest point that is within `eps` (l_inf) of `images` and within [0, 1]."""
    return torch.minimum(torch.maximum(adversarial, images - eps), images + eps).clamp(0.0, 1.0)


def pgd(
    loss: Callable[[Tensor], Tensor],
    images: Tensor,
    *,
    eps: float,
    step_size: float,
    steps: int,
    start: Tensor | None = None,
) -> Tensor:
    """Projected gradient descent (Madry et al., arXiv 1706.06083): the last iterate of `steps` ascent steps on `loss`.

    Args:
        loss: maps perturbed images to a scalar. Sum over the images, so that no image's gradient depends on the batch size.
        images: float (..., C, H, W) in [0, 1], the centre of the ball.
        eps: l_inf radius, in the unit of the images (8/255 in the AdvCL paper).
        step_size: length of one step, in the same unit.
        steps: number of steps; 0 returns the start.
        start: where to start; by default uniform in the ball, clamped to [0, 1].

    Returns:
        Perturbed images of the shape of `images`, detached. The mode of the model is the caller's: evaluation mode to measure
        robustness, training mode inside the AdvCL step.
    """
    adversarial = project(uniform_start(images, eps), images, eps) if start is None else start
    for _ in range(steps):
        with torch.enable_grad():
            adversarial = adversarial.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(loss(adversarial), adversarial)
        adversarial = project(ascend(adversarial.detach(), gradient, step_size), images, eps)
    return adversarial.detach()
