"""What the seed of the clustering decides."""

import torch

from advcl_hub.data import load_data
from advcl_hub.pretraining.pseudo_labels import make_pseudo_labels


def test_every_seed_has_clusters_of_its_own() -> None:
    data = load_data("fake:60")
    first, again, other = (make_pseudo_labels(data, "pixels", (15,), seed).labels for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    # Not only other numbers for the same clusters: other pairs of images are together.
    together = [labels == labels.T for labels in (first, other)]
    assert not torch.equal(*together)
