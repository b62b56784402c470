"""Carries out a plan: one command that measures, pretrains, exports, finetunes and evaluates, as far as the time allows.

    python -m train.flagship resnet18_advcl --root DATA --labels LABELS --output runs/flagship --time-budget 9m
    python -m train.flagship resnet18_advcl --rehearse             # every stage, tiny, on the CPU

The same command goes on where it stopped, also after a kill. Every stage is a command that can be typed as well; what it prints
also goes to logs/STAGE.log. What is worth keeping is renewed after every stage, in a few small files (`train.kept`).
"""

import argparse
import json
import logging
import shlex
import sys
import time
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from advcl_hub.cli.common import script
from advcl_hub.data import load_data
from advcl_hub.files import check_writable, lock, replacing, write_errors
from advcl_hub.records import RESULTS
from advcl_hub.training.runlog import read_log
from advcl_hub.training.state import FILE, differences
from advcl_hub.training.stop import StopRequest, duration
from train import kept, plan
from train.checkpoint import load_checkpoint
from train.export import export_checkpoint
from train.plan import Inputs, Plan, load_plan
from train.processes import StageError, run_command
from train.recipe import build, require
from train.trial import COMPILED, TRIAL, fewer_epochs

log = logging.getLogger("advcl")
_LEAST = 15.0  # seconds: with less left, no stage is started
_RUN_FILES = ("log.jsonl", "curves.png", "views.png", "batch.png", "recipe.yaml")
# What the record of a finished stage holds, at least.
_RECORDS = {
    "benchmark": ("chosen", "ways", "fit_seconds"),
    "pretrain": ("finished", "sha256"),
    "export": ("sha256",),
    "finetune": ("sha256",),
    "evaluate": ("accuracy", "data"),
}
_PIECE = 30.0  # seconds of finetuning, at most, after which its speed is known


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


class Flagship:
    """A plan at work in one folder.

    Args:
        record: plan and rehearsal; what is known of the stages is read from the folder.
        inputs: data and labels.
        output: folder of runs and results.
        keep: folder of what is worth keeping.

    Raises:
        ValueError: the folder holds another plan or another process works in it; `keep` holds something else.
        OSError: a folder cannot be written.
    """

    def __init__(self, record: Record, inputs: Inputs, output: Path, keep: Path) -> None:
        self.record, self.inputs, self.output, self.keep_folder = record, inputs, output, keep
        self.plan, self.stages = record.plan, record.plan.stages
        self.file = output / kept.PLAN
        check_writable(output)
        new = not self.file.is_file()
        if strangers := [name for name in self.stages if new and (output / name).exists()]:
            raise ValueError(f"{output} holds {', '.join(strangers)} and no {kept.PLAN}: choose another --output.")
        inside = keep.resolve() in (output.resolve(), *output.resolve().parents) or output.resolve() in keep.resolve().parents
        if inside and keep.resolve() != (output / "kept").resolve():
            raise ValueError(f"--keep is {keep}: give a folder outside of {output}, or {output / 'kept'}.")
        kept.check_kept(keep, self.plan.to_dict(), new=new)
        output.mkdir(parents=True, exist_ok=True)
        with write_errors(output / "lock"):
            self.lock = (output / "lock").open("a", encoding="utf-8")
        if not lock(self.lock):
            raise ValueError(f"A process is at work in {output} (perhaps what a killed call started): wait for it, or end it.")
        try:
            known = self.earlier() if self.file.is_file() else {}
        except ValueError:
            self.lock.close()
            raise
        self.record.stages = {name: known.get(name, StageState()) for name in self.stages}
        if new:
            self.write()
        self.kept = False  # whether the last try to keep files succeeded

    def earlier(self) -> dict[str, StageState]:
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
                raise ValueError(f"{self.output} holds {there}: choose another --output.")
            lines = "\n  ".join(different.values())
            raise ValueError(f"{self.output} holds another plan; choose another --output, or undo:\n  {lines}")
        return stages

    def write(self) -> None:
        """Puts what is known on disk."""
        with replacing(self.file) as draft:
            draft.write_text(json.dumps(asdict(self.record), indent=2) + "\n", encoding="utf-8")

    # ------------------------------------------------------------------------------------------- what stands in the folder

    def folder(self, name: str) -> Path:
        """Where a stage works; a finetuning that is shortened begins anew beside its first piece."""
        epochs = self.record.stages[name].epochs
        shortened = self.stages[name].run == "finetune" and epochs is not None
        return self.output / (f"{name}-{epochs}ep" if shortened else name)

    def model(self, name: str) -> Path:
        """The exported folder of a stage that makes one."""
        return self.folder(name) / plan.DTYPE if self.stages[name].run == "finetune" else self.folder(name)

    def result(self, name: str) -> Path:
        """The file that a finished stage wrote last."""
        run = self.stages[name].run
        if run == "pretrain":
            return self.folder(name) / "export" / RESULTS
        return self.folder(name) / TRIAL if run == "benchmark" else self.model(name) / RESULTS

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

    # ------------------------------------------------------------------------------------------------------------ the stages

    def run(self, stop: StopRequest) -> None:
        """All stages that can be carried out before a stop is due, each once; those that failed before are tried again."""
        for name, stage in self.stages.items():
            if stop.requested or stop.remaining < _LEAST:
                break
            state, began = self.record.stages[name], time.monotonic()
            if self.done(name) or (stage.of is not None and not self.done(stage.of)):
                continue
            state.error = None
            log.info("\n== %s", name)
            try:
                getattr(self, f"_{stage.run}")(name, stop)
            except (StageError, ValueError, OSError) as error:
                state.error = str(error)
                log.info("%s failed: %s", name, error)
            finally:
                state.seconds += time.monotonic() - began
                self.write()
            self.keep()

    def call(self, name: str, command: list[str], stop: StopRequest) -> None:
        """Runs a command of a stage; see `run_command`."""
        environment = {"CUDA_VISIBLE_DEVICES": ""} if self.record.rehearsal else {}
        run_command(command, self.output / "logs" / f"{name}.log", stop, environment, (self.lock.fileno(),))

    def _benchmark(self, name: str, stop: StopRequest) -> None:
        """Measures the step of the recipe that the stage after it trains."""
        share = sum(self.plan.seconds(other) for other, stage in self.stages.items() if stage.of == name)
        self.call(name, plan.trial_command(self.stages[name], self.inputs, share, self.folder(name)), stop)

    def _pretrain(self, name: str, stop: StopRequest) -> None:
        """Pretrains in as many epochs as the benchmark says fit, compiled if that is faster."""
        state, source = self.record.stages[name], self.stages[name].of
        assert source is not None
        if not state.measured:
            trial = self.read(source)
            state.measured, state.epochs, state.compiled = True, max(1, trial["epochs"]), trial["chosen"] == COMPILED
            if not trial["epochs"]:
                log.info("Not even one epoch fits into the share of %s: it takes one.", name)
            self.write()
        assert state.epochs is not None
        log.info("%d epochs, %s", state.epochs, "compiled" if state.compiled else "eager")
        self.call(
            name,
            plan.pretrain_command(self.stages[source], self.inputs, state.epochs, state.compiled, self.folder(name)),
            stop,
        )

    def _export(self, name: str, stop: StopRequest) -> None:
        """Exports the encoder."""
        source = self.stages[name].of
        assert source is not None
        self.call(name, plan.export_command(self.folder(source), self.folder(name)), stop)

    def _finetune(self, name: str, stop: StopRequest) -> None:
        """Finetunes; after a first piece it is known whether all epochs fit the share, or with how many to begin anew."""
        stage, state, share = self.stages[name], self.record.stages[name], self.plan.seconds(name)
        assert stage.of is not None
        encoder = self.model(stage.of)

        def train(*more: str) -> bool:
            """Goes on, and returns whether the classifier is there."""
            command = plan.finetune_command(stage, self.plan, self.inputs, encoder, state.epochs, self.folder(name))
            if not (self.folder(name) / "classifier" / RESULTS).is_file():
                self.call(name, [*command, *more], stop)
            return (self.folder(name) / "classifier" / RESULTS).is_file()

        if not state.measured:
            began = time.monotonic()
            finished = train("--time-budget", f"{max(1.0, min(_PIECE, share / 3)):g}s")
            if stop.requested:
                return
            state.measured = True
            if not finished:
                state.epochs = fewer_epochs(self.folder(name), share, time.monotonic() - began)
            if state.epochs:
                log.info("All epochs of %s do not fit its share: it begins anew, with %d.", name, state.epochs)
            self.write()
        if train() and not stop.requested:
            self.call(name, plan.convert_command(self.folder(name) / "classifier", self.model(name)), stop)

    def _evaluate(self, name: str, stop: StopRequest) -> None:
        """Measures a classifier."""
        stage = self.stages[name]
        assert stage.of is not None
        command = plan.evaluate_command(stage, self.plan, self.inputs, self.model(stage.of), self.folder(name))
        self.call(name, command, stop)

    # -------------------------------------------------------------------------------------------------- what is said and kept

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
            case "pretrain" | "finetune" if steps := [r for r in read_log(self.folder(name)) if "seconds" in r]:
                last, of = steps[-1], f" of {state.epochs}" if state.epochs else ""
                return f"epoch {last['epoch']:.1f}{of}, {last['seconds']:.0f} s of training"
            case "evaluate" if record:
                accuracy = record["accuracy"]
                figures = {"SA": "standard", "PGD": "pgd", "AutoAttack": "autoattack"}
                measured = [f"{short} {accuracy[key]['value']:.1%}" for short, key in figures.items() if key in accuracy]
                return f"{', '.join(measured)}; {record['data']['images']} images"
        return ""

    def close(self, command: str) -> int:
        """Says how far the plan is and what is next, and lets go of the folder. Returns the exit code: 1 if a stage failed."""
        self.lock.close()
        log.info("\n%s\n", self.summary())
        left = [name for name in self.stages if not self.done(name)]
        if left:
            log.info("Next: %s. The same command goes on:\n  %s", left[0], command)
        elif self.record.rehearsal:
            log.info("Rehearsed: every stage works here. Its figures mean nothing. All of it: %s", self.output)
        elif self.kept:
            folder = shlex.quote(str(self.keep_folder))
            log.info("Finished. To release it:\n  python -m model_cards.release %s --licence LICENCE", folder)
        if not self.kept:
            log.info("Not everything is kept in %s (see above): the same command tries again.", self.keep_folder)
        return 0 if self.kept and not any(self.record.stages[name].error for name in left) else 1

    def keep(self) -> None:
        """Renews the kept files; work goes on if that fails."""
        self.kept = False
        try:
            files = kept.keep(self.keep_folder, self.plan.to_dict(), *self.worth_keeping(), self.summary() + "\n")
            self.kept = True
        except (ValueError, OSError) as error:
            log.info("Not everything is kept: %s", error)
        else:
            size = sum(file.stat().st_size for file in files)
            log.info("Kept in %s: %d files, %.1f MB", self.keep_folder, len(files), size / 1e6)

    def worth_keeping(self) -> tuple[dict[str, Path], dict[str, Path]]:
        """By name the exported folders, and the other files and folders that are kept."""
        models, others = dict[str, Path](), {kept.PLAN: self.file, "logs": self.output / "logs"}
        for name, stage in self.stages.items():
            folder = self.folder(name)
            if stage.run in ("pretrain", "finetune"):
                others |= {f"{name}-run/{file}": folder / file for file in _RUN_FILES}
            if stage.run == "pretrain":
                others[kept.CURVES] = folder / "curves.png"
                exported = any(s.run == "export" and s.of == name and self.done(other) for other, s in self.stages.items())
                if not exported and (folder / FILE).is_file():
                    models[name] = self.output / f"{name}-so-far"
                    export_checkpoint(load_checkpoint(folder), models[name], dtype=plan.DTYPE)
            elif self.done(name):
                (models if stage.run in ("export", "finetune") else others)[name] = self.model(name)
        return models, others


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m train.flagship", description=__doc__.split("\n")[0])
    parser.add_argument("plan", help="name of a file in train/plans, or a path")
    parser.add_argument("--root", type=Path, help="folder that holds the data set")
    parser.add_argument("--labels", type=Path, help="file of pseudo-labels")
    parser.add_argument("--output", type=Path, help="folder of the plan (default: runs/PLAN, runs/PLAN-rehearsal)")
    parser.add_argument("--keep", type=Path, help="folder of what is worth keeping (default: OUTPUT/kept)")
    parser.add_argument("--time-budget", type=duration, help="stop after so long, at the latest half a minute later: 90s, 9m")
    parser.add_argument("--rehearse", action="store_true", help="every stage in a tiny setting, on the CPU")
    argv = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("timm").setLevel(logging.WARNING)
    stop = StopRequest(args.time_budget)
    output = args.output or Path("runs", Path(args.plan).stem + ("-rehearsal" if args.rehearse else ""))
    with script("Interrupted. The same command goes on from the last checkpoint."):
        inputs = Inputs() if args.rehearse else Inputs(args.root, args.labels)
        for option, path in (("--root", inputs.root), ("--labels", inputs.labels)):
            require(path is None or path.exists(), f"{option} is {path}, which does not exist.")
        record = Record(load_plan(args.plan, inputs, rehearse=args.rehearse), args.rehearse)
        flagship = Flagship(record, inputs, output, args.keep or output / "kept")
        if not any(flagship.done(name) for name in flagship.stages):
            load_data(record.plan.data, "test", root=inputs.root)  # what the last stages would refuse is refused now
        attacks = [name for name, s in record.plan.stages.items() if s.run == "evaluate" and s.settings.get("autoattack")]
        if attacks and find_spec("pyautoattack") is None:
            log.info("pyautoattack is not installed: %s will fail without it.", " and ".join(attacks))
        with stop:
            flagship.keep()  # before anything is done: the folder may be a new one
            flagship.run(stop)
        code = flagship.close(shlex.join(["python", "-m", "train.flagship", *argv]))
    sys.exit(code)


if __name__ == "__main__":
    main()
