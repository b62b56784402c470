"""The protocols of the field and the values that others finetuned with: one table, from which the README's is made.

The facts are those of the published code: DynACL (github.com/PKU-ML/DYNACL, commit 1f0ad5c), DeACL
(github.com/pantheon5100/DeACL, commit 3fb81e3), and the RobustSSL benchmark (github.com/GodXuxilie/RobustSSL_Benchmark,
Finetuning_Methods/Vanilla_Finetuning at commit 3b85d40), which finetunes the encoders of AdvCL, ACL, DynACL and DeACL.
"""

import difflib
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from advcl_hub.records import counted

PROTOCOLS = {
    "slf": "standard linear finetuning: a linear head on the frozen encoder, cross-entropy on clean images",
    "alf": "adversarial linear finetuning: a linear head on the frozen encoder, cross-entropy on PGD images",
    "aff": "adversarial full finetuning: all weights, TRADES (or objective=pgd: PGD adversarial training)",
    "sff": "standard full finetuning: all weights, cross-entropy on clean images",
}
OBJECTIVES = {"slf": ("ce",), "alf": ("pgd",), "aff": ("trades", "pgd"), "sff": ("ce",)}
AUGMENTATIONS = ("crop-flip", "crop", "none")
PRECISIONS = ("float32", "bfloat16")
ONE, TWO = ("adv",), ("clean", "adv")  # batch-norm branches; adv is exported
EXPORTED = "adv"
_LEAST_BATCHES = 8  # of a small data set a preset's batch is at most one eighth
_MOST_LR_PER_IMAGE = 0.1 / 128  # of a batch, where all weights are trained: published AFF takes as much


@dataclass(frozen=True)
class Settings:
    """Everything that decides the result of finetuning, besides encoder and data.

    Attributes:
        protocol: a key of `PROTOCOLS`.
        preset: whose values these are, where nothing was overridden.
        objective: `ce`; `pgd`, cross-entropy on PGD images (Madry et al., arXiv 1706.06083); or `trades` (Zhang et al.,
            arXiv 1901.08573).
        epochs: passes over the training images, each in whole batches.
        batch_size: images a step, over all processes.
        lr: of SGD.
        milestones: epochs after which the learning rate is divided by 10.
        momentum, weight_decay: of SGD; the decay is on all weights that are trained.
        eps, step_size, steps: of the attack in training, l_inf, pixels of [0, 1]. It runs in evaluation mode.
        beta: weight of the robust term of TRADES.
        branches: batch-norm branches: one for all images, or one for clean and one for adversarial images, of which `adv` is
            exported. Both start as copies of the encoder's.
        zero_head: the new head starts at zero, else as the architecture starts it.
        augment: `crop-flip` (shifted by up to an eighth of the side, mirrored), `crop`, or `none`. With a frozen encoder, clean
            images and `none` the features are computed once.
        ema_decay: of averaged weights, which are then judged and exported; 0 for none.
        accumulate: each process computes its share of a batch in so many parts. Batch statistics are those of a part.
        precision: `float32`, or `bfloat16` to compute under autocast.
        val_fraction: share of every class that is held out to choose the best epoch; 0 takes the last epoch.
        seed: of order, augmentation, attacks, held-out images, few-shot subset, and the new head.

    Raises:
        ValueError: a value outside its range, or a combination that makes no sense.
    """

    protocol: str
    preset: str
    objective: str
    epochs: int
    batch_size: int
    lr: float
    milestones: tuple[float, ...]
    momentum: float = 0.9
    weight_decay: float = 2e-4
    eps: float = 8 / 255
    step_size: float = 2 / 255
    steps: int = 10
    beta: float = 6.0
    branches: tuple[str, ...] = ONE
    zero_head: bool = True
    augment: str = "crop-flip"
    ema_decay: float = 0.0
    accumulate: int = 1
    precision: str = "float32"
    val_fraction: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        _one_of("objective", self.objective, OBJECTIVES[self.protocol], f" with protocol {self.protocol}")
        _one_of("augment", self.augment, AUGMENTATIONS)
        _one_of("precision", self.precision, PRECISIONS)
        least = {"epochs": 1, "batch_size": 1, "steps": 1, "accumulate": 1, "seed": 0}
        least |= {"momentum": 0, "weight_decay": 0, "beta": 0, "ema_decay": 0, "val_fraction": 0}
        for name, smallest in least.items():
            if not smallest <= (value := getattr(self, name)) < float("inf"):
                raise ValueError(f"{name} is {value}, expected at least {smallest}{' and finite' if value > 0 else ''}")
        for name in ("ema_decay", "val_fraction", "momentum"):
            if getattr(self, name) >= 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected less than 1")
        if not 0 < self.lr < float("inf"):
            raise ValueError(f"lr is {self.lr}, expected more than 0")
        if not all(milestone > 0 for milestone in self.milestones):
            raise ValueError(f"milestones are {self.milestones}, expected epochs above 0")
        for name in ("eps", "step_size"):
            value = getattr(self, name)
            if not 0 < value <= 1:
                hint = f": did you mean {value:g}/255?" if value > 1 else ""
                raise ValueError(f"{name} is {value:g}, expected a distance of pixels in (0, 1]{hint}")
        if self.branches not in (ONE, TWO):
            raise ValueError(f"branches are {self.branches}, expected adv, or clean and adv")
        if self.branches == TWO and self.objective != "trades":
            raise ValueError("Two batch-norm branches need an objective with clean and adversarial images: trades.")

    @property
    def frozen(self) -> bool:
        """Whether the encoder stays as it is, in evaluation mode, and only the head is trained."""
        return self.protocol in ("slf", "alf")

    @property
    def attacks(self) -> bool:
        """Whether training makes adversarial images."""
        return self.objective != "ce"

    @property
    def caches(self) -> bool:
        """Whether the features never change, so that they are computed once."""
        return self.frozen and not self.attacks and self.augment == "none"

    def to_dict(self) -> dict[str, Any]:
        """All settings by name, as JSON has them."""
        return {**asdict(self), "milestones": list(self.milestones), "branches": list(self.branches)}

    def describe(self) -> str:
        """The protocol in a few words."""
        loss = {"ce": "cross-entropy", "pgd": f"PGD-{self.steps}", "trades": f"TRADES beta {self.beta:g}"}[self.objective]
        return f"{self.protocol.upper()} ({loss}; {counted(self.epochs, 'epoch')}, batch {self.batch_size}, lr {self.lr:g})"


_LINEAR = {"epochs": 25, "batch_size": 512, "lr": 0.01}
_FULL = {"epochs": 25, "batch_size": 128, "lr": 0.1, "milestones": (15, 20)}
_STANDARD_FULL = {**_LINEAR, "milestones": (10, 20)}
_BENCHMARK = "RobustSSL benchmark"
_OLD_BENCHMARK = "RobustSSL benchmark, old commit"  # 08e268e, Finetuning_Methods/Vanilla; newer ones have no SFF

# (preset, protocol): values, and where they come from.
PRESETS: dict[tuple[str, str], tuple[dict[str, Any], str]] = {
    # AdvCL's own SLF has another head, and chooses the epoch by PGD on test images.
    ("advcl", "slf"): ({**_LINEAR, "milestones": (15, 20)}, _BENCHMARK),
    ("advcl", "alf"): ({**_LINEAR, "milestones": (15, 20)}, _BENCHMARK),
    ("advcl", "aff"): (_FULL, _BENCHMARK),
    ("advcl", "sff"): (_STANDARD_FULL, _OLD_BENCHMARK),
    ("dynacl", "slf"): ({**_LINEAR, "milestones": (10, 20)}, "DynACL's code"),
    ("dynacl", "alf"): ({**_LINEAR, "milestones": (10, 20)}, "DynACL's code"),
    ("dynacl", "aff"): ({**_FULL, "branches": TWO}, "DynACL's code"),
    ("dynacl", "sff"): (_STANDARD_FULL, _OLD_BENCHMARK),
    ("acl", "slf"): ({**_LINEAR, "milestones": (10, 20)}, _BENCHMARK),
    ("acl", "alf"): ({**_LINEAR, "milestones": (10, 20)}, _BENCHMARK),
    ("acl", "aff"): ({**_FULL, "epochs": 100, "milestones": (40, 60), "branches": TWO}, _BENCHMARK),
    ("acl", "sff"): (_STANDARD_FULL, _OLD_BENCHMARK),
    # DeACL's own SLF and ALF move the encoder's batch norms: other protocols, which are not offered under these names.
    ("deacl", "slf"): ({**_LINEAR, "milestones": (15, 20)}, _BENCHMARK),
    ("deacl", "alf"): ({**_LINEAR, "milestones": (15, 20)}, _BENCHMARK),
    ("deacl", "aff"): ({**_LINEAR, "milestones": (15, 20), "zero_head": False}, "DeACL's code"),
}

# What the RobustSSL benchmark changes for other data sets than CIFAR-10: presets, protocols, values by data set.
_BY_DATA: tuple[tuple[tuple[str, ...], tuple[str, ...], dict[str, dict[str, Any]]], ...] = (
    (
        ("dynacl", "acl"),
        ("slf", "alf"),
        {"cifar100": {"lr": 0.05}, "stl10 at 32x32": {"batch_size": 128}, "stl10 at 96x96": {"lr": 0.1}},
    ),
    (("dynacl",), ("aff",), {"stl10 at 96x96": {"milestones": (10, 20)}}),
)


def choose_settings(
    protocol: str, preset: str, *, data: str = "", size: int | None = None, overrides: Mapping[str, Any] | None = None
) -> Settings:
    """A preset's values for a data set, and what replaces them.

    Args:
        protocol: a key of `PROTOCOLS`.
        preset: `advcl`, `dynacl`, `acl` or `deacl`.
        data: name of the data set; some presets have other values for `cifar100` and `stl10`.
        size: side of the images, in pixels.
        overrides: values by name of `Settings`. Where `epochs` is among them and `milestones` are not, these move in
            proportion; where `eps` is and `step_size` is not, that becomes eps / 4.

    Raises:
        ValueError: an unknown protocol, preset or name (the nearest is given), a preset that does not know the protocol, or a
            value out of range.
    """
    overrides = dict(overrides or {})
    _one_of("protocol", protocol, tuple(PROTOCOLS))
    _one_of("preset", preset, tuple(dict.fromkeys(name for name, _ in PRESETS)))
    if (preset, protocol) not in PRESETS:
        known = [name for name, of in PRESETS if of == protocol]
        raise ValueError(f"The preset {preset} has no {protocol}; these have: {', '.join(known)}.")
    names = [field.name for field in fields(Settings) if field.name not in ("protocol", "preset")]
    for name in overrides:
        if name not in names:
            near = difflib.get_close_matches(name, names, 1, 0.0)[0]
            raise ValueError(f"Unknown setting {name!r}. Did you mean {near!r}? Known: {', '.join(names)}")
    values = dict(PRESETS[preset, protocol][0])
    name = data.removeprefix("parquet:")
    for presets, protocols, by_data in _BY_DATA:
        if preset in presets and protocol in protocols:
            values |= by_data.get(f"{name} at {size}x{size}" if name == "stl10" else name, {})
    if "epochs" in overrides and "milestones" not in overrides:
        values["milestones"] = tuple(m * overrides["epochs"] / values["epochs"] for m in values["milestones"])
    if "eps" in overrides and "step_size" not in overrides:
        values["step_size"] = overrides["eps"] / 4
    values = {"objective": OBJECTIVES[protocol][0], **values, **overrides}
    values |= {name: tuple(values[name]) for name in ("milestones", "branches") if name in values}
    if values["objective"] != "trades" and "branches" not in overrides:
        values["branches"] = ONE
    return Settings(protocol=protocol, preset=preset, **values)


def without_effect(protocol: str, overrides: Mapping[str, Any]) -> list[str]:
    """Those of the overrides that change nothing under a protocol: of an attack that it does not make, or of another loss."""
    objective = overrides.get("objective", OBJECTIVES[protocol][0])
    idle = {"ce": ("eps", "step_size", "steps", "beta"), "pgd": ("beta",), "trades": ()}[objective]
    return [name for name in overrides if name in idle]


def fit_to_images(settings: Settings, images: int, processes: int, given: Collection[str] = ()) -> Settings:
    """A preset's batch and learning rate for so many images.

    The batch is at most an eighth of the images, and divisible among processes and their parts. Where all weights are trained,
    the learning rate is at most 0.1 for a batch of 128, as in published AFF, and in proportion for a smaller one (linear
    scaling, Goyal et al., arXiv 1706.02677): TRADES in batches of 3 diverges at 0.1. A linear head keeps its rate.

    Args:
        settings: of the preset.
        images: to train on.
        processes: that share a batch.
        given: names of the settings that stay as they are.
    """
    batch, lr = settings.batch_size, settings.lr
    if "batch_size" not in given:
        unit, most = processes * settings.accumulate, max(2, images // _LEAST_BATCHES)
        batch = max(1, min(batch, most) // unit) * unit
    if "lr" not in given and not settings.frozen:
        lr = min(lr, _MOST_LR_PER_IMAGE * batch)
    return replace(settings, batch_size=batch, lr=lr)


def table() -> str:
    """All presets as a markdown table."""
    header = ("preset", "protocol", "loss", "epochs", "batch", "lr", "/10 after", "batch norm", "new head", "from")
    rows = []
    for (preset, protocol), (_, source) in PRESETS.items():
        s = choose_settings(protocol, preset)
        loss = {"ce": "CE", "pgd": f"CE on PGD-{s.steps}", "trades": f"TRADES, beta {s.beta:g}"}[s.objective]
        norm = "frozen" if s.frozen else "clean, adv" if s.branches == TWO else "one"
        head = "zero" if s.zero_head else "default"
        rows.append((preset, protocol, loss, s.epochs, s.batch_size, f"{s.lr:g}", _listed(s.milestones), norm, head, source))
    lines = [f"| {' | '.join(map(str, row))} |" for row in (header, *rows)]
    column = {"batch_size": "batch", "milestones": "/10 after"}
    notes = [f"On other data than CIFAR-10, from the {_BENCHMARK}:"]
    for presets, protocols, by_data in _BY_DATA:
        changes = [
            f"{name} ({', '.join(f'{column.get(key, key)} {_listed(value)}' for key, value in values.items())})"
            for name, values in by_data.items()
        ]
        notes.append(f"- {' and '.join(protocols)} of {' and '.join(presets)}: {', '.join(changes)}.")
    return "\n".join([lines[0], "|---" * len(header) + "|", *lines[1:], "", *notes])


def _listed(value: float | tuple[float, ...]) -> str:
    return ", ".join(f"{number:g}" for number in (value if isinstance(value, tuple) else (value,)))


def _one_of(name: str, value: str, known: tuple[str, ...], where: str = "") -> None:
    if value not in known:
        near = difflib.get_close_matches(str(value), known, 1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise ValueError(f"{name} is {value!r}, expected one of {', '.join(known)}{where}.{hint}")
