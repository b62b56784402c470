"""What a benchmark leaves: a table to read, results.json, and benchmark.png to look at."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from advcl_hub.files import replacing
from advcl_hub.records import counted
from advcl_hub.training.pictures import save_figure
from train.benchmark.timing import Timing


@dataclass(frozen=True)
class Row:
    """One contestant.

    Attributes:
        name: what was done.
        timing: seconds of a call.
        items: what one call handles, in the section's unit; 0 where only the time counts.
        more: other columns of the table by heading, as text or numbers.
    """

    name: str
    timing: Timing
    items: int = 0
    more: dict[str, Any] = field(default_factory=dict)

    def shown(self, rate: bool) -> tuple[float, float, float]:
        """The median, the least and the greatest, in items a second or in seconds."""
        t = self.timing
        return (self.items / t.median, self.items / t.high, self.items / t.low) if rate else (t.median, t.low, t.high)


@dataclass(frozen=True)
class Section:
    """Contestants that do the same work; ratios are to the first.

    Attributes:
        name, title: short and long.
        rows: the contestants.
        unit: of `Row.items`, e.g. `images`.
        note: what was measured, on what.
        compare: whether the rows do the same work, so that ratios mean something.
    """

    name: str
    title: str
    rows: list[Row]
    unit: str = "images"
    note: str = ""
    compare: bool = True

    def table(self) -> str:
        """The section in Markdown: the median over all rounds, in brackets the slowest and the fastest."""
        rates = all(row.items for row in self.rows)
        headings = ["", f"{self.unit}/s" if rates else "seconds", *(["ratio"] if self.compare else [])]
        headings += list(dict.fromkeys(key for row in self.rows for key in row.more))
        lines = [f"## {self.title}", "", _line(headings), _line(["---"] * len(headings))]
        for row in self.rows:
            value, low, high = row.shown(rates)
            cells = [row.name, f"{_short(value)} ({_short(low)} to {_short(high)})"]
            cells += [f"{self.ratio(row):.2f}"] if self.compare else []
            cells += [_short(row.more.get(key, "")) for key in headings[len(cells) :]]
            lines.append(_line(cells))
        return "\n".join([*lines, *(["", self.note] if self.note else [])])

    def ratio(self, row: Row) -> float:
        """How many times faster than the first row, item by item."""
        first = self.rows[0]
        return (first.timing.median / max(first.items, 1)) / (row.timing.median / max(row.items, 1))


def save(folder: Path, sections: list[Section], facts: dict[str, Any]) -> None:
    """Writes results.json and benchmark.png, whole or not at all."""
    record = {"kind": "benchmark", **facts, "sections": [asdict(section) for section in sections]}
    with replacing(folder / "results.json") as draft:
        draft.write_text(json.dumps(record, indent=1), encoding="utf-8")
    _draw(folder / "benchmark.png", sections, facts)


def _draw(path: Path, sections: list[Section], facts: dict[str, Any]) -> None:
    heights = [1.1 + 0.42 * len(section.rows) for section in sections]
    figure = Figure(figsize=(9, sum(heights)), layout="constrained")
    panels = figure.subplots(len(sections), 1, height_ratios=heights, squeeze=False)
    for section, axes in zip(sections, panels[:, 0], strict=True):
        rates = all(row.items for row in section.rows)
        names = [row.name for row in section.rows]
        for i, row in enumerate(section.rows):
            value, low, high = row.shown(rates)
            axes.barh(i, value, color="tab:gray" if i == 0 and section.compare else "tab:blue")
            axes.errorbar(value, i, xerr=[[value - low], [high - value]], color="black", capsize=3)
            label = f"{_short(value)}  ({section.ratio(row):.2f}x)" if section.compare else _short(value)
            axes.annotate(label, (high, i), xytext=(6, 0), textcoords="offset points", va="center", fontsize=9)
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.margins(x=0.22)
        medians = [row.timing.median for row in section.rows]
        if max(medians) > 100 * min(medians):
            axes.set_xscale("log")
        axes.set_title(f"{section.title}, {section.unit + '/s' if rates else 'seconds'}", loc="left", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    threads = counted(facts["hardware"]["threads"], "thread")
    figure.suptitle(f"{facts['hardware']['name']}, {threads}, torch {facts['versions']['torch']}")
    save_figure(figure, path)


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _short(value: Any) -> str:
    """Three digits of a number; text as it is."""
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
