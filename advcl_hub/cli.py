"""The command `advcl-hub`: reads the command line, calls the library, prints."""

import argparse
import functools
import json
import logging
import shlex
import sys
import warnings
from collections.abc import Callable
from dataclasses import fields
from fractions import Fraction
from pathlib import Path
from typing import Any

import click

import advcl_hub
from advcl_hub.attacks import LOSSES, NORMS
from advcl_hub.evaluation import Protocol, load_record, report
from advcl_hub.evaluation.processes import Processes, leave
from advcl_hub.evaluation.protocol import AUTOATTACKS
from advcl_hub.evaluation.results import folder_name
from advcl_hub.evaluation.runner import UNFINISHED
from advcl_hub.export import RESULTS
from advcl_hub.files import slug
from advcl_hub.finetuning.presets import AUGMENTATIONS, PRECISIONS, PRESETS, PROTOCOLS, Settings, table
from advcl_hub.training.stop import duration


def length(text: str) -> float:
    """A distance of pixels in [0, 1], also as a fraction."""
    try:
        return float(Fraction(text))
    except (ValueError, ZeroDivisionError):
        raise click.BadParameter(f"{text!r} is not a number such as 8/255 or 0.5") from None


def seconds(text: str) -> float:
    """A time such as 90s, 9m or 2h."""
    try:
        return duration(text)
    except argparse.ArgumentTypeError as error:
        raise click.BadParameter(str(error)) from None


def numbers(text: str) -> tuple[float, ...]:
    """Numbers with commas between them."""
    return tuple(length(part) for part in text.split(",") if part)


def words(text: str) -> tuple[str, ...]:
    """Words with commas between them."""
    return tuple(filter(None, text.split(",")))


def _command(function: Callable[..., None]) -> Callable[..., None]:
    """User errors become one line and exit code 1, Ctrl-C a line that says how to go on."""

    @functools.wraps(function)
    def wrapped(*args: Any, **options: Any) -> None:
        logging.getLogger("timm").setLevel(logging.WARNING)
        try:
            with warnings.catch_warnings():
                warnings.showwarning = lambda message, *rest: click.echo(f"warning: {message}", err=True)
                function(*args, **options)
        except (ValueError, OSError, ImportError, FloatingPointError) as error:
            raise click.ClickException(str(error)) from error
        except KeyboardInterrupt:
            click.echo("\nStopped. The same command goes on from the last finished batch.", err=True)
            sys.exit(130)

    return wrapped


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="advcl-hub")
def main() -> None:
    """Image encoders for timm that stay adversarially robust after finetuning."""


@main.command()
@click.argument("model")
@click.option("--data", required=True, help="cifar10, cifar100, stl10, fashion-mnist, digits, folder:PATH or parquet:PATH.")
@click.option("--root", type=click.Path(path_type=Path), help="Folder that holds the data set.")
@click.option("--split", default="test", show_default=True, help="Split of the data set.")
@click.option("--n", "--images", "n", type=int, help="So many images, class-balanced, everywhere the same.  [default: all]")
@click.option("--first", is_flag=True, help="With --n: the first ones instead, as RobustBench does.")
@click.option("--norm", type=click.Choice(NORMS, case_sensitive=False), default=Protocol.norm, show_default=True)
@click.option("--eps", type=length, help="Radius in pixels of [0, 1], such as 8/255.  [default: 8/255, L2: 0.5]")
@click.option("--steps", type=int, default=Protocol.steps, show_default=True, help="PGD steps; 0 leaves PGD out.")
@click.option("--step-size", type=length, help="Length of a PGD step.  [default: eps / 4]")
@click.option(
    "--restarts", type=int, default=Protocol.restarts, show_default=True, help="PGD runs that an image has to survive."
)
@click.option("--loss", type=click.Choice(list(LOSSES)), default=Protocol.loss, show_default=True, help="What PGD raises.")
@click.option("--autoattack", type=click.Choice(AUTOATTACKS), help="Run AutoAttack too (rand: for random models).")
@click.option("--corruptions", help="A folder in the layout of CIFAR-10-C, or 'generated' for a small set of our own.")
@click.option("--seed", type=int, default=Protocol.seed, show_default=True)
@click.option("--batch-size", type=int, default=Protocol.batch_size, show_default=True, help="Halved until it fits the GPU.")
@click.option("--bf16", is_flag=True, help="Compute in bfloat16, for screening only: the result says so.")
@click.option(
    "--check-images", type=int, default=Protocol.check_images, show_default=True, help="For checks and curves; 0: none."
)
@click.option("--device", help="Such as cpu or cuda:1.  [default: a GPU if there is one]")
@click.option("--output", type=click.Path(path_type=Path), help="Folder for the results.  [default: evaluations/MODEL/...]")
@click.option("--json", "as_json", is_flag=True, help="Print results.json instead of a table.")
@_command
def evaluate(model: str, data: str, bf16: bool, as_json: bool, output: Path | None, **options: Any) -> None:
    """Clean accuracy, PGD and AutoAttack of any timm MODEL: a name, hf-hub:ORG/NAME, local-dir:FOLDER or a folder.

    The model's preprocessing is inside the attacked function; eps counts in pixels of [0, 1]. Stop it whenever you like: the
    same command goes on. Several processes share the images: torchrun --nproc_per_node 2 -m advcl_hub.cli evaluate ...
    (there type --images for --n, which torchrun takes for one of its own).

    \b
    Examples:
      advcl-hub evaluate runs/resnet18/classifier --data cifar10 --root DATA
      advcl-hub evaluate resnet18.a1_in1k --data folder:imagenette --n 1000 --autoattack standard
    """
    settings = {field.name: options.pop(field.name) for field in fields(Protocol) if field.name in options}
    protocol = Protocol(precision="bfloat16" if bf16 else "float32", **settings)
    output = output or Path("evaluations", slug(model), folder_name(data, protocol, options))
    command = shlex.join(["advcl-hub", *sys.argv[1:]])
    result = advcl_hub.evaluate(model, data, protocol, output=output, command=command, **options)
    main_process = Processes.current().rank == 0
    leave()
    if main_process:
        click.echo(json.dumps(result.record, indent=2) if as_json else f"\n{report([result.record])}\n\nResults: {output}")


@main.command("report")
@click.argument("results", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--format", "style", type=click.Choice(["text", "markdown", "latex"]), default="text", show_default=True)
@click.option("--literature", is_flag=True, help="Add published figures on the same data, marked as quoted.")
@click.option("--json", "as_json", is_flag=True, help="Print the records.")
@_command
def report_command(results: tuple[Path, ...], style: str, literature: bool, as_json: bool) -> None:
    """Puts evaluations side by side: folders that evaluate wrote.

    \b
    Example:
      advcl-hub report evaluations/*/* --format latex --literature
    """
    unfinished = [path for path in results if (path / UNFINISHED).is_dir() and not (path / RESULTS).exists()]
    for path in unfinished:
        click.echo(f"warning: {path} is left out: its evaluation is not finished.", err=True)
    records = [load_record(path) for path in results if path not in unfinished]
    click.echo(json.dumps(records, indent=2) if as_json else report(records, style, literature=literature))


_PRESET_NAMES = tuple(dict.fromkeys(name for name, _ in PRESETS))
_OVERRIDES = (
    click.option("--objective", type=click.Choice(["trades", "pgd"]), help="Of aff: TRADES or PGD adversarial training."),
    click.option("--epochs", type=int, help="Milestones move in proportion."),
    click.option("--batch-size", type=int, help="Over all processes.  [default: the preset's, of small sets an eighth]"),
    click.option("--lr", type=float, help="Learning rate of SGD."),
    click.option("--milestones", type=numbers, help="Epochs after which it is divided by 10, such as 15,20."),
    click.option("--momentum", type=float),
    click.option("--weight-decay", type=float),
    click.option("--eps", type=length, help="Radius of the attack in training, l_inf, such as 8/255."),
    click.option("--step-size", type=length, help="Length of its steps.  [default: eps / 4]"),
    click.option("--steps", type=int, help="Number of its steps."),
    click.option("--beta", type=float, help="Weight of the robust term of TRADES."),
    click.option("--branches", type=words, help="Batch-norm branches of aff: adv, or clean,adv of which adv is exported."),
    click.option("--zero-head/--default-head", default=None, help="How the new head starts."),
    click.option("--augment", type=click.Choice(AUGMENTATIONS), help="With none, slf computes the features once."),
    click.option("--ema-decay", type=float, help="Of averaged weights, which are then exported; 0: none."),
    click.option("--accumulate", type=int, help="Parts in which a process computes its share of a batch."),
    click.option("--precision", type=click.Choice(PRECISIONS), help="bfloat16 computes under autocast."),
    click.option("--val-fraction", type=float, help="Held out of the training images to choose the epoch; 0: the last."),
    click.option("--seed", type=int, help="Of everything random.  [default: 0]"),
)


def _overrides(function: Callable[..., None]) -> Callable[..., None]:
    """The options that replace a preset's values; they reach the command as one dictionary of those that were given."""
    names = [field.name for field in fields(Settings)]

    @functools.wraps(function)
    def wrapped(**options: Any) -> None:
        given = {name: options.pop(name) for name in names if name in options and name not in ("protocol", "preset")}
        function(**options, overrides={name: value for name, value in given.items() if value is not None})

    for option in reversed(_OVERRIDES):
        wrapped = option(wrapped)
    return wrapped


@main.command()
@click.argument("model")
@click.option("--data", required=True, help="cifar10, cifar100, stl10, fashion-mnist, digits, folder:PATH or parquet:PATH.")
@click.option("--protocol", type=click.Choice(list(PROTOCOLS)), default="slf", show_default=True)
@click.option("--preset", type=click.Choice(_PRESET_NAMES), default="advcl", show_default=True, help="Whose values to take.")
@click.option("--root", type=click.Path(path_type=Path), help="Folder that holds the data set.")
@click.option("--split", default="train", show_default=True, help="Split of the data set.")
@click.option("--size", type=int, help="Side of the images, instead of the encoder's own.")
@click.option("--shots", type=int, help="So many images of every class.  [default: all]")
@click.option("--keep-head", is_flag=True, help="Start from the classifier that the model has.")
@_overrides
@click.option("--output", type=click.Path(path_type=Path), help="Folder of the run.  [default: runs/finetuned/MODEL/...]")
@click.option("--cpu", is_flag=True, help="Compute on the CPU even where there is a GPU.")
@click.option("--time-budget", type=seconds, help="Stop with a checkpoint after so long: 90s, 9m, 2h.")
@click.option("--checkpoint-minutes", type=float, default=5.0, show_default=True)
@_command
def finetune(model: str, root: Path | None, overrides: dict[str, Any], **options: Any) -> None:
    """Finetunes the encoder MODEL on labelled images: a name, hf-hub:ORG/NAME, local-dir:FOLDER or a folder.

    random: before MODEL draws new weights. Protocols: slf and alf train a linear head on the frozen encoder, on clean and on
    adversarial images; aff trains all weights adversarially (TRADES), sff on clean images. `advcl-hub presets` lists them.
    Stop it whenever you like: the same command goes on. Several processes: accelerate launch train/finetune.py ..., or
    torchrun --nproc_per_node 2 -m advcl_hub.cli finetune ...

    \b
    Examples:
      advcl-hub finetune runs/resnet18/export --data cifar10 --root DATA --protocol slf
      advcl-hub finetune runs/resnet18/export --data folder:pets --protocol aff --epochs 10 --val-fraction 0.1
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    command = shlex.join(["advcl-hub", *sys.argv[1:]])
    tuned = advcl_hub.finetune(model, root=root, command=command, **options, **overrides)
    main_process = Processes.current().rank == 0
    leave()
    if not main_process:
        return
    if not tuned.finished:
        click.echo(f"Stopped with a checkpoint in {tuned.output}. The same command continues.")
        return
    evaluation = [
        "advcl-hub",
        "evaluate",
        str(tuned.folder),
        "--data",
        options["data"],
        *(["--root", str(root)] if root else []),
    ]
    click.echo(
        f"Use it:       import advcl_hub, timm\n"
        f'              model = timm.create_model("local-dir:{tuned.folder}", pretrained=True)\n'
        f"Evaluate it:  {shlex.join(evaluation)}"
    )


@main.command()
def presets() -> None:
    """Lists the presets of finetuning with all their values, as markdown."""
    click.echo(table())


@main.command()
@click.argument("models", nargs=-1, required=True)
@click.option("--to", type=words, required=True, help="Data sets, such as cifar10,fashion-mnist,folder:PATH.")
@click.option("--protocols", type=words, default="slf", show_default=True, help="Such as slf,alf,aff.")
@click.option("--shots", type=words, default="all", show_default=True, help="Images of every class, such as 10,100,all.")
@click.option("--preset", type=click.Choice(_PRESET_NAMES), default="advcl", show_default=True, help="Whose values to take.")
@click.option("--root", type=click.Path(path_type=Path), help="Folder that holds the data sets.")
@click.option("--n", "--images", "n", type=int, default=1000, show_default=True, help="Class-balanced test images; 0: all.")
@click.option("--check-images", type=int, default=Protocol.check_images, show_default=True, help="As in evaluate.")
@_overrides
@click.option("--output", type=click.Path(path_type=Path), default=Path("runs/transfer"), show_default=True)
@click.option("--cpu", is_flag=True, help="Compute on the CPU even where there is a GPU.")
@click.option("--time-budget", type=seconds, help="Stop with a checkpoint after so long: 90s, 9m, 2h.")
@_command
def transfer(
    models: tuple[str, ...], shots: tuple[str, ...], n: int, check_images: int, overrides: dict[str, Any], **options: Any
) -> None:
    """Finetunes and evaluates every MODEL on every data set under every protocol, and prints one table.

    MODEL is as in finetune, or NAME=MODEL to name its row. Stop it whenever you like: the same command goes on.

    \b
    Example:
      advcl-hub transfer AdvCL=runs/advcl/export SimCLR=runs/simclr/export random:resnet8_cifar \\
          --to cifar10,fashion-mnist --protocols slf,alf,aff --shots 100,all --root DATA
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    counts = [None if text == "all" else int(length(text)) for text in shots]
    named = [(name, model) if found else (text, text) for text in models for name, found, model in [text.partition("=")]]
    if len(dict(named)) < len(named):
        raise ValueError("Two models have the same name.")
    result = advcl_hub.transfer(
        dict(named),
        shots=counts,
        n=n or None,
        evaluation=Protocol(eps=overrides.get("eps"), check_images=check_images),
        command=shlex.join(["advcl-hub", *sys.argv[1:]]),
        **options,
        **overrides,
    )
    main_process = Processes.current().rank == 0
    leave()
    if main_process:
        unfinished = "" if result.finished else "\n\nStopped before the end. The same command continues."
        click.echo(f"\n{result.table()}\n\nReport, table (CSV) and picture: {result.output}{unfinished}")


if __name__ == "__main__":
    main()
