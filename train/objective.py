"""The AdvCL objective: contrastive loss over all views and all processes, and pseudo-label cross-entropy over several K.

Both losses run outside autocast, in float32 or wider: a softmax over thousands of negatives is not for bfloat16.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx


def gather_batch(views: Tensor) -> Tensor:
    """The views of every process, with gradient: (V, N, D) on each of W processes -> (V, W*N, D), ordered by rank.

        rank 0: [a b]                      every rank: [a b c d]
        rank 1: [c d]      ->              and the gradient of each entry flows back to the rank it came from

    `accelerator.gather` would detach: negatives of other processes would then not be pushed away.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return views
    return _GatherBatch.apply(views)


class _GatherBatch(torch.autograd.Function):
    """All-gather whose gradient is the sum over all processes' losses. (torch's own is deprecated, its successor too new.)"""

    @staticmethod
    def forward(ctx: FunctionCtx, views: Tensor) -> Tensor:
        parts = [torch.empty_like(views, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, views.contiguous())
        return torch.cat(parts, dim=1)

    @staticmethod
    def backward(ctx: FunctionCtx, *gradients: Tensor) -> Tensor:
        gradient = gradients[0].contiguous()
        dist.all_reduce(gradient)
        return gradient.chunk(dist.get_world_size(), dim=1)[dist.get_rank()]


def contrastive_loss(views: Tensor, temperature: float = 0.5, base_temperature: float = 0.07) -> Tensor:
    """Multi-view InfoNCE (AdvCL section 4): every view is an anchor, the other views of the same image are its positives.

    The negatives of an anchor are all views of all other images of the global batch. The mean over the local anchors is scaled
    by temperature / base_temperature, as the published code does (0.5 / 0.07, about 7.1). With the gradient averaged over the
    processes, as DistributedDataParallel does, the result equals one process with the whole batch.

    Args:
        views: unit vectors (V, N, D), V >= 2 views of the N local images.
        temperature: softmax temperature.
        base_temperature: the published scale's denominator; set it to `temperature` for the unscaled loss.

    Returns:
        Scalar in float32 (float64 if the input is).
    """
    num_views, n, dim = views.shape
    if num_views < 2:
        raise ValueError(f"A contrastive loss needs at least 2 views, got {num_views}.")
    with torch.autocast(views.device.type, enabled=False):
        views = views.to(torch.promote_types(views.dtype, torch.float32))
        everyone = gather_batch(views)
        total = everyone.shape[1]
        rank = dist.get_rank() if total > n else 0
        logits = views.reshape(-1, dim) @ everyone.reshape(-1, dim).T / temperature  # (V*N, V*W*N)

        # Column of view v of local image i is v * total + rank * n + i.
        image = rank * n + torch.arange(n, device=views.device)
        view = torch.arange(num_views, device=views.device)
        column = (view[:, None] * total + image).reshape(-1, 1)  # each anchor's own column
        shift = torch.arange(1, num_views, device=views.device) * total
        positives = (column + shift) % (num_views * total)

        attraction = logits.gather(1, positives).mean(1)
        repulsion = logits.scatter(1, column, -torch.inf).logsumexp(1)
        return (repulsion - attraction).mean() * (temperature / base_temperature)


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
