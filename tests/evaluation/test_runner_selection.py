"""Which images are measured, and what the record says of them."""

from dataclasses import replace

import torch

from advcl_hub.evaluation import Protocol, evaluate
from tests.support.tiny_classifiers import TinyNet, labelled_by


def test_n_images_are_of_all_classes_and_are_those_that_are_recorded() -> None:
    data = labelled_by(TinyNet(3), 60)
    data = replace(data, labels=torch.tensor([0] * 40 + [1] * 15 + [2] * 5))
    found = evaluate(TinyNet(3), data, Protocol(steps=0), n=12, progress=False)
    told = found.record["data"]
    assert (told["images"], told["of"], told["selection"]) == (12, 60, "class-balanced")
    assert told["sha256"] == data.subset(data.balanced_positions(12)).fingerprint()
    assert [row["images"] for row in found.record["per_class"].values()] == [4, 4, 4]
    assert len(found.images["index"]) == 12
