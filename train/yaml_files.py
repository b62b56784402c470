"""YAML files and values, as recipes and plans have them."""

import re
import typing
from pathlib import Path
from typing import Any

import yaml

from advcl_hub.files import check_depth


def read_yaml(name: str, folder: Path, what: str) -> dict[str, Any]:
    """The values in a YAML file: one of a folder, by its name without ending, or the file at a path.

    Raises:
        FileNotFoundError: no such file; those of the folder are named.
        ValueError: not YAML, or not keys with values.
    """
    known = sorted(p.stem for p in folder.glob("*.yaml"))
    path = folder / f"{name}.yaml" if name in known else Path(name)
    if not path.is_file():
        raise FileNotFoundError(f"No {what} {name!r}. Known: {', '.join(known)}; or give the path of a YAML file.")
    try:
        values = parse_yaml(path.read_text(encoding="utf-8")) or {}
    except ValueError as error:
        raise ValueError(f"{path} is not YAML: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold `key: value` lines")
    return typing.cast(dict[str, Any], values)


class _Loader(yaml.SafeLoader):
    """YAML in which `1e-5` is a number, as in JSON and YAML 1.2: else `model_kwargs` would have it as text."""


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789"))


def parse_yaml(text: str) -> Any:
    """What a YAML text holds; ValueError whatever is wrong with it."""
    try:
        value = yaml.load(text, _Loader)
        check_depth(value, 50)
        return value
    # PyYAML's own errors do not cover values such as `0x_` and `!!bool maybe`.
    except (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(str(error) if isinstance(error, yaml.YAMLError) else repr(error)) from None
