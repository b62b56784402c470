"""What is measured, and how: everything that decides a figure stands in one frozen record."""

from dataclasses import asdict, dataclass, field
from typing import Any

from advcl_hub.attacks import LOSSES, NORMS, Norm

DEFAULT_EPS = {"Linf": 8 / 255, "L2": 0.5}
AUTOATTACKS = ("standard", "rand")
PRECISIONS = ("float32", "bfloat16")


@dataclass(frozen=True)
class Protocol:
    """An evaluation's settings. The unit of `eps` and `step_size` is that of pixels in [0, 1], whatever the model normalises.

    Attributes:
        norm: of the perturbation, `Linf` or `L2`.
        eps: its radius; None means 8/255 in l_inf and 0.5 in l2.
        steps: PGD steps.
        step_size: length of a PGD step; None means eps / 4 (2/255 for 8/255).
        restarts: PGD runs from different random starts; an image has to survive all of them.
        loss: that PGD raises: `ce` (cross-entropy), `margin` or `dlr`.
        autoattack: `standard`, `rand` (for models that are random), or None to leave AutoAttack out.
        seed: of every random start; AutoAttack sets it before each batch, as pyautoattack does.
        batch_size: images a batch. It decides the random numbers of AutoAttack and of the checks.
        precision: `float32`, or `bfloat16` to screen models faster; figures from it are for nobody else's eyes.
        check_images: how many of the images the checks and the curves take; 0 leaves them out.
        compile: attack a compiled network: faster after the first batches, which wait for the compiler, and rounded otherwise.
            On CPUs it takes a C++ compiler.

    Raises:
        ValueError: a value outside its range.
    """

    norm: Norm = "Linf"
    eps: float | None = None
    steps: int = 20
    step_size: float | None = None
    restarts: int = 1
    loss: str = "ce"
    autoattack: str | None = None
    seed: int = 0
    batch_size: int = 250
    precision: str = "float32"
    check_images: int = 100
    compile: bool = field(default=False, repr=False)  # the names of folders, made of the repr, say it themselves

    def __post_init__(self) -> None:
        _one_of("norm", self.norm, NORMS)
        _one_of("loss", self.loss, tuple(LOSSES))
        _one_of("precision", self.precision, PRECISIONS)
        if self.autoattack is not None:
            _one_of("autoattack", self.autoattack, AUTOATTACKS)
        if self.eps is None:
            object.__setattr__(self, "eps", DEFAULT_EPS[self.norm])
        if self.step_size is None:
            object.__setattr__(self, "step_size", self.radius / 4)
        if not 0 <= self.radius < float("inf") or (self.norm == "Linf" and self.radius > 1):
            hint = f": did you mean {self.radius:g}/255?" if self.radius > 1 else ""
            raise ValueError(f"eps is {self.radius:g}, expected a distance of pixels in [0, 1]{hint}")
        if not 0 <= self.step < float("inf"):
            raise ValueError(f"step_size is {self.step:g}, expected 0 or more")
        if self.attacks_with_pgd and not self.step:
            raise ValueError("step_size is 0: PGD would stand still; steps=0 leaves it out")
        if self.autoattack and not self.radius:
            raise ValueError("eps is 0: AutoAttack needs room to move")
        for name, least in (("steps", 0), ("restarts", 1), ("seed", 0), ("batch_size", 1), ("check_images", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least {least}")

    @property
    def radius(self) -> float:
        """`eps` as a number."""
        assert self.eps is not None
        return self.eps

    @property
    def step(self) -> float:
        """`step_size` as a number."""
        assert self.step_size is not None
        return self.step_size

    @property
    def tolerance(self) -> float:
        """How far rounding may move logits that are scaled to length 1."""
        return 1e-4 if self.precision == "float32" else 5e-2

    @property
    def attacks_with_pgd(self) -> bool:
        """Whether there is anything for PGD to do."""
        return self.steps > 0 and self.radius > 0

    def to_dict(self) -> dict[str, Any]:
        """All settings by name; `compile` only if it is set, as records from before it existed lack it."""
        return {name: value for name, value in asdict(self).items() if name != "compile" or value}


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name} is {value!r}, expected one of {', '.join(known)}")
