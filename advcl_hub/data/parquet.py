"""Hugging Face image sets in Parquet files: a split is read whole, or there is an error that says what is missing.

Where the split `train` may be, below a folder or its `data/`:

    train-00000-of-00002.parquet ...     as `datasets.push_to_hub` writes it; its versions 2.3 to 2.14 add a hash for each file
    train-0.parquet, train-1.parquet     numbers from 0 on
    train.parquet                        one file
    train/0000.parquet ...               the Hub's own conversion (its branch refs/convert/parquet)

Only names of the first kind tell how many files there are. Of the others, a loss of the last ones cannot be seen.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from advcl_hub.errors import need
from advcl_hub.files import parse_json, refuse_pointer

_MOST_CLASSES = 2**20  # that are named after their numbers
_LAYOUT = "[data/]SPLIT-*.parquet"
_SHARD = re.compile(r"(?P<split>.+)-(?P<number>\d+)-of-(?P<total>\d+)(?P<suffix>.*)\.parquet")
_NUMBERED = re.compile(r"(?P<split>.+)-(?P<number>\d+)\.parquet")
_CONVERTED = re.compile(r"(?P<number>\d+)\.parquet")


@dataclass(frozen=True)
class ParquetSplit:
    """One split as its files store it.

    Attributes:
        images: encoded, b"" where there is none. They are held in memory: unpack a set larger than that into a folder.
        names: of each image's file and row.
        labels: int64 (N,).
        classes: class names by label, in Unicode's form NFC.
    """

    images: list[bytes]
    names: list[str]
    labels: np.ndarray
    classes: tuple[str, ...]


@dataclass(frozen=True)
class _File:
    """A file and what its name tells.

    Attributes:
        path: of the file.
        name: what to call it in a message.
        kind: which of the layouts its name follows.
        split: whose file it is.
        number: its place in the split; 0 for a split of one file.
        total: how many files the split has, None if the name does not tell.
        suffix: what follows the total: a hash, or nothing.
    """

    path: Path
    name: str
    kind: str
    split: str
    number: int = 0
    total: int | None = None
    suffix: str = ""


def has_parquet(folder: Path, splits: Sequence[str]) -> bool:
    """Whether a folder holds one of these splits in Parquet files."""
    return any(file.split in splits for file in _find(folder))


def read_parquet(folder: Path, split: str) -> ParquetSplit:
    """Reads one split. The order is that of the files' numbers and of their rows.

    The columns are `img` or `image` (struct of bytes and path), and `label` or `fine_label` (integers). Without class names in
    the files' Hugging Face metadata, the labels themselves are the names.

    Args:
        folder: holds the files, see above.
        split: by its name.

    Raises:
        ValueError: no such split, files of several layouts or pushes, Git LFS pointers, damaged files, other columns or class
            names in another file or split, a row without a label.
        FileNotFoundError: a file of the split is missing.
        ImportError: pyarrow is not installed.
    """
    found = _find(folder)
    files = _complete(folder, split, found)
    shards = [_read_file(file) for file in files]
    _check_alike([(file.name, shard) for file, shard in zip(files, shards, strict=True)])
    labels = np.concatenate([shard.labels for shard in shards])
    classes = _classes(shards[0], files[0], found, int(labels.max(initial=-1)))
    names = [f"{file.name} row {row}" for file, shard in zip(files, shards, strict=True) for row in range(len(shard.labels))]
    return ParquetSplit([image for shard in shards for image in shard.images], names, labels, classes)


# ---- which files -----------------------------------------------------------------------------------------------------


def _find(folder: Path) -> list[_File]:
    """All files of a folder and its data/ whose names tell a split, by name."""
    found = []
    for place in (folder, folder / "data"):
        for path in sorted(place.glob("*.parquet")):
            if (file := _parse_name(path)) is not None:
                found.append(file)
        for path in sorted(place.glob("*/*.parquet")):
            if path.parent.name != "data" and (number := _CONVERTED.fullmatch(path.name)):
                name = f"{path.parent.name}/{path.name}"
                found.append(_File(path, name, "SPLIT/N.parquet", path.parent.name, int(number["number"])))
    return [file for file in found if not file.split.startswith(".")]


def _parse_name(path: Path) -> _File | None:
    """What the name of a file that is not in a split's folder tells; None if that is no split."""
    if match := _SHARD.fullmatch(path.name):
        number, total = int(match["number"]), int(match["total"])
        return _File(path, path.name, "SPLIT-N-of-M.parquet", match["split"], number, total, match["suffix"])
    if match := _NUMBERED.fullmatch(path.name):
        return _File(path, path.name, "SPLIT-N.parquet", match["split"], int(match["number"]))
    if _CONVERTED.fullmatch(path.name):
        return None
    return _File(path, path.name, "SPLIT.parquet", path.stem)


def _complete(folder: Path, split: str, found: Sequence[_File]) -> list[_File]:
    """The files of a split in their order, once they are certainly all of it and nothing else."""
    files = sorted((file for file in found if file.split == split), key=lambda file: (file.number, file.name))
    if not files:
        there = ", ".join(sorted({file.split for file in found})) or "none"
        where = f"{folder} (searched for {_LAYOUT})"
        raise ValueError(f"{where} has no split {split!r}, it has: {there}{_hint(folder, split)}")
    if len(places := sorted({str(_place(file, folder)) for file in files})) > 1:
        raise ValueError(f"{folder} has the split {split} twice, in {' and in '.join(places)}: remove one of them.")
    if len(kinds := sorted({file.kind for file in files})) > 1:
        raise _unclear(folder, split, files, f"their names follow {' and '.join(kinds)}; leave the files of one layout only")
    totals, numbers = sorted({file.total for file in files if file.total is not None}), Counter(file.number for file in files)
    if len(totals) > 1:
        raise _unclear(folder, split, files, f"of {' and of '.join(map(str, totals))} files; leave those of one push only")
    if twice := [number for number, count in numbers.items() if count > 1]:
        raise _unclear(
            folder, split, files, f"number {twice[0]} is there {numbers[twice[0]]} times; leave the files of one push only"
        )
    if len({bool(file.suffix) for file in files}) > 1:
        raise _unclear(folder, split, files, "only some names end in a hash; leave the files of one push only")
    if files[0].total is None and numbers.keys() != set(range(len(files))):
        raise _unclear(folder, split, files, f"their numbers are not 0 to {len(files) - 1}; fetch those that are missing")
    total = files[0].total
    if total is not None and (missing := sorted(set(range(total)) - numbers.keys())):
        raise FileNotFoundError(
            f"{files[0].path.parent} has {len(files)} of the {total} files of the split {split}: {_listed(files)}. "
            f"Missing: {', '.join(map(str, missing[:10]))}{' ...' if len(missing) > 10 else ''}; fetch them."
        )
    if total is not None and len(files) > total:
        raise _unclear(folder, split, files, f"number {files[-1].number} of {total} files; fetch them again")
    return files


def _place(file: _File, folder: Path) -> Path:
    return folder / "data" if folder / "data" in file.path.parents else folder


def _unclear(folder: Path, split: str, files: Sequence[_File], why: str) -> ValueError:
    return ValueError(f"{folder} does not tell which files are the split {split}: {_listed(files)}. Seen: {why}.")


def _listed(files: Sequence[_File]) -> str:
    return ", ".join(file.name for file in files[:10]) + (f" and {len(files) - 10} more" if len(files) > 10 else "")


def _hint(folder: Path, split: str) -> str:
    """Where else Parquet files are, for somebody who named the folder above or below."""
    if numbers := sorted(path.name for path in folder.glob("*.parquet") if _CONVERTED.fullmatch(path.name)):
        return f"; {numbers[0]} names no split: give the folder above, whose folders are the splits"
    below = sorted({path.parent.name for path in folder.glob(f"*/{split}*.parquet")} | _converted_below(folder))
    return f"; there are Parquet files in {', '.join(below[:5])}: give one of these folders" if below else ""


def _converted_below(folder: Path) -> set[str]:
    """Configurations in the Hub's own conversion, CONFIG/SPLIT/N.parquet."""
    return {path.parents[1].name for path in folder.glob("*/*/*.parquet") if _CONVERTED.fullmatch(path.name)} - {"data"}


# ---- what is in them -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Shard:
    """What one file holds: encoded images, labels, the columns they are from, and class names or ()."""

    images: list[bytes]
    labels: np.ndarray
    columns: tuple[str, str]
    classes: tuple[str, ...]


def _read_file(file: _File) -> _Shard:
    need("pyarrow", "A source of Parquet files", "data")
    import pyarrow as pa  # here: no other source needs it
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    refuse_pointer(file.path)
    try:
        schema = pq.read_schema(file.path)
        image, label = columns = _columns(schema, file.path)
        table = pq.read_table(file.path, columns=[image, label], partitioning=None)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file.path} cannot be read as Parquet: {error}; fetch it again") from error
    if missing := table[label].null_count:
        raise ValueError(f"{file.path} has {missing} rows without a label")
    encoded = pc.struct_field(table[image], "bytes").to_pylist()
    labels = table[label].to_numpy().astype(np.int64)
    return _Shard([item or b"" for item in encoded], labels, columns, _class_names(schema, label, file.path))


def _columns(schema: Any, path: Path) -> tuple[str, str]:
    """Names of the columns of images and of labels."""
    import pyarrow as pa

    types = {field.name: field.type for field in schema}
    images = [n for n in ("img", "image") if n in types and _holds_bytes(types[n])]
    labels = [n for n in ("label", "fine_label") if n in types and pa.types.is_integer(types[n])]
    used = [*images[:1], *labels[:1]]
    if not images or not labels or any(schema.names.count(name) > 1 for name in used):
        found = ", ".join(f"{field.name}: {field.type}" for field in schema)
        raise ValueError(f"{path} has {found}; expected img or image: struct<bytes, path>, and label: int")
    return images[0], labels[0]


def _holds_bytes(kind: Any) -> bool:
    """Whether a column's type is a struct with `bytes`. Text there would be taken for the path of a file on this machine."""
    import pyarrow as pa

    place = kind.get_field_index("bytes") if pa.types.is_struct(kind) else -1
    tests = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view)
    return place >= 0 and any(test(kind.field(place).type) for test in tests)


def _class_names(schema: Any, label: str, path: Path) -> tuple[str, ...]:
    """Names in the Hugging Face metadata, in form NFC as folders' names are compared; () if there are none."""
    try:
        metadata = parse_json((schema.metadata or {}).get(b"huggingface", b"{}"))
        names = metadata.get("info", {}).get("features", {}).get(label, {}).get("names") or []
        if not isinstance(names, list):
            raise TypeError(f"class names as {type(names).__name__}")
        classes = tuple(unicodedata.normalize("NFC", name) for name in names)
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} has damaged Hugging Face metadata ({error!r}); fetch it again") from None
    if twice := [name for name, count in Counter(classes).items() if count > 1]:
        raise ValueError(f"{path} names several classes {', '.join(twice)}: give them different names")
    return classes


def _check_alike(shards: Sequence[tuple[str, _Shard]]) -> None:
    """The first file must not speak for others that say something else."""
    (first, expected), *others = shards
    for name, shard in others:
        if shard.columns != expected.columns:
            ours, theirs = (" and ".join(columns) for columns in (expected.columns, shard.columns))
            raise ValueError(
                f"{first} has the columns {ours}, {name} has {theirs}: they are of different sets, leave one of them."
            )
        if shard.classes != expected.classes:
            differ = _difference(expected.classes, shard.classes)
            raise ValueError(f"{first} and {name} {differ}: they are of different sets, leave one of them.")


def _difference(ours: Sequence[str], theirs: Sequence[str]) -> str:
    if not ours or not theirs:
        return "must both have class names in their metadata or neither"
    if set(ours) == set(theirs):
        return "have the same class names in another order"
    return f"have different class names, only one of them has: {', '.join(sorted(set(ours) ^ set(theirs))[:10])}"


def _classes(shard: _Shard, file: _File, found: Sequence[_File], largest: int) -> tuple[str, ...]:
    """Class names by label, once the other splits agree: a label has to mean the same in all of them.

    Splits that cannot be read do not count (others may be pointers, or have no labels): whoever asks for them is told.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    for split in sorted({other.split for other in found} - {file.split}):
        other = next(other for other in found if other.split == split)
        try:
            schema = pq.read_schema(other.path)
            label = _columns(schema, other.path)[1]
        except (pa.ArrowException, ValueError, OSError):
            continue
        names = _class_names(schema, label, other.path)
        if names != shard.classes:
            both = f"{file.split} ({file.name}) and {split} ({other.name})"
            raise ValueError(
                f"The splits {both} {_difference(shard.classes, names)}. All splits of a set need the same classes: move the "
                "other set to another folder."
            )
        if not names:
            largest = max(largest, *(_largest(file.path, label) for file in found if file.split == split))
    if not shard.classes and largest >= _MOST_CLASSES:
        raise ValueError(f"{file.path} has the label {largest}, and no class names: that is no number of a class.")
    return shard.classes or tuple(str(label) for label in range(largest + 1))


def _largest(path: Path, label: str) -> int:
    """The largest label in a file of another split, -1 if there is none or it cannot be read."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    try:
        found = pc.max(pq.read_table(path, columns=[label], partitioning=None)[label]).as_py()
    except (pa.ArrowException, OSError):
        return -1
    return -1 if found is None else found
