"""Puts errors of other libraries into one sentence, and says which package is missing."""

import importlib.util
import re
from collections.abc import Iterator, Sequence


def reason_of(error: BaseException, limit: int = 300) -> str:
    """What an error says, as one sentence of at most `limit` characters, whoever raised it.

    Of a refused state dict the first keys and shapes are named, and how many more there are. Of other messages the first
    paragraph is taken. Line breaks and control characters become blanks: keys and names come from files of other people.
    """
    text = str(error).strip()
    if not text or isinstance(error, KeyError):  # whose message is the key alone
        text = repr(error)
    lines = text.split("\n\n")[0].splitlines()
    if len(lines) > 1 and lines[0].startswith("Error(s) in loading state_dict"):
        text = f"{_plain(lines[0])} {'; '.join(_refused_keys(lines[1:]))}"
    else:
        text = _plain(" ".join(lines)) or _plain(repr(error))
    return text if len(text) <= limit else f"{text[: limit - 4].rstrip()} ..."


def _refused_keys(lines: Sequence[str]) -> Iterator[str]:
    """Of torch's lists of keys, one a line, and its lines of shapes, the first two each and the number of the others."""
    shapes = [line for line in lines if line.strip().startswith("size mismatch")]
    for line in lines:
        kind, found, keys = _plain(line).partition(": ")
        if line not in shapes and found:
            yield f"{kind}: {_first_two(keys.rstrip('.').split(', '))}"
        elif line not in shapes and (rest := _plain(line)):
            yield rest.rstrip(".")
    if shapes:
        sizes = [
            re.sub(
                r"copying a param with shape torch.Size\((\S.*?)\) from checkpoint, the shape in current model is "
                r"torch.Size\((.*?)\)\.?$",
                r"\1 instead of \2",
                _plain(line),
            )
            for line in shapes
        ]
        yield _first_two(sizes)


def _first_two(items: Sequence[str]) -> str:
    shown = ", ".join(item if len(item) <= 90 else f"{item[:86]} ..." for item in items[:2])
    return shown + (f" and {len(items) - 2} more" if len(items) > 2 else "")


def visible(text: str) -> str:
    """A text of others for a terminal, with what would move its cursor or change its colours written out, but for new lines."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def _plain(text: str) -> str:
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def need(package: str, purpose: str, extra: str) -> None:
    """Raises ImportError with the command to type unless the package is installed.

    Args:
        package: its import name.
        purpose: what needs it, the first words of the message.
        extra: the set of optional packages that has it.
    """
    if importlib.util.find_spec(package) is None:
        raise ImportError(f"{purpose} needs the package {package}: {how_to_install(extra)}")


def how_to_install(extra: str) -> str:
    """The command that installs a set of optional packages."""
    return f'pip install "advcl-hub[{extra}]"'
