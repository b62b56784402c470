"""Reads results.json, the record of an evaluation, and writes its values as text."""

from collections.abc import Mapping
from pathlib import Path
from types import UnionType
from typing import Any

from advcl_hub.errors import reason_of, visible
from advcl_hub.files import parse_json

RESULTS = "results.json"  # of an evaluation, and of an exported folder
FORMAT = 1  # of an evaluation's record
ATTACK_NAMES = {"apgd-ce": "APGD-CE", "apgd-dlr": "APGD-DLR", "apgd-t": "APGD-T", "fab-t": "FAB-T", "square": "Square"}

_MOST = 2.0**64  # of numbers in a record, either way: counts, seconds, distances; seeds are the largest
_FIGURE = {"value": float, "interval_95": (float, float)}
# Of an evaluation's record what tables and cards read, with its types. `?` may be missing, `*` is every other key.
_FORM = {
    "model": {"name": str, "attacked_at": [int], "fitted_inside": str | None},
    "data": {"name": str, "split": str | None, "images": int, "of": int, "selection": str},
    "protocol": {
        **dict.fromkeys(("norm", "loss", "precision"), str),
        **dict.fromkeys(("eps", "step_size"), float),
        **dict.fromkeys(("steps", "restarts", "seed"), int),
        "autoattack": str | None,
    },
    "accuracy": {"standard": _FIGURE, "*": _FIGURE},
    "autoattack_columns?": {"*": _FIGURE},
    "autoattack_left_out?": {},
    "checks": [{"name": str, "passed": bool, "detail": str}],
    "corruptions?": {"mean": float},
    "warnings": [str],
    "batch_size": int,
    "command": str | None,
    "seconds": float,
    "hardware": {"name": str},
}


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
        record = parse_json(file.read_text(encoding="utf-8"))
        if record["kind"] != "evaluation":
            raise ValueError(f"it is that of {record['kind']}; advcl-hub evaluate writes such folders")
        if record["format"] > FORMAT:
            raise ValueError("it was written by a newer advcl-hub")
        _check(record, _FORM)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is not the result of an evaluation ({reason_of(error)}).") from None
    return record


def _check(value: Any, form: Any, place: str = "it") -> None:
    """Raises ValueError unless a value of a record is as a form like `_FORM` has it."""
    if isinstance(form, dict) and isinstance(value, dict):
        for key, inner in form.items():
            optional, key = key.endswith("?"), key.rstrip("?")
            names = [name for name in value if name not in form] if key == "*" else [key] * (not optional or key in value)
            for name in names:
                if name not in value:
                    raise ValueError(f"{place} has no {name}")
                _check(value[name], inner, f"{place}.{name}".removeprefix("it."))
    elif isinstance(form, list) and isinstance(value, list):
        for each in value:
            _check(each, form[0], place)
    elif isinstance(form, tuple) and isinstance(value, list) and len(value) == len(form):
        for each, inner in zip(value, form, strict=True):
            _check(each, inner, place)
    elif form in (int, float) and (type(value) is int or type(value) is form):
        if not -_MOST < value < _MOST:
            raise ValueError(f"{place} is no number that can be measured")
    elif not (isinstance(form, type | UnionType) and isinstance(value, form)) or form in (int, float):
        raise ValueError(f"{place} is {value!r:.60}")


def pixels(length: float, norm: str = "Linf") -> str:
    """A length as the field writes it: `8/255` in l_inf, `0.5` in l2."""
    return f"{length * 255:.3g}/255" if norm == "Linf" else f"{length:.3g}"


def one_line(text: str) -> str:
    """A text of others as one line without control characters."""
    return visible(" ".join(text.split()))


def in_markdown(text: str) -> str:
    """A text of others as one line of Markdown that is no heading, rule, table or HTML."""
    return one_line(text).replace("<", "&lt;").replace("|", "/")


def counted(number: int, noun: str) -> str:
    """A number of things in words: `1 step`, `7,640 steps`."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def autoattack_text(record: Mapping[str, Any]) -> str:
    """Which AutoAttack the record of an evaluation is of, such as `standard`, or `standard without Square`."""
    missing = (f" without {ATTACK_NAMES.get(name, name)}" for name in record.get("autoattack_left_out", {}))
    return record["protocol"]["autoattack"] + "".join(missing)
