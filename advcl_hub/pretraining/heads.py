"""Classifiers of pseudo-labels."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class PseudoLabelHeads(nn.ModuleDict):
    """One linear classifier for each clustering, all on the same features (AdvCL, arXiv 2111.01124, section 4).

    Args:
        dim: width of the features.
        ks: numbers of clusters.

    Raises:
        ValueError: `ks` is empty, repeats a number, or has one below 2.
    """

    def __init__(self, dim: int, ks: Sequence[int]) -> None:
        if not ks:
            raise ValueError(
                "ks is empty, but there is a pseudo-label term: give the numbers of clusters (AdvCL leaves the term out with "
                "pseudo_label_weight=0)."
            )
        if len(set(ks)) < len(ks) or not all(isinstance(k, int) and k >= 2 for k in ks):
            raise ValueError(f"ks are {tuple(ks)}, expected distinct numbers of clusters, each at least 2.")
        super().__init__({str(k): nn.Linear(dim, k) for k in ks})

    def forward(self, features: Tensor) -> list[Tensor]:
        """Logits (N, K) of features (N, dim), for every K."""
        return [head(features) for head in self.values()]

    def check(self, labels: Tensor | None, count: int) -> Tensor:
        """The pseudo-labels of `count` images. Raises ValueError if there are none, or of another type or shape."""
        if labels is None:
            raise ValueError("The objective has a pseudo-label term: pass the labels of the batch.")
        expected = (count, len(self))
        if labels.shape != expected or labels.dtype != torch.int64:
            raise ValueError(
                f"labels are {labels.dtype} {tuple(labels.shape)}, expected torch.int64 {expected}: a pseudo-label of "
                f"every image for each of ks = {', '.join(self)}."
            )
        return labels
