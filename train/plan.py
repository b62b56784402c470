"""Plans: from one YAML file the stages that make an encoder, its classifiers and their figures, and the command of each.

A plan's keys are the fields of `Plan`; its stages have those of `Stage`. `train.flagship` runs it.
"""

import json
import re
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import click
import torch
from timm.models import create_model, is_model

from advcl_hub.cli.measure import evaluate
from advcl_hub.cli.tune import finetune, lp_aff
from advcl_hub.evaluation.protocol import Protocol
from advcl_hub.finetuning.lp_aff import stage_values
from advcl_hub.finetuning.presets import Settings, choose_settings, without_effect
from advcl_hub.hub.released import check_name
from train.recipe import Recipe, build, load_recipe, require
from train.yaml_files import read_yaml

PLANS = Path(__file__).with_name("plans")
# By what a stage runs, what the stage runs that it continues from. A benchmark may do without.
NEEDS = {
    "benchmark": ("pretrain", "lp_aff"),
    "pretrain": ("benchmark",),
    "lp_aff": ("pretrain",),
    "export": ("pretrain", "lp_aff"),
    "finetune": ("export",),
    "evaluate": ("finetune",),
}
TRAINED = ("pretrain", "lp_aff")  # these make an encoder
RESERVED = ("logs", "lock", "kept")
# By train.flagship, or by the epochs; of the time that choosing an epoch takes, the log of a training says nothing.
_CHOSEN = ("help", "data", "root", "output", "time_budget", "json", "milestones", "val_fraction")
# The option lists of those commands that are not recipes.
_CLICK: dict[str, click.Command] = {"lp_aff": lp_aff, "finetune": finetune, "evaluate": evaluate}
DTYPE = "float16"  # of the weights that a plan leaves, which are those that it measures


@dataclass(frozen=True)
class Stage:
    """One step of a plan.

    Attributes:
        run: `benchmark` (`train.trial`), `pretrain`, `lp_aff`, `export`, `finetune` or `evaluate`.
        of: the stage whose result it takes. Of a benchmark, if it has one, the stage whose encoder its recipe starts from, the
            teacher of DeACL; it replaces `start_from`.
        share: part of the plan's minutes, in [0, 1]. Pretraining takes the number of epochs that fits; LP-AFF and finetuning
            take their own number, or fewer if that does not fit.
        recipe: of a benchmark: what to measure, and then to pretrain.
        settings: of a benchmark, overrides of the recipe by dotted key; else options of the command, without their dashes.
    """

    run: str
    of: str | None = None
    share: float = 0.0
    recipe: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require(self.run in NEEDS, f"run must be one of {', '.join(NEEDS)}, got {self.run!r}")
        require(0 <= self.share <= 1, f"share must be in [0, 1], got {self.share:g}")
        required = self.run != "benchmark"
        require(not required or self.of is not None, f"{self.run} needs `of`: a stage that runs {' or '.join(NEEDS[self.run])}")
        require((self.recipe is not None) == (self.run == "benchmark"), "a benchmark needs a recipe, no other stage has one")
        require(not self.settings or self.run not in ("pretrain", "export"), f"{self.run} has no settings of its own")


@dataclass(frozen=True)
class Plan:
    """What to make, in which order, in which time.

    Attributes:
        name: of the exported encoder when it is released, `ARCHITECTURE.TAG`; a classifier's adds `_` and the name of its
            stage. All encoders of a plan have this architecture.
        minutes: for all stages together, over all calls.
        data: data set to finetune and to evaluate on.
        stages: by name.
    """

    name: str
    minutes: float
    data: str
    stages: dict[str, Stage]

    def __post_init__(self) -> None:
        try:
            check_name(self.name)
        except ValueError as error:
            raise ValueError(f"name: {str(error).rstrip('.')}") from None
        require(is_model(self.name.partition(".")[0]), f"name: timm has no architecture {self.name.partition('.')[0]!r}")
        require(0 < self.minutes < float("inf"), f"minutes must be a positive number, got {self.minutes:g}")
        require(bool(self.stages), "stages are missing")
        total = sum(stage.share for stage in self.stages.values())
        require(total < 1 + 1e-9, f"the shares of the stages add up to {total:g}, more than 1")
        earlier: dict[str, Stage] = {}
        for name, stage in self.stages.items():
            require(re.fullmatch(r"[A-Za-z0-9_]+", name) is not None, f"stages.{name}: a name has letters, digits and _ only")
            require(name not in RESERVED, f"stages.{name}: the name is taken by the plan's own files")
            if stage.of is not None:
                require(stage.of in earlier, f"stages.{name}: of is {stage.of!r}, and no earlier stage is called so")
                run, wanted = earlier[stage.of].run, NEEDS[stage.run]
                need = f"{stage.run} needs one that runs {' or '.join(wanted)}"
                require(run in wanted, f"stages.{name}: of is {stage.of!r}, which runs {run}; {need}")
            earlier[name] = stage
        for stage in self.stages.values():
            alike = [other for other, s in self.stages.items() if stage.run == s.run == "pretrain" and stage.of == s.of]
            require(len(alike) < 2, f"stages {' and '.join(alike)} would train the same: a benchmark is for one pretraining")
        exports = [name for name, stage in self.stages.items() if stage.run == "export"]
        require(len(exports) <= 1, f"stages {' and '.join(exports)} are exports: a plan releases one encoder")
        taken = {stage.of for stage in self.stages.values()}
        idle = [name for name, stage in self.stages.items() if stage.run in TRAINED and name not in taken]
        require(
            len(idle) <= (not exports),  # without an export the last one is what the plan is for
            f"stages.{' and '.join(idle)}: no stage takes this encoder: name it in the `of` of one, or leave its stage out",
        )

    def seconds(self, name: str) -> float:
        """Seconds of the plan that a stage may take."""
        return 60 * self.minutes * self.stages[name].share

    def to_dict(self) -> dict[str, Any]:
        """Plain nested values, as YAML and JSON have them."""
        return asdict(self)


@dataclass(frozen=True)
class Inputs:
    """What a plan reads besides itself: folder of the data set, file of pseudo-labels."""

    root: Path | None = None
    labels: Path | None = None

    def overrides(self) -> list[str]:
        """For a recipe."""
        named = {"data.root": self.root, "pseudo_labels.path": self.labels}
        return [f"{key}={value}" for key, value in named.items() if value is not None]


def load_plan(name: str, inputs: Inputs, *, rehearse: bool = False) -> Plan:
    """Reads a plan and checks everything in it that can be checked before it runs.

    Args:
        name: a file in train/plans without its ending, or the path of a YAML file.
        inputs: for the recipes.
        rehearse: apply what the plan has under `rehearse`.

    Raises:
        FileNotFoundError: no such plan or recipe.
        ValueError: an unknown key, setting or option (the nearest known one is named), a value of the wrong type, stages that
            do not follow from each other, or a rehearsal of a plan that has none.
    """
    values = read_yaml(name, PLANS, "plan")
    changes = values.pop("rehearse", None)
    if rehearse:
        require(isinstance(changes, Mapping), f"The plan {name} has no rehearsal: add what it changes under `rehearse`.")
        values = _merged(values, changes)
    plan: Plan = build(Plan, values)
    for stage_name, stage in plan.stages.items():
        try:
            if stage.run == "benchmark":
                made = recipe(stage, inputs, stage.of)
                require(made.model == plan.name.partition(".")[0], f"it makes a {made.model}, the plan's name is {plan.name}")
                if stage.of is not None:
                    _check_start(made, stage, _source_of(plan, stage.of), inputs)
            elif stage.run in _CLICK:
                for key in stage.settings:
                    require(key.replace("-", "_") not in _CHOSEN, f"settings.{key} is not for a plan to set")
                _check_options(stage, plan)
        except (ValueError, TypeError, click.ClickException) as error:
            message = error.format_message() if isinstance(error, click.ClickException) else str(error)
            if inputs.labels is None and "pseudo_labels.path" in message:
                message += "; --labels FILE sets pseudo_labels.path"
            if "set start_from to" in message:
                message += "; or give `of`, a stage that makes the teacher"
            raise ValueError(f"stages.{stage_name}: {message}") from None
    return plan


def _check_options(stage: Stage, plan: Plan) -> None:
    """Raises ValueError for a setting that the stage's command would refuse."""
    given = _given(stage, plan)
    for name in ("n", "shots"):
        require(given.get(name) is None or given[name] >= 1, f"{name} is {given.get(name)}, expected at least 1")
    if stage.run == "evaluate":
        Protocol(**{f.name: given[f.name] for f in fields(Protocol) if f.name in given})
        return
    tuning_epochs(stage, plan)
    require(given.get("clusters", 2) >= 2, f"clusters is {given.get('clusters')}, expected at least 2")
    protocol = given.get("protocol", "aff")
    idle = ", ".join(without_effect(protocol, _overrides_of(given)))
    require(not idle, f"{idle} changes nothing with the protocol {protocol}: leave it out")


def tuning_epochs(stage: Stage, plan: Plan) -> int:
    """The number of epochs that LP-AFF or a finetuning is asked for. Raises ValueError for a bad setting."""
    given = _given(stage, plan)
    if stage.run == "finetune":
        return choose_settings(given["protocol"], given["preset"], data=plan.data, overrides=_overrides_of(given)).epochs
    epochs: int = stage_values(given["head_epochs"], _overrides_of(given))["aff"]["epochs"]
    return epochs


def _given(stage: Stage, plan: Plan) -> dict[str, Any]:
    """The options of a stage's command, as click reads them."""
    return _CLICK[stage.run].make_context(stage.run, ["MODEL", "--data", plan.data, *options(stage)]).params


def _overrides_of(given: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the options that replace a preset's values."""
    names = {f.name for f in fields(Settings)} - {"protocol", "preset"}
    return {key: value for key, value in given.items() if key in names and value is not None}


def _source_of(plan: Plan, name: str) -> Stage:
    """The benchmark whose recipe made the encoder of a stage."""
    stage = plan.stages[name]
    while stage.run != "benchmark":
        assert stage.of is not None
        stage = plan.stages[stage.of]
    return stage


def _check_start(made: Recipe, stage: Stage, source: Stage, inputs: Inputs) -> None:
    """Raises ValueError unless a benchmark's recipe can start from the encoder of another one."""
    require("start_from" not in stage.settings, "of and settings.start_from both say where it starts: leave one out")
    require(
        not made.objective.needs_projector,
        f"{made.method} needs its teacher's projection head, which no stage exports: leave out `of`, and set "
        "settings.start_from to an encoder exported with --keep-projector",
    )
    there = recipe(source, inputs, source.of)
    weights = []
    for each in (made, there):
        with torch.device("meta"):  # shapes only
            network = create_model(each.model, num_classes=0, **each.model_kwargs)
        weights.append({key: tuple(value.shape) for key, value in network.state_dict().items()})
    require(
        weights[0] == weights[1],
        f"its network is not that of {stage.of!r}: model_kwargs are {made.model_kwargs} here and {there.model_kwargs} there",
    )


def recipe(stage: Stage, inputs: Inputs, start: Path | str | None = None) -> Recipe:
    """The recipe that a benchmark measures, which starts from the encoder in the folder `start` if there is one."""
    assert stage.recipe is not None
    return load_recipe(stage.recipe, _recipe_settings(stage, inputs, start))


def _recipe_settings(stage: Stage, inputs: Inputs, start: Path | str | None) -> list[str]:
    """What a benchmark changes in its recipe, as `key=value`."""
    return [*overrides(stage), *inputs.overrides(), *([] if start is None else [f"start_from={start}"])]


def overrides(stage: Stage) -> list[str]:
    """A benchmark's settings as `key=value`."""
    return [f"{key}={_text(value)}" for key, value in stage.settings.items()]


def options(stage: Stage) -> list[str]:
    """A stage's settings as options of its command; null leaves one out, true makes it a flag."""
    words: list[str] = []
    for key, value in stage.settings.items():
        if value is not None and value is not False:
            words += [f"--{key.replace('_', '-')}", *([] if value is True else [str(value)])]
    return words


def trial_command(stage: Stage, inputs: Inputs, start: Path | None, seconds: float, folder: Path) -> list[str]:
    """Measures the step of a benchmark's recipe, and how many epochs fit into so many seconds."""
    assert stage.recipe is not None
    settings = _recipe_settings(stage, inputs, start)
    return _python("train.trial", stage.recipe, *settings, f"--fit={seconds:.0f}s", "--output", str(folder))


def pretrain_command(
    benchmark: Stage, inputs: Inputs, start: Path | None, epochs: int, compiled: bool, folder: Path
) -> list[str]:
    """Pretrains the recipe of a benchmark in so many epochs; the warm-up keeps its share, and at most four probes judge it."""
    assert benchmark.recipe is not None
    c = recipe(benchmark, inputs, start)
    warmup = round(c.optimizer.warmup_epochs * epochs / c.epochs, 3)
    chosen = {"epochs": epochs, "optimizer.warmup_epochs": warmup, "speed.compile": compiled}
    if c.judge.every:
        chosen["judge.every"] = -(-epochs // 4)
    last = [f"{key}={_text(value)}" for key, value in chosen.items()]
    settings = [*_recipe_settings(benchmark, inputs, start), *last]
    return _python("train.pretrain", benchmark.recipe, *settings, "--output", str(folder))


def export_command(run: Path, folder: Path) -> list[str]:
    """Exports the encoder of a pretraining run, also of one that is not finished."""
    return _python("train.export", str(run), "--dtype", DTYPE, "--output", str(folder))


def tune_command(stage: Stage, plan: Plan, inputs: Inputs, encoder: Path, epochs: int | None, folder: Path) -> list[str]:
    """Finetunes an encoder, or does LP-AFF, in fewer epochs than the stage says if they are given."""
    chosen = [] if epochs is None else ["--epochs", str(epochs)]
    command = stage.run.replace("_", "-")
    words = [command, str(encoder), *_data(plan, inputs), *options(stage), *chosen, "--output", str(folder)]
    return _python("advcl_hub.cli", *words)


def convert_command(exported: Path, folder: Path) -> list[str]:
    """Stores an encoder or a classifier in the type in which it is measured and released."""
    return _python("advcl_hub.cli", "convert", str(exported), str(folder), "--dtype", DTYPE)


def evaluate_command(stage: Stage, plan: Plan, inputs: Inputs, classifier: Path, folder: Path) -> list[str]:
    """Measures a classifier."""
    words = ["evaluate", str(classifier), *_data(plan, inputs), *options(stage), "--output", str(folder)]
    return _python("advcl_hub.cli", *words)


def _data(plan: Plan, inputs: Inputs) -> list[str]:
    return ["--data", plan.data, *([] if inputs.root is None else ["--root", str(inputs.root)])]


def _python(module: str, *words: str) -> list[str]:
    return [sys.executable, "-m", module, *words]


def _text(value: Any) -> str:
    """A value as YAML reads it again."""
    return value if isinstance(value, str) else json.dumps(value)


def _merged(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Nested values with changes, group by group."""
    merged = dict(values)
    for key, value in changes.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merged(merged[key], value) if both else value
    return merged
