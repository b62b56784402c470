"""The training step as published (AdvCL, arXiv 2111.01124), written plainly: what every shortcut is measured against.

Every attack step encodes all five views, although three of them do not change; the similarities of all pairs are kept for the
backward pass; nothing is fused, compiled, or in another type or layout than float32, contiguous
(of which torch, on a GPU, makes TF32 in convolutions).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from advcl_hub.pretraining.advcl import AdvCL
from advcl_hub.pretraining.views import Views


def published_losses(network: AdvCL, views: Views, noise: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The total, the contrastive and the pseudo-label loss of one step, ready for backward.

    Args:
        network: in training mode; of it only layers and settings are used.
        views: of N images.
        noise: the random starts (2, N, C, H, W) of the two perturbations, in [-eps, eps].
        labels: pseudo-labels (N, K).
    """
    attack, heads, weight = network.attack, network.heads, network.objective.pseudo_label_weight
    assert heads is not None

    def encode(x_cl: Tensor, x_ce: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The five forward passes: unit projections (N, 4, D) of four views, logits of the fifth."""
        features = []
        for x, branch in (
            (views.strong1, "clean"),
            (views.strong2, "clean"),
            (x_cl, "adv"),
            (views.high_frequency, "clean"),
        ):
            with network.branch.use(branch):
                features.append(F.normalize(network.projector(network.encoder(x)), dim=1))
        with network.branch.use("adv_ce"):
            hidden = network.encoder(x_ce)
        return torch.stack(features, dim=1), [head(hidden) for head in heads.values()]

    def climb(x: Tensor, gradient: Tensor) -> Tensor:
        """A step along the sign of the gradient, back into the ball around the weak view, and into [0, 1]."""
        x = x + attack.step_size * gradient.sign()
        x = torch.min(torch.max(x, views.weak - attack.eps), views.weak + attack.eps)
        return torch.clamp(x, 0, 1)

    x_cl, x_ce = views.weak + noise[0], views.weak + noise[1]
    for _ in range(attack.steps):
        x_cl, x_ce = x_cl.detach().requires_grad_(), x_ce.detach().requires_grad_()
        features, logits = encode(x_cl, x_ce)
        cross_entropy = sum(F.cross_entropy(z, labels[:, i], reduction="sum") for i, z in enumerate(logits)) / len(logits)
        loss = supervised_contrastive_loss(features) + weight * cross_entropy
        gradients = torch.autograd.grad(loss, [x_cl, x_ce])
        x_cl, x_ce = (climb(x.detach(), g) for x, g in zip((x_cl, x_ce), gradients, strict=True))
    features, logits = encode(x_cl, x_ce)
    contrastive = supervised_contrastive_loss(features)
    pseudo_label = sum((F.cross_entropy(z, labels[:, i]) for i, z in enumerate(logits)), torch.zeros(())) / len(logits)
    return contrastive + weight * pseudo_label, contrastive, pseudo_label


def supervised_contrastive_loss(features: Tensor, temperature: float = 0.5, base_temperature: float = 0.07) -> Tensor:
    """The contrastive loss with masks over all pairs, as its authors wrote it down (Khosla et al., arXiv 2004.11362).

    Args:
        features: unit vectors (N, V, D).
    """
    n, v, _ = features.shape
    contrast = torch.cat(features.unbind(1))  # (V*N, D)
    logits = contrast @ contrast.T / temperature
    logits = logits - logits.max(dim=1, keepdim=True).values.detach()
    not_self = 1 - torch.eye(v * n, device=features.device, dtype=features.dtype)
    positives = torch.eye(n, device=features.device, dtype=features.dtype).repeat(v, v) * not_self
    log_probability = logits - (logits.exp() * not_self).sum(1, keepdim=True).log()
    return -(temperature / base_temperature) * ((positives * log_probability).sum(1) / positives.sum(1)).mean()
