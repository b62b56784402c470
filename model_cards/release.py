"""Releases weights: an entry in advcl_hub/released.json, their folder in the package or on the Hub, and their card here.

python model_cards/release.py FOLDER resnet8_cifar.advcl_c10                     # bundled: copied into the package
python model_cards/release.py FOLDER resnet18_cifar.advcl_c10 --hub ORG/NAME@COMMIT   # pushed there before
python model_cards/release.py                                                    # all cards and the README's table anew
"""

import argparse
import json
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from advcl_hub.cards import add_to_results, card, pretraining, read_export, summary
from advcl_hub.evaluation.protocol import pixels
from advcl_hub.export import CONFIG, GOLDEN, PICTURE, RESULTS, WEIGHTS, load_folder, verify_folder
from advcl_hub.files import file_sha256, replacing
from advcl_hub.hub import verify
from advcl_hub.registry import BUNDLED as BUNDLED
from advcl_hub.registry import RELEASED as RELEASED
from advcl_hub.registry import Release, head_of, load_releases, open_source, row

ROOT = Path(__file__).parents[1]
CARDS = Path(__file__).parent
README = ROOT / "README.md"
_MARKS = ("<!-- released weights: made by model_cards/release.py -->\n", "<!-- end of released weights -->")


def entry(folder: Path, *, hub: str | None = None, robustbench: str | None = None) -> dict[str, Any]:
    """What released.json says of an exported folder, all of it read from there."""
    results, config = read_export(folder)
    repository, _, commit = (hub or "").partition("@")
    repository = repository.removeprefix(f"{json.loads(RELEASED.read_text())['organisation']}/")
    made = pretraining(results)
    found: dict[str, Any] = {"config": config}
    if hub:
        if not re.fullmatch(r"[0-9a-f]{40}", commit):
            raise ValueError(f"--hub is {hub}, expected ORG/NAME@COMMIT with all 40 digits: a release is pinned.")
        found |= {"hub_id": repository, "revision": commit}
    else:
        found["bundled"] = True
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
    figures = {key: accuracy[key]["value"] for key in ("standard", "pgd", "autoattack") if key in accuracy}
    about = {"model": evaluation["model"]["name"], "data": data["name"], "images": data["images"]}
    return (
        about | {"norm": protocol["norm"], "eps": pixels(protocol["eps"], protocol["norm"]), "seed": protocol["seed"]} | figures
    )


def cards() -> dict[Path, str]:
    """By path the text of every card, and of the README with its table, as they should be."""
    found = load_releases(RELEASED)
    texts = {CARDS / r.name / "README.md": card(source(r), r.name, r.name) for r in found}
    before, _, rest = README.read_text().partition(_MARKS[0])
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


def release(folder: Path, name: str, *, hub: str | None, robustbench: str | None) -> None:
    """Adds a release, or replaces it.

    Raises:
        ValueError: another architecture, or the Hub has other weights at that commit.
    """
    found = entry(folder, hub=hub, robustbench=robustbench)
    if found["config"]["architecture"] != name.partition(".")[0]:
        raise ValueError(f"{folder} holds a {found['config']['architecture']}, not {name}.")
    verify_folder(folder)
    if hub:
        there = open_source(f"hf-hub:{hub}")
        if there.files[WEIGHTS]["sha256"] != found["files"][WEIGHTS]["sha256"]:
            raise ValueError(f"{hub} has other weights than {folder}.")
        verify(hub)
    data = json.loads(RELEASED.read_text())
    for home in (CARDS / name, BUNDLED / name):
        shutil.rmtree(home, ignore_errors=True)
    home = CARDS / name if hub else BUNDLED / name
    home.mkdir(parents=True)
    for file in (RESULTS, CONFIG, PICTURE, *(() if hub else (WEIGHTS, GOLDEN))):
        if (folder / file).is_file():
            shutil.copyfile(folder / file, home / file)
    add_to_results(home)  # an older export may name local paths
    data["releases"][name] = found
    with replacing(RELEASED) as draft:
        draft.write_text(json.dumps(data, indent=2) + "\n")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, help="exported folder with its evaluations (advcl-hub card)")
    parser.add_argument("name", nargs="?", help="ARCHITECTURE.TAG")
    parser.add_argument("--hub", metavar="ORG/NAME@COMMIT", help="where it was pushed; by default it is bundled")
    parser.add_argument("--robustbench", metavar="MODEL_DATASET_THREAT", help="name for RobustBench, of a classifier")
    args = parser.parse_args()
    try:
        if args.folder:
            if not args.name:
                parser.error("a folder needs a name")
            release(args.folder, args.name, hub=args.hub, robustbench=args.robustbench)
        for path, text in cards().items():
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as draft:
                draft.write_text(text)
            print(path.relative_to(ROOT))
        for found in load_releases(RELEASED):
            if found.folder and (found.folder / PICTURE).is_file():
                shutil.copyfile(found.folder / PICTURE, CARDS / found.name / PICTURE)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
