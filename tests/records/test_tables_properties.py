"""Properties of tables and pages: whatever text a record of others holds, it stays in its cell, and draws nothing else."""

import re
from typing import Any

from hypothesis import example, given
from hypothesis import strategies as st

from advcl_hub.records.tables import page, report
from tests.support.evaluation_records import RECORD, records


@given(st.lists(records(), min_size=1, max_size=2))
@example([RECORD | {"model": {**RECORD["model"], "name": "a\n# b"}}])
@example([RECORD | {"warnings": ["\x1b[2J", "a\n\n<script>"]}])
@example([RECORD | {"hardware": {"name": "\x1b]0;title\x07"}}])
def test_text_of_others_stays_in_its_cell_of_a_markdown_table(found: list[dict[str, Any]]) -> None:
    text = report(found, "markdown")
    assert text.replace("\n", "").isprintable() and "<" not in text
    table, *others = text.split("\n\n")
    lines = table.splitlines()
    assert len(lines) == 2 + len(found) and {line.count("|") for line in lines} == {lines[0].count("|")}
    warnings = sum(len(record["warnings"]) for record in found)
    assert len(others) == warnings + 1 and all(cited.startswith("> **Warning.**") for cited in others[:warnings])
    assert all(line.startswith("- ") for line in others[-1].splitlines())


@given(records())
@example(RECORD | {"checks": [{"name": "a|b", "passed": True, "detail": "<img src=x>\n"}]})
@example(RECORD | {"command": "x`\n\n<b>"})
def test_a_page_has_the_headings_that_we_wrote(record: dict[str, Any]) -> None:
    text = page(record, ["curves.png"])
    assert text.replace("\n", "").isprintable() and "<" not in text
    assert len(re.findall(r"^#", text, re.MULTILINE)) == 2 and text.count("\n\n| check") == 1
    *_, check = (line for line in text.splitlines() if line.startswith("|"))
    assert check.count("|") == 4


@given(st.lists(records(), min_size=1, max_size=2))
@example([RECORD | {"model": {**RECORD["model"], "name": "\x1b[31m"}}])
def test_a_text_table_is_aligned_and_moves_no_cursor(found: list[dict[str, Any]]) -> None:
    text = report(found, "text")
    assert text.replace("\n", "").isprintable()
    lines = text.split("\n\n")[0].splitlines()
    assert len(lines) == 2 + len(found) and set(lines[1]) == {"-"} and len({len(line) for line in lines}) == 1


@given(st.lists(records(), min_size=1, max_size=2))
@example([RECORD | {"model": {**RECORD["model"], "name": "\\input{/etc/passwd}"}}])
@example([RECORD | {"model": {**RECORD["model"], "name": "{a}~b^c±_"}}])
@example([RECORD | {"warnings": ["a\n\\input{x}"]}])
def test_a_latex_table_runs_no_command_of_others(found: list[dict[str, Any]]) -> None:
    lines = report(found, "latex").splitlines()
    body = [line for line in lines if not line.startswith("%")]
    assert len(body) == 6 + len(found)  # tabular, three rules, the header, the end
    known = r"\$\\pm\$|\\(?:\\$|[&%$#_{}]|textasciitilde\{\}|(?:top|mid|bottom)rule$|begin\{tabular\}\{lr+\}$|end\{tabular\}$)"
    for line in body:
        assert not set(re.sub(known, "", line)) & set("\\{}%$#_^~")
        assert not line.endswith(r" \\") or len(re.findall(r"(?<!\\)&", line)) == len(re.findall(r"(?<!\\)&", body[2]))
