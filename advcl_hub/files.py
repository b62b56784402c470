"""Files that appear complete or not at all, their names and hashes, and what of a record may be published."""

import contextlib
import errno
import hashlib
import json
import os
import re
import shlex
import tempfile
import threading
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple, TextIO

from safetensors import SafetensorError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from torch import Tensor


def slug(text: str) -> str:
    """A file name: the last two parts of a path, with nothing but letters, digits, dot, dash and underscore."""
    parts = [re.sub(r"[^\w.-]+", "-", part).strip("-.") for part in Path(text).parts[-2:]]
    return "-".join(filter(None, parts)) or "model"


def file_sha256(path: Path) -> str:
    """Hexadecimal sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_depth(value: Any, most: int) -> None:
    """Raises ValueError unless every value lies in fewer than `most` lists and dictionaries; those may hold themselves."""
    level = [value]
    for _ in range(most):
        groups = [each.values() if isinstance(each, dict) else each for each in level if isinstance(each, dict | list)]
        level = list({id(each): each for group in groups for each in group}.values())  # each once, however often it is named
    if level:
        raise ValueError("it is nested too deeply")


def parse_json(text: str | bytes) -> Any:
    """What a JSON text of other people holds; ValueError whatever is wrong with it, also where it is nested too deeply."""
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    check_depth(value, 100)  # those that we write have some twenty
    return value


class SafetensorsFile(NamedTuple):
    """What a safetensors file holds.

    Attributes:
        tensors: by name.
        metadata: texts by name, empty if there are none.
        sha256: of the file, in hex.
    """

    tensors: "dict[str, Tensor]"
    metadata: dict[str, str]
    sha256: str


def read_safetensors(path: Path) -> SafetensorsFile:
    """Reads a safetensors file at once, so that all of it is of one file, also while another one takes its place.

    (`safetensors.safe_open` opens a path twice, and would mix the two.)

    Raises:
        FileNotFoundError: no such file.
        SafetensorError: it is no complete safetensors file, or holds types that torch does not read.
    """
    from safetensors.torch import load  # torch, which most users of this module do without

    content = path.read_bytes()
    try:
        tensors = load(content)
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:  # of types and shapes
        raise SafetensorError(f"{type(error).__name__}: {error}") from error
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])  # `load` has checked it, and drops the metadata
    return SafetensorsFile(tensors, header.get("__metadata__") or {}, hashlib.sha256(content).hexdigest())


LFS_POINTER = b"version https://git-lfs"  # how the file begins that a clone without Git LFS has in place of another


def refuse_pointer(path: Path, name: str | None = None) -> None:
    """Raises ValueError if a file is a Git LFS pointer in the place of the file itself (a clone without Git LFS).

    Args:
        path: of the file; one that does not exist is none.
        name: to call it in the error, by default its path.
    """
    if not path.is_file():
        return
    with path.open("rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise ValueError(f"{name or path} is a Git LFS pointer, not the file itself: run `git lfs pull` in its repository.")


# Where a path starts that tells about its owner: /x, ~/x, ~me/x, ../x, $HOME/x, C:\x, \\server\x, file://x.
_START = r"(?:file://|//?(?<!://)(?=[\w.~])|~\w*/|(?:\.\./)+|\$\{?\w+\}?/|[A-Za-z]:\\|\\\\(?=\w))"
# Within a text it follows no fraction (8/255) and no relative path (runs/x), and is no URL.
_PATH = re.compile(rf"""(?<![\w./~)\]%<]){_START}[^\s"',;=()\[\]{{}}]+""")
_SECRET = re.compile(r"(?<=://)[^/@\s]+@|hf_\w{20,}")


def without_local_paths(record: Any) -> Any:
    """A record of JSON in which every path that tells about its owner, also within commands, is replaced by its last part.

    Records are published with the weights; how somebody's folders are called is nobody else's business. Tokens and passwords
    of addresses are left out, too.
    """
    if isinstance(record, str):
        return _public(_SECRET.sub("", record))
    if isinstance(record, Mapping):
        return {without_local_paths(key): without_local_paths(value) for key, value in record.items()}
    if isinstance(record, list | tuple):
        return [without_local_paths(value) for value in record]
    return record


def _public(text: str) -> str:
    if re.match(r"(advcl-hub|python|torchrun|accelerate) ", text):
        with contextlib.suppress(ValueError):  # quotes that do not match
            return shlex.join(_public_word(word) for word in shlex.split(text))
    if re.match(_START, text) or re.match(r"(folder|parquet|local-dir):", text):
        return _public_word(text)
    return _PATH.sub(lambda path: _last(path[0]), text)


def _public_word(word: str) -> str:
    """One path, or several after `folder:`, `--root=` and between commas; there may be blanks in them."""
    pieces = [word] if re.match(_START, word) and "," not in word else re.split(r"([:=,])", word)
    return "".join(_last(piece) if re.match(_START, piece) else piece for piece in pieces)


def _last(path: str) -> str:
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1]


# What a file system answers that cannot do what it is asked; any other error of fsync means that data may be lost.
_CANNOT = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EBADF)
_warned: set[str] = set()  # comforts that this process has warned about


def warn_once(what: str, message: str, stacklevel: int = 3) -> None:
    """Warns that a comfort is missing, once a process.

    Args:
        what: names the comfort; later calls with the same name say nothing.
        message, stacklevel: of the warning.
    """
    if what not in _warned:
        _warned.add(what)
        warnings.warn(message, stacklevel=stacklevel)


@contextlib.contextmanager
def comfort(what: str, *, errors: type[Exception] = OSError) -> Iterator[None]:
    """Turns an error of a `with` block, whose work is optional, into one warning a process.

    Args:
        what: names the comfort, as in "WHAT failed (PermissionError: ...)".
        errors: what may be raised.
    """
    try:
        yield
    except errors as error:
        reason = error.__cause__ if isinstance(error.__cause__, OSError) else error  # what `write_errors` explains
        warn_once(what, f"{what} failed ({type(reason).__name__}: {reason}); the work goes on without.", 4)


def make_readable(path: Path, mode: int = 0o666) -> None:
    """Gives a file the permissions of new files, where its file system has any.

    safetensors makes its files, and tempfile its folders, readable by their owner alone.

    Args:
        path: a file or folder.
        mode: permissions before the umask; a folder's are 0o777.
    """
    mask = os.umask(0)
    os.umask(mask)
    with comfort("Setting permissions of files"):
        path.chmod(mode & ~mask)


def sync(file: IO[Any]) -> None:
    """Puts an open file on disk, as far as its file system can. Raises OSError if data could not be written."""
    try:
        os.fsync(file.fileno())
    except OSError as error:
        if error.errno not in _CANNOT:
            raise
        warn_once("sync", f"Files cannot be synced to disk ({error.strerror}): a power failure may lose the last ones.")


def check_writable(folder: Path) -> None:
    """Raises OSError unless files can be written to a folder, which need not exist yet. Leaves nothing behind."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise OSError(f"{folder} cannot be written ({error.strerror}); choose another folder.") from error


@contextlib.contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """Says which file or folder a `with` block could not write: OSError and safetensors' own errors become one OSError."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        untouched = " What was there before is untouched." if path.exists() else ""
        raise OSError(f"{path} could not be written: {error}.{untouched}") from error


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Writes a file next to its place and renames it over the earlier one.

    Args:
        path: where the file is to stand.

    Yields:
        The path to write to in the `with` block. If the block fails it is removed, and the earlier file stays.

    Raises:
        OSError: the file cannot be written, because the disk is full or for other reasons.
    """
    draft = path.with_name(f".{os.getpid()}-{threading.get_ident()}-{path.name}")  # others may write it, too; see `is_draft`
    try:
        with write_errors(path):
            yield draft
            with draft.open("rb") as file:
                sync(file)
            make_readable(draft)
            draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def is_draft(path: Path) -> bool:
    """Whether `replacing` has written a file; where it is not being written now, a kill has left it."""
    return re.fullmatch(r"\.\d+-\d+-.+", path.name) is not None


def lock(file: TextIO) -> bool:
    """Returns whether this process now holds the lock of an open file, False if another one does.

    The lock ends with the last process that has the file open. Where the file system has no locks there is one warning.
    """
    if fcntl is None:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        warn_once("lock", f"{file.name} cannot be locked ({error.strerror}): do not start the same work twice.")
    return True
