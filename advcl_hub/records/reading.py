"""Reads results.json, the record of an evaluation, and writes its values as text."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from advcl_hub.errors import reason_of

RESULTS = "results.json"  # of an evaluation, and of an exported folder
FORMAT = 1  # of an evaluation's record
ATTACK_NAMES = {"apgd-ce": "APGD-CE", "apgd-dlr": "APGD-DLR", "apgd-t": "APGD-T", "fab-t": "FAB-T", "square": "Square"}


def load_record(path: str | Path) -> dict[str, Any]:
    """The record in a folder that `evaluate` wrote, or in such a results.json.

    Raises:
        FileNotFoundError: there is none.
        ValueError: the file is no record of an evaluation.
    """
    path = Path(path)
    file = path / RESULTS if path.is_dir() or path.suffix != ".json" else path
    if not file.is_file():
        raise FileNotFoundError(f"{path} has no {RESULTS}: run advcl-hub evaluate with --output {path} first.")
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        if record["kind"] != "evaluation":
            raise ValueError(f"it is that of {record['kind']}; advcl-hub evaluate writes such folders")
        if record["format"] > FORMAT:
            raise ValueError("it was written by a newer advcl-hub")
        (
            record["model"]["name"],
            record["accuracy"]["standard"],
            record["protocol"]["norm"],
            record["warnings"],
            record["batch_size"],
        )
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is not the result of an evaluation ({reason_of(error)}).") from None
    return record


def pixels(length: float, norm: str = "Linf") -> str:
    """A length as the field writes it: `8/255` in l_inf, `0.5` in l2."""
    return f"{length * 255:.3g}/255" if norm == "Linf" else f"{length:.3g}"


def counted(number: int, noun: str) -> str:
    """A number of things in words: `1 step`, `7,640 steps`."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def autoattack_text(record: Mapping[str, Any]) -> str:
    """Which AutoAttack the record of an evaluation is of, such as `standard`, or `standard without Square`."""
    missing = (f" without {ATTACK_NAMES[name]}" for name in record.get("autoattack_left_out", {}))
    return record["protocol"]["autoattack"] + "".join(missing)
