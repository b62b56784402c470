"""The losses: contrastive over all views and all processes, cross-entropy on pseudo-labels at several K, cosines.

All of them run outside autocast, in float32 or wider: a softmax over thousands of negatives is not for bfloat16.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK = 2**22  # similarities made at once, 16 MiB in float32: more leave the cache of a CPU; a GPU takes 16 times as many


def contrastive_loss(views: Tensor | Sequence[Tensor], temperature: float = 0.5, base_temperature: float = 0.07) -> Tensor:
    """Multi-view InfoNCE (AdvCL section 4): every view is an anchor, the other views of the same image are its positives.

    The negatives of an anchor are all views of all other images of the global batch. The mean over the local anchors is scaled
    by temperature / base_temperature, as the published code does (0.5 / 0.07, about 7.1). With the gradient averaged over the
    processes, as DistributedDataParallel does, the result equals one process with the whole batch.

    Memory is linear in the batch: similarities are made some rows at a time and never kept. The gradient has a closed form,
    made only for the views that want one (not for the clean ones in the attack); it cannot be differentiated again, and all
    processes must scale their losses alike.

    Args:
        views: unit vectors, (V, N, D) or V tensors (N, D): V >= 2 views of the N local images.
        temperature: softmax temperature.
        base_temperature: the published scale's denominator; set it to `temperature` for the unscaled loss.

    Returns:
        Scalar in float32 (float64 if the input is).
    """
    if len(views) < 2:
        raise ValueError(f"A contrastive loss needs at least 2 views, got {len(views)}.")
    loss: Tensor = _Contrastive.apply(temperature, *(v.to(torch.promote_types(v.dtype, torch.float32)) for v in views))
    return loss * (temperature / base_temperature)


class _Contrastive(torch.autograd.Function):
    """The mean over the local anchors i of lse_i - (mean over the positives p of s_ip).

    s_ij = z_i z_j / temperature; lse_i = log of the sum of exp(s_ij) over all j but i. Every vector is an anchor, and a key to
    the anchors of all processes. As s is symmetric, the gradient of all their losses together needs their lse, no more:

        d/dz_i ~ sum over j but i of [exp(s_ij - lse_i) + exp(s_ij - lse_j)] z_j - 2 * mean over the positives p of z_p
    """

    @staticmethod
    def forward(ctx: Any, temperature: float, *views: Tensor) -> Tensor:
        anchors = torch.stack(views)  # (V, N, D)
        keys = _gather(anchors).flatten(0, -2)  # (W*V*N, D)
        lse = torch.cat([s.logsumexp(1) for _, s in _similarities(anchors.flatten(0, 1), keys, temperature, 0)])
        positives = (anchors.sum(0) - anchors) / (len(views) - 1)
        ctx.save_for_backward(anchors, positives, keys, lse, _gather(lse).flatten())
        ctx.temperature = temperature
        return lse.mean() - (anchors * positives).sum(2).mean() / temperature

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        anchors, positives, keys, lse, key_lse = ctx.saved_tensors
        n = anchors.shape[1]
        gradients: list[Tensor | None] = [None] * len(anchors)
        for v in [v for v in range(len(anchors)) if ctx.needs_input_grad[1 + v]]:
            pushes = []
            for rows, s in _similarities(anchors[v], keys, ctx.temperature, v * n):
                weights = (s - lse[v * n :][rows, None]).exp_().add_(s.sub_(key_lse).exp_())
                pushes.append(_product(weights, keys))
            gradients[v] = (torch.cat(pushes) - 2 * positives[v]) * (grad / (ctx.temperature * len(lse)))
        return None, *gradients


def _similarities(anchors: Tensor, keys: Tensor, temperature: float, first: int) -> Iterator[tuple[slice, Tensor]]:
    """Some rows of s at a time, with -inf where an anchor is its own key; `first` is the number of local keys before them."""
    rank = dist.get_rank() if _distributed() else 0
    world = dist.get_world_size() if _distributed() else 1
    first += rank * (len(keys) // world)
    size = max(1, (16 * CHUNK if anchors.is_cuda else CHUNK) // len(keys))
    for start in range(0, len(anchors), size):
        rows = slice(start, min(start + size, len(anchors)))
        s = _product(anchors[rows], keys.T).div_(temperature)
        s.diagonal(first + start).fill_(-torch.inf)
        yield rows, s


def _product(left: Tensor, right: Tensor) -> Tensor:
    with torch.autocast(left.device.type, enabled=False):
        return left @ right


def _gather(tensor: Tensor) -> Tensor:
    """The tensor of every process, stacked by rank (W, ...); without gradient."""
    if not _distributed():
        return tensor[None]
    everyone = tensor.new_empty(dist.get_world_size(), *tensor.shape)
    dist.all_gather(list(everyone), tensor.contiguous())
    return everyone


def _distributed() -> bool:
    return dist.is_initialized() and dist.get_world_size() > 1


def pseudo_label_loss(logits: Sequence[Tensor], labels: Tensor, reduction: str = "mean") -> Tensor:
    """Cross-entropy on pseudo-labels, averaged over the clusterings (AdvCL section 4).

    Args:
        logits: one (N, K) tensor a clustering.
        labels: int64 (N, len(logits)), the cluster of each image in each clustering.
        reduction: over the batch; "mean" in training, "sum" in the attack.
    """
    with torch.autocast(labels.device.type, enabled=False):
        losses = [
            F.cross_entropy(z.to(torch.promote_types(z.dtype, torch.float32)), labels[:, i], reduction=reduction)
            for i, z in enumerate(logits)
        ]
    return torch.stack(losses).mean()


def cosine_similarity(first: Tensor, second: Tensor) -> Tensor:
    """The cosine (N,) of vectors (N, D), in float32 or wider: the similarity of DeACL and ProFeAT."""
    with torch.autocast(first.device.type, enabled=False):
        first, second = (v.to(torch.promote_types(v.dtype, torch.float32)) for v in (first, second))
        return F.cosine_similarity(first, second, dim=1)
