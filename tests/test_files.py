"""Files that appear complete or not at all."""

from pathlib import Path

import pytest

from advcl_hub.files import check_writable, replacing


def test_the_earlier_file_stands_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("earlier")
    with pytest.raises(KeyError), replacing(path) as draft:
        draft.write_text("half")
        raise KeyError
    assert path.read_text() == "earlier"
    with replacing(path) as draft:
        draft.write_text("new")
        assert path.read_text() == "earlier" and draft.suffix == ".txt"
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_what_cannot_be_written_is_named(tmp_path: Path) -> None:
    message = r"a\.txt could not be written: .*What was there before is untouched"
    with pytest.raises(OSError, match=message), replacing(tmp_path / "absent" / "a.txt") as draft:
        draft.write_text("x")


def test_a_folder_is_tried_without_a_trace(tmp_path: Path) -> None:
    check_writable(tmp_path / "runs" / "new")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"run cannot be written \(Not a directory\); choose another folder"):
        check_writable(tmp_path / "file" / "run")
