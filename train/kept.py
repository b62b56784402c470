"""What a plan leaves to take away: at most 8 files of at most 16 MiB, whole after every stage.

    NAME-SHA256.safetensors   weights, in parts (`advcl_hub.hub.parts`)
    folders.zip               everything else: exports, evaluations, logs and pictures of the runs, the plan and what it decided
    summary.md, curves.png    to look at

folders.zip is replaced when all parts that it names are there, and earlier parts go after that: a call that is cut off at any
moment leaves the earlier state or the new one. `model_cards/release.py` takes such a folder, and the folders come back by

    python -m train.kept KEPT FOLDER
"""

import argparse
import json
import re
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from advcl_hub.cli.common import script
from advcl_hub.files import check_writable, replacing
from advcl_hub.hub.export import WEIGHTS, verify_folder
from advcl_hub.hub.parts import LIMIT, join, split
from advcl_hub.records import RESULTS
from train.recipe import require

PLAN, FOLDERS, SUMMARY, CURVES = "plan.json", "folders.zip", "summary.md", "curves.png"
FILES = 8
_PARTS = "parts.json"  # in the archive: by model the files of its weights
_PART = re.compile(r"\w+-[0-9a-f]{8}\.safetensors")
_DRAFT = re.compile(r"\.part-.*|\.\d+-\d+-(folders\.zip|summary\.md|curves\.png)")  # written when a call was cut off


def keep(
    target: Path, plan: Mapping[str, Any], models: Mapping[str, Path], others: Mapping[str, Path], summary: str
) -> list[Path]:
    """Replaces what is kept.

    Args:
        target: folder of the kept files, which holds nothing else.
        plan: whose files they are; `others` holds its record, plan.json.
        models: exported folders by name, an encoder before the classifiers that were finetuned from it.
        others: files and folders to keep besides, by their name; `curves.png` among them stands alone, too. What does not exist
            is left out.
        summary: text of summary.md.

    Returns:
        The kept files.

    Raises:
        ValueError: the folder holds something else, or this is more than 8 files of 16 MiB.
        OSError: a file cannot be read or written.
    """
    check_kept(target, plan)
    target.mkdir(parents=True, exist_ok=True)
    earlier = {Path(file).name for files in _archived(target, _PARTS).values() for file in files}
    for path in [path for path in target.iterdir() if _DRAFT.fullmatch(path.name)]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    parts = split(models, target)
    with replacing(target / FOLDERS) as draft, zipfile.ZipFile(draft, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(_PARTS, json.dumps(parts))
        for name, path in {**others, **models}.items():
            for file in [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file()):
                if file.name != WEIGHTS:  # those are in the parts
                    archive.write(file, Path(name, file.relative_to(path)))
    if CURVES in others and others[CURVES].is_file():
        with replacing(target / CURVES) as draft:
            shutil.copyfile(others[CURVES], draft)
    with replacing(target / SUMMARY) as draft:
        draft.write_text(summary, encoding="utf-8")
    weights = {part for of_model in parts.values() for part in of_model}
    for part in earlier - weights:
        (target / part).unlink(missing_ok=True)
    files = sorted(path for path in target.iterdir() if path.name in {FOLDERS, SUMMARY, CURVES} | weights)
    large = [path.name for path in files if path.stat().st_size > LIMIT]
    if large or len(files) > FILES:
        what = f"{', '.join(large)} larger than {LIMIT >> 20} MiB" if large else f"{len(files)} files"
        raise ValueError(f"{target} holds {what}, more than can be taken away in {FILES} files: copy them by other means.")
    return files


def fitting(models: Mapping[str, Path], more: Mapping[str, Path]) -> dict[str, Path]:
    """The models, and of others those that fit beside them into 8 files of 16 MiB, the first ones first.

    Args:
        models, more: exported folders by name.

    Raises:
        ValueError, OSError: see `advcl_hub.hub.parts.split`.
    """
    chosen = dict(models)
    if not more:
        return chosen
    with tempfile.TemporaryDirectory() as temporary:
        parts = split({**models, **more}, Path(temporary))
    for name, folder in more.items():
        weights = {part for each in (*chosen, name) for part in parts[each]}
        if len({FOLDERS, SUMMARY, CURVES} | weights) <= FILES:
            chosen[name] = folder
    return chosen


def check_kept(target: Path, plan: Mapping[str, Any], *, new: bool = False) -> None:
    """Checks that files may be kept in a folder: it is new, empty, or holds what this plan kept before.

    Args:
        target: the folder.
        plan: as plain values.
        new: whether the plan only begins, so that nothing of it can be there.

    Raises:
        ValueError: the folder holds something else, the files of another plan, or of an earlier run of this one.
        OSError: it cannot be written.
    """
    check_writable(target)
    names = {path.name for path in target.iterdir() if not _DRAFT.fullmatch(path.name)} if target.is_dir() else set()
    if FOLDERS not in names and not all(map(_PART.fullmatch, names)):  # parts alone: a first call was cut off
        what = ", ".join(sorted(names)[:3])
        raise ValueError(f"{target} holds something else ({what}): choose another folder to keep files in.")
    earlier = _archived(target, PLAN).get("plan")
    if earlier and (new or earlier != json.loads(json.dumps(plan))):
        whose = "an earlier run of this plan, whose --output is another or lost" if new else "another plan"
        raise ValueError(f"{target} holds the files of {whose}: choose another folder to keep files in.")


def _archived(target: Path, name: str) -> dict[str, Any]:
    """A record in the archive, empty if there is none."""
    try:
        with zipfile.ZipFile(target / FOLDERS) as archive:
            record = json.loads(archive.read(name))
            return record if isinstance(record, dict) else {}
    except (OSError, zipfile.BadZipFile, zlib.error, KeyError, ValueError):
        return {}


def unpack(source: Path, target: Path) -> dict[str, Path]:
    """Makes the exported folders of a plan again, with everything that was kept beside them, and verifies them.

    Args:
        source: folder of the kept files.
        target: new folder.

    Returns:
        By name the exported folders, an encoder before its classifiers.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, or is not one of ours.
    """
    if not (source / FOLDERS).is_file():
        raise FileNotFoundError(f"{source} has no {FOLDERS}: not what a plan keeps.")
    try:
        with zipfile.ZipFile(source / FOLDERS) as archive:
            archive.extractall(target)  # keeps to the folder, whatever the archive says
        parts: dict[str, list[str]] = json.loads((target / _PARTS).read_text(encoding="utf-8"))
        folders = {Path(name).name: target / Path(name).name for name in parts}
        for name, files in zip(folders, parts.values(), strict=True):
            sha256 = json.loads((folders[name] / RESULTS).read_text(encoding="utf-8"))["sha256"][WEIGHTS]
            join([source / Path(file).name for file in files], folders[name] / WEIGHTS, sha256)
            verify_folder(folders[name])
    except (zipfile.BadZipFile, zlib.error, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{source} is damaged ({error!r}): copy it again.") from error
    return folders


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m train.kept", description="Unpacks what a plan kept.")
    parser.add_argument("kept", type=Path, help="folder of the kept files")
    parser.add_argument("folder", type=Path, help="new folder for what is in them")
    args = parser.parse_args()
    with script():
        require(not args.folder.exists(), f"{args.folder} exists already: give a new folder.")
        for name, folder in unpack(args.kept, args.folder).items():
            print(f"{name}: {folder}")


if __name__ == "__main__":
    main()
