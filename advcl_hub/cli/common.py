"""What the commands share: how they read lengths, times and lists, and what becomes of errors."""

import argparse
import functools
import logging
import sys
import warnings
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import click

from advcl_hub.training.stop import duration

DATA = "cifar10, cifar100, stl10, fashion-mnist, digits, folder:PATH or parquet:PATH."


def length(text: str) -> float:
    """A distance of pixels in [0, 1], also as a fraction."""
    try:
        return float(Fraction(text))
    except (ValueError, ZeroDivisionError):
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


def user_errors(function: Callable[..., None]) -> Callable[..., None]:
    """User errors become one line and exit code 1, Ctrl-C a line that says how to go on."""

    @functools.wraps(function)
    def wrapped(*args: Any, **options: Any) -> None:
        logging.getLogger("timm").setLevel(logging.WARNING)
        try:
            with warnings.catch_warnings():
                warnings.showwarning = lambda message, *rest: click.echo(f"warning: {message}", err=True)
                function(*args, **options)
        except (ValueError, OSError, ImportError, FloatingPointError) as error:
            raise click.ClickException(str(error)) from error
        except KeyboardInterrupt:
            click.echo("\nStopped. What takes long goes on from there with the same command.", err=True)
            sys.exit(130)

    return wrapped
