"""AutoAttack (Croce & Hein, arXiv 2003.01690) through its authors' package pyautoattack, batch by batch.

The package attacks; the loop around it is ours, because its own cannot be continued after a kill. The seed is set before every
batch, so that each image's result is that of `pyautoattack.AutoAttack.run_standard_evaluation` at the same seed and batch size.
"""

import logging
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from advcl_hub.attacks import distance, excess
from advcl_hub.evaluation.journal import Payload
from advcl_hub.evaluation.measure import Measurement
from advcl_hub.evaluation.protocol import Protocol
from advcl_hub.records.reading import ATTACK_NAMES

if TYPE_CHECKING:
    from pyautoattack import AutoAttack

# Passes through the network an image when nothing breaks it, a pass with gradient counted three times; for the ETA.
_COST = {"apgd-ce": 304, "apgd-dlr": 304, "apgd-t": 2750, "fab-t": 3700, "square": 5001}
_EOT = 20  # gradients a step in the version for random models


def build(measurement: Measurement) -> "AutoAttack":
    """The package's AutoAttack for this protocol, with as many targets as there are other classes, at most nine."""
    return _build(measurement.classifier, measurement.protocol, measurement.classes, measurement.device)


def _build(classifier: nn.Module, protocol: Protocol, classes: int, device: torch.device) -> "AutoAttack":
    from pyautoattack import AutoAttack

    assert protocol.autoattack is not None
    with _quiet():
        attack = AutoAttack(
            classifier,
            norm=protocol.norm,
            eps=protocol.radius,
            seed=protocol.seed,
            version=protocol.autoattack,
            device=device,
        )
    attack.apgd_targeted.n_target_classes = attack.fab.n_target_classes = min(9, classes - 1)
    attack.attacks_to_run = [name for name in attack.attacks_to_run if classes >= _least_classes(name)]
    return attack


def left_out(protocol: Protocol, shape: tuple[int, int, int], classes: int) -> dict[str, str]:
    """The attacks of AutoAttack that fail on images of this shape, by name a sentence that says why.

    An attack may have needs that it does not tell: Square in l2 cuts the image into tiles, and fails where they do not fit,
    after hours of the other attacks. So each attack is tried on a stand-in of the model, with few steps on random images.

    Args:
        protocol: norm, eps and version of AutoAttack.
        shape: (C, H, W) of the images.
        classes: number of logits.
    """
    reasons: dict[str, str] = {}
    attack = _build(_Firm(classes), protocol, classes, torch.device("cpu"))
    for method in (attack.apgd, attack.apgd_targeted):
        method.n_iter, method.n_iter_2, method.eot_iter = 2, 1, 1  # n_iter_2: steps to the first look at the step size
    attack.fab.n_iter, attack.square.n_queries = 1, 2
    cuda = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(cuda):
        images = torch.rand(2, *shape, generator=torch.Generator().manual_seed(0))
        for name in attack.attacks_to_run:
            try:
                for batch in (images, images[:1]):  # the package treats a single image in its own way
                    _attack(attack, name, batch, torch.zeros(len(batch), dtype=torch.int64), [])
            except Exception as error:  # whatever it is, it would come again
                size = "x".join(map(str, shape[1:]))
                why = (str(error).strip() or repr(error)).splitlines()[0]
                reasons[name] = f"{ATTACK_NAMES[name]} cannot attack {size} images in {protocol.norm} ({why})"
    return reasons


class _Firm(nn.Module):
    """Gives class 0 to every image, whatever is done to it, and has gradients: attacks on it go all their way."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.classes = classes

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, classes): 10 for class 0, and for the others something small that depends on the image."""
        slopes = torch.linspace(0, 0.1, self.classes)
        return images.flatten(1).mean(1, keepdim=True) * slopes + 10 * (slopes == 0)


def _least_classes(name: str) -> int:
    """The targeted DLR loss divides by differences of the four largest logits, the untargeted one of three."""
    return {"apgd-t": 4, "apgd-dlr": 3}.get(name, 2)


def run(measurement: Measurement, positions: list[int], unable: Collection[str] = ()) -> dict[str, Payload]:
    """Attacks the images at these positions (those that are right when clean); each attack takes those that survived before it.

    Args:
        measurement: what measures.
        positions: which images.
        unable: attacks that are left out, see `left_out`.

    Returns:
        By attack: `position`, `survives`, `prediction` on the adversarial image; its `distance`, `excess`, `finite` as in PGD.
    """
    attack = build(measurement)
    results: dict[str, Payload] = {}
    for name in attack.attacks_to_run:
        if name in unable:
            continue
        cost = _COST[name] * (_EOT if measurement.protocol.autoattack == "rand" else 1)
        payload = measurement.measure(name, positions, partial(_attack, attack, name), cost)
        results[name] = {"position": positions, **payload}
        positions = [p for p, survives in zip(positions, payload.get("survives", []), strict=True) if survives]
    return results


def _attack(attack: "AutoAttack", name: str, images: Tensor, labels: Tensor, indices: list[int]) -> Payload:
    """One batch as in the package's run_standard_evaluation (pyautoattack 0.2), whose order of calls decides the numbers."""
    with _quiet(), torch.no_grad():
        if name.startswith("apgd-") and name != "apgd-t":
            method = attack.apgd
            method.loss = name.removeprefix("apgd-")
        elif name == "apgd-t":
            method = attack.apgd_targeted
        elif name == "fab-t":
            method = attack.fab
            method.targeted, method.n_restarts = True, 1
        else:
            method = attack.square
        method.seed = attack.get_seed()
        adversarial = method.perturb(images.clone(), labels.clone())
        logits = attack.get_logits(adversarial)
        prediction = logits.argmax(1)
    return {
        "survives": (prediction == labels).tolist(),
        "prediction": prediction.tolist(),
        "distance": distance(adversarial, images, attack.norm).tolist(),
        "excess": excess(adversarial).tolist(),
        "finite": logits.isfinite().all(1).tolist(),
    }


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the package's messages: its warnings are checks of ours, which reach the result."""
    logger = logging.getLogger("auto-attack")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
