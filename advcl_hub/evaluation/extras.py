"""Packages of the `eval` extra, asked for before work starts."""

import importlib.util


def need(package: str, purpose: str) -> None:
    """Raises ImportError with the command to type unless the package is installed.

    Args:
        package: its import name.
        purpose: what needs it, the first words of the message.
    """
    if importlib.util.find_spec(package) is None:
        raise ImportError(f'{purpose} needs the package {package}: pip install "advcl-hub[eval]"')
