"""The same training with other seeds: what a card says of mean and spread."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from advcl_hub.files import without_local_paths
from advcl_hub.training.state import differences

# Of a recipe, what decides nothing besides the seed: places on a machine, and what is repeated with the seed (the encoder that
# pretraining started from, pseudo-labels that were made for it).
_PLACES = (
    *("seed", "start_from", "checkpoint_minutes", "judge", "data.root", "data.workers", "data.download"),
    *("pseudo_labels.path", "pseudo_labels.encoder", "pseudo_labels.cache"),
)
_COLUMNS = {"standard": "SA", "pgd": "PGD", "autoattack": "AA"}


def of_another_seed(
    path: str | Path,
    record: Mapping[str, Any],
    results: Mapping[str, Any],
    recipe: Mapping[str, Any] | None,
    other: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """What a card keeps of an evaluation of a model that was made as this one is, with another seed.

    Args:
        path: how to call the evaluation in errors.
        record: of the evaluation, as `load_record` reads it.
        results: results.json of the export, with its evaluations: one of them must have the same data and attacks.
        recipe: of the pretraining behind the export, None if it is not known.
        other: of the pretraining behind the other model.

    Raises:
        ValueError: the other model was made otherwise, or with the same seed; or there is nothing to compare it with.
    """
    theirs = record["model"].get("provenance") or {}
    if recipe is None or other is None:
        raise ValueError(f"{path}: the pretraining of {record['model']['name'] if recipe else 'this export'} is not on record.")
    ours = [e for e in results.get("evaluations", []) if _measured(e) == _measured(record)]
    same = [e for e in ours if _settings(e, results).get("protocol") == (theirs.get("settings") or {}).get("protocol")]
    if not same:
        raise ValueError(
            f"{path} has no counterpart: add an evaluation of these weights on the same data, with the same attacks."
        )
    kind, now = _settings(same[0], results), theirs.get("settings") or {}
    found = differences(_without(recipe, _PLACES), _without(other, _PLACES)) | differences(
        _without(kind, ("seed",)), _without(now, ("seed",))
    )
    if found:
        raise ValueError(f"{path} is of a model that was made otherwise:\n  " + "\n  ".join(found.values()))
    if other["seed"] == recipe["seed"]:
        raise ValueError(f"{path} is of a model with the same seed of pretraining, {recipe['seed']}.")
    kept = {key: record[key] for key in ("data", "protocol", "accuracy", "command", "seconds", "hardware")}
    return without_local_paths({"model": same[0]["model"]["name"], "seed": other["seed"], **kept})


def table(evaluations: Sequence[Mapping[str, Any]], others: Sequence[Mapping[str, Any]], seed: int | None) -> str | None:
    """Mean, lowest and highest accuracy over the seeds in percent, as markdown; None without other seeds.

    Args:
        evaluations: of the export.
        others: of `of_another_seed`.
        seed: of the export's pretraining.
    """
    if not others or seed is None:
        return None
    lines = [f"| model | seeds | {' | '.join(_COLUMNS.values())} |", "|---|---|" + "---:|" * len(_COLUMNS)]
    for evaluation in evaluations:
        name = evaluation["model"]["name"]
        same = [o for o in others if o["model"] == name and _measured(o) == _measured(evaluation)]
        if not same:
            continue
        seeds = ", ".join(str(s) for s in sorted([seed, *(o["seed"] for o in same)]))
        cells = [_spread([r["accuracy"].get(key) for r in (evaluation, *same)]) for key in _COLUMNS]
        lines.append(f"| {name} | {seeds} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _spread(found: Sequence[Mapping[str, Any] | None]) -> str:
    values = [100 * each["value"] for each in found if each]
    if len(values) < len(found):
        return "-"
    return f"{sum(values) / len(values):.1f} ({min(values):.1f} to {max(values):.1f})"


def _measured(record: Mapping[str, Any]) -> tuple[Any, ...]:
    """On which images, and how."""
    return record["data"].get("sha256"), record["protocol"]


def _settings(evaluation: Mapping[str, Any], results: Mapping[str, Any]) -> Mapping[str, Any]:
    """Those with which the evaluated classifier was finetuned."""
    tuned = evaluation.get("finetuning") or (results if results.get("kind") == "classifier" else {})
    return tuned.get("settings") or {}


def _without(values: Mapping[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    """A copy of nested values without some, named with dots."""
    copy = {key: _without(value, ()) if isinstance(value, Mapping) else value for key, value in values.items()}
    for key in keys:
        *groups, leaf = key.split(".")
        inner: Any = copy
        for group in groups:
            inner = inner.get(group, {})
        inner.pop(leaf, None)
    return copy
