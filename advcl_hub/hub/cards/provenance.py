"""How weights came to be, read from their records.

A record names the encoder that its training started from, with that encoder's own record in it, down to a pretraining.
That may have started from another one, such as that of a teacher.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from advcl_hub.hub.export import WEIGHTS

Record = Mapping[str, Any]
PROTOCOLS = {
    "slf": "linear head on the frozen encoder (SLF)",
    "alf": "adversarially trained linear head on the frozen encoder (ALF)",
    "aff": "adversarial full finetuning (AFF)",
    "sff": "standard full finetuning (SFF)",
}
_METHODS = {
    "advcl": "AdvCL",
    "simclr": "contrastive learning on clean views (SimCLR)",
    "acl": "adversarial contrastive learning (ACL)",
    "deacl": "DeACL",
    "profeat": "ProFeAT",
    "pseudo_label_at": "adversarial training on pseudo-labels",
}


def chain(record: Record | None) -> Iterator[Record]:
    """The record of some weights and of what each was made from, the latest first; a pretraining is the last one."""
    while isinstance(record, Mapping) and record:
        yield record
        if "recipe" in record:
            return
        record = _part(_part(record, "encoder"), "provenance")


def pretraining(results: Record | None) -> Record | None:
    """The record of the pretraining behind an encoder or a classifier, None if it is not known."""
    return next((record for record in chain(results) if "recipe" in record), None)


def pretrainings(results: Record | None) -> list[Record]:
    """The records of that pretraining and of those that it started from, the latest first, as far as they are known."""
    records, latest = [], pretraining(results)
    while latest:
        records.append(latest)
        latest = pretraining(_part(started_from(latest), "provenance"))
    return records


def started_from(made: Record) -> Record:
    """The encoder that a pretraining started from: `name`, `weights_sha256`, and its `provenance`; empty if there is none."""
    return _part(_part(made, "provenance"), "start_from")


def finetunings(results: Record | None) -> list[Record]:
    """The records of every finetuning behind some weights, the latest first, LP-AFF among them, which reads no labels."""
    return [record for record in chain(results) if "recipe" not in record and record.get("settings")]


def ancestors(results: Record) -> set[str]:
    """sha256 of the files that these weights were finetuned from, and of those before they were rounded to a smaller dtype."""
    before = list(chain(results))[1:]
    pairs = [(_part(record, "sha256").get(WEIGHTS), _part(record, "rounded_from").get("sha256")) for record in before]
    return {sha256 for pair in pairs for sha256 in pair if sha256}


def _part(record: Record, key: str) -> Record:
    """A record within a record; empty where there is none, whatever a damaged file has in its place."""
    part = record.get(key)
    return part if isinstance(part, Mapping) else {}


def is_lp_aff(record: Record) -> bool:
    """Whether the record of a finetuning is that of LP-AFF."""
    return str(record.get("method")).startswith("LP-AFF")


def is_robust(made: Record) -> bool:
    """Whether a pretraining had adversarial views."""
    return method_name(made) != "simclr" and bool(made["recipe"].get("attack", {}).get("steps"))


def is_advcl(results: Record, made: Record | None) -> bool:
    """Whether weights come from AdvCL: our own pretraining (see `pretraining`) or a checkpoint of its authors' code."""
    return results.get("layout") == "advcl" or (made is not None and method_name(made) == "advcl")


def method(made: Record) -> str:
    """What a pretraining did, in the terms of the field."""
    name = method_name(made)
    if name == "advcl" and not made["recipe"].get("objective", {}).get("pseudo_label_weight"):
        return "AdvCL without pseudo-labels"
    return _METHODS.get(name, name)


def method_name(made: Record) -> str:
    """The name of the method; earlier records have SimCLR and ACL as settings of AdvCL's objective."""
    recipe = made["recipe"]
    objective = recipe.get("objective", {})
    earlier = "acl" if objective.get("pairing") == "separate" else "advcl"
    return str(recipe.get("method") or ("simclr" if objective.get("adversarial_views") == [] else earlier))
