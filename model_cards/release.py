"""Releases weights: an entry in advcl_hub/released.json, a place for their files, and their card here.

python -m model_cards.release FOLDER resnet8_cifar.advcl_c10
python -m model_cards.release KEPT --licence apache-2.0                          # all that a plan kept (train/flagship.py)
python -m model_cards.release FOLDER resnet18_cifar.advcl_c10 --hub ORG/NAME@COMMIT   # pushed there before
python -m model_cards.release                                                    # all cards and the README's table anew

Weights below 1 MB go into the package. Larger ones lie in model_cards/weights, in parts, until somebody has pushed them:
`advcl-hub push NAME ORG/NAME`, then the third line.
"""

import argparse
import json
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from advcl_hub.cli.common import script
from advcl_hub.files import file_sha256, replacing
from advcl_hub.hub.cards import add_to_results, card, pretraining, read_export, summary
from advcl_hub.hub.export import CONFIG, GOLDEN, PICTURE, WEIGHTS, load_folder, verify_folder
from advcl_hub.hub.parts import split
from advcl_hub.hub.push_pull import FIRST_VERSION, verify
from advcl_hub.hub.registry import BUNDLED as BUNDLED
from advcl_hub.hub.registry import CHECKOUT as CHECKOUT
from advcl_hub.hub.registry import RELEASED as RELEASED
from advcl_hub.hub.registry import Release, head_of, load_releases, open_source, row
from advcl_hub.records import RESULTS, pixels
from train import kept
from train.plan import Plan
from train.recipe import build

ROOT = Path(__file__).parents[1]
CARDS = Path(__file__).parent
README = ROOT / "README.md"
BUNDLED_BYTES = 1_000_000  # larger weights do not go into the package
_MARKS = ("<!-- released weights: made by model_cards/release.py -->\n", "<!-- end of released weights -->")


def entry(folder: Path, where: Mapping[str, Any], *, robustbench: str | None = None) -> dict[str, Any]:
    """What released.json says of an exported folder, all of it read from there.

    Args:
        folder: with its evaluations.
        where: keys that say where the weights lie: `bundled`, or `hub_id` and `revision`, with `parts` until they are there.
        robustbench: name for RobustBench.
    """
    results, config = read_export(folder)
    made = pretraining(results)
    found: dict[str, Any] = {"config": config, **where}
    files = [name for name in (WEIGHTS, CONFIG, GOLDEN) if (folder / name).is_file()]
    found["files"] = {f: {"sha256": file_sha256(folder / f), "size": (folder / f).stat().st_size} for f in files}
    evaluations = results.get("evaluations", [])
    found["facts"] = {
        "summary": summary(results, config),
        "head": head_of(results, config),
        "data": (results.get("data") or (made or {}).get("provenance", {}).get("data") or {}).get("name"),
        "parameters": sum(p.numel() for p in load_folder(folder).parameters()),
        "threat_model": [
            f"{e['protocol']['norm']} {pixels(e['protocol']['eps'], e['protocol']['norm'])}" for e in evaluations[:1]
        ],
        "results": [_figures(e) for e in evaluations],
        "provenance": {key: (made or {}).get("provenance", {}).get(key) for key in ("pseudo_labels", "versions", "hardware")},
        "licence": results.get("licence"),
    }
    return found | ({"robustbench": robustbench} if robustbench else {})


def _figures(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    accuracy, data, protocol = evaluation["accuracy"], evaluation["data"], evaluation["protocol"]
    shown = ("standard", "pgd", *(() if evaluation.get("autoattack_left_out") else ("autoattack",)))  # all of it, or none
    figures = {key: accuracy[key]["value"] for key in shown if key in accuracy}
    about = {"model": evaluation["model"]["name"], "data": data["name"], "images": data["images"]}
    return (
        about | {"norm": protocol["norm"], "eps": pixels(protocol["eps"], protocol["norm"]), "seed": protocol["seed"]} | figures
    )


def cards() -> dict[Path, str]:
    """By path the text of every card, and of the README with its table, as they should be."""
    found = load_releases(RELEASED)
    texts = {CARDS / r.name / "README.md": card(source(r), r.name, r.name) for r in found}
    before, _, rest = README.read_text(encoding="utf-8").partition(_MARKS[0])
    after = rest.partition(_MARKS[1])[2]
    return {**texts, README: f"{before}{_MARKS[0]}{table(found)}{_MARKS[1]}{after}"}


def source(found: Release) -> Path:
    """The folder that a card is made from: in the package, or, of weights on the Hub, what was kept beside the card."""
    return found.folder or CARDS / found.name


def table(found: Sequence[Release]) -> str:
    """The README's table, empty if there is nothing to show."""
    rows = [row(r) | {"name": f"[`{r.name}`](model_cards/{r.name}/README.md)"} for r in found]
    if not rows:
        return ""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *([*r.values()] for r in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


def pushed(hub: str, folder: Path) -> dict[str, str]:
    """Where weights lie that were pushed to `ORG/NAME@COMMIT`. Raises ValueError if others lie there."""
    repository, _, commit = hub.partition("@")
    if not re.fullmatch(r"[0-9a-f]{40}", commit):
        raise ValueError(f"--hub is {hub}, expected ORG/NAME@COMMIT with all 40 digits: a release is pinned.")
    if open_source(f"hf-hub:{hub}").files[WEIGHTS]["sha256"] != file_sha256(folder / WEIGHTS):
        raise ValueError(f"{hub} has other weights than {folder}.")
    verify(hub)
    ours = json.loads(RELEASED.read_text(encoding="utf-8"))["organisation"]
    return {"hub_id": repository.removeprefix(f"{ours}/"), "revision": commit}


def release(
    folders: Mapping[str, Path], *, overwrite: bool = False, hub: str | None = None, robustbench: str | None = None
) -> None:
    """Adds releases, or replaces them.

    Args:
        folders: exported ones with their evaluations, by the name of the release; an encoder before its classifiers.
        overwrite: whether other weights of these names may be replaced.
        hub: where the one folder was pushed.
        robustbench: name of the one folder for RobustBench.

    Raises:
        ValueError: another architecture, other weights that would be replaced, or the Hub has other weights at that commit.
    """
    data = json.loads(RELEASED.read_text(encoding="utf-8"))
    for name, folder in folders.items():
        if not re.fullmatch(r"\w+\.[\w.-]+", name, re.ASCII):
            raise ValueError(f"{name!r} is no name of a release: ARCHITECTURE.TAG, of letters, digits, dots, - and _.")
        earlier = data["releases"].get(name)
        if earlier and not overwrite and earlier["files"][WEIGHTS]["sha256"] != file_sha256(folder / WEIGHTS):
            raise ValueError(f"{name} is released with other weights: choose another name, or replace them with --replace.")
        architecture = read_export(folder)[1]["architecture"]
        if architecture != name.partition(".")[0]:
            raise ValueError(f"{folder} holds a {architecture}, not {name}.")
        verify_folder(folder)
        if folder.resolve() in [home.resolve() for home in (CARDS / name, BUNDLED / name, CHECKOUT / name)]:
            raise ValueError(f"{folder} is where {name} lies, and would be replaced: give a folder of its own.")
    large = {n: f for n, f in folders.items() if not hub and (f / WEIGHTS).stat().st_size >= BUNDLED_BYTES}
    parts = split(large, CHECKOUT) if large else {}
    before = _parts(data)
    where: dict[str, Any]
    files: tuple[str, ...]
    for name, folder in folders.items():
        if hub:
            where, home, files = pushed(hub, folder), CARDS / name, ()
        elif name in parts:
            where = {"hub_id": name, "revision": FIRST_VERSION, "parts": parts[name]}
            home, files = CHECKOUT / name, (GOLDEN,)
        else:
            where, home, files = {"bundled": True}, BUNDLED / name, (WEIGHTS, GOLDEN)
        for before_it in (CARDS / name, BUNDLED / name, CHECKOUT / name):
            shutil.rmtree(before_it, ignore_errors=True)
        home.mkdir(parents=True)
        for file in (RESULTS, CONFIG, PICTURE, *files):
            if (folder / file).is_file():
                shutil.copyfile(folder / file, home / file)
        add_to_results(home)  # an older export may name local paths
        data["releases"][name] = entry(folder, where, robustbench=robustbench)
    with replacing(RELEASED) as draft:
        draft.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    for part in before - _parts(data):  # of weights that were replaced, or pushed
        (CHECKOUT / part).unlink(missing_ok=True)


def _parts(data: Mapping[str, Any]) -> set[str]:
    return {part for found in data["releases"].values() for part in found.get("parts", ())}


def release_kept(source: Path, licence: str, notes: Sequence[str], *, overwrite: bool, rehearsal: bool) -> None:
    """Releases the encoder and the classifiers of a plan under its name, with their evaluations. Raises as `release` does."""
    with tempfile.TemporaryDirectory() as temporary:
        models = kept.unpack(source, Path(temporary))
        record = json.loads((Path(temporary) / kept.PLAN).read_text(encoding="utf-8"))
        try:
            build(Plan, plan := record["plan"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{source} has a damaged {kept.PLAN}: {error}.") from error
        if record.get("rehearsal") and not rehearsal:
            raise ValueError(f"{source} is a rehearsal, whose figures mean nothing: --rehearsal releases it, to try.")
        folders, measured = dict[str, Path](), dict[str, list[Path]]()
        for stage, settings in plan["stages"].items():
            if settings["run"] == "evaluate" and (Path(temporary) / stage / RESULTS).is_file():
                measured.setdefault(settings["of"], []).append(Path(temporary) / stage)
        for stage, folder in models.items():
            run = plan["stages"].get(stage, {}).get("run")
            if run == "export":
                evaluations = [path for found in measured.values() for path in found]
                folders[plan["name"]] = folder
            elif run == "finetune":
                evaluations = measured.get(stage, [])
                folders[f"{plan['name']}_{stage}"] = folder
            else:
                continue
            add_to_results(folder, evaluations, notes, licence)
        if plan["name"] not in folders:
            raise ValueError(f"{source} holds no finished encoder: let the plan go on.")
        release(folders, overwrite=overwrite)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "folder", nargs="?", type=Path, help="exported, with its evaluations (advcl-hub card); or kept by a plan"
    )
    parser.add_argument("name", nargs="?", help="ARCHITECTURE.TAG")
    parser.add_argument("--licence", help="of what a plan kept, as the Hub writes it")
    parser.add_argument("--note", action="append", default=[], help="a sentence for its cards' section on limits")
    parser.add_argument("--replace", action="store_true", help="other weights of that name")
    parser.add_argument("--rehearsal", action="store_true", help="release a rehearsal, to try")
    parser.add_argument("--hub", metavar="ORG/NAME@COMMIT", help="where it was pushed")
    parser.add_argument("--robustbench", metavar="MODEL_DATASET_THREAT", help="name for RobustBench, of a classifier")
    args = parser.parse_args()
    with script():
        if args.folder and (args.folder / kept.FOLDERS).is_file():
            if args.name or args.hub or args.robustbench or not args.licence:
                raise ValueError("What a plan kept has its name and is not on the Hub yet: give a --licence only.")
            release_kept(args.folder, args.licence, args.note, overwrite=args.replace, rehearsal=args.rehearsal)
        elif args.folder and not args.folder.is_dir():
            raise ValueError(f"{args.folder} is no folder.")
        elif args.folder and (args.folder / "kept" / kept.FOLDERS).is_file():
            raise ValueError(f"{args.folder} is the folder of a plan: did you mean {args.folder / 'kept'}?")
        elif args.folder:
            if not args.name or args.licence or args.note:
                raise ValueError("A folder needs a name; its licence and notes are those of `advcl-hub card`.")
            release({args.name: args.folder}, overwrite=args.replace, hub=args.hub, robustbench=args.robustbench)
        for path, text in cards().items():
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as draft:
                draft.write_text(text, encoding="utf-8")
            print(path.relative_to(ROOT))
        for found in load_releases(RELEASED):
            if found.folder and (found.folder / PICTURE).is_file():
                shutil.copyfile(found.folder / PICTURE, CARDS / found.name / PICTURE)


if __name__ == "__main__":
    main()
