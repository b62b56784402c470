"""Signs of false robustness, looked for in every evaluation (Athalye et al., arXiv 1802.00420; Carlini et al., 1902.06705)."""

from collections.abc import Sequence
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
from advcl_hub.evaluation.protocol import Protocol, pixels

CURVE_EPS = (0.25, 0.5, 0.75, 1, 1.5, 2, 4)  # times the protocol's eps
CURVE_STEPS = (1, 2, 5, 10, 20, 50, 100)
RESTARTS = 5
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
    random = _difference(first, second)
    together = _difference(first[:8], alone)
    batch_norms = [
        name
        for name, module in classifier.named_modules()
        if module.training or (isinstance(module, _BatchNorm) and module.running_mean is None)
    ]
    tolerance = 1e-4 if protocol.precision == "float32" else 5e-2
    total = first.sum(1)
    softmax = bool(((first >= 0).all() and (first <= 1 + 1e-5).all() and ((total - 1).abs() < 1e-4).all()).item())
    low, high = images.min().item(), images.max().item()
    return [
        Check("inputs in [0, 1]", low >= 0 and high <= 1, f"pixels from {low:.3f} to {high:.3f}"),
        Check(
            "deterministic",
            random <= 1e-4,
            f"two passes differ by {random:.1e}" + ("" if random <= 1e-4 else ": random models need autoattack=rand"),
        ),
        Check(
            "evaluation mode",
            not batch_norms and (together <= tolerance or random > 1e-4),
            f"an image's logits in a batch and alone differ by {together:.1e}"
            + (f"; in training mode or without running statistics: {', '.join(batch_norms[:3])}" if batch_norms else ""),
        ),
        Check(
            "logits",
            not softmax,
            "the outputs are probabilities, not logits" if softmax else "the outputs are no probabilities",
        ),
    ]


def _difference(a: Tensor, b: Tensor) -> float:
    """The largest distance of two sets of logits (N, K), each scaled to length 1."""
    return (F.normalize(a, dim=1) - F.normalize(b, dim=1)).norm(dim=1).max().item()


def gradient_checks(measurement: Measurement, positions: list[int], protocol: Protocol) -> list[Check]:
    """Whether the cross-entropy has gradients, and whether following them beats a random step of the same length."""

    def work(images: Tensor, labels: Tensor, indices: list[int]) -> Payload:
        x = images.clone().requires_grad_()
        loss = LOSSES["ce"](measurement.classifier(x), labels)
        (gradient,) = torch.autograd.grad(loss.sum(), x)
        length = protocol.radius / 8
        with torch.no_grad():
            steps = (gradient, torch.randn_like(gradient))
            uphill, random = (
                LOSSES["ce"](measurement.classifier(ascend(images, g, length, protocol.norm).clamp(0, 1)), labels)
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


def noise_check(measurement: Measurement, survivors: list[int], protocol: Protocol, total: int, draws: int = 20) -> Check:
    """Whether random corners of the ball break images that PGD does not: then PGD is blind, not the model robust."""

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
        broken <= _SLACK * total,
        f"{draws} random draws break {broken} of {len(survivors)} images that survive PGD",
    )


@dataclass(frozen=True)
class Curves:
    """Accuracy on the images of the checks, in [0, 1], as (value, accuracy) pairs.

    Over eps and restarts, and under a loss, those count that survive what stands before, too; over steps, one run is shown.
    """

    images: int
    eps: list[tuple[float, float]]
    steps: list[tuple[int, float]]
    restarts: list[tuple[int, float]]
    losses: dict[str, float]


def attack_checks(
    measurement: Measurement, sample: list[int], right: list[int], protocol: Protocol, classes: int
) -> tuple[Curves, list[Check]]:
    """Accuracy over eps, steps, restarts and losses on a sample, and what is wrong with it.

    Args:
        measurement: what measures.
        sample: positions of the images, right and wrong ones.
        right: those of them that are right when clean; the others count as broken and are not attacked.
        protocol: the evaluation's.
        classes: number of classes.
    """
    n, clean = len(sample), len(right) / len(sample)
    largest = float(max(measurement.labels[sample].bincount())) / n  # what always answering one class reaches
    chance = max(1 / classes, largest)

    def left(stage: str, positions: list[int], **changes: Any) -> list[int]:
        payload = measurement.pgd(f"check {stage}", positions, replace(protocol, **{"restarts": 1, **changes}))
        return [p for p, broken_by in zip(positions, payload.get("restart", []), strict=True) if broken_by < 0]

    counts = sorted({*CURVE_STEPS, protocol.steps, 5 * protocol.steps})
    by_steps = measurement.pgd_by_steps("check steps", right, protocol, counts)
    step_curve = [(count, sum(by_steps.get(str(count), [])) / n) for count in counts]
    survivors = [p for p, survives in zip(right, by_steps.get(str(protocol.steps), []), strict=True) if survives]

    # Balls are nested: what broke at a smaller eps is broken at a larger one, and is not attacked again.
    eps_curve, standing = [(0.0, len(left("eps 0", right, eps=0.0, step_size=0.0, steps=1)) / n)], right
    for factor in CURVE_EPS:
        if factor == 1:
            standing = [p for p in standing if p in set(survivors)]
        elif factor * protocol.radius <= 1 or protocol.norm == "L2":
            changes = {"eps": factor * protocol.radius, "step_size": factor * protocol.step}
            standing = left(f"eps x{factor:g}", standing, **changes)
        eps_curve.append((factor * protocol.radius, len(standing) / n))
    # In half of the range every image can be made grey, in l2 at the length of that change.
    enough = 0.5 if protocol.norm == "Linf" else 0.5 * float(torch.tensor(measurement.data.shape).prod()) ** 0.5
    far = len(left("very large eps", right, eps=enough, step_size=enough / 4)) / n

    again = measurement.pgd("check restarts", survivors, replace(protocol, restarts=RESTARTS)).get("restart", [])
    restart_curve = [(r + 1, sum(not 0 <= broken_by <= r for broken_by in again) / n) for r in range(RESTARTS)]
    others = [name for name in LOSSES if name != protocol.loss and (name != "dlr" or classes > 2)]
    losses = {name: len(left(f"loss {name}", survivors, loss=name)) / n for name in others}

    own, most = len(survivors) / n, step_curve[-1]
    rises = max((b - a for (_, a), (_, b) in pairwise(step_curve)), default=0.0)
    best = min(losses, key=lambda name: losses[name])
    highest = max(accuracy for _, accuracy in (*eps_curve, *step_curve))
    checks = [
        Check("eps 0 equals clean", eps_curve[0][1] == clean, f"{eps_curve[0][1]:.1%} at eps 0, {clean:.1%} clean"),
        Check("robust is not above clean", highest <= clean, f"at most {highest:.1%} under attack, {clean:.1%} clean"),
        Check(
            "very large eps leaves nothing",
            far <= chance + _SLACK,
            f"{far:.1%} at eps {pixels(enough, protocol.norm)}, one answer for all gives {chance:.1%}",
        ),
        Check(
            "more steps are not weaker",
            rises <= _SLACK,
            f"accuracy rises by at most {max(rises, 0):.1%} from one number of steps to the next",
        ),
        Check(
            "enough steps",
            own - most[1] <= _SLACK,
            f"{own:.1%} after {protocol.steps} steps, {most[1]:.1%} after {most[0]}",
        ),
        Check(
            "more restarts find little more",
            own - restart_curve[-1][1] <= _GAIN,
            f"{own:.1%} with one start, {restart_curve[-1][1]:.1%} with {RESTARTS}",
        ),
        Check(
            "other losses find little more",
            own - losses[best] <= _GAIN,
            f"{own:.1%} under {protocol.loss}, {losses[best]:.1%} under {best} too",
        ),
    ]
    return Curves(n, eps_curve, step_curve, restart_curve, losses), checks


def distance_check(distances: Sequence[float], protocol: Protocol) -> Check:
    """Whether every adversarial image is within the budget."""
    far = max(distances, default=0.0)
    return Check(
        "perturbations within eps", far <= protocol.radius * (1 + 1e-5) + 1e-7, f"largest {pixels(far, protocol.norm)}"
    )


def autoattack_checks(columns: dict[str, float], pgd: float, classes: int, version: str) -> list[Check]:
    """What AutoAttack's own figures say: by attack the accuracy in [0, 1] after it."""
    names = list(columns)
    checks = [
        Check(
            "PGD is close to AutoAttack",
            pgd - columns[names[-1]] <= 2 * _GAIN,
            f"{pgd:.1%} under PGD, {columns[names[-1]]:.1%} under AutoAttack",
        )
    ]
    if version == "standard":
        targets, whole = min(9, classes - 1), classes >= 10
        checks.append(
            Check(
                "all of AutoAttack",
                whole,
                "nine targets" if whole else f"only {classes} classes: {', '.join(names)} with {targets} targets",
            )
        )
    if "square" in columns:
        before = columns[names[names.index("square") - 1]]
        checks.append(
            Check(
                "Square finds nothing new",
                before - columns["square"] <= 0.002,  # pyautoattack's own threshold
                f"{before:.1%} before the black-box attack, {columns['square']:.1%} after it",
            )
        )
    return checks


def as_records(checks: Sequence[Check]) -> list[dict[str, Any]]:
    """For results.json."""
    return [asdict(check) for check in checks]
