"""`advcl-hub finetune`, `advcl-hub lp-aff`, `advcl-hub presets` and `advcl-hub transfer`."""

import functools
import logging
import shlex
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import click

import advcl_hub
from advcl_hub.cli.common import DATA, class_order, length, numbers, seconds, user_errors, words
from advcl_hub.evaluation import Protocol
from advcl_hub.finetuning import Finetuned
from advcl_hub.finetuning.presets import AUGMENTATIONS, PRECISIONS, PRESETS, PROTOCOLS, Settings, table
from advcl_hub.training.processes import Processes, leave

_PRESET_NAMES = tuple(dict.fromkeys(name for name, _ in PRESETS))
_OVERRIDES = (
    click.option("--objective", type=click.Choice(["trades", "pgd"]), help="Of aff: TRADES or PGD adversarial training."),
    click.option("--epochs", type=int, help="Number of epochs; the milestones scale with it."),
    click.option("--batch-size", type=int, help="Over all processes.  [default: the preset's, of small sets an eighth]"),
    click.option("--lr", type=float, help="Of SGD.  [default: the preset's; less in aff and sff for a batch below 128]"),
    click.option("--milestones", type=numbers, help="Epochs after which the learning rate is divided by 10, such as 15,20."),
    click.option("--momentum", type=float),
    click.option("--weight-decay", type=float),
    click.option("--eps", type=length, help="Radius of the attack in training, l_inf, such as 8/255."),
    click.option("--step-size", type=length, help="Length of a step of the attack.  [default: eps / 4]"),
    click.option("--steps", type=int, help="Number of steps of the attack."),
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


def _tell(run: Finetuned) -> bool:
    """Whether this is the main process of a finished run, which has more to say; if it was stopped, it says how to go on."""
    main_process = Processes.current().rank == 0
    leave()
    if main_process and not run.finished:
        click.echo(f"Stopped with a checkpoint in {run.output}. The same command continues.")
    return main_process and run.finished


def _next(command: str, run: Finetuned, data: str, root: Path | None) -> str:
    """What to type to go on with the model of a run, on the same data."""
    return shlex.join(["advcl-hub", command, str(run.folder), "--data", data, *(["--root", str(root)] if root else [])])


@click.command(short_help="Finetunes an encoder: SLF, ALF, AFF, SFF.")
@click.argument("model")
@click.option("--data", required=True, help=DATA)
@click.option("--protocol", type=click.Choice(list(PROTOCOLS)), default="slf", show_default=True)
@click.option("--preset", type=click.Choice(_PRESET_NAMES), default="advcl", show_default=True, help="Whose values to take.")
@click.option("--root", type=click.Path(path_type=Path), help="Folder that holds the data set.")
@click.option("--split", default="train", show_default=True, help="Split of the data set.")
@click.option("--size", type=int, help="Side of the images, instead of the encoder's own.")
@click.option("--shots", type=int, help="So many images of every class.  [default: all]")
@click.option("--keep-head", is_flag=True, help="Start from the classifier that the model has.")
@class_order
@_overrides
@click.option("--output", type=click.Path(path_type=Path), help="Folder of the run.  [default: runs/finetuned/MODEL/...]")
@click.option("--cpu", is_flag=True, help="Compute on the CPU even where there is a GPU.")
@click.option("--time-budget", type=seconds, metavar="TIME", help="Stop with a checkpoint after so long: 90s, 9m, 2h.")
@click.option("--checkpoint-minutes", type=float, default=5.0, show_default=True)
@user_errors
def finetune(model: str, root: Path | None, overrides: dict[str, Any], **options: Any) -> None:
    """Finetunes the encoder MODEL on labelled images: a name, hf-hub:ORG/NAME, local-dir:FOLDER or a folder.

    random: before MODEL draws new weights. Protocols: slf and alf train a linear head on the frozen encoder, on clean and on
    adversarial images; aff trains all weights adversarially (TRADES), sff on clean images. `advcl-hub presets` lists them.
    Stop it whenever you like: the same command goes on. Several processes: accelerate launch -m advcl_hub.cli finetune
    ..., or torchrun --nproc_per_node 2 -m advcl_hub.cli finetune ...

    \b
    Examples:
      advcl-hub finetune runs/resnet18/export --data cifar10 --root DATA --protocol slf
      advcl-hub finetune runs/resnet18/export --data folder:pets --protocol aff --epochs 10 --val-fraction 0.1
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    command = shlex.join(["advcl-hub", *sys.argv[1:]])
    tuned = advcl_hub.finetune(model, root=root, command=command, **options, **overrides)
    if not _tell(tuned):
        return
    evaluation = _next("evaluate", tuned, options["data"], root)
    click.echo(
        f"Use it:       import advcl_hub, timm\n"
        f'              model = timm.create_model("local-dir:{tuned.folder}", pretrained=True)\n'
        f"Evaluate it:  {evaluation}"
    )


@click.command("lp-aff", short_help="Finetunes an encoder on clusters of its features, without labels.")
@click.argument("encoder")
@click.option("--data", required=True, help=DATA)
@click.option("--root", type=click.Path(path_type=Path), help="Folder that holds the data set.")
@click.option("--split", default="train", show_default=True, help="Split of the data set; it may be unlabeled.")
@click.option("--size", type=int, help="Side of the images, instead of the encoder's own.")
@click.option("--clean", help="Encoder whose features are clustered, such as the clean branch.  [default: ENCODER]")
@click.option("--clusters", type=int, default=10, show_default=True, help="Number of clusters.")
@click.option("--head-epochs", type=int, default=10, show_default=True, help="Epochs of the stage of the head alone.")
@_overrides
@click.option("--output", type=click.Path(path_type=Path), help="Folder of the run.  [default: runs/finetuned/ENCODER/...]")
@click.option("--cpu", is_flag=True, help="Compute on the CPU even where there is a GPU.")
@click.option("--time-budget", type=seconds, metavar="TIME", help="Stop with a checkpoint after so long: 90s, 9m, 2h.")
@click.option("--checkpoint-minutes", type=float, default=5.0, show_default=True)
@user_errors
def lp_aff(encoder: str, root: Path | None, overrides: dict[str, Any], **options: Any) -> None:
    """Finetunes ENCODER adversarially on clusters of its features, without labels: LP-AFF, the last stage of DynACL++.

    k-means, then a linear head on the frozen encoder, then all weights with TRADES; what comes out is an encoder again. The
    options apply to the last stage, that of all weights; batch size, augmentation, precision, seed and --zero-head apply to the
    stage of the head, too. Stop it whenever you like: the same command goes on. Several processes: as in finetune.

    \b
    Example:
      advcl-hub lp-aff runs/resnet18/export --clean runs/resnet18/export_clean --data cifar10 --root DATA --output runs/pp
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    command = shlex.join(["advcl-hub", *sys.argv[1:]])
    done = advcl_hub.lp_aff(encoder, root=root, command=command, **options, **overrides)
    if not _tell(done):
        return
    finetuning = _next("finetune", done, options["data"], root)
    click.echo(
        f"Use it:       import advcl_hub, timm\n"
        f'              encoder = timm.create_model("local-dir:{done.folder}", pretrained=True)\n'
        f"Finetune it:  {finetuning} --protocol slf"
    )


@click.command(short_help="Lists the presets of finetuning.")
def presets() -> None:
    """Lists the presets of finetuning with all their values, as markdown."""
    click.echo(table())


@click.command(short_help="Finetunes and evaluates encoders side by side.")
@click.argument("models", nargs=-1, required=True)
@click.option("--to", type=words, required=True, help="Data sets, such as cifar10,fashion-mnist,folder:PATH.")
@click.option("--protocols", type=words, default="slf", show_default=True, help="Such as slf,alf,aff.")
@click.option("--shots", type=words, default="all", show_default=True, help="Images of every class, such as 10,100,all.")
@click.option(
    "--held-out",
    type=float,
    default=0.0,
    show_default=True,
    help="Evaluate on this share of the training images, not trained on, instead of the test split.",
)
@click.option("--preset", type=click.Choice(_PRESET_NAMES), default="advcl", show_default=True, help="Whose values to take.")
@click.option("--root", type=click.Path(path_type=Path), help="Folder that holds the data sets.")
@click.option(
    "--n", "--images", "n", type=int, default=1000, show_default=True, help="Class-balanced images to evaluate on; 0: all."
)
@click.option("--check-images", type=int, default=Protocol.check_images, show_default=True, help="As in evaluate.")
@_overrides
@click.option("--output", type=click.Path(path_type=Path), default=Path("runs/transfer"), show_default=True)
@click.option("--cpu", is_flag=True, help="Compute on the CPU even where there is a GPU.")
@click.option("--time-budget", type=seconds, metavar="TIME", help="Stop with a checkpoint after so long: 90s, 9m, 2h.")
@user_errors
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
