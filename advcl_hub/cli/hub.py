"""`advcl-hub list`, `info`, `pull`, `verify`, `card`, `push` and `convert`."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource
from click.shell_completion import CompletionItem
from huggingface_hub import ModelCard

from advcl_hub.cli.common import numbers, user_errors, words
from advcl_hub.hub.cards import add_to_results, card, read_export, write_card
from advcl_hub.hub.converters import LAYOUTS, convert
from advcl_hub.hub.export import DTYPES, export_again
from advcl_hub.hub.push_pull import FIRST_VERSION, described, pull, push, verify
from advcl_hub.hub.registry import releases
from advcl_hub.hub.released import Release, row


class _Name(click.ParamType[str]):
    """Completes the names of released weights; a folder or ORG/NAME will do as well."""

    name = "name"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        found = {name: release for name, release in releases().items() if name.startswith(incomplete)}
        items = [CompletionItem(name, help=release.facts.get("summary")) for name, release in found.items()]
        return items or [CompletionItem(incomplete, type="file")]


@click.command("list", short_help="Lists the released weights.")
@click.argument("pattern", default="")
@click.option("--json", "as_json", is_flag=True, help="Print everything that is known of them.")
@user_errors
def list_command(pattern: str, as_json: bool) -> None:
    """Lists the released weights whose name contains PATTERN.

    \b
    Examples:
      advcl-hub list
      advcl-hub list aff --json
    """
    found = {name: release for name, release in releases().items() if pattern in name}
    if as_json:
        click.echo(json.dumps({name: _as_json(release) for name, release in found.items()}, indent=2))
    elif found:
        click.echo(table(found))
    elif pattern:
        raise ValueError(f"No released weights have {pattern!r} in their name; there are {', '.join(releases()) or 'none'}.")
    else:
        click.echo("There are no released weights.")


@click.command("info", short_help="Says what weights are and what was measured.")
@click.argument("name", type=_Name())
@click.option("--json", "as_json", is_flag=True, help="Print config.json and results.json.")
@user_errors
def info_command(name: str, as_json: bool) -> None:
    """Says what weights are, how they were made and what was measured: released ones, a folder, or ORG/NAME on the Hub.

    It prints the model card without the recipes of pretraining, whose values are in --json.

    \b
    Examples:
      advcl-hub info resnet10_cifar.pseudo_label_at_c10
      advcl-hub info runs/resnet18/export --json
    """
    with described(name) as (folder, load):
        if as_json:
            results, config = read_export(folder)
            click.echo(json.dumps({"config": config, "results": results}, indent=2))
        else:
            text = ModelCard(card(folder, name, load)).text.strip()
            click.echo(re.sub(r"<details>.*?</details>\s*", "", text, flags=re.DOTALL))  # recipes, line by line: see --json


@click.command("pull", short_help="Downloads weights from the Hub to a folder.")
@click.argument("name", type=_Name())
@click.argument("folder", type=click.Path(path_type=Path))
@user_errors
def pull_command(name: str, folder: Path) -> None:
    """Downloads ORG/NAME[@REVISION] or released weights to FOLDER, verified.

    \b
    Example:
      advcl-hub pull ORG/resnet18_cifar.advcl_c10@v1 encoders/resnet18
    """
    pull(name, folder)
    click.echo(
        f"{folder}: complete and verified\n"
        "Use it:  import advcl_hub, timm\n"
        f'         model = timm.create_model("local-dir:{folder}", pretrained=True)'
    )


@click.command("verify", short_help="Checks weights against their sha256 and golden output.")
@click.argument("name", type=_Name())
@user_errors
def verify_command(name: str) -> None:
    """Checks weights against their sha256 and their golden output: a folder, released weights, or ORG/NAME[@REVISION].

    \b
    Examples:
      advcl-hub verify resnet10_cifar.pseudo_label_at_c10
      advcl-hub verify runs/resnet18/export
    """
    click.echo(f"{name}: every sha256 is right; the output differs from the golden one by {verify(name):.1e} of its size")


@click.command("card", short_help="Writes a model card, with the figures of evaluations.")
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("evaluations", nargs=-1, type=click.Path(path_type=Path))
@click.option("--note", "notes", multiple=True, help="A sentence for the section on limits.")
@click.option("--licence", help="Of the weights, as the Hub writes it: apache-2.0, mit, cc-by-nc-4.0 ...")
@click.option("--name", help="Title.  [default: the folder's name]")
@click.option(
    "--other-seed",
    "other_seeds",
    multiple=True,
    type=click.Path(path_type=Path),
    help="An evaluation of a model made in the same way with another seed: for mean and spread.",
)
@user_errors
def card_command(
    folder: Path,
    evaluations: tuple[Path, ...],
    notes: tuple[str, ...],
    licence: str | None,
    name: str | None,
    other_seeds: tuple[Path, ...],
) -> None:
    """Writes the model card of an exported FOLDER (README.md), with the figures of EVALUATIONS, which its results.json keeps.

    EVALUATIONS are folders that advcl-hub evaluate wrote, of these very weights or of a classifier finetuned from them. With
    --other-seed, mean and spread stand beside them: the records must show the same training.

    \b
    Example:
      advcl-hub card runs/resnet18/export evaluations/resnet18-slf/* --other-seed evaluations/seed1-slf/NAME
    """
    if evaluations or notes or licence or other_seeds:
        add_to_results(folder, evaluations, notes, licence, other_seeds)
    click.echo(f"Card: {write_card(folder, name)}")


@click.command("push", short_help="Uploads an exported folder to the Hub.")
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("repository")
@click.option("--version", default=FIRST_VERSION, show_default=True, help="Tag on the Hub. It names these weights for good.")
@click.option("--private", is_flag=True, help="Make the repository private.")
@click.option("--create-pr", is_flag=True, help="Open a pull request instead of committing to main.")
@click.option("--dry-run", is_flag=True, help="Only check, and print what would be uploaded, with the card.")
@click.option("--json", "as_json", is_flag=True, help="Print what was done.")
@user_errors
def push_command(folder: Path, repository: str, as_json: bool, **options: Any) -> None:
    """Uploads an exported FOLDER to ORG/NAME on the Hugging Face Hub: one commit, a card, a tag; then checks what is there.

    FOLDER may also be the name of released weights, which a checkout holds until somebody pushes them.

    Stop it whenever you like: the same command finishes the job (but that --create-pr opens a new one). Log in first: hf auth
    login.

    \b
    Examples:
      advcl-hub push runs/resnet18/export ORG/resnet18_cifar.advcl_c10 --dry-run
      advcl-hub push runs/resnet18/export ORG/resnet18_cifar.advcl_c10 --private
    """
    done = push(folder, repository, **options)
    if as_json:
        click.echo(json.dumps(vars(done), indent=2))
        return
    if options["dry_run"]:
        click.echo(f"{done.card}\n{'-' * 40}\nWould be uploaded to {repository}:")
    else:
        what = "had everything already" if done.unchanged else "has"
        click.echo(f"{repository} {what} (commit {str(done.commit)[:8]}{f', tag {done.version}' if done.version else ''}):")
    for name, size in done.files.items():
        click.echo(f"  {size:>12,} bytes  {name}")
    for name in done.left_out:
        click.echo(f"  {'left out':>18}  {name}")
    if not options["dry_run"]:
        if not done.unchanged:
            click.echo(f"Verified: downloaded again, every sha256 and the golden output are right.\n{done.url or ''}".strip())
        if done.version:
            click.echo(f'Use it:  import advcl_hub, timm\n         timm.create_model("hf-hub:{repository}", pretrained=True)')


def table(found: Mapping[str, Release]) -> str:
    """Weights by name: head, data, figures, and where they lie."""
    rows = [row(release) for release in found.values()]
    cells = [list(rows[0]), *([*r.values()] for r in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    right = {list(rows[0]).index(column) for column in ("SA", "PGD", "AutoAttack", "images")}
    lines = [
        "  ".join(c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))).rstrip()
        for line in cells
    ]
    note = "Accuracies in percent; of an encoder, those of its first classifier. advcl-hub info NAME tells more."
    return "\n".join([lines[0], "-" * (sum(widths) + 2 * len(widths) - 2), *lines[1:], "", note])


def _as_json(release: Release) -> dict[str, Any]:
    return {
        "architecture": release.architecture,
        "model_args": release.model_args,
        "hub_id": release.hub_id,
        "revision": release.revision,
        "folder": str(release.folder) if release.folder else None,
        "files": dict(release.files),
        **release.facts,
    }


_FOLLOWERS = "acl is also DynACL's, solo is solo-learn's, DeACL's and ProFeAT's"


@click.command("convert", short_help="Converts a published checkpoint to a folder for timm.")
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--layout", default="auto", show_default=True, help=f"auto, {', '.join(LAYOUTS)}. {_FOLLOWERS}.")
@click.option("--entry", help="Of a file with several networks: model or ema; encoder_q (DynACL), momentum_backbone (DeACL).")
@click.option("--branch", help="Batch norms to take: clean, adv or adv_ce.  [default: adv]")
@click.option("--architecture", help="timm model that it has to be.  [default: the one that fits]")
@click.option("--mean", type=numbers, help="What the network subtracts from images in [0, 1], such as 0.49,0.48,0.45 or 0.")
@click.option("--std", type=numbers, help="What it divides them by, such as 0.2,0.2,0.2 or 1.")
@click.option("--size", type=int, help="Side of the images.  [default: 32, of ACL's networks for STL-10 96]")
@click.option("--keep-head/--drop-head", default=None, help="Whether a linear head makes it a classifier.  [default: it does]")
@click.option("--keep-projector", is_flag=True, help="Store the projection head beside the encoder, and drop a linear head.")
@click.option("--label-names", type=words, help="Names of the head's classes, in order, with commas between them.")
@click.option("--dtype", type=click.Choice(list(DTYPES)), default="float32", show_default=True, help="Of the stored weights.")
@click.option("--origin", help="Where the file comes from, for the record.")
@user_errors
def convert_command(source: Path, folder: Path, dtype: str, label_names: tuple[str, ...] | None, **options: Any) -> None:
    """Converts a published checkpoint to a FOLDER that timm opens; or an exported folder to another --dtype.

    SOURCE is a file of torch.save or safetensors, which is never unpickled. Every key is used, or left out for a stated reason,
    and the outputs are compared with those of the published network; otherwise nothing is written.

    \b
    Examples:
      advcl-hub convert cifar10_pretrain.pth encoders/advcl --origin "github.com/LijieFan/AdvCL"
      advcl-hub convert ckpt.pth encoders/plain --layout kuangliu --mean 0 --std 1
      advcl-hub convert res18_simclr-cifar10.ckpt encoders/deacl --drop-head
      advcl-hub convert runs/pets/classifier classifiers/pets --dtype float16
    """
    if source.is_dir():
        context = click.get_current_context()
        given = [
            name for name in (*options, "label_names") if context.get_parameter_source(name) is ParameterSource.COMMANDLINE
        ]
        if given:
            raise ValueError(f"{source} is a folder, of which only --dtype can be changed (given: {', '.join(given)}).")
        export_again(source, folder, dtype=dtype)
        click.echo(f"{folder}: {dtype}, verified. Evaluations and the card of the other weights do not come along.")
        return
    done = convert(source, folder, dtype=dtype, label_names=label_names or (), **options)
    click.echo(
        f"{done.describe()}\n"
        "Use it:  import advcl_hub, timm\n"
        f'         model = timm.create_model("local-dir:{folder}", pretrained=True)'
    )
