"""What a plan has done in its folder: plan.json, where each stage works, how far it is, and what came out."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from advcl_hub.files import replacing
from advcl_hub.finetuning.lp_aff import EXPORT, FULL
from advcl_hub.records import RESULTS
from advcl_hub.training.state import differences
from train import kept
from train.fitting import timed_records
from train.plan import DTYPE, Plan
from train.recipe import build
from train.trial import TRIAL

# What the record of a finished stage holds, at least.
_RECORDS = {
    "benchmark": ("chosen", "ways", "fit_seconds"),
    "pretrain": ("finished", "sha256"),
    "lp_aff": ("sha256",),
    "export": ("sha256",),
    "finetune": ("sha256",),
    "evaluate": ("accuracy", "data"),
}


class Tuned(NamedTuple):
    """Where, in the folder of a stage that may take fewer epochs, the epochs are trained and what is made lies."""

    training: str
    made: str


TUNED = {"finetune": Tuned("", "classifier"), "lp_aff": Tuned(FULL, EXPORT)}


@dataclass
class StageState:
    """What is known of a stage between calls.

    Attributes:
        seconds: time spent on it.
        measured: whether it is known how many epochs fit its share.
        epochs: number of epochs that fits the share; None: the number in the stage's settings.
        compiled: whether pretraining is faster compiled.
        error: why it failed the last time.
    """

    seconds: float = 0.0
    measured: bool = False
    epochs: int | None = None
    compiled: bool = False
    error: str | None = None


@dataclass
class Record:
    """plan.json: the plan, whether it is a rehearsal, and what is known of its stages."""

    plan: Plan
    rehearsal: bool
    stages: dict[str, StageState] = field(default_factory=dict)


class PlanFolder:
    """The folder in which a plan is at work; the stages are those of its record.

    Args:
        record: plan and rehearsal; what is known of the stages is read from the folder by `read_record`.
        path: the folder.
    """

    def __init__(self, record: Record, path: Path) -> None:
        self.record, self.path = record, path
        self.plan, self.stages = record.plan, record.plan.stages
        self.file = path / kept.PLAN

    def read_record(self) -> dict[str, StageState]:
        """What is known of the stages from earlier calls. Raises ValueError if they carried out another plan."""
        try:
            earlier = json.loads(self.file.read_text(encoding="utf-8"))
            stages: dict[str, StageState] = build(dict[str, StageState], earlier.pop("stages"))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{self.file} is damaged ({error}): choose another --output.") from None
        ours = json.loads(json.dumps({"plan": self.plan.to_dict(), "rehearsal": self.record.rehearsal}))
        if different := differences(earlier, ours):
            if "rehearsal" in different:
                there = "a rehearsal" if earlier.get("rehearsal") else "no rehearsal"
                raise ValueError(f"{self.path} holds {there}: choose another --output.")
            lines = "\n  ".join(different.values())
            raise ValueError(f"{self.path} holds another plan; choose another --output, or undo:\n  {lines}")
        return stages

    def write(self) -> None:
        """Puts what is known on disk."""
        with replacing(self.file) as draft:
            draft.write_text(json.dumps(asdict(self.record), indent=2) + "\n", encoding="utf-8")

    def folder(self, name: str) -> Path:
        """Where a stage works; one that is shortened begins anew beside its first try."""
        epochs = self.record.stages[name].epochs
        return self.shortened(name, epochs) if self.stages[name].run in TUNED and epochs is not None else self.path / name

    def shortened(self, name: str, epochs: int) -> Path:
        """Where a finetuning works that was shortened to so many epochs."""
        return self.path / f"{name}-{epochs}ep"

    def model(self, name: str) -> Path:
        """The exported folder of a stage that makes one; encoders that training goes on from are in float32."""
        inside = {"pretrain": "export", "lp_aff": EXPORT, "finetune": DTYPE}
        return self.folder(name) / inside.get(self.stages[name].run, "")

    def source(self, name: str) -> str:
        """The stage whose result this one takes."""
        of = self.stages[name].of
        assert of is not None
        return of

    def training(self, name: str) -> Path:
        """Where the log is of a stage that trains."""
        tuned = TUNED.get(self.stages[name].run)
        return self.folder(name) / (tuned.training if tuned else "")

    def start(self, benchmark: str) -> Path | None:
        """The encoder that the recipe of a benchmark starts from, if a stage makes it."""
        of = self.stages[benchmark].of
        return None if of is None else self.model(of)

    def result(self, name: str) -> Path:
        """The file that a finished stage wrote last."""
        return self.folder(name) / TRIAL if self.stages[name].run == "benchmark" else self.model(name) / RESULTS

    def read(self, name: str) -> dict[str, Any]:
        """The record in that file, empty if the stage is not finished or the file is damaged: then the stage runs again."""
        try:
            record = json.loads(self.result(name).read_text(encoding="utf-8"))
            return record if all(record[key] for key in _RECORDS[self.stages[name].run]) else {}
        except (OSError, ValueError, KeyError, TypeError):
            return {}

    def done(self, name: str) -> bool:
        """Whether a stage is finished."""
        return bool(self.read(name))

    def summary(self) -> str:
        """Every stage in a line of a table: how far it is, what it took, and what came out."""
        spent = sum(state.seconds for state in self.record.stages.values())
        rehearsal = ", a rehearsal" if self.record.rehearsal else ""
        lines = [f"{self.plan.name}{rehearsal}: {spent / 60:.1f} of {self.plan.minutes:g} minutes used", ""]
        lines += ["| stage | state | minutes | planned | result |", "| --- | --- | --- | --- | --- |"]
        for name in self.stages:
            state = self.record.stages[name]
            cells = [name, self.state(name), f"{state.seconds / 60:.1f}", f"{self.plan.seconds(name) / 60:.1f}"]
            lines.append(f"| {' | '.join([*cells, self.outcome(name)])} |")
        return "\n".join(lines)

    def state(self, name: str) -> str:
        """`done`, `failed`, `stopped`, `to do`, or what it waits for."""
        if self.done(name):
            return "done"
        of = self.stages[name].of
        if of is not None and not self.done(of):
            return f"waits for {of}"
        state = self.record.stages[name]
        return "failed" if state.error else "stopped" if state.seconds else "to do"

    def outcome(self, name: str) -> str:
        """What came out of a stage, in a few words."""
        state, record = self.record.stages[name], self.read(name)
        match self.stages[name].run:
            case _ if state.error and not self.done(name):
                return state.error.replace("|", "/").replace("\n", " ")
            case "benchmark" if record:
                way = record["ways"][record["chosen"]]
                rate = f"{way['images_per_second']:,.0f} images/s, {way['share_of_matrix_rate']:.0%} of the matrix rate"
                return f"{record['chosen']}: {rate}; {record['epochs']} epochs fit"
            case "pretrain" | "lp_aff" | "finetune" if steps := timed_records(self.training(name)):
                last, of = steps[-1], f" of {state.epochs}" if state.epochs else ""
                return f"epoch {last['epoch']:.1f}{of}, {last['seconds']:.0f} s of training"
            case "evaluate" if record:
                accuracy = record["accuracy"]
                figures = {"SA": "standard", "PGD": "pgd", "AutoAttack": "autoattack"}
                measured = [f"{short} {accuracy[key]['value']:.1%}" for short, key in figures.items() if key in accuracy]
                return f"{', '.join(measured)}; {record['data']['images']} images"
        return ""
