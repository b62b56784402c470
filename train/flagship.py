"""Carries out a plan: one command that measures, pretrains, exports, finetunes and evaluates, as far as the time allows.

    python -m train.flagship resnet18_advcl --root DATA --labels LABELS --output runs/flagship --time-budget 9m
    python -m train.flagship resnet18_advcl --rehearse             # every stage, tiny, on the CPU

The same command goes on where it stopped, also after a kill. Every stage is a command that can be typed as well; what it prints
also goes to logs/STAGE.log. What is worth keeping is renewed after every stage, in a few small files (`train.kept`).
"""

import argparse
import logging
import shlex
import shutil
import sys
import time
from importlib.util import find_spec
from pathlib import Path

from advcl_hub.cli.common import script
from advcl_hub.data import load_data
from advcl_hub.files import check_writable, lock, write_errors
from advcl_hub.finetuning.lp_aff import HEAD, LABELS, REQUEST
from advcl_hub.hub.export import export_again
from advcl_hub.records import RESULTS, counted
from advcl_hub.training.state import FILE
from advcl_hub.training.stop import StopRequest, duration
from train import kept, plan
from train.checkpoint import load_checkpoint
from train.export import export_checkpoint
from train.fitting import FitWatch
from train.plan import TRAINED, Inputs, load_plan
from train.plan_folder import TUNED, PlanFolder, Record, StageState
from train.processes import StageError, Stop, run_command
from train.recipe import require
from train.trial import COMPILED

log = logging.getLogger("advcl")
_LEAST = 15.0  # seconds: with less left, no stage is started
_RUN_FILES = ("log.jsonl", "curves.png", "views.png", "batch.png", "recipe.yaml")


class Flagship:
    """A plan at work in one folder.

    Args:
        record: plan and rehearsal; what is known of the stages is read from the folder (`at`).
        inputs: data and labels.
        output: folder of runs and results.
        keep: folder of what is worth keeping.

    Raises:
        ValueError: the folder holds another plan or another process works in it; `keep` holds something else.
        OSError: a folder cannot be written.
    """

    def __init__(self, record: Record, inputs: Inputs, output: Path, keep: Path) -> None:
        self.at, self.inputs, self.keep_folder = PlanFolder(record, output), inputs, keep
        check_writable(output)
        new = not self.at.file.is_file()
        if strangers := [name for name in self.at.stages if new and (output / name).exists()]:
            raise ValueError(f"{output} holds {', '.join(strangers)} and no {kept.PLAN}: choose another --output.")
        inside = keep.resolve() in (output.resolve(), *output.resolve().parents) or output.resolve() in keep.resolve().parents
        if inside and keep.resolve() != (output / "kept").resolve():
            raise ValueError(f"--keep is {keep}: give a folder outside of {output}, or {output / 'kept'}.")
        kept.check_kept(keep, self.at.plan.to_dict(), new=new)
        output.mkdir(parents=True, exist_ok=True)
        with write_errors(output / "lock"):
            self.lock = (output / "lock").open("a", encoding="utf-8")
        if not lock(self.lock):
            raise ValueError(f"A process is at work in {output} (perhaps what a killed call started): wait for it, or end it.")
        try:
            known = self.at.read_record() if self.at.file.is_file() else {}
        except ValueError:
            self.lock.close()
            raise
        self.at.record.stages = {name: known.get(name, StageState()) for name in self.at.stages}
        if new:
            self.at.write()
        self.kept = False  # whether the last try to keep files succeeded

    # ------------------------------------------------------------------------------------------------------------ the stages

    def run(self, stop: StopRequest) -> None:
        """All stages that can be carried out before a stop is due, each once; those that failed before are tried again."""
        for name, stage in self.at.stages.items():
            if stop.requested or stop.remaining < _LEAST:
                break
            state, began = self.at.record.stages[name], time.monotonic()
            if self.at.done(name) or (stage.of is not None and not self.at.done(stage.of)):
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
                self.at.write()
            self.keep()

    def call(self, name: str, command: list[str], stop: Stop) -> None:
        """Runs a command of a stage; see `run_command`."""
        environment = {"CUDA_VISIBLE_DEVICES": ""} if self.at.record.rehearsal else {}
        run_command(command, self.at.path / "logs" / f"{name}.log", stop, environment, (self.lock.fileno(),))

    def _benchmark(self, name: str, stop: StopRequest) -> None:
        """Measures the step of the recipe that the stage after it trains."""
        share = sum(
            self.at.plan.seconds(other)
            for other, stage in self.at.stages.items()
            if (stage.run, stage.of) == ("pretrain", name)
        )
        stage, start = self.at.stages[name], self.at.start(name)
        self.call(name, plan.trial_command(stage, self.inputs, start, share, self.at.folder(name)), stop)

    def _pretrain(self, name: str, stop: StopRequest) -> None:
        """Pretrains in as many epochs as the benchmark says fit, compiled if that is faster."""
        state, source = self.at.record.stages[name], self.at.source(name)
        if not state.measured:
            trial = self.at.read(source)
            state.measured, state.epochs, state.compiled = True, max(1, trial["epochs"]), trial["chosen"] == COMPILED
            if not trial["epochs"]:
                log.info("Not even one epoch fits into the share of %s: it takes one.", name)
            self.at.write()
        assert state.epochs is not None
        log.info("%s, %s", counted(state.epochs, "epoch"), "compiled" if state.compiled else "eager")
        benchmark, start = self.at.stages[source], self.at.start(source)
        command = plan.pretrain_command(benchmark, self.inputs, start, state.epochs, state.compiled, self.at.folder(name))
        self.call(name, command, stop)

    def _lp_aff(self, name: str, stop: StopRequest) -> None:
        """Makes clusters of the features, and finetunes on them in as many epochs as fit."""
        self.tune(name, stop)

    def _export(self, name: str, stop: StopRequest) -> None:
        """Exports the encoder."""
        source = self.at.source(name)
        if self.at.stages[source].run == "lp_aff":
            self.call(name, plan.convert_command(self.at.model(source), self.at.folder(name)), stop)
        else:
            self.call(name, plan.export_command(self.at.folder(source), self.at.folder(name)), stop)

    def _finetune(self, name: str, stop: StopRequest) -> None:
        """Finetunes in as many epochs as fit."""
        if self.tune(name, stop):
            self.call(name, plan.convert_command(self.at.folder(name) / "classifier", self.at.model(name)), stop)

    def tune(self, name: str, stop: StopRequest) -> bool:
        """Trains in the stage's own number of epochs, and returns whether all of it is done.

        If its log shows that they do not fit the share, it begins anew with the number that does.
        """
        stage, state = self.at.stages[name], self.at.record.stages[name]
        encoder, made = self.at.model(self.at.source(name)), TUNED[stage.run].made

        def train(until: Stop) -> bool:
            """Goes on, and returns whether the model is there."""
            folder = self.at.folder(name)
            if not (folder / made / RESULTS).is_file():
                command = plan.tune_command(stage, self.at.plan, self.inputs, encoder, state.epochs, folder)
                self.call(name, command, until)
            return (folder / made / RESULTS).is_file()

        if not state.measured:
            first, epochs, lp_aff = self.at.folder(name), plan.tuning_epochs(stage, self.at.plan), stage.run == "lp_aff"
            head = [first / HEAD] if lp_aff else []
            fit = FitWatch(stop, self.at.training(name), epochs, self.at.plan.seconds(name), head)
            done, fits = train(fit), fit.fits
            if not done and fits is not None and fits < epochs:
                log.info("All epochs of %s do not fit its share: it begins anew, with %d.", name, fits)
                for same in (LABELS, HEAD) if lp_aff else ():  # they do not depend on the epochs
                    if (first / same).is_dir():
                        shutil.copytree(first / same, self.at.shortened(name, fits) / same, dirs_exist_ok=True)
                state.epochs = fits
            state.measured = done or fits is not None
            self.at.write()
            if not state.measured:
                return False
        return not stop.requested and train(stop) and not stop.requested

    def _evaluate(self, name: str, stop: StopRequest) -> None:
        """Measures a classifier."""
        stage, model = self.at.stages[name], self.at.model(self.at.source(name))
        self.call(name, plan.evaluate_command(stage, self.at.plan, self.inputs, model, self.at.folder(name)), stop)

    def close(self, command: str) -> int:
        """Says how far the plan is and what is next, and lets go of the folder. Returns the exit code: 1 if a stage failed."""
        self.lock.close()
        log.info("\n%s\n", self.at.summary())
        left = [name for name in self.at.stages if not self.at.done(name)]
        if left:
            log.info("Next: %s. The same command goes on:\n  %s", left[0], command)
        elif self.at.record.rehearsal:
            log.info("Rehearsed: every stage works here. Its figures mean nothing. All of it: %s", self.at.path)
        elif self.kept:
            folder = shlex.quote(str(self.keep_folder))
            log.info("Finished. To release it:\n  python -m model_cards.release %s --licence LICENCE", folder)
        if not self.kept:
            log.info("Not everything is kept in %s (see above): the same command tries again.", self.keep_folder)
        return 0 if self.kept and not any(self.at.record.stages[name].error for name in left) else 1

    def keep(self) -> None:
        """Renews the kept files; work goes on if that fails."""
        self.kept = False
        try:
            models, earlier, others = self.worth_keeping()
            chosen = kept.fitting(models, earlier)
            left = [name for name in earlier if name not in chosen]
            note = f"\nNot kept, because it does not fit beside the rest: {', '.join(left)}\n" if left else ""
            files = kept.keep(self.keep_folder, self.at.plan.to_dict(), chosen, others, f"{self.at.summary()}\n{note}")
            self.kept = True
        except (ValueError, OSError) as error:
            log.info("Not everything is kept: %s", error)
        else:
            size = sum(file.stat().st_size for file in files)
            log.info("Kept in %s: %d files, %.1f MB%s", self.keep_folder, len(files), size / 1e6, note.rstrip())

    def worth_keeping(self) -> tuple[dict[str, Path], dict[str, Path], dict[str, Path]]:
        """By name the exported folders, earlier encoders of the plan, the newest first, and the other files and folders."""
        at, models, earlier = self.at, dict[str, Path](), dict[str, Path]()
        others = {kept.PLAN: at.file, "logs": at.path / "logs"}
        exported = {stage.of for name, stage in at.stages.items() if stage.run == "export" and at.done(name)}
        for name, stage in at.stages.items():
            if stage.run in (*TRAINED, "finetune"):
                others |= {f"{name}-run/{file}": at.training(name) / file for file in _RUN_FILES}
            if stage.run == "lp_aff":
                others |= {f"{name}-run/{file}": at.folder(name) / file for file in (REQUEST, LABELS, f"{HEAD}/log.jsonl")}
            if stage.run in TRAINED:
                if (curves := at.training(name) / kept.CURVES).is_file():
                    others[kept.CURVES] = curves
                if name not in exported and (folder := self.so_far(name)):
                    earlier = {name: folder, **earlier}
            elif at.done(name):
                (models if stage.run in ("export", "finetune") else others)[name] = at.model(name)
        if not models and earlier:  # nothing is exported yet: the newest one is the result
            newest = next(iter(earlier))
            models[newest] = earlier.pop(newest)
        return models, earlier, others

    def so_far(self, name: str) -> Path | None:
        """The encoder that a stage trains, exported as far as it is trained."""
        folder = self.at.path / f"{name}-so-far"
        if self.at.stages[name].run == "lp_aff":
            return export_again(self.at.model(name), folder, dtype=plan.DTYPE) if self.at.done(name) else None
        if not (self.at.folder(name) / FILE).is_file():
            return None
        return export_checkpoint(load_checkpoint(self.at.folder(name)), folder, dtype=plan.DTYPE)


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
        if not any(flagship.at.done(name) for name in flagship.at.stages):
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
