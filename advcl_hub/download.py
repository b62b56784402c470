"""Files from the Hugging Face Hub, checked, and its errors as one sentence that says what to do."""

import errno
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import _CACHED_NO_EXIST, constants, hf_hub_download, try_to_load_from_cache
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

    Args:
        repository: `ORG/NAME`.
        file: name in the repository.
        revision: branch, tag or commit; by default main.
        cache_dir: instead of the Hub client's own.
        expected: its `sha256` and, if known, its `size`: a file that differs is removed from the cache and refused.

    Returns:
        Where it lies in the cache.

    Raises:
        FileNotFoundError: the repository has no such file.
        OSError: no network, no such repository, no access.
        ValueError: not the file that was expected.
    """
    what = f"{repository} cannot be fetched from the Hub"
    try:
        with hub_errors(repository, what):
            path = Path(hf_hub_download(repository, file, revision=revision, cache_dir=cache_dir))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{what}: it has no {file}.") from error
    except OSError as error:
        # Without a network, the cache may still know that there is no such file.
        if try_to_load_from_cache(repository, file, cache_dir=cache_dir, revision=revision) is _CACHED_NO_EXIST:
            raise FileNotFoundError(f"{what}: it has no {file}.") from error
        raise
    if expected:
        try:
            check_file(path, expected)
        except ValueError as error:
            path.resolve().unlink(missing_ok=True)
            path.unlink(missing_ok=True)
            raise ValueError(
                f"{file} of {repository} is not the file that was released ({error}). It was removed from the cache: try "
                "again, and if this comes back, do not use that repository or mirror."
            ) from None
    return path


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
        raise ValueError(f"{repository!r} is no name of a Hub repository (ORG/NAME): {first_line(error)}") from error
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


def first_line(error: BaseException) -> str:
    """Of an error's message."""
    return (str(error).strip() or repr(error)).splitlines()[0]
