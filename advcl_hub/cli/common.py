"""What the commands share: how they read lengths, times and lists, and what becomes of errors."""

import argparse
import contextlib
import functools
import io
import logging
import math
import os
import select
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any

import click
import torch

from advcl_hub.data.matching import CLASS_ORDERS
from advcl_hub.errors import reason_of, visible
from advcl_hub.training.stop import duration

TRACEBACK = "ADVCL_HUB_TRACEBACK"  # a variable: 1 shows where an error came from
class_order = click.option(
    "--class-order",
    type=click.Choice(list(CLASS_ORDERS)),
    help="How a model that does not name its classes numbers folders: natural as timm, plain as torchvision's ImageFolder.",
)
DATA = "cifar10, cifar100, stl10, fashion-mnist, digits, folder:PATH or parquet:PATH."


def length(text: str) -> float:
    """A distance of pixels in [0, 1], also as a fraction."""
    try:
        number = float(Fraction(text) if "/" in text else text)
        if not math.isfinite(number):
            raise ValueError
        return number
    except (ValueError, ZeroDivisionError, OverflowError):
        raise click.BadParameter(f"{text!r} is not a number such as 8/255 or 0.5") from None


def seconds(text: str) -> float:
    """A time such as 90s, 9m or 2h."""
    try:
        return duration(text)
    except argparse.ArgumentTypeError as error:
        raise click.BadParameter(str(error)) from None


def numbers(text: str) -> tuple[float, ...]:
    """Numbers with commas between them."""
    return tuple(length(part) for part in text.split(",") if part)


def words(text: str) -> tuple[str, ...]:
    """Words with commas between them."""
    return tuple(filter(None, text.split(",")))


def sentence(error: Exception) -> str:
    """What a user is told of an error: our own words as they are, of others their type and the variable that shows more."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return f"The memory does not suffice: lower the batch size. ({type(error).__name__}: {reason_of(error)})"
    kind = type(error)
    ours = kind.__module__.partition(".")[0] in ("builtins", "advcl_hub", "train", "model_cards")
    if ours and isinstance(error, ValueError | OSError | ImportError | FloatingPointError) and str(error):
        # Names and keys of other people's files may hold what moves a terminal's cursor.
        return visible(str(error))
    text = reason_of(error)
    named = text if text.startswith(kind.__name__) else f"{kind.__name__}: {text}"
    return f"{named.rstrip('.')}. (Set {TRACEBACK}=1 to see where.)"


@contextlib.contextmanager
def one_sentence(fail: Callable[[str], BaseException]) -> Iterator[None]:
    """Turns whatever a command raises into one sentence on stderr and a non-zero exit code, in every process of a run.

    Click's own exceptions and Ctrl-C pass. A closed pipe (`advcl-hub list | head -1`) is no error of ours and is silent.

    Args:
        fail: makes the exception that ends the process out of the sentence.
    """
    try:
        yield
    except (click.ClickException, click.Abort, click.exceptions.Exit):
        raise
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _reader_is_gone():
            sys.exit(1)
        if os.environ.get(TRACEBACK, "0") not in ("", "0"):
            traceback.print_exc()
        raise fail(sentence(error)) from error


def _reader_is_gone() -> bool:
    """Whether stdout is a pipe whose other end is closed; what is left in its buffer is then thrown away."""
    try:
        sys.stdout.flush()
        if not hasattr(select, "poll"):  # Windows
            return False
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
        if not poll.poll(0):  # only errors are asked for
            return False
    except BrokenPipeError:
        pass
    except (OSError, ValueError):  # no file, or a closed one
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python fails to write it when it ends
    return True


@contextlib.contextmanager
def script(interrupted: str | None = None) -> Iterator[None]:
    """The body of a command that is no part of `advcl-hub`, such as those of train/: errors as `error: ...`, with exit code 1.

    Args:
        interrupted: what Ctrl-C says; by default it passes.
    """
    any_text()
    try:
        with one_sentence(lambda text: SystemExit(f"error: {text}")):
            yield
    except click.ClickException as error:
        sys.exit(f"error: {error.format_message()}")
    except KeyboardInterrupt:
        if interrupted is None:
            raise
        sys.exit(interrupted)


def any_text() -> None:
    """Lets stdout and stderr print any text: what their encoding lacks is escaped instead of raising.

    An encoding such as that of LC_ALL=C lacks most letters, and UTF-8 lacks the names of files that are not UTF-8.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def user_errors(function: Callable[..., None]) -> Callable[..., None]:
    """Errors become one sentence and exit code 1 (see `one_sentence`), Ctrl-C a line that says how to go on."""

    @functools.wraps(function)
    def wrapped(*args: Any, **options: Any) -> None:
        logging.getLogger("timm").setLevel(logging.WARNING)
        try:
            with one_sentence(click.ClickException), warnings.catch_warnings():
                warnings.showwarning = lambda message, *rest: click.echo(f"warning: {visible(str(message))}", err=True)
                function(*args, **options)
        except KeyboardInterrupt:
            click.echo("\nStopped. What takes long goes on from there with the same command.", err=True)
            sys.exit(130)

    return wrapped
