"""A classifier with clear margins, and what the tests of checks ask of its evaluations."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from advcl_hub.data import ImageData
from advcl_hub.evaluation import Evaluation, Protocol, evaluate
from tests.support.tiny_classifiers import TinyNet, labelled_by

EPS = 0.008  # PGD breaks two thirds of the images that ClearNet gets right


class ClearNet(TinyNet):
    """A TinyNet whose logits have mean 0 and deviation 5, so that its classes are even and PGD finds all there is to find."""

    def __init__(
        self,
        before: Callable[[Tensor], Tensor] = lambda images: images,
        after: Callable[[Tensor], Tensor] = lambda logits: logits,
        classes: int = 10,
    ) -> None:
        super().__init__(classes)
        self.before, self.after = before, after
        with torch.no_grad():
            logits = self.layers(torch.rand(500, 3, 8, 8))
            scale, last = 5 / logits.std(0), self.layers[-1]
            last.bias.copy_((last.bias - logits.mean(0)) * scale)
            last.weight.mul_(scale[:, None])

    def forward(self, images: Tensor) -> Tensor:
        return self.after(self.layers(self.before(images)))


def measured(model: nn.Module, data: ImageData | None = None, **settings: Any) -> Evaluation:
    data = labelled_by(ClearNet(), 30, wrong=3) if data is None else data
    return evaluate(model, data, Protocol(**{"eps": EPS, "steps": 10, **settings}), progress=False)


def names(evaluation: Evaluation) -> list[str]:
    return [check["name"] for check in evaluation.record["checks"]]


def failed(evaluation: Evaluation) -> set[str]:
    found = {check["name"] for check in evaluation.record["checks"] if not check["passed"]}
    assert found == {warning.partition(":")[0] for warning in evaluation.warnings if ": no. " in warning}
    return found


def detail(evaluation: Evaluation, name: str) -> str:
    return next(check["detail"] for check in evaluation.record["checks"] if check["name"] == name)


OF_THE_MODEL = ["deterministic", "evaluation mode", "logits"]


def with_gradient(change: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The identity, with another gradient."""

    def before(images: Tensor) -> Tensor:
        images = images.clone()
        if images.requires_grad:
            images.register_hook(change)
        return images

    return before


downhill = with_gradient(torch.neg)


def saturated(logits: Tensor) -> Tensor:
    return logits * 1e4
