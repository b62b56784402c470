"""Releases weights: an entry in advcl_hub/hub/released.json, a place for their files, and their card here.

python -m model_cards.release FOLDER resnet8_cifar.advcl_c10
python -m model_cards.release KEPT --licence apache-2.0                          # all that a plan kept (train/flagship.py)
python -m model_cards.release FOLDER resnet18_cifar.advcl_c10 --hub ORG/NAME@COMMIT   # pushed there before
python -m model_cards.release                                                    # all cards and the README's table anew

Weights below 1 MB go into the package. Larger ones lie in model_cards/weights, in parts, until somebody has pushed them:
`advcl-hub push NAME ORG/NAME`, then the third line.

FOLDER may be where NAME lies now. New files are written beside their places and renamed, then released.json is replaced, and
only then earlier files are removed: if this stops at any moment, all released weights load, and the same command goes on.
"""

import argparse
import json
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from advcl_hub.cli.common import script
from advcl_hub.files import file_sha256, lock, replacing, sync, write_errors
from advcl_hub.hub.cards import add_to_results, card, pretraining, read_export, summary
from advcl_hub.hub.export import CARD, CHECKED, CONFIG, GOLDEN, PICTURE, WEIGHTS, load_folder, verify_folder
from advcl_hub.hub.parts import join, split
from advcl_hub.hub.push_pull import FIRST_VERSION, verify
from advcl_hub.hub.registry import BUNDLED as BUNDLED
from advcl_hub.hub.registry import CHECKOUT as CHECKOUT
from advcl_hub.hub.registry import RELEASED as RELEASED
from advcl_hub.hub.registry import Release, check_name, head_of, load_releases, open_source, row
from advcl_hub.records import RESULTS, pixels
from train import kept
from train.plan import Plan
from train.recipe import build

ROOT = Path(__file__).parents[1]
CARDS = Path(__file__).parent
README = ROOT / "README.md"
BUNDLED_BYTES = 1_000_000  # larger weights do not go into the package
_FILES = (RESULTS, CONFIG, PICTURE, CARD, GOLDEN, WEIGHTS)  # results.json first: without it, a folder is incomplete
_DRAFT = ".release-draft-"  # how our drafts begin
_REPLACING = re.compile(r"\.\d+-\d+-(released\.json|README\.md|examples\.png)")  # those of `advcl_hub.files.replacing`
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


@dataclass(frozen=True)
class _Move:
    """A release on its way to its home: `draft` lies beside it and holds `files`; `entry` is for released.json."""

    name: str
    home: Path
    draft: Path
    files: tuple[str, ...]
    entry: Mapping[str, Any]


def release(
    folders: Mapping[str, Path], *, overwrite: bool = False, hub: str | None = None, robustbench: str | None = None
) -> None:
    """Adds releases, or replaces them.

    Args:
        folders: exported ones with their evaluations, by the name of the release; an encoder before its classifiers.
        overwrite: whether other weights of these names may be replaced.
        hub: where the one folder was pushed.
        robustbench: name of the one folder for RobustBench, by default the one that the same weights have now.

    Raises:
        ValueError: no name of a release, another architecture, other weights that would be replaced or are on the Hub.
        OSError: a folder or a file is missing, or cannot be written.
    """
    for name in folders:
        check_name(name, name.partition(".")[0])
    data = json.loads(RELEASED.read_text(encoding="utf-8"))
    earlier, before = {found.name: found for found in load_releases(RELEASED)}, _parts(data)
    with ExitStack() as drafts:
        whole = {name: _whole(name, folder, earlier.get(name), drafts) for name, folder in folders.items()}
        for name, folder in whole.items():
            architecture = read_export(folder)[1]["architecture"]
            if architecture != name.partition(".")[0]:
                raise ValueError(f"{folder} holds a {architecture}, not {name}.")
            verify_folder(folder)
            if name in earlier and not overwrite and not _same(earlier[name], folder, WEIGHTS):
                raise ValueError(f"{name} is released with other weights: choose another name, or replace them with --replace.")
        parts, steps = _drafted(whole, earlier, hub, robustbench, drafts)
        for path in parts:
            path.replace(CHECKOUT / path.name)
        for moves in steps:
            for move in moves:
                _place(move)
                data["releases"][move.name] = move.entry
            with replacing(RELEASED) as draft:
                draft.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    for move in steps[-1]:
        _remove_earlier(move)
    _remove_parts(before, data)


def _drafted(
    whole: Mapping[str, Path],
    earlier: Mapping[str, Release],
    hub: str | None,
    robustbench: str | None,
    drafts: ExitStack,
) -> tuple[set[Path], list[list[_Move]]]:
    """Drafts of all that is new: new parts, and what to move in each of the steps that end with a new released.json.

    A folder and released.json cannot change in the same instant. Where a release is loaded from the very folder that has to
    change, a first step puts it into the other home; else there is one step.
    """
    where = {name: pushed(hub, folder) for name, folder in whole.items()} if hub else {}
    steps: list[dict[str, Path]] = [{}, {}]  # by name the parents of the homes
    for name, folder in whole.items():
        parent = CARDS if hub else CHECKOUT if (folder / WEIGHTS).stat().st_size >= BUNDLED_BYTES else BUNDLED
        in_use = name in earlier and earlier[name].folder == parent / name
        if in_use and ((parent / name).is_symlink() or not _same(earlier[name], folder, *CHECKED)):
            steps[0][name] = BUNDLED if parent == CHECKOUT else CHECKOUT
        steps[1][name] = parent
    parts = _in_parts({n: f for n, f in whole.items() if CHECKOUT in (steps[0].get(n), steps[1][n])}, earlier, drafts)
    moves: list[list[_Move]] = []
    for parents in filter(None, steps):
        moves.append([])
        for name, parent in parents.items():
            lies: Mapping[str, Any] = where.get(name) or {"bundled": True}
            if parent == CHECKOUT:
                lies = {"hub_id": name, "revision": FIRST_VERSION, "parts": [path.name for path in parts[name]]}
            others = {BUNDLED: (WEIGHTS, GOLDEN), CHECKOUT: (GOLDEN,), CARDS: ()}[parent]
            draft = _draft(parent, drafts)
            _copy({file: whole[name] / file for file in (RESULTS, CONFIG, PICTURE, *others)}, draft, parent / name)
            add_to_results(draft)  # an older export may name local paths
            files = tuple(path.name for path in draft.iterdir())
            present = earlier[name].robustbench if name in earlier and _same(earlier[name], whole[name], WEIGHTS) else None
            found = entry(whole[name], lies, robustbench=robustbench or present)
            moves[-1].append(_Move(name, parent / name, draft, files, found))
    return {path for of_one in parts.values() for path in of_one if path.parent != CHECKOUT}, moves


def _whole(name: str, folder: Path, earlier: Release | None, drafts: ExitStack) -> Path:
    """The folder; but a whole copy of a home that lacks files: weights in parts or on the Hub, or half removed when killed."""
    complete = all((folder / file).is_file() for file in (RESULTS, *CHECKED))
    if not complete and earlier and folder.resolve() in [(home / name).resolve() for home in (CARDS, BUNDLED, CHECKOUT)]:
        described = folder if (folder / RESULTS).is_file() else source(earlier)
        files = {file: described / file for file in (RESULTS, CONFIG, PICTURE)}
        for file in (GOLDEN, WEIGHTS):
            files[file] = folder / file if (folder / file).is_file() else earlier.fetch(file)
        folder = _draft(CARDS, drafts)
        _copy(files, folder, CARDS / name)
    elif not folder.is_dir():
        raise ValueError(f"{folder} is no folder.")
    return folder


def _same(earlier: Release, folder: Path, *files: str) -> bool:
    """Whether files of the folder are those of the release."""
    return all(file_sha256(folder / file) == earlier.files.get(file, {}).get("sha256") for file in files)


def _in_parts(folders: Mapping[str, Path], earlier: Mapping[str, Release], drafts: ExitStack) -> dict[str, list[Path]]:
    """By name the parts that weights are made of: drafts, or those of the releases if they give the same weights."""
    if not folders:
        return {}
    store = _draft(CHECKOUT, drafts)
    parts = {n: [part for part in earlier[n].parts if part.parent == CHECKOUT] if n in earlier else [] for n in folders}
    with suppress(OSError, ValueError, SafetensorError):  # they are none, not all, or others
        return _joined(parts, folders, store)
    parts = {name: [store / file for file in files] for name, files in split(folders, store).items()}
    return _joined(parts, folders, store)


def _joined(parts: dict[str, list[Path]], folders: Mapping[str, Path], store: Path) -> dict[str, list[Path]]:
    """The parts, after a check that the folders' weights can be made of them."""
    for name, folder in folders.items():
        join(parts[name], store / WEIGHTS, file_sha256(folder / WEIGHTS)).unlink()  # which takes a file that is there as it is
    return parts


def _draft(parent: Path, drafts: ExitStack) -> Path:
    """A new hidden folder, which `drafts` removes at its end."""
    parent.mkdir(parents=True, exist_ok=True)
    return Path(drafts.enter_context(tempfile.TemporaryDirectory(prefix=_DRAFT, dir=parent)))


def _copy(files: Mapping[str, Path], draft: Path, home: Path) -> None:
    """Copies those files that exist to the disk; errors name the home that they are for."""
    with write_errors(home):
        for name, path in files.items():
            if path.is_file():
                shutil.copyfile(path, draft / name)
                with (draft / name).open("rb") as file:
                    sync(file)


def _place(move: _Move) -> None:
    """Moves the files of a draft to their home, over the earlier ones. A home that is a symbolic link becomes a folder."""
    try:
        if move.home.is_symlink():
            move.home.unlink()
        move.home.mkdir(exist_ok=True)
        for file in move.files:
            (move.draft / file).replace(move.home / file)
    except OSError as error:
        raise OSError(f"{move.home} could not be written: {error}. All releases load; the same command goes on.") from error


def _remove_earlier(move: _Move) -> None:
    """Removes the files of a release that are not in its home, and their folders if nothing else is in them."""
    for home in (CARDS / move.name, BUNDLED / move.name, CHECKOUT / move.name):
        stays = {*move.files} if home == move.home else set()
        if home.parent == CARDS:  # which has the card, too, and its picture
            stays |= {CARD, *({PICTURE} & {*move.files})}
        if home.is_symlink():
            home.unlink()
        elif home.is_dir():
            for file in _FILES:
                if file not in stays:
                    (home / file).unlink(missing_ok=True)
            with suppress(OSError):  # it is not empty
                home.rmdir()


def _remove_parts(before: set[str], data: Mapping[str, Any]) -> None:
    """Removes parts that no entry names: of weights that were replaced or pushed, also by a call that was stopped."""
    for path in CHECKOUT.glob("*.safetensors"):
        made = re.fullmatch(r"(.+)-([0-9a-f]{8})\.safetensors", path.name)  # the digits prove that it is ours
        ours = made and made[1] in data["releases"] and file_sha256(path).startswith(made[2])
        if path.name not in _parts(data) and (path.name in before or ours):
            path.unlink()


def _parts(data: Mapping[str, Any]) -> set[str]:
    return {part for found in data["releases"].values() for part in found.get("parts", ())}


def _remove_drafts() -> None:
    """Removes what a call left that was killed."""
    shown = [path for path in CARDS.iterdir() if path.is_dir() and not path.is_symlink()]
    folders = {CARDS, BUNDLED, CHECKOUT, README.parent, RELEASED.parent, *shown}
    for path in [path for folder in folders for path in folder.glob(".*")]:
        if path.name.startswith(_DRAFT) and path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif _REPLACING.fullmatch(path.name):
            path.unlink(missing_ok=True)


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
    with script(), (CARDS / "release.py").open(encoding="utf-8") as program:
        if not lock(program):
            raise OSError(f"Another call of this command works in {CARDS}: wait until it has ended.")
        _remove_drafts()
        if args.folder and (args.folder / kept.FOLDERS).is_file():
            if args.name or args.hub or args.robustbench or not args.licence:
                raise ValueError("What a plan kept has its name and is not on the Hub yet: give a --licence only.")
            release_kept(args.folder, args.licence, args.note, overwrite=args.replace, rehearsal=args.rehearsal)
        elif args.folder and not args.name and not args.folder.is_dir():
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
                with replacing(CARDS / found.name / PICTURE) as draft:
                    shutil.copyfile(found.folder / PICTURE, draft)


if __name__ == "__main__":
    main()
