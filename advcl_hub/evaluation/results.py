"""The record of an evaluation: results.json, images.csv and what is needed to repeat it."""

import csv
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from advcl_hub.evaluation.protocol import Protocol
from advcl_hub.files import replacing, slug
from advcl_hub.records import RESULTS, load_record, pixels


@dataclass(frozen=True)
class Evaluation:
    """A finished evaluation.

    Attributes:
        record: what stands in results.json.
        images: columns of images.csv: for every image, in order, its index, label, predictions and what it survived.
    """

    record: dict[str, Any]
    images: dict[str, list[Any]]

    @property
    def standard(self) -> float:
        """Accuracy on the images as they are, in [0, 1] (SA)."""
        return self.record["accuracy"]["standard"]["value"]

    @property
    def robust(self) -> float | None:
        """Accuracy under PGD, in [0, 1] (RA)."""
        return self._value("pgd")

    @property
    def autoattack(self) -> float | None:
        """Accuracy after all attacks of AutoAttack that can run on such images, in [0, 1] (AA); `warnings` name the others."""
        return self._value("autoattack")

    @property
    def worst_case(self) -> float:
        """Accuracy on images that survive everything that was tried, in [0, 1]."""
        return self.record["accuracy"]["worst_case"]["value"]

    @property
    def warnings(self) -> list[str]:
        """What speaks against the figures, one sentence each."""
        return self.record["warnings"]

    def _value(self, name: str) -> float | None:
        found = self.record["accuracy"].get(name)
        return None if found is None else found["value"]

    def save(self, folder: Path) -> None:
        """Writes images.csv and, last, results.json."""
        with replacing(folder / "images.csv") as draft, draft.open("w", newline="", encoding="utf-8") as file:
            table = csv.writer(file)
            table.writerow(self.images)
            table.writerows(zip(*self.images.values(), strict=True))
        with replacing(folder / RESULTS) as draft:
            draft.write_text(json.dumps(self.record, indent=2) + "\n", encoding="utf-8")


def finished(folder: Path, facts: Mapping[str, Any]) -> Evaluation | None:
    """The evaluation that already stands in a folder, None if there is none.

    Raises:
        ValueError: what stands there was measured otherwise, and would be lost.
    """
    if not (folder / RESULTS).exists():
        return None
    record = load_record(folder)
    wanted = json.loads(json.dumps(facts))
    if differing := [key for key, value in wanted.items() if record.get(key) != value]:
        raise ValueError(
            f"{folder} holds an evaluation with another {', '.join(differing)}: choose another --output, or remove that folder."
        )
    if not (folder / "images.csv").is_file():
        raise ValueError(f"{folder} lacks its images.csv: remove that folder to measure again.")
    values = {"True": True, "False": False}
    try:
        with (folder / "images.csv").open(newline="", encoding="utf-8") as file:
            names, *rows = csv.reader(file)
        columns = zip(*([values[v] if v in values else int(v) for v in row] for row in rows), strict=True)
        images = {name: [*column] for name, column in zip(names, columns, strict=True)}
    except (ValueError, csv.Error):
        images = {}
    if not images:
        raise ValueError(f"{folder} has a damaged images.csv: remove that folder to measure again.")
    return Evaluation(record, images)


def proportion(correct: int, total: int) -> dict[str, Any]:
    """`value` in [0, 1], the count, and the 95 % interval of Wilson (1927) for images drawn from a population."""
    z, p = 1.959964, correct / total
    centre, spread = p + z * z / (2 * total), z * math.sqrt(p * (1 - p) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    low, high = (centre - spread) / scale, (centre + spread) / scale
    low, high = max(0.0, min(p, low)), min(1.0, max(p, high))  # which rounding must not put beside the value
    return {"value": p, "correct": correct, "interval_95": [low, high]}


def per_class(
    survives: Mapping[str, Sequence[bool]], labels: Sequence[int], classes: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """By name of every class that has images: how many, and by column how many of them are right."""
    table: dict[str, dict[str, Any]] = {}
    for label, name in enumerate(classes):
        members = [i for i, given in enumerate(labels) if given == label]
        if members:
            table[name] = {"images": len(members)} | {key: sum(flags[i] for i in members) for key, flags in survives.items()}
    return table


def folder_name(data: str, protocol: Protocol, options: Mapping[str, Any]) -> str:
    """A folder's name: what people ask first, and a few digits that differ with everything else."""
    count = [f"first{options['n']}" if options["first"] else f"n{options['n']}"] if options["n"] else []
    budget = f"{protocol.norm}-{pixels(protocol.radius, protocol.norm).replace('/', '-')}"
    attacks = [f"pgd{protocol.steps}", *(["aa"] if protocol.autoattack else []), *(["compiled"] if protocol.compile else [])]
    everything = repr((protocol, data, {key: str(value) for key, value in options.items() if key != "device"}))
    return "-".join([slug(data), *count, budget, *attacks, hashlib.sha256(everything.encode()).hexdigest()[:6]])
