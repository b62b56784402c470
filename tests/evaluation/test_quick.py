"""The figures and images for use while training are those of an evaluation."""

from dataclasses import replace

import pytest
import torch

from advcl_hub.evaluation import Protocol, adversarial_images, evaluate
from tests.support.tiny_classifiers import TinyNet, labelled_by


@pytest.mark.parametrize("steps", [0, 5])
def test_adversarial_images_are_those_that_an_evaluation_measured(steps: int) -> None:
    model = TinyNet()
    data = labelled_by(model, 60)
    attack = Protocol(eps=0.02, steps=steps, check_images=0, batch_size=25, seed=3)
    if steps:
        expected = evaluate(model, data, attack, progress=False).images["pgd"]
        assert 5 < sum(expected) < 55
    images = adversarial_images(model, data, attack)
    distance = (images - data.images / 255).abs()
    assert distance.max() <= 0.02 + 1e-6 and images.min() >= 0 and images.max() <= 1
    assert distance.mean() > 0.01 if steps else not distance.any()
    few = adversarial_images(model, data.subset(torch.arange(20, 30)), attack)
    assert torch.allclose(few, images[20:30], atol=1e-6)  # the starts belong to images, not to batches
    if steps:
        with torch.no_grad():
            assert (model(images).argmax(1) == data.labels).tolist() == expected


def test_adversarial_images_are_made_in_the_precision_of_the_protocol() -> None:
    model = TinyNet()
    data = labelled_by(model, 20)
    exact, coarse = (adversarial_images(model, data, Protocol(steps=2, precision=p)) for p in ("float32", "bfloat16"))
    assert not torch.equal(exact, coarse)


def test_what_cannot_be_attacked() -> None:
    model = TinyNet()
    data = labelled_by(model, 3)
    with pytest.raises(ValueError, match="No images"):
        adversarial_images(model, data.subset(torch.arange(0)), Protocol())
    with pytest.raises(ValueError, match="has images without a label"):
        adversarial_images(model, replace(data, labels=torch.tensor([0, -1, 2])), Protocol())
    with pytest.raises(ValueError, match="The model tells 10 classes apart, random has 2"):
        adversarial_images(model, replace(data, classes=("a", "b")), Protocol())
    with pytest.raises(ValueError, match="The device nowhere cannot be used"):
        adversarial_images(model, data, Protocol(), device="nowhere")
