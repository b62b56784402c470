"""What a grid of finetuning runs leaves: a table in markdown, one line a cell in CSV, and a picture that compares encoders."""

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from advcl_hub.files import comfort, replacing
from advcl_hub.records import RESULTS, counted, in_markdown, load_record, pixels

CELL = "cell.json"  # in a cell's folder: what it was asked for, and its last evaluation


@dataclass(frozen=True)
class Cell:
    """One encoder on one data set under one protocol.

    Attributes:
        encoder: its name in the table.
        protocol, shots, data: as asked for.
        tuned: results.json of the classifier.
        evaluated: results.json of its evaluation.
        folder: of the evaluation; the run's is two above.
        held_out: share of the training images that it was evaluated on, 0 for the test split.
    """

    encoder: str
    protocol: str
    shots: int | None
    data: str
    tuned: dict[str, Any]
    evaluated: dict[str, Any]
    folder: Path
    held_out: float = 0.0

    @property
    def standard(self) -> float:
        """Clean accuracy in [0, 1]."""
        return self.evaluated["accuracy"]["standard"]["value"]

    @property
    def robust(self) -> float | None:
        """Accuracy under PGD in [0, 1], None if it was left out."""
        found = self.evaluated["accuracy"].get("pgd")
        return None if found is None else found["value"]

    @property
    def training(self) -> str:
        """Protocol and shots, as a row names them."""
        return self.protocol.upper() + (f", {counted(self.shots, 'shot')}" if self.shots else "")


def save(folder: Path, cells: Sequence[Cell]) -> None:
    """Writes report.md, results.csv and comparison.png: of these cells, and of those that earlier calls left in the folder."""
    with replacing(cells[-1].folder.parents[1] / CELL) as draft:
        last = cells[-1]
        asked = {key: getattr(last, key) for key in ("encoder", "protocol", "shots", "data", "held_out")}
        draft.write_text(json.dumps({**asked, "evaluation": last.folder.name}) + "\n", encoding="utf-8")
    known = {cell.folder.parents[1] for cell in cells}
    cells = [*cells, *(read(path) for path in sorted(folder.glob(f"*/*/*/{CELL}")) if path.parent not in known)]
    with replacing(folder / "report.md") as draft:
        draft.write_text(f"# Transfer\n\n{markdown(cells)}\n\n![comparison](comparison.png)\n", encoding="utf-8")
    with replacing(folder / "results.csv") as draft, draft.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, list(_line(cells[0])))
        table.writeheader()
        table.writerows(_line(cell) for cell in cells)
    with comfort("Drawing comparison.png", errors=Exception):
        picture(folder / "comparison.png", cells)


def read(path: Path) -> Cell:
    """A cell that an earlier call finished, from its cell.json."""
    asked = json.loads(path.read_text(encoding="utf-8"))
    folder = path.parent / "evaluations" / asked.pop("evaluation")
    tuned = json.loads((path.parent / "classifier" / RESULTS).read_text(encoding="utf-8"))
    return Cell(**asked, tuned=tuned, evaluated=load_record(folder), folder=folder)


def markdown(cells: Sequence[Cell]) -> str:
    """Rows: encoders and protocols; columns: data sets with clean accuracy and that under PGD. Then what the figures mean."""
    if not cells:
        return "Nothing is finished yet."
    data = list(dict.fromkeys(cell.data for cell in cells))
    found = {(cell.encoder, cell.training, cell.data): cell for cell in cells}
    attacks = _attacks(cells)
    attack = attacks[0].partition(",")[0] if len(attacks) == 1 else "PGD"  # the notes say whose is which
    header = ["encoder", "finetuning", *(f"{name} {column}" for name in data for column in ("SA", attack))]
    rows = []
    for training in dict.fromkeys(cell.training for cell in cells):
        for encoder in dict.fromkeys(cell.encoder for cell in cells):
            row = [encoder, training]
            for name in data:
                cell = found.get((encoder, training, name))
                mark = " (!)" if cell and cell.evaluated["warnings"] else ""
                row += ["-", "-"] if cell is None else [_percent(cell.standard), _percent(cell.robust) + mark]
            if any(entry != "-" for entry in row[2:]):
                rows.append(row)
    lines = [f"| {' | '.join(map(in_markdown, row))} |" for row in (header, *rows)]
    lines.insert(1, "|---|---" + "|---:" * (len(header) - 2) + "|")
    whose: dict[str, dict[str, None]] = {}  # the encoders of each note, in their order
    for cell in cells:
        whose.setdefault(_note(cell), {})[cell.encoder] = None
    notes = [f"{', '.join(encoders)}: {note}" if len(attacks) > 1 else note for note, encoders in whose.items()]
    said = [f"(!) {c.encoder}, {c.training}, {c.data}: {warning}" for c in cells for warning in c.evaluated["warnings"]]
    return "\n".join([*lines, "", "Accuracy in percent.", *(f"- {in_markdown(note)}" for note in [*notes, *said])])


def _note(cell: Cell) -> str:
    """Everything that a figure needs beside it, one line a kind of cell."""
    p, s, trained, tested = (
        cell.evaluated["protocol"],
        cell.tuned["settings"],
        cell.tuned["data"],
        cell.evaluated["data"],
    )
    tests = "held-out training images" if cell.held_out else "test images"
    rate = f"batch {s['batch_size']}, lr {s['lr']:g}" + (f", beta {s['beta']:g}" if s["objective"] == "trades" else "")
    attack = f"; attack {counted(s['steps'], 'step')} within {pixels(s['eps'])}" if s["objective"] != "ce" else ""
    return (
        f"{cell.training} on {trained['name']}: preset {cell.tuned['preset']}, {counted(s['epochs'], 'epoch')} over "
        f"{trained['images']:,} images, {rate}, augmentation {s['augment']}, {s['precision']}{attack}; {cell.tuned['chosen']}. "
        f"Tested on {tested['selection']} {tested['images']:,} of {tested['of']:,} {tests}; {_attack(cell)}, "
        f"step {pixels(p['step_size'], p['norm'])}; seeds {s['seed']} and {p['seed']}."
    )


def _attack(cell: Cell) -> str:
    p = cell.evaluated["protocol"]
    return f"PGD-{p['steps']}, {p['norm']} {pixels(p['eps'], p['norm'])}"


def _attacks(cells: Sequence[Cell]) -> list[str]:
    """Those that some figure is under."""
    return list(dict.fromkeys(_attack(cell) for cell in cells if cell.robust is not None))


def _line(cell: Cell) -> dict[str, Any]:
    s, p, accuracy = cell.tuned["settings"], cell.evaluated["protocol"], cell.evaluated["accuracy"]
    intervals = {
        f"{name}_{side}": accuracy[key]["interval_95"][index] if key in accuracy else ""
        for name, key in (("standard", "standard"), ("robust", "pgd"))
        for index, side in enumerate(("low", "high"))
    }
    return {
        "encoder": cell.encoder,
        "model": cell.tuned["encoder"]["name"],
        "protocol": cell.protocol,
        "preset": cell.tuned["preset"],
        "shots": cell.shots or "",
        "data": cell.tuned["data"]["name"],
        "held_out": cell.held_out,
        "train_images": cell.tuned["data"]["images"],
        **{key: s[key] for key in ("objective", "epochs", "batch_size", "lr", "augment", "precision", "seed")},
        "seconds": cell.tuned["seconds"],
        "evaluated_images": cell.evaluated["data"]["images"],
        "eps": p["eps"],
        "pgd_steps": p["steps"],
        "standard": cell.standard,
        "robust": "" if cell.robust is None else cell.robust,
        **intervals,
        "warnings": len(cell.evaluated["warnings"]),
        "weights_sha256": cell.tuned["encoder"]["weights_sha256"],
        "folder": "/".join(cell.folder.parents[1].parts[-3:]),
    }


def picture(path: Path, cells: Sequence[Cell]) -> Path:
    """One diagram a data set: for each protocol a pair of bars an encoder, clean accuracy behind that under attack."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    from advcl_hub.training.pictures import save_figure

    data = list(dict.fromkeys(cell.data for cell in cells))
    encoders = list(dict.fromkeys(cell.encoder for cell in cells))
    trainings = list(dict.fromkeys(cell.training for cell in cells))
    colours = [f"C{i}" for i in range(len(encoders))]
    width = 0.8 / len(encoders)
    figure = Figure(figsize=(max(4.5, 1.2 + 0.55 * len(encoders) * len(trainings)) * len(data), 3.8), layout="constrained")
    for axis, name in zip(figure.subplots(1, len(data), squeeze=False)[0], data, strict=True):
        for cell in cells:
            if cell.data != name:
                continue
            order = encoders.index(cell.encoder)
            x = trainings.index(cell.training) + (order - (len(encoders) - 1) / 2) * width
            axis.bar(x, 100 * cell.standard, 0.92 * width, color=colours[order], alpha=0.35)
            axis.text(x, 100 * cell.standard + 1, f"{100 * cell.standard:.0f}", ha="center", fontsize=8, color="0.4")
            if cell.robust is not None:
                axis.bar(x, 100 * cell.robust, 0.92 * width, color=colours[order])
                axis.text(x, 100 * cell.robust + 1, f"{100 * cell.robust:.0f}", ha="center", fontsize=8, weight="bold")
        axis.set_xticks(range(len(trainings)), trainings)
        axis.set(ylim=(0, 105), title=name)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_ylabel("accuracy (%)")
    handles = [Patch(color=colour) for colour in colours]
    attacks = _attacks(cells)
    figure.legend(handles, encoders, loc="outside upper center", ncols=len(encoders), frameon=False)
    figure.supxlabel(f"light: clean; dark: {attacks[0] if len(attacks) == 1 else 'PGD'}", fontsize=9)
    return save_figure(figure, path)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"
