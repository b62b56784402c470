"""AutoAttack (Croce & Hein, arXiv 2003.01690) through its authors' package pyautoattack, batch by batch.

The package attacks; the loop around it is ours, because its own cannot be continued after a kill. The seed is set before every
batch, so that each image's result is that of `pyautoattack.AutoAttack.run_standard_evaluation` at the same seed and batch size.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from advcl_hub.attacks import distance, excess
from advcl_hub.evaluation.journal import Payload
from advcl_hub.evaluation.measure import Measurement

if TYPE_CHECKING:
    from pyautoattack import AutoAttack

# Passes through the network an image when nothing breaks it, a pass with gradient counted three times; for the ETA.
_COST = {"apgd-ce": 304, "apgd-dlr": 304, "apgd-t": 2750, "fab-t": 3700, "square": 5001}
_EOT = 20  # gradients a step in the version for random models


def build(measurement: Measurement) -> "AutoAttack":
    """The package's AutoAttack for this protocol, with as many targets as there are other classes, at most nine."""
    from pyautoattack import AutoAttack

    protocol, classes = measurement.protocol, measurement.classes
    assert protocol.autoattack is not None
    with _quiet():
        attack = AutoAttack(
            measurement.classifier,
            norm=protocol.norm,
            eps=protocol.radius,
            seed=protocol.seed,
            version=protocol.autoattack,
            device=measurement.device,
        )
    attack.apgd_targeted.n_target_classes = attack.fab.n_target_classes = min(9, classes - 1)
    attack.attacks_to_run = [name for name in attack.attacks_to_run if classes >= _least_classes(name)]
    return attack


def _least_classes(name: str) -> int:
    """The targeted DLR loss divides by differences of the four largest logits, the untargeted one of three."""
    return {"apgd-t": 4, "apgd-dlr": 3}.get(name, 2)


def run(measurement: Measurement, positions: list[int]) -> dict[str, Payload]:
    """Attacks the images at these positions (those that are right when clean); each attack takes those that survived before it.

    Returns:
        By attack: `position`, `survives`, `prediction` on the adversarial image; its `distance`, `excess`, `finite` as in PGD.
    """
    attack = build(measurement)
    results: dict[str, Payload] = {}
    for name in attack.attacks_to_run:
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
