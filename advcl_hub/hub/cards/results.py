"""What a card is made of: an export's results.json, with the evaluations and notes that were added to it."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from advcl_hub.files import parse_json, replacing, without_local_paths
from advcl_hub.hub.cards.provenance import PROTOCOLS, ancestors
from advcl_hub.hub.cards.seeds import compact_other_seed
from advcl_hub.hub.export import CONFIG, PICTURE, WEIGHTS
from advcl_hub.records import RESULTS, load_record

# Of an evaluation's record, what no card shows: every class and step, and how the model was made, which stands beside it.
_LEFT_OUT = ("per_class", "curves", "classes", "corrupted")
_TYPED = ("notes", "origin", "licence")  # of results.json, by people who mean it to be read


def read_export(folder: str | Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """results.json, without local paths that an older export may have, and config.json of an exported folder.

    Raises:
        FileNotFoundError: it has none: no exported folder.
        ValueError: one of them is damaged.
    """
    folder, found = Path(folder), []
    for name in (RESULTS, CONFIG):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} has no {name}: not a folder that advcl-hub exported.")
        try:
            record = parse_json((folder / name).read_text(encoding="utf-8"))
            typed = {key: record[key] for key in _TYPED if key in record}
            found.append(without_local_paths(record) | typed)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{folder / name} is damaged ({error}): export or pull it again.") from None
    if not all(isinstance(record, dict) for record in found) or not isinstance(found[0].get("sha256"), dict):
        raise ValueError(f"{folder / RESULTS} names no sha256 of the weights: not a folder that advcl-hub exported.")
    return found[0], found[1]


def add_to_results(
    folder: str | Path,
    evaluations: Sequence[str | Path] = (),
    notes: Sequence[str] = (),
    licence: str | None = None,
    other_seeds: Sequence[str | Path] = (),
) -> dict[str, Any]:
    """Adds evaluations and notes to an export's results.json, for its card, with the picture of its first evaluation.

    Args:
        folder: that `export_folder` wrote.
        evaluations: folders that `advcl-hub evaluate` wrote, of these very weights, or of a classifier that was finetuned from
            them. An earlier one of the same model, data and attacks is replaced.
        notes: sentences for the card's section on limits; those that stand there already are not repeated.
        licence: of the weights, as the Hub writes it: apache-2.0, mit, cc-by-nc-4.0 ...
        other_seeds: folders that `advcl-hub evaluate` wrote, of models made as these weights and what was finetuned from them,
            but with other seeds: for mean and spread. Each needs a counterpart among the evaluations.

    Returns:
        results.json as it is now.

    Raises:
        ValueError: an evaluation of other weights; or of other seeds, see `advcl_hub.hub.cards.seeds.compact_other_seed`.
        OSError: a folder or file is missing, or cannot be written.
    """
    folder = Path(folder)
    results, _ = read_export(folder)
    read = {Path(path): _compact(load_record(Path(path)), results, path) for path in evaluations}
    added = {_identity(evaluation): evaluation for evaluation in read.values()}
    standing = [e for e in results.get("evaluations", []) if _identity(e) not in added]
    results["evaluations"] = [*standing, *added.values()]
    if other_seeds:
        more = [compact_other_seed(path, load_record(Path(path)), results) for path in other_seeds]
        kept = {_seed_identity(found): found for found in results.get("other_seeds", [])}
        for path, found in zip(other_seeds, more, strict=True):
            before = kept.setdefault(_seed_identity(found), found)
            if before["model"] != found["model"]:
                raise ValueError(f"{path}: there is an evaluation of another model of seed {found['seed']} already.")
            kept[_seed_identity(found)] = found
        results["other_seeds"] = list(kept.values())
    if licence:
        results["licence"] = licence
    results["notes"] = list(dict.fromkeys([*results.get("notes", []), *notes]))
    first = next((_identity(evaluation) for evaluation in results["evaluations"]), None)
    pictured = [path for path, evaluation in read.items() if _identity(evaluation) == first and (path / PICTURE).is_file()]
    if pictured:
        results["picture_of"] = read[pictured[-1]]["model"]["name"]
        with replacing(folder / PICTURE) as draft:
            shutil.copyfile(pictured[-1] / PICTURE, draft)
    with replacing(folder / RESULTS) as draft:
        draft.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return results


def _compact(record: dict[str, Any], results: Mapping[str, Any], path: str | Path) -> dict[str, Any]:
    """What a card needs of an evaluation's record; ValueError if it is of other weights than the export's."""
    ours, model = results["sha256"][WEIGHTS], record["model"]
    tuned = model.get("provenance") or {}
    if model.get("file_sha256") == ours:
        name = "this model"
    elif ours in ancestors(tuned) and tuned.get("settings"):
        name = PROTOCOLS[tuned["settings"]["protocol"]]
    else:
        raise ValueError(f"{path} is an evaluation of {model['name']}, which is neither these weights nor finetuned from them.")
    kept = {key: value for key, value in record.items() if key not in _LEFT_OUT}
    kept["model"] = {key: value for key, value in model.items() if key != "provenance"} | {"name": name}
    if name != "this model":
        kept["finetuning"] = {key: tuned.get(key) for key in ("settings", "kept_head", "data", "seconds", "command")}
    return without_local_paths(kept)


def _seed_identity(record: Mapping[str, Any]) -> str:
    return json.dumps([record["model"]["name"], record["seed"], record["data"], record["protocol"]], sort_keys=True)


def _identity(record: Mapping[str, Any]) -> str:
    keys = ("name", "attacked_at")
    same = [{k: record["model"].get(k) for k in keys}, record["data"], record["protocol"]]
    return json.dumps(same, sort_keys=True)
