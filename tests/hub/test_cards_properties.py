"""Properties of model cards: any record gives a card or one refusal, and no HTML or control characters of others."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from advcl_hub.hub.cards import card, read_export
from advcl_hub.hub.export import CONFIG, RESULTS
from advcl_hub.hub.released import BUNDLED
from tests.support import properties
from tests.support.properties import DEEP, damaged, odd_text

FEW = settings(max_examples=20 if properties.PROFILE == "usual" else 300)
NAME = "resnet10_cifar.pseudo_label_at_c10_aff"
RECORD, VALUES = (json.loads((BUNDLED / NAME / name).read_text(encoding="utf-8")) for name in (RESULTS, CONFIG))
OURS = ("<details><summary>", "</summary>", "</details>")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cards")


def write(folder: Path, results: Any, config: Any) -> None:
    (folder / RESULTS).write_text(json.dumps(results), encoding="utf-8")
    (folder / CONFIG).write_text(json.dumps(config), encoding="utf-8")


def told(text: str) -> str:
    """The text of a card for people, without its metadata, blocks of code and our own HTML."""
    front, text = re.fullmatch(r"---\n(.*?\n)---\n(.*)", text, re.DOTALL).groups()
    assert isinstance(yaml.safe_load(front), dict)
    text = re.sub(r"^```\w*\n.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    for ours in OURS:
        text = text.replace(ours, "")
    return text


def with_text(record: Any, text: str, number: int) -> Any:
    """The record with one of its texts replaced, the `number`-th one."""
    place = [number]

    def walk(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: walk(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [walk(inner) for inner in value]
        if isinstance(value, str):
            place[0] -= 1
            return text if place[0] == -1 else value
        return value

    return walk(record)


@FEW
@given(odd_text, st.integers(0, 120))
def test_text_of_others_stays_on_its_line_and_is_no_html(folder: Path, text: str, number: int) -> None:
    write(folder, with_text(RECORD, f"x{text}<b>\x1b[2J\n# y|z", number), with_text(VALUES, f"{text}<i>\n", number % 9))
    try:
        shown = told(card(folder, "a/b", "hf-hub:a/b"))
    except ValueError as error:
        assert str(folder) in str(error)
        return
    assert shown.replace("\n", "").isprintable() and "<" not in shown
    headings = re.findall(r"^#+ .*", shown, re.MULTILINE)
    assert headings[0] == "# a/b" and "## Results" in headings and not any(heading.startswith("# y") for heading in headings)


@FEW
@given(damaged(RECORD), damaged(VALUES))
@example(RECORD, VALUES)
@example({**RECORD, "seconds": "many"}, VALUES)
@example({**RECORD, "evaluations": [{**RECORD["evaluations"][0], "seconds": "x"}]}, VALUES)
@example({**RECORD, "licence": ["x"]}, VALUES)
@example(RECORD, {**VALUES, "num_classes": 3, "label_names": None})
def test_a_damaged_record_gives_a_card_or_a_refusal_that_names_the_folder(folder: Path, results: Any, config: Any) -> None:
    write(folder, results, config)
    try:
        assert told(card(folder))
    except ValueError as error:
        assert str(folder) in str(error)


@given(st.binary(max_size=20), st.sampled_from([RESULTS, CONFIG]))
@example(DEEP.encode(), RESULTS)
@example(b"[" * 500 + b"]" * 500, CONFIG)
def test_another_file_is_refused_by_name(folder: Path, content: bytes, name: str) -> None:
    write(folder, RECORD, VALUES)
    (folder / name).write_bytes(content)
    try:
        found = read_export(folder)
    except ValueError as error:
        assert str(folder / name) in str(error) or "names no sha256" in str(error)
    else:
        assert content.strip() == b"{}" and found == (RECORD, {})
