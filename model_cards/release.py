"""Releases weights: an entry in advcl_hub/hub/released.json, their files in place, and their card in this folder.

python -m model_cards.release FOLDER resnet10_cifar.pseudo_label_at_c10
python -m model_cards.release ENCODER resnet10_cifar.mine SLF resnet10_cifar.mine_slf    # several in one call
python -m model_cards.release KEPT --licence apache-2.0                          # all that a plan kept (train/flagship.py)
python -m model_cards.release FOLDER resnet18_cifar.advcl_c10 --hub ORG/NAME@COMMIT   # pushed there before
python -m model_cards.release                                                    # all cards and the README's table anew

Weights below 4 MB go into the package. Of a linear head whose encoder is there, only the head is stored. Larger weights lie in
model_cards/weights, in parts, until somebody has pushed them: `advcl-hub push NAME ORG/NAME`, then the command with --hub.

FOLDER may be where NAME lies now. New files are written beside their places and renamed, then released.json is replaced, and
only then earlier files are removed. A call that was stopped on the way is undone by the next one.
"""

import argparse
import json
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from advcl_hub.cli.common import script
from advcl_hub.files import file_sha256, is_draft, lock, replacing
from advcl_hub.hub.cards import add_to_results, card, pretraining, read_export, summary
from advcl_hub.hub.export import CARD, CONFIG, GOLDEN, PICTURE, WEIGHTS, load_folder, verify_folder
from advcl_hub.hub.parts import split
from advcl_hub.hub.projector import PROJECTOR
from advcl_hub.hub.push_pull import FIRST_VERSION, verify
from advcl_hub.hub.registry import open_source
from advcl_hub.hub.released import BUNDLED as BUNDLED
from advcl_hub.hub.released import CHECKOUT as CHECKOUT
from advcl_hub.hub.released import RELEASED as RELEASED
from advcl_hub.hub.released import Release, check_name, head_of, load_releases, row
from advcl_hub.records import RESULTS, pixels
from model_cards import heads
from model_cards.heads import HEAD
from train import kept
from train.plan import Plan
from train.recipe import build

ROOT = Path(__file__).parents[1]
CARDS = Path(__file__).parent
README = ROOT / "README.md"
BUNDLED_BYTES = 4_000_000  # larger weights do not go into the package
_FILES = {RESULTS, CONFIG, PICTURE, CARD, GOLDEN, WEIGHTS, PROJECTOR, HEAD}
# How hidden folders begin beside the folders of releases: those not finished yet, and those that a new one replaces.
_DRAFT, _EARLIER = ".release-draft-", ".release-earlier-"
# While files are renamed: the sha256 of the released.json that the call ends with. If that is in place, the call is done.
_JOURNAL = ".release-journal"  # beside released.json
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
    files = [name for name in (WEIGHTS, CONFIG, GOLDEN, PROJECTOR) if (folder / name).is_file()]
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
        robustbench: name of the one folder for RobustBench, by default the one that the same weights have now.

    Raises:
        ValueError: no name of a release, another architecture, other weights that would be replaced or are on the Hub, an
            encoder without the heads in the package that share it, or files of somebody else where the release is to lie.
        OSError: a folder or a file is missing, or cannot be written.
    """
    data = json.loads(RELEASED.read_text(encoding="utf-8"))
    known = {found.name: found for found in load_releases(RELEASED)}
    for name, folder in folders.items():
        check_name(name)
        if not folder.is_dir():
            raise ValueError(f"{folder} is no folder.")
        _check_homes(name, known.get(name))
    with ExitStack() as drafts:
        drafts.callback(recover)
        whole = {name: _with_weights(name, folder, known.get(name), drafts) for name, folder in folders.items()}
        for name, folder in whole.items():
            _check(name, folder, known.get(name), overwrite)
        large = {n: f for n, f in whole.items() if not hub and (f / WEIGHTS).stat().st_size >= BUNDLED_BYTES}
        store = _draft(CHECKOUT, drafts) if large else None
        parts = split(large, store) if store else {}
        small = {} if hub else {n: f for n, f in whole.items() if n not in large}
        encoders = heads.encoders_below(small, [found for n, found in known.items() if n not in whole], BUNDLED)
        heads.check_shared(known, {n: f for n, f in small.items() if n not in encoders}, set(whole), BUNDLED)
        moves: dict[Path, Path] = {}  # by home its draft
        for name, folder in whole.items():
            where, parent, files = _place(name, folder, hub, parts.get(name), encoders.get(name))
            draft = _draft(parent, drafts) / name
            draft.mkdir()
            if name in encoders:
                heads.write_head(folder / WEIGHTS, whole.get(encoders[name], BUNDLED / encoders[name]) / WEIGHTS, draft / HEAD)
            for file in (RESULTS, CONFIG, PICTURE, *files):
                if (folder / file).is_file():
                    shutil.copyfile(folder / file, draft / file)
            add_to_results(draft)  # an older export may name local paths
            same = name in known and _same_weights(known[name], folder)
            alias = robustbench or (known[name].robustbench if same else None)
            data["releases"][name] = entry(folder, where, robustbench=alias)
            moves[parent / name] = draft
        released = _draft(RELEASED.parent, drafts) / RELEASED.name
        released.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
        # All that is new is on the disk: from here on files are renamed, and then removed.
        RELEASED.with_name(_JOURNAL).write_text(file_sha256(released), encoding="utf-8")
        for path in store.iterdir() if store else ():
            path.replace(CHECKOUT / path.name)
        for home in [home for name in folders for home in _homes(name)]:
            earlier = home.with_name(f"{_EARLIER}{home.name}")
            if home.is_symlink() or home.exists():
                home.rename(earlier)
            elif home in moves:
                earlier.mkdir()  # empty: there was none
            if home in moves:
                moves[home].rename(home)
        released.replace(RELEASED)
    _remove_parts(data["releases"])


def _homes(name: str) -> tuple[Path, Path, Path]:
    """Where files of a release may lie: its card, what is in the package, what is in the checkout."""
    return CARDS / name, BUNDLED / name, CHECKOUT / name


def _check_homes(name: str, known: Release | None) -> None:
    """Raises ValueError for files that are not of the release: its folders are replaced whole."""
    if len({home.parent.resolve() for home in _homes(name)}) < 3:
        raise ValueError(
            f"Of {', '.join(str(home.parent) for home in _homes(name))} two are the same folder: remove that link."
        )
    for home in _homes(name):
        if home.is_symlink() or not home.exists():
            continue
        weights = home / WEIGHTS
        if not known or not home.is_dir() or (weights.is_file() and not _same_weights(known, home)):
            raise ValueError(f"{home} is in the way, and no part of a release: move it to another folder first.")
        for stranger in sorted({path.name for path in home.iterdir() if not is_draft(path)} - _FILES):
            raise ValueError(f"{home} holds {stranger}, which is no part of a release: move it to another folder first.")


def _check(name: str, folder: Path, known: Release | None, overwrite: bool) -> None:
    """Raises ValueError unless the folder is an export of the architecture, whose weights may have this name."""
    architecture = read_export(folder)[1]["architecture"]
    if architecture != name.partition(".")[0]:
        raise ValueError(f"{folder} holds a {architecture}, not {name}.")
    verify_folder(folder)
    if known and not overwrite and not _same_weights(known, folder):
        raise ValueError(f"{name} is released with other weights: choose another name, or replace them with --replace.")


def _same_weights(known: Release, folder: Path) -> bool:
    """Whether the folder has the weights of a release."""
    return file_sha256(folder / WEIGHTS) == known.files[WEIGHTS]["sha256"]


def _place(
    name: str, folder: Path, hub: str | None, parts: list[str] | None, encoder: str | None
) -> tuple[dict[str, Any], Path, tuple[str, ...]]:
    """What released.json says of where a release lies, the folder that its home is in, and which files that has besides."""
    if hub:
        return dict(pushed(hub, folder)), CARDS, ()
    more = (PROJECTOR,) if (folder / PROJECTOR).is_file() else ()
    if parts:
        return {"hub_id": name, "revision": FIRST_VERSION, "parts": parts}, CHECKOUT, (GOLDEN, *more)
    if encoder:
        return {"bundled": True, "parts": [f"{encoder}/{WEIGHTS}", f"{name}/{HEAD}"]}, BUNDLED, (GOLDEN, *more)
    return {"bundled": True}, BUNDLED, (WEIGHTS, GOLDEN, *more)


def _with_weights(name: str, folder: Path, known: Release | None, drafts: ExitStack) -> Path:
    """The folder; or, of a home of the release without weights (in parts, or on the Hub), a copy of it that has them."""
    if known is None or (folder / WEIGHTS).is_file() or folder.resolve() not in [home.resolve() for home in _homes(name)]:
        return folder
    whole = _draft(CARDS, drafts) / name
    shutil.copytree(folder, whole)
    for file in (GOLDEN, WEIGHTS, PROJECTOR):
        if file in known.files and not (whole / file).is_file():
            shutil.copyfile(known.fetch(file), whole / file)
    return whole


def _draft(parent: Path, drafts: ExitStack) -> Path:
    """A new hidden folder in `parent`, which `drafts` removes at its end."""
    parent.mkdir(parents=True, exist_ok=True)
    return Path(drafts.enter_context(tempfile.TemporaryDirectory(prefix=_DRAFT, dir=parent)))


def _remove(path: Path) -> None:
    """Removes a folder; of a symbolic link the link only."""
    if path.is_symlink():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


def _is_ours(draft: Path) -> bool:
    """Whether a folder holds nothing but what `release` writes to one."""
    names, files = _FILES | {RELEASED.name}, [path for path in draft.rglob("*") if not path.is_dir()]
    return not draft.is_symlink() and all(f.name in names or f.suffix == ".safetensors" or is_draft(f) for f in files)


def _remove_parts(entries: Mapping[str, Any]) -> None:
    """Removes parts that no entry names: of weights that were replaced or pushed."""
    named = {part for found in entries.values() for part in found.get("parts", ())}
    for path in CHECKOUT.glob("*.safetensors"):
        digits = re.fullmatch(r".+-([0-9a-f]{8})\.safetensors", path.name)  # of its own sha256: they prove that it is ours
        if path.name not in named and digits and file_sha256(path).startswith(digits[1]):
            path.unlink()


def recover() -> None:
    """Ends or undoes what an earlier call has begun: it was done if released.json is the one that it was to end with."""
    entries = json.loads(RELEASED.read_text(encoding="utf-8"))["releases"]
    drafts = [*README.parent.glob(f".*-{README.name}"), *CARDS.glob(f"*/.*-{CARD}"), *CARDS.glob(f"*/.*-{PICTURE}")]
    for path in filter(is_draft, drafts):
        path.unlink()
    parents = (CARDS, BUNDLED, CHECKOUT)
    journal = RELEASED.with_name(_JOURNAL)
    done = journal.is_file() and journal.read_text(encoding="utf-8") == file_sha256(RELEASED)
    for earlier in [path for parent in parents for path in parent.glob(f"{_EARLIER}*")]:
        home = earlier.with_name(earlier.name.removeprefix(_EARLIER))
        if done:
            _remove(earlier)
        else:
            _remove(home)
            earlier.rename(home)
            if not home.is_symlink() and not any(home.iterdir()):  # there was none
                home.rmdir()
    for path in [path for parent in (*parents, RELEASED.parent) for path in parent.glob(f"{_DRAFT}????????")]:
        if _is_ours(path):
            shutil.rmtree(path)
    journal.unlink(missing_ok=True)
    _remove_parts(entries)


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
    parser = argparse.ArgumentParser(
        prog="python -m model_cards.release", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "releases",
        nargs="*",
        metavar="FOLDER NAME",
        help="exported, with its evaluations (advcl-hub card), and ARCHITECTURE.TAG, an encoder before the heads on it; "
        "or a single folder that a plan kept",
    )
    parser.add_argument("--licence", help="of what a plan kept, as the Hub writes it")
    parser.add_argument("--note", action="append", default=[], help="a sentence for its cards' section on limits")
    parser.add_argument("--replace", action="store_true", help="other weights of that name")
    parser.add_argument("--rehearsal", action="store_true", help="release a rehearsal, to try")
    parser.add_argument("--hub", metavar="ORG/NAME@COMMIT", help="where it was pushed")
    parser.add_argument("--robustbench", metavar="MODEL_DATASET_THREAT", help="name for RobustBench, of a classifier")
    args = parser.parse_args()
    first, names = Path(args.releases[0]) if args.releases else None, args.releases[1::2]
    with script(), (CARDS / "release.py").open(encoding="utf-8") as program:
        if not lock(program):
            raise OSError(f"Another call of this command works in {CARDS}: wait until it has ended.")
        recover()
        if first and (first / kept.FOLDERS).is_file():
            if names or args.hub or args.robustbench or not args.licence:
                raise ValueError("What a plan kept has its name and is not on the Hub yet: give a --licence only.")
            release_kept(first, args.licence, args.note, overwrite=args.replace, rehearsal=args.rehearsal)
        elif first and not names and not first.is_dir():
            raise ValueError(f"{first} is no folder.")
        elif first and (first / "kept" / kept.FOLDERS).is_file():
            raise ValueError(f"{first} is the folder of a plan: did you mean {first / 'kept'}?")
        elif first:
            if len(args.releases) % 2 or args.licence or args.note:
                raise ValueError("A folder needs a name; its licence and notes are those of `advcl-hub card`.")
            if len(set(names)) < len(names):
                raise ValueError("The same name was given twice.")
            if len(names) > 1 and (args.hub or args.robustbench):
                raise ValueError("--hub and --robustbench are for one release: give one folder with its name.")
            folders = dict(zip(names, map(Path, args.releases[::2]), strict=True))
            release(folders, overwrite=args.replace, hub=args.hub, robustbench=args.robustbench)
        for path, text in cards().items():
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as draft:
                draft.write_text(text, encoding="utf-8")
            print(path.relative_to(ROOT))
        for found in load_releases(RELEASED):
            if found.folder and (found.folder / PICTURE).is_file():
                with replacing(CARDS / found.name / PICTURE) as draft:
                    shutil.copyfile(found.folder / PICTURE, draft)
            elif found.folder:
                (CARDS / found.name / PICTURE).unlink(missing_ok=True)


if __name__ == "__main__":
    main()
