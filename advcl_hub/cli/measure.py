"""`advcl-hub evaluate` and `advcl-hub report`."""

import json
import shlex
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import click

import advcl_hub
from advcl_hub.attacks import LOSSES, NORMS
from advcl_hub.cli.common import DATA, class_order, length, user_errors
from advcl_hub.evaluation import Protocol
from advcl_hub.evaluation.protocol import AUTOATTACKS
from advcl_hub.evaluation.results import folder_name
from advcl_hub.evaluation.runner import UNFINISHED
from advcl_hub.files import slug
from advcl_hub.records import RESULTS, load_record
from advcl_hub.records.tables import report
from advcl_hub.training.processes import Processes, leave


@click.command(short_help="Measures clean accuracy, PGD and AutoAttack.")
@click.argument("model")
@click.option("--data", required=True, help=DATA)
@click.option("--root", type=click.Path(path_type=Path), help="Folder that holds the data set.")
@click.option("--split", default="test", show_default=True, help="Split of the data set.")
@click.option("--n", "--images", "n", type=int, help="So many images, class-balanced, everywhere the same.  [default: all]")
@click.option("--first", is_flag=True, help="With --n: the first ones instead, as RobustBench does.")
@class_order
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
    "--compile", is_flag=True, help="Faster in long runs, after a minute of compiling; on CPUs it takes a C++ compiler."
)
@click.option(
    "--check-images", type=int, default=Protocol.check_images, show_default=True, help="For checks and curves; 0: none."
)
@click.option("--device", help="Such as cpu or cuda:1.  [default: a GPU if there is one]")
@click.option("--output", type=click.Path(path_type=Path), help="Folder for the results.  [default: evaluations/MODEL/...]")
@click.option("--json", "as_json", is_flag=True, help="Print results.json instead of a table.")
@user_errors
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
    if options["class_order"] is None:
        del options["class_order"]  # the names of folders from before it existed stay valid
    settings = {field.name: options.pop(field.name) for field in fields(Protocol) if field.name in options}
    protocol = Protocol(precision="bfloat16" if bf16 else "float32", **settings)
    output = output or Path("evaluations", slug(model), folder_name(data, protocol, options))
    command = shlex.join(["advcl-hub", *sys.argv[1:]])
    result = advcl_hub.evaluate(model, data, protocol, output=output, command=command, **options)
    main_process = Processes.current().rank == 0
    leave()
    if not main_process:
        return
    saved = (output / RESULTS).is_file()
    table = f"\n{report([result.record])}" + (f"\n\nResults: {output}" if saved else "")
    click.echo(json.dumps(result.record, indent=2) if as_json else table)
    if not saved:  # evaluate has warned, and said why
        raise click.ClickException(f"{output} has no {RESULTS}: free some space or make it writable, and repeat the command.")


@click.command("report", short_help="Puts evaluations side by side.")
@click.argument("results", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--format", "style", type=click.Choice(["text", "markdown", "latex"]), default="text", show_default=True)
@click.option("--literature", is_flag=True, help="Add published figures on the same data, marked as quoted.")
@click.option("--json", "as_json", is_flag=True, help="Print the records.")
@user_errors
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
