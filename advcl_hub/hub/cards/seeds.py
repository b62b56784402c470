"""The same training with other seeds: what a card says of mean and spread."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from advcl_hub.files import without_local_paths
from advcl_hub.hub.cards.provenance import chain, pretraining, pretrainings, started_from
from advcl_hub.records import pixels
from advcl_hub.training.state import FREE, differences

_COLUMNS = {"standard": "SA", "pgd": "PGD", "autoattack": "AA"}
_OF_CLUSTERS = ("method", "weights_sha256", "preprocessing", "k")  # of labels that were clustered anew for every seed
_BESIDE = ("autoattack", "check_images")  # of a protocol: standard accuracy and PGD are the same with and without them
_OF_DATA = ("name", "split", "of", "images", "shots", "classes")  # which images a few shots are, is drawn with the seed


def compact_other_seed(path: str | Path, record: Mapping[str, Any], results: Mapping[str, Any]) -> dict[str, Any]:
    """What a card keeps of an evaluation of a model that was made as this one is, with another seed.

    Args:
        path: how to call the evaluation in errors.
        record: of the evaluation, as `load_record` reads it.
        results: results.json of the export, with its evaluations: one of them must have the same data and PGD.

    Returns:
        Model, seed of the pretraining, data, protocol, accuracy (values in [0, 1]), command, seconds and hardware.

    Raises:
        ValueError: the other model was made otherwise, or with the same seed; or there is nothing to compare it with.
    """
    provenance = record["model"].get("provenance") or {}
    theirs, recipe, own = _stages(provenance), pretraining(provenance), pretraining(results)
    ours = [e for e in results.get("evaluations", []) if _measured(e) == _measured(record)]
    chains = {e["model"]["name"]: _stages(results, e.get("finetuning")) for e in ours}
    same = {name: stages for name, stages in chains.items() if _protocols(stages) == _protocols(theirs)}
    if recipe is None or own is None:
        raise ValueError(f"{path}: the pretraining of {'this export' if recipe else record['model']['name']} is not on record.")
    if not same:
        raise ValueError(f"{path} has no counterpart: add an evaluation of these weights on the same data, with the same PGD.")
    name, stages = next(iter(same.items()))
    found = differences(_decided(theirs, recipe), _decided(stages, own))
    if differing := [sentence for key, sentence in found.items() if _decides(key)]:
        raise ValueError(
            f"{path} is of a model that was trained otherwise (there) than these weights (now):\n  " + "\n  ".join(differing)
        )
    for number, made in enumerate(zip(pretrainings(recipe), pretrainings(own), strict=True)):
        other, mine = (each["recipe"].get("seed") for each in made)
        if other == mine:
            which = "of pretraining" if number == 0 else "of the pretraining that it started from"
            raise ValueError(f"{path} is of a model with the same seed {which}, {mine}.")
    kept = {
        key: record.get(key)
        for key in ("data", "protocol", "accuracy", "autoattack_left_out", "command", "seconds", "hardware")
    }
    model = {"name": name, **{key: record["model"].get(key) for key in ("file_sha256", "attacked_at")}}
    return without_local_paths({"model": model, "seed": recipe["recipe"]["seed"], **kept})


def seeds_table(evaluations: Sequence[Mapping[str, Any]], others: Sequence[Mapping[str, Any]], seed: int | None) -> str | None:
    """Mean, lowest and highest accuracy over the seeds in percent, as markdown; None without other seeds.

    Args:
        evaluations: of the export.
        others: of `compact_other_seed`.
        seed: of the export's pretraining.
    """
    rows = []
    for evaluation in evaluations:
        name, data, protocol = evaluation["model"]["name"], evaluation["data"]["name"], evaluation["protocol"]
        alike = [o for o in others if o["model"]["name"] == name and _measured(o) == _measured(evaluation)]
        alike.sort(key=lambda o: o["protocol"]["autoattack"] == protocol["autoattack"])  # the fullest of a seed comes last
        same = list({o["seed"]: o for o in alike}.values())
        if not same or seed is None:
            continue
        seeds = ", ".join(str(s) for s in sorted([seed, *(o["seed"] for o in same)]))
        attack = f"{protocol['norm']} {pixels(protocol['eps'], protocol['norm'])}"
        cells = [_spread([_accuracy(r, key, protocol) for r in (evaluation, *same)]) for key in _COLUMNS]
        rows.append(f"| {' | '.join([name, f'{data}, {attack}', seeds, *cells])} |")
    header = [f"| model | on | seeds | {' | '.join(_COLUMNS.values())} |", "|---|---|---|" + "---:|" * len(_COLUMNS)]
    return "\n".join([*header, *rows]) if rows else None


def _accuracy(record: Mapping[str, Any], key: str, protocol: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """None if it was not measured as in `protocol`, or only by some attacks of AutoAttack."""
    other = record.get("autoattack_left_out") or record["protocol"]["autoattack"] != protocol["autoattack"]
    return None if key == "autoattack" and other else record["accuracy"].get(key)


def _spread(found: Sequence[Mapping[str, Any] | None]) -> str:
    values = [100 * each["value"] for each in found if each]
    if len(values) < len(found):
        return "-"
    return f"{sum(values) / len(values):.1f} ({min(values):.1f} to {max(values):.1f})"


def _measured(record: Mapping[str, Any]) -> tuple[Any, ...]:
    """On which images, and with which PGD."""
    protocol = {key: value for key, value in record["protocol"].items() if key not in _BESIDE}
    return record["data"].get("sha256"), protocol, record["model"].get("attacked_at")


def _stages(record: Mapping[str, Any], finetuning: Mapping[str, Any] | None = None) -> list[Mapping[str, Any]]:
    """All that was done after pretraining, the last stage first."""
    return [*([finetuning] if finetuning else []), *(stage for stage in chain(record) if "recipe" not in stage)]


def _protocols(stages: Sequence[Mapping[str, Any]]) -> list[Any]:
    return [(stage.get("settings") or {}).get("protocol") for stage in stages]


def _decided(stages: Sequence[Mapping[str, Any]], made: Mapping[str, Any]) -> dict[str, Any]:
    """What decided the weights of a model: recipe, length and inputs of its pretraining, and every stage of finetuning."""
    inputs = made.get("provenance") or {}
    labels, first = inputs.get("pseudo_labels") or {}, started_from(made)
    before, teacher = first.get("provenance") or {}, pretraining(first.get("provenance"))
    return {
        **{key: made.get(key) for key in ("recipe", "step", "branch", "ema")},
        "images": (inputs.get("data") or {}).get("sha256"),
        "pseudo_labels": {key: labels.get(key) for key in (_OF_CLUSTERS if "encoder" in labels else ("file_sha256",))},
        "start_from": _decided(_stages(before), teacher) if teacher else {"weights_sha256": first.get("weights_sha256")},
        "finetuning": {
            str(number): {
                **{key: stage.get(key) for key in ("settings", "kept_head")},
                "data": {key: (stage.get("data") or {}).get(key) for key in _OF_DATA},
            }
            for number, stage in enumerate(reversed(stages), 1)
        },
    }


def _decides(key: str) -> bool:
    """Whether a dotted key of `_decided` is neither a seed nor what decides nothing."""
    return not key.endswith("seed") and not key.rpartition("recipe.")[2].startswith(FREE)
