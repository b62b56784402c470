"""Signs of false robustness, looked for in every evaluation (Athalye et al., arXiv 1802.00420; Carlini et al., 1902.06705)."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from advcl_hub.attacks import LOSSES, ascend, project
from advcl_hub.evaluation.journal import Payload
from advcl_hub.evaluation.measure import Measurement
from advcl_hub.evaluation.protocol import Protocol
from advcl_hub.records import counted, pixels

CURVE_EPS = (0.25, 0.5, 1, 2, 4)  # times the protocol's eps
CURVE_STEPS = (1, 2, 5, 10, 20, 50, 100)
RESTARTS = 4  # more than the protocol's
_SLACK = 0.02  # attacks are no exact maximisers: this much may go the wrong way
_GAIN = 0.05  # ... and this much more may a stronger attack find before the figure is in doubt


@dataclass(frozen=True)
class Check:
    """One thing that was looked at: what, whether it is as it should be, and what was seen."""

    name: str
    passed: bool
    detail: str


def model_checks(classifier: nn.Module, images: Tensor, labels: Tensor, protocol: Protocol) -> list[Check]:
    """Checks of the function itself, on a batch (N, C, H, W) of images in [0, 1] with labels (N,)."""
    with torch.no_grad():
        first, second = classifier(images), classifier(images)
        alone = torch.cat([classifier(image[None]) for image in images[:8]])
    random = difference(first, second)
    together = difference(first[:8], alone)
    batch_norms = [
        name
        for name, module in classifier.named_modules()
        if module.training or (isinstance(module, _BatchNorm) and module.running_mean is None)
    ]
    advise = random > 1e-4 and protocol.autoattack != "rand"
    total = first.sum(1)
    softmax = bool(((first >= 0).all() and (first <= 1 + 1e-5).all() and ((total - 1).abs() < 1e-4).all()).item())
    return [
        Check(
            "deterministic",
            random <= 1e-4,
            f"two passes differ by {random:.1e}" + (": random models need autoattack=rand" if advise else ""),
        ),
        Check(
            "evaluation mode",
            not batch_norms and (together <= protocol.tolerance or random > 1e-4),
            f"an image's logits in a batch and alone differ by {together:.1e}"
            + (f"; in training mode or without running statistics: {', '.join(batch_norms[:3])}" if batch_norms else ""),
        ),
        Check(
            "logits",
            not softmax,
            "the outputs are probabilities, not logits" if softmax else "the outputs are no probabilities",
        ),
    ]


def difference(a: Tensor, b: Tensor) -> float:
    """The largest distance of two sets of logits (N, K), each scaled to length 1."""
    return (F.normalize(a, dim=1) - F.normalize(b, dim=1)).norm(dim=1).max().item()


def gradient_checks(measurement: Measurement, positions: list[int]) -> list[Check]:
    """Whether the cross-entropy has gradients, and whether following them beats a random step of the same length."""
    protocol = measurement.protocol

    def work(images: Tensor, labels: Tensor, indices: list[int]) -> Payload:
        x = images.clone().requires_grad_()
        loss = LOSSES["ce"](measurement.classifier(x), labels)
        (gradient,) = torch.autograd.grad(loss.sum(), x)
        length = protocol.radius / 8
        with torch.no_grad():
            steps = (gradient, torch.randn_like(gradient))
            uphill, random = (  # by their margin, as the cross-entropy of confident models is 0 on both sides
                LOSSES["margin"](measurement.classifier(ascend(images, g, length, protocol.norm).clamp(0, 1)), labels)
                for g in steps
            )
        size = gradient.flatten(1).abs().amax(1)
        return {"usable": ((size > 0) & gradient.flatten(1).isfinite().all(1)).tolist(), "uphill": (uphill > random).tolist()}

    found = measurement.measure("check gradients", positions, work, cost=5)
    usable, uphill, n = sum(found.get("usable", [])), sum(found.get("uphill", [])), len(positions)
    return [
        Check("gradients", usable == n, f"zero or not finite on {n - usable} of {n} images"),
        Check("gradients lead uphill", uphill >= 0.9 * n, f"a gradient step beats a random one on {uphill} of {n} images"),
    ]


def noise_check(measurement: Measurement, survivors: list[int], total: int, draws: int = 20) -> Check:
    """Whether random corners of the ball break images that PGD does not: then PGD is blind, not the model robust."""
    protocol = measurement.protocol

    def work(images: Tensor, labels: Tensor, indices: list[int]) -> Payload:
        survives = torch.ones_like(labels, dtype=torch.bool)
        with torch.no_grad():
            for _ in range(draws):
                noisy = project(
                    ascend(images, torch.randn_like(images), protocol.radius, protocol.norm),
                    images,
                    protocol.radius,
                    protocol.norm,
                )
                survives &= measurement.classifier(noisy).argmax(1) == labels
        return {"survives": survives.tolist()}

    found = measurement.measure("check noise", survivors, work, cost=draws)
    broken = len(survivors) - sum(found.get("survives", []))
    return Check(
        "random noise is weaker than PGD",
        broken <= max(1, _SLACK * total),
        f"{draws} random draws break {broken} of {len(survivors)} images that survive PGD",
    )


@dataclass(frozen=True)
class Curves:
    """Accuracy on the images of the checks, in [0, 1], as (value, accuracy) pairs.

    Over eps and steps: an attack from one start at each value. Over restarts and under other losses: those images count that
    survive the protocol's own attack, too.
    """

    images: int
    eps: list[tuple[float, float]]
    steps: list[tuple[int, float]]
    restarts: list[tuple[int, float]]
    losses: dict[str, float]


def draw_curves(measurement: Measurement, sample: list[int], survivors: list[int]) -> Curves:
    """Accuracy over eps, steps, restarts and losses.

    Args:
        measurement: what measures.
        sample: positions of the images, also of those that are wrong when clean: an attack must not put them right.
        survivors: those of them that survive the protocol's PGD.
    """
    protocol, n = measurement.protocol, len(sample)

    def standing(stage: str, positions: list[int], **changes: Any) -> float:
        payload = measurement.pgd(
            f"check {stage}", positions, replace(protocol, **{"restarts": 1, "autoattack": None, **changes})
        )
        return sum(broken_by < 0 for broken_by in payload.get("restart", [])) / n

    counts = sorted({*CURVE_STEPS, protocol.steps, 5 * protocol.steps})
    by_steps = measurement.pgd_by_steps("check steps", sample, protocol, counts)
    steps = [(count, sum(by_steps[str(count)]) / n) for count in counts]
    eps = [(0.0, standing("eps 0", sample, eps=0.0, step_size=0.0, steps=1))]
    for factor in CURVE_EPS:
        radius = factor * protocol.radius
        if factor == 1:
            eps.append((radius, dict(steps)[protocol.steps]))
        elif radius <= 1 or protocol.norm == "L2":
            eps.append((radius, standing(f"eps x{factor:g}", sample, eps=radius, step_size=factor * protocol.step)))
    radius = everything(measurement)
    eps.append((radius, standing("very large eps", sample, eps=radius, step_size=radius / 4, steps=max(20, protocol.steps))))

    more = replace(protocol, restarts=protocol.restarts + RESTARTS)
    again = measurement.pgd("check restarts", survivors, more, first=protocol.restarts).get("restart", [])
    restarts = [(r + 1, sum(not 0 <= by <= r for by in again) / n) for r in range(protocol.restarts - 1, more.restarts)]
    others = [name for name in LOSSES if name != protocol.loss and (name != "dlr" or measurement.classes > 2)]
    return Curves(n, eps, steps, restarts, {name: standing(f"loss {name}", survivors, loss=name) for name in others})


def everything(measurement: Measurement) -> float:
    """An eps at which any image can become any other's grey: half of the range of pixels, in l2 the length of that change."""
    if measurement.protocol.norm == "Linf":
        return 0.5
    return 0.5 * math.prod(measurement.data.shape) ** 0.5


def curve_checks(curves: Curves, labels: Tensor, clean: float, protocol: Protocol, classes: int) -> list[Check]:
    """What is wrong with the curves of images with these labels (N,), of which a share of `clean` is right as it is."""
    chance = max(1 / classes, labels.bincount().max().item() / len(labels))  # what always answering one class reaches
    norm = protocol.norm
    image = 1 / curves.images + 1e-9  # batches of another size may tip one image
    slack, gain = max(_SLACK, image), max(_GAIN, image)
    steps, eps, restarts = dict(curves.steps), curves.eps[:-1], curves.restarts
    highest = max(accuracy for _, accuracy in (*eps, *curves.steps))
    own, (most, at_most), (large, left) = steps[protocol.steps], curves.steps[-1], curves.eps[-1]
    best = min(curves.losses, key=lambda name: curves.losses[name])
    return [
        Check(
            "steps reach eps",
            protocol.steps * protocol.step >= protocol.radius * (1 - 1e-9),
            f"{counted(protocol.steps, 'step')} of {pixels(protocol.step, norm)} for eps {pixels(protocol.radius, norm)}",
        ),
        Check("eps 0 equals clean", abs(eps[0][1] - clean) <= image, f"{eps[0][1]:.1%} at eps 0, {clean:.1%} clean"),
        Check("robust is not above clean", highest <= clean + image, f"at most {highest:.1%} under attack, {clean:.1%} clean"),
        Check(
            "a larger eps is not weaker",
            _rise(eps) <= slack,
            f"from one eps to the next accuracy rises by {_rise(eps):.1%} at most",
        ),
        Check(
            "very large eps leaves nothing",
            left <= chance + slack,
            f"{left:.1%} at eps {pixels(large, norm)}, one answer for all gives {chance:.1%}",
        ),
        Check(
            "more steps are not weaker",
            _rise(curves.steps) <= slack,
            f"from one number of steps to the next accuracy rises by {_rise(curves.steps):.1%} at most",
        ),
        Check(
            "enough steps",
            own - at_most <= slack,
            f"{own:.1%} after {counted(protocol.steps, 'step')}, {at_most:.1%} after {most}",
        ),
        Check(
            "more restarts find little more",
            restarts[0][1] - restarts[-1][1] <= gain,
            f"{restarts[0][1]:.1%} with {restarts[0][0]}, {restarts[-1][1]:.1%} with {restarts[-1][0]}",
        ),
        Check(
            "other losses find little more",
            restarts[0][1] - curves.losses[best] <= gain,
            f"{restarts[0][1]:.1%} under {protocol.loss}, {curves.losses[best]:.1%} under {best} too",
        ),
    ]


def _rise(curve: Sequence[tuple[float, float]]) -> float:
    return max(0.0, *(b - a for (_, a), (_, b) in pairwise(curve)))


def budget_checks(
    distances: Sequence[float], excess: Sequence[float], finite: Sequence[bool], protocol: Protocol
) -> list[Check]:
    """Whether every adversarial image is within the budget and is an image, and the model gave numbers for it."""
    far, beyond = (max((v if math.isfinite(v) else math.inf for v in values), default=0.0) for values in (distances, excess))
    return [
        Check("perturbations within eps", far <= protocol.radius * (1 + 1e-5) + 1e-7, f"largest {pixels(far, protocol.norm)}"),
        Check("finite outputs", all(finite), f"not finite on {len(finite) - sum(finite)} of {len(finite)} adversarial images"),
        Check("inputs in [0, 1]", beyond <= 1e-7, f"adversarial pixels leave [0, 1] by {beyond:.1g} at most"),
    ]


def autoattack_checks(
    columns: dict[str, float],
    pgd: float | None,
    classes: int,
    version: str,
    left_out: Mapping[str, str] | None = None,
) -> list[Check]:
    """What AutoAttack's own figures say.

    Args:
        columns: by attack the accuracy in [0, 1] after it.
        pgd: that under PGD, if measured.
        classes: of the model.
        version: of AutoAttack.
        left_out: attacks that fail on images of this size, and why.
    """
    names, checks = list(columns), []
    if names and pgd is not None:
        last = columns[names[-1]]
        checks = [
            Check(
                "PGD is close to AutoAttack",
                -_SLACK <= pgd - last <= 2 * _GAIN,
                f"{pgd:.1%} under PGD, {last:.1%} under AutoAttack",
            )
        ]
    whole = all_of_autoattack(names, classes, version, left_out or {})
    if version == "standard" or not whole.passed:
        checks.append(whole)
    if "square" in names[1:]:
        before = columns[names[names.index("square") - 1]]
        checks.append(
            Check(
                "Square finds nothing new",
                before - columns["square"] <= 0.002 + 1e-9,  # pyautoattack's own threshold
                f"{before:.1%} before the black-box attack, {columns['square']:.1%} after it",
            )
        )
    return checks


def all_of_autoattack(ran: Sequence[str], classes: int, version: str, left_out: Mapping[str, str]) -> Check:
    """Whether a figure is that of the whole AutoAttack, which others report, or of the attacks that could be run.

    Args:
        ran: attacks that were run.
        classes: of the model.
        version: of AutoAttack.
        left_out: those that fail on images of this size, and why.
    """
    attacks, doubts = ", ".join(ran) or "no attack", []
    if version == "standard" and classes < 10:
        doubts.append(f"only {classes} classes: {attacks} with {min(9, classes - 1)} targets")
    elif classes < 3:
        doubts.append(f"only {classes} classes: {attacks}")
    if left_out:
        doubts.append(f"{', '.join(left_out.values())}: the figure is that of {attacks} alone")
    return Check("all of AutoAttack", not doubts, "; ".join(doubts) or "nine targets")


def as_records(checks: Sequence[Check]) -> list[dict[str, Any]]:
    """For results.json."""
    return [asdict(check) for check in checks]
