"""Packages that are not always installed, asked for before work starts."""

import importlib.util


def need(package: str, purpose: str, extra: str = "eval") -> None:
    """Raises ImportError with the command to type unless the package is installed.

    Args:
        package: its import name.
        purpose: what needs it, the first words of the message.
        extra: the set of optional packages that has it.
    """
    if importlib.util.find_spec(package) is None:
        raise ImportError(f'{purpose} needs the package {package}: pip install "advcl-hub[{extra}]"')
