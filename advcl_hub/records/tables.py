"""Evaluations side by side, as text, markdown and LaTeX."""

from collections.abc import Mapping, Sequence
from typing import Any

from advcl_hub.records.literature import SOURCE, quoted
from advcl_hub.records.reading import ATTACK_NAMES, autoattack_text, in_markdown, one_line, pixels

FORMATS = ("text", "markdown", "latex")


def report(records: Sequence[Mapping[str, Any]], style: str = "text", *, literature: bool = False) -> str:
    """A table with one row an evaluation, what the columns mean, and every warning.

    Args:
        records: of `Evaluation.record` or `load_record`.
        style: `text`, `markdown` or `latex` (booktabs).
        literature: add what others published on the same data, marked as quoted.

    Raises:
        ValueError: unknown style, or no records.
    """
    if style not in FORMATS:
        raise ValueError(f"The format is {style!r}, expected one of {', '.join(FORMATS)}")
    if not records:
        raise ValueError("There is nothing to report.")
    protocols = list(dict.fromkeys(protocol_text(r) for r in records))
    attacks = [a for a in ATTACK_NAMES if any(a in r.get("autoattack_columns", {}) for r in records)]
    shown = [key for key in ("pgd", "autoattack") if any(key in r["accuracy"] for r in records)]
    counts = {r["protocol"]["steps"] for r in records}
    robust = f"PGD-{counts.pop()}" if len(counts) == 1 else "PGD"
    header = ["model", "SA", *([robust] if "pgd" in shown else []), *(ATTACK_NAMES[a] for a in attacks)]
    header += ["AA"] if "autoattack" in shown else []
    rows, marks = [], len(protocols) > 1
    for record in records:
        name = record["model"]["name"] + (f" [{protocols.index(protocol_text(record)) + 1}]" if marks else "")
        accuracy = record["accuracy"]
        cells = [_figure(accuracy["standard"])]
        cells += [_figure(accuracy.get("pgd"))] if "pgd" in shown else []
        cells += [_figure(record.get("autoattack_columns", {}).get(a)) for a in attacks]
        cells += [_figure(accuracy.get("autoattack"))] if "autoattack" in shown else []
        rows.append([name + (" (!)" if record["warnings"] else ""), *cells])
    notes = [(f"[{i + 1}] " if marks else "") + text for i, text in enumerate(protocols)]
    if attacks:
        notes.append("Each attack of AutoAttack takes what survived those to its left; AA is what is left of them all.")
    notes.append("Accuracies in percent, with the 95 % interval (Wilson) for images drawn at random.")
    if literature:
        comparable = [r for r in records if r["protocol"]["norm"] == "Linf" and abs(r["protocol"]["eps"] - 8 / 255) < 1e-6]
        published = [q for data in dict.fromkeys(r["data"]["name"] for r in comparable) for q in quoted(data)]
        if published and "AA" not in header:
            header, rows = [*header, "AA"], [[*row, "-"] for row in rows]
        for q in published:
            known = {"SA": f"{100 * q.standard:.1f}", "AA": f"{100 * q.autoattack:.1f}"}
            rows.append([f"{q.method}, {q.protocol}, {q.data} (quoted)", *(known.get(column, "-") for column in header[1:])])
        notes.append(
            f"Quoted: {SOURCE}. Not measured here." if published else "No published figures are known for this setting."
        )
    if any(text.startswith("parquet:") for text in protocols):
        notes.append("Images from Parquet files (parquet:) may be recompressed: figures of the originals then do not compare.")
    warnings = [f"{r['model']['name']}: {warning}" for r in records for warning in r["warnings"]]
    made = ([*map(one_line, texts)] for texts in (notes, warnings))
    return {"text": _text, "markdown": _markdown, "latex": _latex}[style](header, [[*map(one_line, r)] for r in rows], *made)


def page(record: Mapping[str, Any], pictures: Sequence[str]) -> str:
    """The report of one evaluation in markdown, with its checks and pictures."""
    checks = [
        f"| {in_markdown(c['name'])} | {'yes' if c['passed'] else '**no**'} | {in_markdown(c['detail'])} |"
        for c in record["checks"]
    ]
    parts = [in_markdown(f"# {record['model']['name']} on {record['data']['name']}"), report([record], "markdown")]
    if "corruptions" in record:
        found = record["corruptions"]
        of = in_markdown(record["corrupted"]["set"])
        parts.append(f"Mean accuracy under corruptions ({of}): {100 * found['mean']:.1f} %.")
    parts += [f"![{name}]({name})" for name in pictures]
    if checks:
        parts.append("\n".join(["## Signs of false robustness", "", "| check | passed | seen |", "|---|---|---|", *checks]))
    if record["command"]:
        how, where = in_markdown(record["command"]), in_markdown(record["hardware"]["name"])
        parts.append(f"Made by `{how}` in {record['seconds']:,.0f} s on {where}.")
    return "\n\n".join(parts) + "\n"


def protocol_text(record: Mapping[str, Any]) -> str:
    """Data, budget and attacks of a record in one sentence."""
    data, p, model = record["data"], record["protocol"], record["model"]
    images = f"{data['selection']} {data['images']:,} " + (f"{data['split']} images" if data["split"] else "images")
    if data["images"] != data["of"]:
        images += f" of {data['of']:,}"
    attacks = []
    if p["steps"] and p["eps"]:
        starts = f"{p['restarts']} random start" + ("s" if p["restarts"] > 1 else "")
        attacks.append(f"PGD-{p['steps']} on {p['loss']}, step {pixels(p['step_size'], p['norm'])}, {starts}")
    if p["autoattack"]:
        attacks.append(f"AutoAttack {autoattack_text(record)}, batch {record['batch_size']}")
    budget = f"{p['norm']}, eps {pixels(p['eps'], p['norm'])} in pixels of [0, 1]; " if attacks else "not attacked"
    size = "x".join(map(str, model["attacked_at"][1:]))
    fitted = f" ({model['fitted_inside']} inside)" if model["fitted_inside"] else ""
    numbers = p["precision"] + (", compiled" if p.get("compile") else "")
    return f"{data['name']}, {images}, at {size}{fitted}: {budget}{'; '.join(attacks)}; seed {p['seed']}, {numbers}."


def _figure(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "-"
    low, high = found["interval_95"]
    return f"{100 * found['value']:.2f} [{100 * low:.1f}, {100 * high:.1f}]"


def _text(header: list[str], rows: list[list[str]], notes: list[str], warnings: list[str]) -> str:
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    lines = [
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(r, widths, strict=True)))
        for r in (header, *rows)
    ]
    lines.insert(1, "-" * len(lines[0]))
    text = [*lines, "", *notes]
    return "\n".join([*text, "", *(f"WARNING  {w}" for w in warnings)] if warnings else text)


def _markdown(header: list[str], rows: list[list[str]], notes: list[str], warnings: list[str]) -> str:
    lines = [f"| {' | '.join(map(in_markdown, row))} |" for row in (header, *rows)]
    lines.insert(1, "|---" + "|---:" * (len(header) - 1) + "|")
    cited = [f"> **Warning.** {in_markdown(warning)}" for warning in warnings]
    parts = ["\n".join(lines), *cited, "\n".join(f"- {in_markdown(note)}" for note in notes)]
    return "\n\n".join(parts)


def _latex(header: list[str], rows: list[list[str]], notes: list[str], warnings: list[str]) -> str:
    def line(cells: Sequence[str]) -> str:
        return " & ".join(_escape(cell) for cell in cells) + r" \\"

    return "\n".join(
        [
            *(f"% {note}" for note in notes),
            *(f"% WARNING {warning}" for warning in warnings),
            rf"\begin{{tabular}}{{l{'r' * (len(header) - 1)}}}",
            r"\toprule",
            line(header),
            r"\midrule",
            *(line(row) for row in rows),
            r"\bottomrule",
            r"\end{tabular}",
        ]
    )


def _escape(text: str) -> str:
    text = text.replace("\\", "/").replace("^", "-")
    for character in "&%$#_{}":
        text = text.replace(character, "\\" + character)
    return text.replace("±", r"$\pm$").replace("~", r"\textasciitilde{}")
