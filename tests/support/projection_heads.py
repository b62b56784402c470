"""Projection heads with values of their own in every tensor."""

import torch
from torch import nn


def trained_head(features: int, *widths: int) -> nn.Sequential:
    """Linear layers of these widths, with batch norm (and statistics of a batch) and ReLU between them, in evaluation mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        layers: list[nn.Module] = []
        for takes, gives in zip((features, *widths), widths, strict=False):
            layers += [nn.Linear(takes, gives), nn.BatchNorm1d(gives), nn.ReLU()]
        head = nn.Sequential(*layers[:-2])
        for parameter in head.parameters():
            parameter.data += 0.1 * torch.rand_like(parameter)
        head(torch.rand(50, features))
    return head.eval()
