"""Files from the Hugging Face Hub, checked, and its errors as one sentence that says what to do."""

import errno
import hashlib
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from advcl_hub.errors import reason_of
from advcl_hub.files import file_sha256

_LOG_IN = "log in with `hf auth login` or set HF_TOKEN"


def commit_of(path: Path) -> str:
    """The commit that a file in the Hub client's cache belongs to: it keeps a folder for each."""
    return path.parent.name


def split_revision(name: str) -> tuple[str, str | None]:
    """`hf-hub:ORG/NAME@REVISION` as repository and revision, None where none is named."""
    repository, _, revision = name.removeprefix("hf-hub:").partition("@")
    return repository, revision or None


def fetch(
    repository: str,
    file: str,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    expected: Mapping[str, Any] | None = None,
) -> Path:
    """A file of a Hub repository, from the cache or downloaded, as the Hub client does it (HF_HOME, HF_ENDPOINT, HF_TOKEN).

    The client looks at a cached file's name only. Here its content is checked, and a damaged one is fetched again, once.

    Args:
        repository: `ORG/NAME`.
        file: name in the repository.
        revision: branch, tag or commit; by default main.
        cache_dir: instead of the Hub client's own.
        expected: its `sha256` and, if known, its `size`: a file that differs is removed from the cache and refused. By default
            the content is compared with the hash that the client names it by, where there is one.

    Returns:
        Where it lies in the cache.

    Raises:
        FileNotFoundError: the repository has no such file.
        OSError: no network, no such repository, no access.
        ValueError: not the file that was expected, or a damaged one in the cache that cannot be fetched again.
    """
    path = _download(repository, file, revision, cache_dir)
    wrong = _difference(path, expected)
    if wrong and (is_damaged(path) or content_hash(path) is None):  # else the Hub itself has another file
        path = _fetch_again(path, wrong, repository, file, revision, cache_dir)
        wrong = _difference(path, expected)
    if wrong:
        removed = "It was removed from the cache: try again" if _remove(path, cache_dir) else f"Delete {path}, try again"
        what = "is not the file that was released" if expected else "came damaged"
        raise ValueError(
            f"{file} of {repository} {what} ({wrong}). {removed}, and if this comes back, do not use that repository or mirror."
        )
    return path


def _download(repository: str, file: str, revision: str | None, cache_dir: str | Path | None, again: bool = False) -> Path:
    """As `fetch`, unchecked; with `again` also where the cache has the file."""
    what = f"{repository} cannot be fetched from the Hub"
    try:
        with hub_errors(repository, what):
            return Path(hf_hub_download(repository, file, revision=revision, cache_dir=cache_dir, force_download=again))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{what}: it has no {file}.") from error
    except OSError as error:
        # Without a network, the cache may still know that there is no such file: then it has neither a path for it nor None.
        known = try_to_load_from_cache(repository, file, cache_dir=cache_dir, revision=revision)
        if known is not None and not isinstance(known, str):
            raise FileNotFoundError(f"{what}: it has no {file}.") from error
        raise


def _fetch_again(
    path: Path, wrong: str, repository: str, file: str, revision: str | None, cache_dir: str | Path | None
) -> Path:
    """Replaces a damaged file of the cache, and warns; raises ValueError, with what to do, where that is impossible."""
    if constants.HF_HUB_OFFLINE:
        raise ValueError(f"{path} is damaged ({wrong}): unset HF_HUB_OFFLINE once, and it is fetched again.")
    # The client replaces what its link points to, but not a file in the place of the link (a system without links).
    if content_hash(path) is None and not _remove(path, cache_dir):
        raise ValueError(f"{path} is damaged ({wrong}) and cannot be removed: delete it, and it is fetched again.")
    try:
        fetched = _download(repository, file, revision, cache_dir, again=True)
    except OSError as error:
        raise ValueError(
            f"{path} is damaged ({wrong}) and could not be fetched again ({str(error).rstrip('.')}): delete it and try again "
            "where the Hub can be reached and the cache can be written."
        ) from error
    warnings.warn(f"{path} was damaged ({wrong}); it was removed and fetched again.", stacklevel=4)
    return fetched


def is_cached(repository: str, file: str, revision: str | None, cache_dir: str | Path | None = None) -> bool:
    """Whether the Hub client's cache has a file, so that it opens without the Hub."""
    return isinstance(try_to_load_from_cache(repository, file, cache_dir=cache_dir, revision=revision), str)


def is_damaged(path: Path) -> bool:
    """Whether a file in the Hub client's cache is not what its name says: sha256 of large files, git's sha1 of others.

    False, too, where the cache has no such names (systems without links).
    """
    name = content_hash(path)
    if name is None:
        return False
    if len(name) == 64:
        return file_sha256(path) != name
    content = path.read_bytes()
    # Some mirrors name a file by its plain sha1.
    git, plain = (hashlib.sha1(head + content, usedforsecurity=False) for head in (b"blob %d\0" % len(content), b""))
    return name not in (git.hexdigest(), plain.hexdigest())


def content_hash(path: Path) -> str | None:
    """The hash that the client names the content of a cached file by: the last part of what the file links to.

    That may be a link, too, into a store for all repositories, where names mean something else: only one link is followed.
    """
    name = Path(os.readlink(path)).name if path.is_symlink() else ""
    return name if re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", name) else None


def _remove(path: Path, cache_dir: str | Path | None) -> bool:
    """Removes a file that the client gave us from its cache, and its content; nothing outside the cache. Whether it is gone."""
    cache = Path(cache_dir or constants.HF_HUB_CACHE)
    if not path.absolute().is_relative_to(cache.absolute()):
        return False
    content = path.resolve()  # blobs/HASH of the repository, or blobs/HA/HASH of all repositories
    inside = content.is_relative_to(cache.resolve()) and "blobs" in (content.parent.name, content.parent.parent.name)
    blob = Path(os.path.normpath(path.parent / os.readlink(path))) if path.is_symlink() else path
    try:
        for found in {content, blob, path} if inside else {path}:
            found.unlink(missing_ok=True)
    except OSError:
        return False
    return True


def _difference(path: Path, expected: Mapping[str, Any] | None) -> str:
    """What is wrong with a file of the cache, empty if nothing is."""
    if not expected:
        return "its content is not that of its hash in the cache" if is_damaged(path) else ""
    try:
        check_file(path, expected)
    except ValueError as error:
        return str(error)
    return ""


def check_file(path: Path, expected: Mapping[str, Any]) -> None:
    """Raises ValueError, with what is wrong, unless a file has the expected `size` (where given) and `sha256`."""
    size = path.stat().st_size
    if size != expected.get("size", size):
        raise ValueError(f"it has {size:,} bytes instead of {expected['size']:,}")
    if (found := file_sha256(path)) != expected["sha256"]:
        raise ValueError(f"its sha256 is {found[:12]}... instead of {expected['sha256'][:12]}...")


@contextmanager
def hub_errors(repository: str, what: str) -> Iterator[None]:
    """Turns whatever the Hub client raises in a `with` block into one OSError or ValueError of one sentence.

    Args:
        repository: `ORG/NAME` that the block talks about.
        what: the first words of the sentence: what did not work.
    """
    try:
        yield
    except HFValidationError as error:
        raise ValueError(f"{repository!r} is no name of a Hub repository (ORG/NAME): {reason_of(error)}") from error
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None:  # the client wraps some errors in others, which say less
            if (reason := _reason(cause, repository)) is not None:
                raise (FileNotFoundError if _is_missing(cause) else OSError)(f"{what}: {reason}.") from error
            cause = cause.__cause__
        raise


def _is_missing(error: BaseException) -> bool:
    return isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError)


def _reason(error: BaseException, repository: str) -> str | None:
    """Why a request failed and what to do; None for errors that are not the Hub's."""
    endpoint = constants.ENDPOINT
    if isinstance(error, OfflineModeIsEnabled) or (isinstance(error, LocalEntryNotFoundError) and constants.HF_HUB_OFFLINE):
        return "it is not in the cache and HF_HUB_OFFLINE is set; unset it once to download"
    if isinstance(error, LocalTokenNotFoundError):
        return f"no token was found; {_LOG_IN}"
    if isinstance(error, LocalEntryNotFoundError) and error.__cause__ is not None:
        return None  # whose cause says more
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "the disk is full; free some space and try again"
    if isinstance(error, GatedRepoError):
        return f"access to {repository} has to be asked for at {endpoint}/{repository}, then {_LOG_IN}"
    if isinstance(error, RevisionNotFoundError):
        return f"{repository} has no such revision"
    if _is_missing(error):
        return "it has no such file"
    if isinstance(error, HfHubHTTPError):
        return _http_reason(error, repository, endpoint)
    if _is_network(error):
        return f"{endpoint} cannot be reached ({type(error).__name__}); check the network and HF_ENDPOINT, and try again"
    if isinstance(error, LocalEntryNotFoundError):
        return f"{endpoint} cannot be reached, and it is not in the cache"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}" + (f" ({error.filename})" if error.filename else "")
    return None


def _http_reason(error: HfHubHTTPError, repository: str, endpoint: str) -> str:
    status = error.response.status_code
    said = f" ({error.server_message})" if error.server_message else ""
    if status == 401 and not isinstance(error, RepositoryNotFoundError):
        return f"{endpoint} does not know the token{said}; {_LOG_IN} again"
    if isinstance(error, RepositoryNotFoundError):
        return f"{repository} is not on {endpoint}, or is private: check the name, and {_LOG_IN} if it is private"
    if status == 403:
        return f"the token has no permission for that{said}; make one with write access to {repository.partition('/')[0]}"
    if status in (409, 412):
        return f"it was changed by somebody else in the meantime{said}; try again"
    if status == 429:
        return "too many requests; wait a few minutes and try again"
    if status >= 500:
        return f"{endpoint} has trouble (HTTP {status}); nothing was changed, try again later"
    return f"{endpoint} refused (HTTP {status}){said}"


def _is_network(error: BaseException) -> bool:
    """Whether an error is one of the transport: of the client's HTTP library (httpx, httpx2) or of the system's."""
    module = type(error).__module__.partition(".")[0]
    return isinstance(error, ConnectionError | TimeoutError) or module in ("httpx", "httpx2", "httpcore", "httpcore2")
