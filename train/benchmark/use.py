"""Using encoders: PGD-20 and AutoAttack against the bare packages, a linear probe, opening weights."""

import logging
import subprocess
import sys
from collections.abc import Callable, Iterator

import timm
import torch
from torch import Tensor, nn

from advcl_hub.data import ImageData, load_data
from advcl_hub.evaluation import Protocol, evaluate
from advcl_hub.evaluation.borrowing import borrowed
from advcl_hub.hub.registry import releases
from advcl_hub.opening import load_model
from train.benchmark.report import Row, Section
from train.benchmark.timing import Timing, clock, race
from train.probe import linear_probe

EPS = 8 / 255


def measure_evaluation(
    name: str, data: ImageData, device: torch.device, rounds: int, compiled: bool, tell: Callable[[str], None] = print
) -> Iterator[Section]:
    """PGD-20 and AutoAttack on all these images, by the packages alone and by `advcl_hub.evaluate`.

    Args:
        name: of a classifier with weights.
        data: labelled images.
        device: where to compute.
        rounds: of PGD; AutoAttack is measured once.
        compiled: measure AutoAttack with `compile=True`, too.
    """
    images, labels = data.images, data.labels.to(device)
    assert isinstance(images, Tensor)
    pixels, found = images.to(device) / 255, {}

    def model() -> nn.Module:
        return load_model(name).model.to(device)

    def ours(steps: int, autoattack: str | None, compile: bool = False) -> Callable[[], None]:
        network = model()
        key = f"ours{', compiled' if compile else ''}"

        def run() -> None:
            protocol = Protocol(steps=steps, autoattack=autoattack, check_images=0, compile=compile)
            result = evaluate(network, data, protocol, device=device, progress=False)
            found[key] = result.robust if autoattack is None else result.autoattack

        return run

    def foolbox_pgd() -> Callable[[], None]:
        from foolbox.attacks import LinfPGD
        from foolbox.models.pytorch import PyTorchModel

        network = model()
        attack = LinfPGD(abs_stepsize=EPS / 4, steps=20)

        def run() -> None:
            fooled = 0.0
            with borrowed(network, device):
                for x, y in zip(pixels.split(Protocol().batch_size), labels.split(Protocol().batch_size), strict=True):
                    fooled += attack(PyTorchModel(network, bounds=(0, 1), device=device), x, y, epsilons=EPS)[2].sum().item()
            found["foolbox"] = 1 - fooled / len(labels)

        return run

    def bare_autoattack() -> Callable[[], None]:
        from pyautoattack import AutoAttack

        network = model()
        logging.getLogger("auto-attack").setLevel(logging.ERROR)

        def run() -> None:
            attack = AutoAttack(network, norm="Linf", eps=EPS, seed=0, version="standard", device=device)
            with borrowed(network, device):
                _, predictions = attack.run_standard_evaluation(pixels, labels, batch_size=Protocol().batch_size)
            found["pyautoattack"] = (predictions == labels).float().mean().item()

        return run

    def rows(times: dict[str, Timing]) -> list[Row]:
        return [Row(key, timing, len(data), {"robust": f"{found[key]:.2%}"}) for key, timing in times.items()]

    about = f"{name}, {len(data)} images of {data.name}, l_inf 8/255, float32."
    pgd = race({"foolbox": foolbox_pgd(), "ours": ours(20, None)}, device, rounds, tell=lambda text: tell(f"PGD, {text}"))
    yield Section(
        *("pgd", "PGD-20", rows(pgd)),
        note=f"{about} Ours leaves out images that are wrong when clean, and checks the model and every perturbation; the "
        "random starts differ. Weights want no gradient in either.",
    )
    runs = {"pyautoattack": bare_autoattack(), "ours": ours(0, "standard")}
    runs |= {"ours, compiled": ours(0, "standard", compile=True)} if compiled else {}
    aa = race(runs, device, 1, warm_up=0, tell=lambda text: tell(f"AutoAttack, {text}"))
    note = (
        f"{about} One measurement, compilation included unless torch has it on disk; the same seed and batches, so the robust "
        "accuracies must agree."
    )
    yield Section("autoattack", "AutoAttack (standard)", rows(aa), note=note)


def measure_probe(model: str, count: int, device: torch.device, tell: Callable[[str], None] = print) -> Section:
    """A linear probe of an encoder on so many images: features once, then a convex fit."""
    data = load_data(f"fake:{count}")
    encoder = timm.create_model(model, num_classes=0).eval()
    tell(f"linear probe, {count} images")
    timing = Timing.of([clock(lambda: linear_probe(encoder, data, device), device)])
    note = f"{count:,} images: features of the frozen encoder once, then L-BFGS to the optimum; one measurement."
    return Section("probe", "Linear probe", [Row(model, timing, count)], note=note, compare=False)


def measure_loading(rounds: int, tell: Callable[[str], None] = print) -> list[Section]:
    """Opening bundled weights by name, with their checks, against timm alone; importing the package against timm."""
    name, release = next((name, r) for name, r in releases().items() if r.folder)
    architecture = name.partition(".")[0]
    runs: dict[str, Callable[[], object]] = {
        "timm, local-dir": lambda: timm.create_model(f"local-dir:{release.folder}", pretrained=True),
        "advcl-hub, by name": lambda: timm.create_model(name, pretrained=True),
        "timm, random weights": lambda: timm.create_model(architecture),
    }
    cpu = torch.device("cpu")
    opening = race(runs, cpu, rounds, tell=lambda text: tell(f"opening, {text}"))

    def imports(package: str) -> Callable[[], object]:
        return lambda: subprocess.run([sys.executable, "-c", f"import {package}"], check=True)

    importing = race({p: imports(p) for p in ("timm", "advcl_hub")}, cpu, rounds, tell=lambda text: tell(f"import {text}"))
    return [
        Section(
            *("opening", "Opening a model", [Row(key, timing) for key, timing in opening.items()]),
            note=f"{name}, bundled. By name its files are checked against their sha256 each time.",
        ),
        Section("importing", "Importing the package", [Row(f"import {key}", t) for key, t in importing.items()]),
    ]
