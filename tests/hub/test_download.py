"""The Hub's errors in one sentence each; the commonest are met for real in test_push_pull.py."""

import errno
import os
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import errors

from advcl_hub.files import file_sha256
from advcl_hub.hub.download import commit_of, hub_errors, split_revision


def http(kind: Any, status: int, message: str | None = None) -> Exception:
    response: Any = SimpleNamespace(headers={}, request=None, status_code=status)
    return kind("a long\ntext", response=response, server_message=message)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "the disk is full; free some space"),
        (OSError(errno.EACCES, "Permission denied", "/cache"), "Permission denied (/cache)"),
        (http(errors.GatedRepoError, 403), "has to be asked for at "),
        (http(errors.RevisionNotFoundError, 404), "has no such revision"),
        (http(errors.HfHubHTTPError, 429), "wait a few minutes"),
        (http(errors.HfHubHTTPError, 401, "Expired"), "does not know the token (Expired)"),
        (http(errors.HfHubHTTPError, 403), "write access to acme"),
        (http(errors.HfHubHTTPError, 412), "changed by somebody else"),
        (http(errors.HfHubHTTPError, 504), "has trouble (HTTP 504)"),
        (http(errors.HfHubHTTPError, 418, "Teapot"), "refused (HTTP 418) (Teapot)"),
        (errors.LocalTokenNotFoundError("x"), "hf auth login"),
        (errors.OfflineModeIsEnabled("x"), "HF_HUB_OFFLINE is set"),
        (ConnectionResetError("x"), "check the network"),
        (errors.LocalEntryNotFoundError("x"), "cannot be reached, and it is not in the cache"),
    ],
)
def test_what_went_wrong_and_what_to_do(error: Exception, said: str) -> None:
    with pytest.raises(OSError) as caught, hub_errors("acme/m", "acme/m cannot be read"):
        try:
            raise error
        except Exception as cause:
            raise RuntimeError("Error while uploading") from cause  # as the client wraps some of them
    text = str(caught.value)
    assert text.startswith("acme/m cannot be read: ") and said in text and text.endswith(".") and "\n" not in text


def test_a_missing_file_can_be_told_from_other_trouble() -> None:
    with pytest.raises(FileNotFoundError), hub_errors("acme/m", "x"):
        raise http(errors.RemoteEntryNotFoundError, 404)


@pytest.mark.parametrize("error", [KeyError("a bug"), RuntimeError("a bug"), ValueError("a bug")])
def test_a_bug_stays_one(error: Exception) -> None:
    with pytest.raises(type(error), match="a bug"), hub_errors("acme/m", "x"):
        raise error


def test_names(tmp_path: Any) -> None:
    assert split_revision("hf-hub:acme/m@v1") == ("acme/m", "v1") and split_revision("acme/m") == ("acme/m", None)
    file = tmp_path / "models--acme--m" / "snapshots" / "abc" / "config.json"
    file.parent.mkdir(parents=True)
    file.write_text("{}", encoding="utf-8")
    assert commit_of(file) == "abc" and file_sha256(file).startswith("44136fa3")
