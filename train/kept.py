"""What a plan leaves to take away: at most 8 files of at most 16 MiB, whole after every stage.

    NAME-1.safetensors ...   weights, in parts (`advcl_hub.parts`)
    folders.zip              everything else: exports, evaluations, logs and pictures of the runs, the plan and what it decided
    summary.md, curves.png   to look at

`model_cards/release.py` takes such a folder.
"""

import json
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError

from advcl_hub.export import RESULTS, WEIGHTS, verify_folder
from advcl_hub.files import check_writable, replacing
from advcl_hub.parts import LIMIT, join, split

PLAN, FOLDERS, SUMMARY, CURVES = "plan.json", "folders.zip", "summary.md", "curves.png"
FILES = 8
_PARTS = "parts.json"  # in the archive: by model the files of its weights


def keep(target: Path, models: Mapping[str, Path], others: Mapping[str, Path], summary: str) -> list[Path]:
    """Replaces what is kept.

    Args:
        target: folder of the kept files, which holds nothing else.
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
    check_kept(target)
    target.mkdir(parents=True, exist_ok=True)
    earlier = _parts(target)
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


def _parts(target: Path) -> set[str]:
    """Names of the weights' files that were kept before."""
    try:
        with zipfile.ZipFile(target / FOLDERS) as archive:
            return {Path(file).name for files in json.loads(archive.read(_PARTS)).values() for file in files}
    except (OSError, zipfile.BadZipFile, KeyError, ValueError):
        return set()


def check_kept(target: Path) -> None:
    """Raises ValueError or OSError unless the kept files may be written to a folder: it is new, empty, or holds such files."""
    check_writable(target)
    names = {path.name for path in target.iterdir()} if target.is_dir() else set()
    if names and not {FOLDERS, SUMMARY} & names:
        raise ValueError(
            f"{target} holds something else ({', '.join(sorted(names)[:3])}): choose another folder to keep files in."
        )


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
    except (zipfile.BadZipFile, SafetensorError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{source} is damaged ({error!r}): copy it again.") from error
    return folders
