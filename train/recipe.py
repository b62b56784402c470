"""Recipes: one YAML file a result, `key=value` on the command line overrides it, anything unknown or impossible is refused.

A recipe's keys are the fields of `Recipe` and of the groups in it; numbers may be written as fractions (`eps: 8/255`).
"""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

from advcl_hub.pretraining import METHODS, AdvCL, Attack, ViewConfig
from advcl_hub.pretraining.pseudo_labels import PAPER_KS
from train.yaml_files import parse_yaml, read_yaml

RECIPES = Path(__file__).with_name("recipes")


@dataclass(frozen=True)
class Data:
    """Which images to train on: the arguments of `advcl_hub.data.load_data`, and the share kept back to judge the run.

    Attributes:
        source: e.g. `digits`, `cifar10`, `folder:PATH`, `parquet:PATH`.
        root: folder of the sources that need one.
        size: side to which images are resized; null keeps theirs.
        download: fetch a torchvision dataset that is not in `root`.
        val_fraction: class-balanced share of the training split that is never trained on; the test split is never touched.
        workers: decoding processes for sets too large for memory.
    """

    source: str = "digits"
    root: str | None = None
    size: int | None = None
    download: bool = False
    val_fraction: float = 0.1
    workers: int = 2

    def __post_init__(self) -> None:
        require(0 <= self.val_fraction < 1, f"val_fraction must be in [0, 1), got {self.val_fraction}")
        require(self.workers >= 0, f"workers must not be negative, got {self.workers}")


@dataclass(frozen=True)
class PseudoLabelSource:
    """Where the pseudo-labels come from: a label file (`path`), or clustering the features of a timm model (`encoder`).

    Attributes:
        ks: numbers of clusters, one head each.
        path: safetensors file in the published layout (`train_{K}`).
        encoder: `pixels`, or a pretrained timm model, `hf-hub:` and `local-dir:` names included.
        cache: folder that keeps labels once computed.
    """

    ks: tuple[int, ...] = PAPER_KS
    path: str | None = None
    encoder: str | None = None
    cache: str = "runs/pseudo_labels"

    def __post_init__(self) -> None:
        require(
            bool(self.ks) and min(self.ks) >= 2,
            f"ks needs numbers of clusters of at least 2, got {list(self.ks)}",
        )
        require(self.path is None or self.encoder is None, "give either path or encoder, not both")


@dataclass(frozen=True)
class Optimizer:
    """An optimizer of timm; the learning rate warms up linearly, then falls along a cosine, step by step.

    Published are, for example: AdvCL, `sgd`, lr 0.5, weight decay 1e-4; DeACL, `sgd`, lr 0.5, weight decay 5e-4; ACL, `lars`,
    lr 5, weight decay 1e-6; all with momentum 0.9.

    Attributes:
        name: `sgd` (of plain momentum; timm calls it `momentum`, its `sgd` is Nesterov's), `adamw`, `lars`, or `lamb`, which
            clips the gradient's norm at 1. LARS and LAMB scale the step of every tensor that decays by the norm of its values.
        lr: at the top of the cosine, which runs over all steps; it is not scaled with the batch.
        momentum: of `sgd` and `lars`.
        weight_decay: added to the gradient, but by `adamw` to the step.
        decay_norms_and_biases: whether weights of norms and biases decay too, as published. If not, no tensor of one dimension
            does, and LARS and LAMB do not scale its step.
        warmup_epochs: so long the rate rises from `warmup_lr` to `lr` instead.
        min_lr_ratio: the cosine ends at `lr * min_lr_ratio`.
    """

    name: str = "sgd"
    lr: float = 0.5
    momentum: float = 0.9
    weight_decay: float = 1e-4
    decay_norms_and_biases: bool = True
    warmup_epochs: float = 10
    warmup_lr: float = 0.01
    min_lr_ratio: float = 1e-3

    def __post_init__(self) -> None:
        require(self.name in ("sgd", "adamw", "lars", "lamb"), f"name must be sgd, adamw, lars or lamb, got {self.name!r}")
        require(self.lr > 0, f"lr must be positive, got {self.lr}")
        require(
            min(self.momentum, self.weight_decay, self.warmup_lr, self.min_lr_ratio) >= 0,
            "momentum, weight_decay, warmup_lr and min_lr_ratio must not be negative",
        )
        require(
            self.weight_decay > 0 or self.name not in ("lars", "lamb"),
            f"{self.name} of timm scales the step of tensors with weight decay only: set weight_decay above 0 (1e-6 in ACL)",
        )
        require(self.min_lr_ratio <= 1, f"the rate ends at lr * min_lr_ratio, at most lr: min_lr_ratio is {self.min_lr_ratio}")


@dataclass(frozen=True)
class Speed:
    """How the same step is computed.

    Attributes:
        mixed_precision: `no`, or `bf16` for autocast (the losses stay in float32).
        channels_last: memory layout of network and images, except where `safe_channels_last` says no.
        compile: torch.compile the encoder.
        sync_batch_norm: statistics over all processes (GPUs only).
    """

    mixed_precision: str = "no"
    channels_last: bool = False
    compile: bool = False
    sync_batch_norm: bool = False

    def __post_init__(self) -> None:
        require(
            self.mixed_precision in ("no", "bf16"),
            f"mixed_precision must be no or bf16, got {self.mixed_precision!r}",
        )


@dataclass(frozen=True)
class Judge:
    """A linear probe on held-out images while the run goes on, clean and under PGD at the training eps.

    Attributes:
        every: epochs between probes; 0 for none.
        train_images, val_images: at most so many images fit and judge the probe.
        steps: PGD steps of eps/4.
    """

    every: int = 10
    train_images: int = 5000
    val_images: int = 500
    steps: int = 20

    def __post_init__(self) -> None:
        require(self.every >= 0 and self.steps >= 0, f"every and steps must not be negative, got {self.every} and {self.steps}")
        require(
            self.train_images >= 1 and self.val_images >= 1,
            f"train_images and val_images must be at least 1, got {self.train_images}, {self.val_images}; every=0 is no probe",
        )


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the result of a pretraining run.

    Attributes:
        method: a key of `advcl_hub.pretraining.METHODS`.
        model, model_kwargs: any timm architecture and its arguments.
        start_from: encoder of this architecture whose weights the network starts from: a run, a folder, `hf-hub:ORG/NAME` or
            a name of timm. For `deacl` and `profeat` it is the teacher, too.
        epochs, batch_size: the batch is the global one, over all processes; it must divide by their number.
        seed: of weights, order, views and attack starts.
        ema_decay: of the averaged weights that are judged and exported; 0 for none.
        checkpoint_minutes: time between checkpoints.
        attack: of the step; the probes of `judge` have its eps.
        objective: the method's `Objective`.
    """

    method: str = "advcl"
    model: str = "resnet18_cifar"
    model_kwargs: dict[str, Any] = field(default_factory=dict)
    start_from: str | None = None
    epochs: int = 100
    batch_size: int = 512
    seed: int = 0
    ema_decay: float = 0.0
    checkpoint_minutes: float = 5.0
    data: Data = field(default_factory=Data)
    views: ViewConfig = field(default_factory=ViewConfig)
    attack: Attack = field(default_factory=Attack)
    objective: Any = field(default_factory=AdvCL.Objective)  # the type that the method wants: `from_dict` sees to it
    pseudo_labels: PseudoLabelSource = field(default_factory=PseudoLabelSource)
    optimizer: Optimizer = field(default_factory=Optimizer)
    speed: Speed = field(default_factory=Speed)
    judge: Judge = field(default_factory=Judge)

    def __post_init__(self) -> None:
        objective, labels, warmup = self.objective, self.pseudo_labels, self.optimizer.warmup_epochs
        require(self.epochs >= 1, f"epochs must be at least 1, got {self.epochs}")
        require(self.batch_size >= 2, f"batch_size must be at least 2, got {self.batch_size}")
        require(self.checkpoint_minutes >= 0, f"checkpoint_minutes must not be negative, got {self.checkpoint_minutes}")
        require(0 <= self.seed < 2**32, f"seed must be from 0 to 2**32 - 1, got {self.seed}")
        require(0 <= self.ema_decay < 1, f"ema_decay must be in [0, 1), got {self.ema_decay}")
        require(
            0 <= warmup < self.epochs,
            f"optimizer.warmup_epochs ({warmup}) must be less than epochs ({self.epochs})",
        )
        require(
            not self.judge.every or self.data.val_fraction > 0,
            "judge.every needs held-out images: set data.val_fraction above 0, or judge.every to 0",
        )
        kind = METHODS[self.method].Objective
        require(type(objective) is kind, f"{self.method} takes a {kind.__name__}, got {objective!r}")
        optional = ", or objective.pseudo_label_weight to 0" if hasattr(objective, "pseudo_label_weight") else ""
        require(
            not objective.uses_labels or bool(labels.path or labels.encoder),
            f"{self.method} needs pseudo-labels: set pseudo_labels.path or pseudo_labels.encoder{optional}",
        )
        require(
            not objective.needs_start or bool(self.start_from),
            f"{self.method} starts from a clean teacher: set start_from to a run, a folder, hf-hub:ORG/NAME or a name of timm",
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain nested values, as YAML and JSON have them."""
        return typing.cast(dict[str, Any], _plain(dataclasses.asdict(self)))


def load_recipe(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe and applies overrides.

    Args:
        name: a file in train/recipes without its ending, or the path of a YAML file.
        overrides: `key=value`, groups with dots: `attack.eps=4/255`, `model_kwargs.drop_path_rate=0.1`.

    Raises:
        FileNotFoundError: no such recipe.
        ValueError: an unknown key (the nearest known one is named), a value of the wrong type, an impossible combination.
    """
    values = read_yaml(name, RECIPES, "recipe")
    for override in overrides:
        key, equals, text = override.partition("=")
        require(bool(key and equals), f"An override is key=value, got {override!r}")
        *groups, leaf = key.split(".")
        target = values
        for group in groups:
            target = target.setdefault(group, {})
            require(isinstance(target, dict), f"{key}: {group} is not a group of settings")
        try:
            target[leaf] = parse_yaml(text)
        except ValueError as error:
            raise ValueError(f"{override!r} is not YAML: {' '.join(str(error).split())}") from None
    recipe = from_dict(values)
    o = recipe.optimizer
    require(  # not of `Optimizer` itself: checkpoints from before this rule are still opened and exported
        not o.warmup_epochs or o.warmup_lr <= o.lr,
        f"optimizer: the rate rises from warmup_lr to lr, but {o.warmup_lr} is above {o.lr}: set warmup_lr lower (adamw: 1e-6)",
    )
    return recipe


def from_dict(values: Mapping[str, Any]) -> Recipe:
    """A recipe from nested values; the inverse of `Recipe.to_dict`. Raises ValueError as `load_recipe` does.

    The method decides which keys `objective` has, and the defaults of `attack`.
    """
    name = values.get("method", "advcl")
    require(isinstance(name, str), f"method is a name, got {name!r}; known: {', '.join(METHODS)}")
    if name not in METHODS:
        near = difflib.get_close_matches(str(name), METHODS, 1, 0.0)[0]
        raise ValueError(f"method is {name!r}. Did you mean {near!r}? Known: {', '.join(METHODS)}")
    try:
        objective = build(METHODS[name].Objective, values.get("objective", {}), "objective")
    except ValueError as error:
        raise ValueError(f"method {name}: {error}") from None
    groups = {
        "objective": objective,
        "attack": build(Attack, values.get("attack", {}), "attack", METHODS[name].default_attack),
    }
    recipe: Recipe = build(Recipe, {**values, **groups})
    _check_plain(recipe.to_dict())
    return recipe


def _check_plain(value: Any, path: str = "") -> None:
    """Raises ValueError for what JSON, which checkpoints have, does not keep: infinite numbers, dates of YAML."""
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            _check_plain(inner, _join(path, key))
        return
    kept = isinstance(value, str | int | None) or (isinstance(value, float) and math.isfinite(value))
    require(kept, f"{path} is {value!s:.60}, expected a finite number, or text in quotes")


def require(condition: bool, message: str) -> None:
    """Raises ValueError with `message` unless the condition holds."""
    if not condition:
        raise ValueError(message)


def build(kind: Any, value: Any, path: str = "", base: Any = None) -> Any:
    """`value`, as YAML has it, as an instance of the type `kind`, a dataclass in most cases; `path` names it in errors.

    What `value` leaves out comes from `base`, an instance, or else from the defaults of the dataclass.

    Raises:
        ValueError: an unknown key (the nearest known one is named), or a value of the wrong type.
    """
    if kind is Any or (dataclasses.is_dataclass(kind) and type(value) is kind):
        return value
    if dataclasses.is_dataclass(kind):
        require(isinstance(value, Mapping), f"{path} is a group of settings, got {value!r}")
        known, hints = [f.name for f in dataclasses.fields(kind)], typing.get_type_hints(kind)
        for key in value:
            if key not in known:
                near = difflib.get_close_matches(str(key), known, 1, 0.0)
                hint = f" Did you mean {_join(path, near[0])!r}? Known: {', '.join(known)}" if near else " There are none."
                raise ValueError(f"Unknown key {_join(path, key)!r}.{hint}")
        built = {key: build(hints[key], v, _join(path, key)) for key, v in value.items()}
        unset = dataclasses.MISSING
        for f in dataclasses.fields(kind):
            needed = f.default is unset and f.default_factory is unset
            require(f.name in built or not needed, f"{_join(path, f.name)} is missing")
        try:
            return kind(**built) if base is None else dataclasses.replace(base, **built)  # type: ignore[operator]
        except ValueError as error:
            raise ValueError(f"{path}: {error}" if path else str(error)) from None
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is types.UnionType:  # X | None
        return None if value is None else build(args[0], value, path)
    if origin is tuple:
        require(
            isinstance(value, Sequence) and not isinstance(value, str),
            f"{path} must be a list, got {value!r}",
        )
        kinds = [args[0]] * len(value) if args[-1] is Ellipsis else list(args)
        require(len(kinds) == len(value), f"{path} needs {len(kinds)} values, got {value!r}")
        return tuple(build(k, v, path) for k, v in zip(kinds, value, strict=True))
    if origin is dict:
        require(isinstance(value, Mapping), f"{path} must be a group of settings, got {value!r}")
        require(all(isinstance(key, str) for key in value), f"the keys of {path} must be text, got {list(value)}")
        return {key: build(args[1], v, _join(path, key)) for key, v in value.items()}
    if kind is float and isinstance(value, str | int | float) and not isinstance(value, bool):
        try:  # YAML leaves 8/255 and 1e-4 as text
            return float(Fraction(value) if isinstance(value, str) and "/" in value else value)
        except (ValueError, ZeroDivisionError, OverflowError):
            pass
    elif type(value) is kind:
        return value
    elif kind is str and value is False:
        return "no"  # what YAML makes of an unquoted no
    raise ValueError(f"{path} must be {kind.__name__}, got {value!r}")


def _join(path: str, key: Any) -> str:
    return f"{path}.{key}" if path else str(key)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, tuple | list) else value
