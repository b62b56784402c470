"""Figures, tables, pages and pictures of evaluations: what stands in them, and what must not be left out."""

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from advcl_hub.evaluation import Protocol, evaluate, pictures
from advcl_hub.evaluation.results import proportion
from advcl_hub.records.literature import quoted
from advcl_hub.records.tables import FORMATS, page, report
from tests.support.tiny_classifiers import TinyNet, labelled_by

ATTACKS = {"apgd-ce": 0.5, "apgd-t": 0.45, "fab-t": 0.45, "square": 0.44}


def record(name: str = "net", data: str = "random", **changes: Any) -> dict[str, Any]:
    """The parts of a record that tables read: 1,000 images, 81.2 % clean, 51 % under PGD; settings and parts to change."""
    protocol = Protocol(**{key: changes.pop(key) for key in list(changes) if key in Protocol.__dataclass_fields__})
    accuracy = {"standard": proportion(812, 1000)}
    if protocol.steps:
        accuracy["pgd"] = proportion(510, 1000)
    if protocol.autoattack:
        accuracy["autoattack"] = proportion(440, 1000)
    return {
        "model": {"name": name, "attacked_at": (3, 32, 32), "fitted_inside": None},
        "data": {"name": data, "split": "test", "images": 1000, "of": 10000, "selection": "class-balanced"},
        "protocol": protocol.to_dict(),
        "accuracy": accuracy,
        "batch_size": protocol.batch_size,
        "checks": [],
        "warnings": [],
        "command": None,
        "seconds": 12.3,
        "hardware": {"name": "a processor"},
    } | changes


def attacked(name: str = "net", columns: dict[str, float] = ATTACKS, **changes: Any) -> dict[str, Any]:
    """The same with the columns of AutoAttack."""
    figures = {attack: proportion(round(1000 * value), 1000) for attack, value in columns.items()}
    return record(name, autoattack=changes.pop("autoattack", "standard"), autoattack_columns=figures, **changes)


def rows(table: str, style: str) -> list[list[str]]:
    """The cells of a table in any of the formats, header first."""
    if style == "text":
        lines = table.split("\n\n")[0].splitlines()
        assert set(lines.pop(1)) == {"-"} and len({len(line) for line in lines}) == 1, "the columns are not aligned"
        return [re.split(r" {2,}", line.strip()) for line in lines]
    if style == "markdown":
        lines = [line for line in table.splitlines() if line.startswith("|")]
        assert re.fullmatch(r"\|---(\|---:)+\|", lines[1]) and len({line.count("|") for line in lines}) == 1
        return [line[2:-2].split(" | ") for line in (lines[0], *lines[2:])]
    lines = table.splitlines()
    first, last = lines.index(r"\toprule"), lines.index(r"\bottomrule")
    body = [line for line in lines[first:last] if not line.endswith("rule")]
    assert all(line.endswith(r" \\") for line in body)
    cells = [re.split(r"(?<!\\) & ", line.removesuffix(r" \\")) for line in body]
    assert lines[first - 1] == rf"\begin{{tabular}}{{l{'r' * (len(cells[0]) - 1)}}}" and lines[last + 1] == r"\end{tabular}"
    assert {len(re.findall(r"(?<!\\)&", line)) for line in body} == {len(cells[0]) - 1}
    return cells


pytestmark = [pytest.mark.filterwarnings("error:A picture could not be drawn"), pytest.mark.usefixtures("rendered")]
styles = pytest.mark.parametrize("style", FORMATS)


# ---- figures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("correct", "total", "low", "high"),
    [  # the score interval in textbooks
        (0, 10, 0.0, 0.27753),
        (5, 10, 0.23659, 0.76341),
        (10, 10, 0.72247, 1.0),
        (1, 1, 0.20655, 1.0),
        (81, 263, 0.25529, 0.36621),  # Newcombe (1998), table I
        (15, 148, 0.06239, 0.16053),
    ],
)
def test_the_interval_is_that_of_wilson(correct: int, total: int, low: float, high: float) -> None:
    found = proportion(correct, total)
    assert found["value"] == correct / total and found["correct"] == correct
    assert found["interval_95"] == pytest.approx([low, high], abs=1e-4)


def test_the_ends_of_the_interval_are_just_not_rejected() -> None:
    for correct in range(1, 400, 37):
        found = proportion(correct, 400)
        for end in found["interval_95"]:
            assert abs(correct / 400 - end) / math.sqrt(end * (1 - end) / 400) == pytest.approx(1.959964, rel=1e-6)


# ---- tables ----------------------------------------------------------------------------------------------------------


@styles
def test_figures_have_two_decimals_and_their_interval(style: str) -> None:
    assert rows(report([record()], style), style) == [
        ["model", "SA", "PGD-20"],
        ["net", "81.20 [78.7, 83.5]", "51.00 [47.9, 54.1]"],
    ]


@styles
def test_one_column_an_attack_and_a_dash_where_nothing_was_measured(style: str) -> None:
    rand = attacked("rand", {"apgd-ce": 0.4, "apgd-dlr": 0.3}, autoattack="rand", steps=0)
    header, *body = rows(report([attacked(), rand, record("pgd only")], style), style)
    assert header == ["model", "SA", "PGD", "APGD-CE", "APGD-DLR", "APGD-T", "FAB-T", "Square", "AA"]
    values = [[cell.split(" [")[0] for cell in row[1:]] for row in body]
    assert values[0] == ["81.20", "51.00", "50.00", "-", "45.00", "45.00", "44.00", "44.00"]
    assert values[1] == ["81.20", "-", "40.00", "30.00", "-", "-", "-", "44.00"]
    assert values[2] == ["81.20", "51.00", "-", "-", "-", "-", "-", "-"]


def test_a_clean_evaluation_has_one_figure() -> None:
    clean = report([record(steps=0)])
    assert rows(clean, "text")[0] == ["model", "SA"] and "at 32x32: not attacked; seed 0" in clean
    assert rows(report([record(steps=7), record(steps=7)]), "text")[0] == ["model", "SA", "PGD-7"]


@styles
def test_protocols_that_differ_are_marked_and_told(style: str) -> None:
    table = report([record("a"), record("b", eps=4 / 255), record("c")], style)
    assert [row[0] for row in rows(table, style)[1:]] == ["a [1]", "b [2]", "c [1]"]
    told = [line for line in table.splitlines() if "in pixels of [0, 1]" in line]
    assert len(told) == 2 and "[1] random, " in told[0] and "eps 8/255" in told[0]
    assert "[2] random, " in told[1] and "eps 4/255" in told[1]


@pytest.mark.parametrize(
    "changes",
    [
        {"norm": "L2"},
        {"eps": 0.01},
        {"step_size": 0.01},
        {"steps": 10},
        {"restarts": 2},
        {"loss": "dlr"},
        {"autoattack": "rand"},
        {"seed": 1},
        {"precision": "bfloat16"},
        {"batch_size": 10},
        {"data": "other"},
        {"data": {"name": "random", "split": "train", "images": 1000, "of": 10000, "selection": "class-balanced"}},
        {"data": {"name": "random", "split": "test", "images": 1000, "of": 10000, "selection": "the first"}},
        {"data": {"name": "random", "split": "test", "images": 1000, "of": 1000, "selection": "all"}},
        {"model": {"name": "net", "attacked_at": (3, 64, 64), "fitted_inside": None}},
        {"model": {"name": "net", "attacked_at": (3, 32, 32), "fitted_inside": "enlarged"}},
    ],
)
def test_whatever_makes_figures_incomparable_is_marked(changes: dict[str, Any]) -> None:
    two = [attacked(**given) for given in ({}, changes)]
    assert [row[0] for row in rows(report(two), "text")[1:]] == ["net [1]", "net [2]"]


def test_more_random_starts_are_told() -> None:
    assert "step 2/255, 3 random starts; seed 0" in report([record(restarts=3)])


def test_the_same_protocol_is_told_once_and_not_marked() -> None:
    table = report([record("a"), record("b", accuracy={"standard": proportion(1, 2)}, batch_size=10, check_images=5)])
    assert [row[0] for row in rows(table, "text")[1:]] == ["a", "b"] and table.count("in pixels of [0, 1]") == 1
    assert (
        "random, class-balanced 1,000 test images of 10,000, at 32x32: Linf, eps 8/255 in pixels of [0, 1]; "
        "PGD-20 on ce, step 2/255, 1 random start; seed 0, float32." in table.splitlines()
    )


@styles
def test_no_format_leaves_a_warning_out(style: str) -> None:
    said = ["gradients: no. zero or not finite on 3 of 30 images.", "Not checked for false robustness."]
    table = report([record("a"), record("b", warnings=said)], style)
    assert [row[0] for row in rows(table, style)[1:]] == ["a", "b (!)"]
    marks = {"text": "WARNING  ", "markdown": "> **Warning.** ", "latex": "% WARNING "}
    assert [line for line in table.splitlines() if line.startswith(marks[style])] == [f"{marks[style]}b: {w}" for w in said]
    assert marks[style] not in report([record("a")], style)


def test_special_characters_of_latex_are_escaped() -> None:
    table = report([attacked("a_b & 50% #1 $x {y} ~z", warnings=["w"]), record("plain")], "latex", literature=True)
    first = rows(table, "latex")[1][0]
    assert first == r"a\_b \& 50\% \#1 \$x \{y\} \textasciitilde{}z [1] (!)"


@styles
def test_published_figures_stand_below_and_are_marked_as_quoted(style: str) -> None:
    header, *body = rows(report([record(data="parquet:cifar10")], style, literature=True), style)
    assert header == ["model", "SA", "PGD-20", "AA"] and body[0] == ["net", "81.20 [78.7, 83.5]", "51.00 [47.9, 54.1]", "-"]
    assert len(body) == 1 + 7 * 3 and all(row[0].endswith(" (quoted)") for row in body[1:])
    assert ["ACL, SLF, cifar10 (quoted)", "78.2", "-", "39.2"] in body
    assert ["DynACL-AIR++, AFF, cifar10 (quoted)", "82.4", "-", "50.8"] in body


def test_published_figures_fill_the_columns_of_autoattack() -> None:
    table = rows(report([attacked(data="stl10")], literature=True), "text")
    assert table[0][-1] == "AA" and table[1][-1] == "44.00 [41.0, 47.1]"
    assert ["RoCL, SLF, stl10 (quoted)", "78.2", *["-"] * 5, "26.5"] in table and len(table) == 2 + 5


@styles
def test_only_what_was_published_on_these_data_is_quoted(style: str) -> None:
    assert "quoted" not in report([record(data="cifar10")], style)
    other = report([record(data="digits")], style, literature=True)
    assert "quoted" not in other and "No published figures are known for this setting." in other
    both = report([record(data="cifar100"), record(data="stl10")], style, literature=True)
    assert {row[0].split(", ")[2] for row in rows(both, style)[3:]} == {"cifar100 (quoted)", "stl10 (quoted)"}
    assert "Not measured here." in both and len(rows(both, style)) == 3 + 6 + 5 + 5


@pytest.mark.parametrize("changes", [{"norm": "L2"}, {"norm": "L2", "eps": 8 / 255}, {"eps": 4 / 255}])
def test_figures_at_another_budget_are_not_quoted(changes: dict[str, Any]) -> None:
    other = record(data="cifar10", **changes)
    assert "(quoted)" not in report([other], literature=True)
    assert report([other, record()], literature=True).count("(quoted)") == 0
    assert report([other, record(data="cifar10")], literature=True).count("(quoted)") == 21


def test_images_that_may_be_recompressed_are_told() -> None:
    for literature in (True, False):
        assert "may be recompressed" in report([record(data="parquet:cifar10")], literature=literature)
        assert "recompressed" not in report([record(data="cifar10")], literature=literature)


def test_quoted_figures_are_those_of_the_table() -> None:
    known = {
        (q.method, q.data, q.protocol): (q.autoattack, q.standard) for d in ("cifar10", "cifar100", "stl10") for q in quoted(d)
    }
    assert len(known) == 21 + 6 + 5 + 5
    assert known["ACL", "cifar10", "SLF"] == pytest.approx((0.392, 0.782))
    assert known["AdvCL (ImageNet pseudo-labels)", "cifar100", "AFF"] == pytest.approx((0.253, 0.583))
    assert known["DeACL", "cifar10", "ALF"] == pytest.approx((0.456, 0.794))
    assert known["DynACL++", "stl10", "SLF"] == pytest.approx((0.472, 0.709))
    assert ("RoCL", "cifar100", "AFF") not in known and ("DeACL", "cifar100", "SLF") not in known
    assert all(robust < standard for robust, standard in known.values())
    assert quoted("cifar") == quoted("digits") == []


@pytest.mark.parametrize("style", FORMATS)
def test_an_incomplete_autoattack_is_not_called_the_standard_one(style: str) -> None:
    whole = attacked()
    assert "AutoAttack standard, batch" in report([whole], style)
    part = whole | {"autoattack_left_out": {"square": "Square cannot attack 24x24 images"}}
    assert "AutoAttack standard without Square, batch" in report([part], style)


def test_what_cannot_be_reported_is_refused() -> None:
    with pytest.raises(ValueError, match="The format is 'html', expected one of text, markdown, latex"):
        report([record()], "html")
    with pytest.raises(ValueError, match="nothing to report"):
        report([])


def test_a_page_holds_checks_pictures_and_how_it_was_made() -> None:
    checks = [
        {"name": "gradients", "passed": True, "detail": "zero on 0 of 9 images"},
        {"name": "logits", "passed": False, "detail": "the outputs are probabilities"},
    ]
    full = record(
        checks=checks,
        warnings=["logits: no."],
        corrupted={"set": "CIFAR-10-C"},
        corruptions={"mean": 0.4321},
        command="advcl-hub evaluate net",
    )
    text = page(full, ["per_class.png", "curves.png"])
    assert text.startswith("# net on random\n\n| model | SA | PGD-20 |\n") and "> **Warning.** net: logits: no." in text
    assert "| gradients | yes | zero on 0 of 9 images |\n| logits | **no** | the outputs are probabilities |" in text
    assert "![per_class.png](per_class.png)\n\n![curves.png](curves.png)" in text
    assert "corruptions (CIFAR-10-C): 43.2 %." in text
    assert "Made by `advcl-hub evaluate net` in 12 s on a processor." in text
    bare = page(record(), [])
    assert not any(word in bare for word in ("false robustness", "corruptions", "![", "Made by"))


# ---- real evaluations ------------------------------------------------------------------------------------------------


def test_curves_stop_before_the_very_large_eps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(pictures, "save_figure", lambda figure, path: drawn.append(figure))
    curves = {"images": 9, "eps": [(0, 0.8), (4 / 255, 0.7), (8 / 255, 0.5), (0.5, 0.1)], "steps": [(1, 0.6), (20, 0.5)]}
    pictures.save_curves(tmp_path / "curves.png", record(curves=curves))
    pictures.save_curves(tmp_path / "curves.png", record(norm="L2", curves=curves))
    for figure, unit in zip(drawn, (255, 1), strict=True):
        left, right = (axis.lines[0].get_xydata() for axis in figure.axes)
        assert np.allclose(left, [[0, 80], [4 / 255 * unit, 70], [8 / 255 * unit, 50]])
        assert np.allclose(right, [[0, 80], [1, 60], [2, 50]])
        assert [label.get_text() for label in figure.axes[1].get_xticklabels()] == ["clean", "1", "20"]


@styles
def test_real_evaluations_stand_side_by_side(style: str) -> None:
    model = TinyNet()
    data = labelled_by(model, 30, wrong=3)
    protocols = (Protocol(eps=0.01, steps=steps, check_images=0) for steps in (3, 1))
    first, second = (evaluate(model, data, protocol, progress=False) for protocol in protocols)
    table = report([first.record, second.record], style)
    header, *body = rows(table, style)
    assert header == ["model", "SA", "PGD"] and [row[0] for row in body] == ["TinyNet [1] (!)", "TinyNet [2] (!)"]
    assert body[0][1] == "90.00 [74.4, 96.5]" and body[0][2].startswith(f"{100 * (first.robust or 0):.2f} [")
    assert table.count("Not checked for false robustness") == 2 and "random, all 30 images, at 8x8: " in table
