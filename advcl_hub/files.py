"""Files that appear complete or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Writes a file next to its place and renames it over the earlier one.

    Args:
        path: where the file is to stand.

    Yields:
        The path to write to in the `with` block. If the block fails it is removed, and the earlier file stays.
    """
    draft = path.with_name(f".{os.getpid()}-{path.name}")  # of this process: another may write the same file
    try:
        yield draft
        with draft.open("rb") as file:
            os.fsync(file.fileno())
        draft.replace(path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
