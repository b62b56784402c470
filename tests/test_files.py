"""Files that appear complete or not at all, and records without local paths."""

import importlib.util
import sys
from pathlib import Path

import pytest

from advcl_hub import files
from advcl_hub.files import check_writable, replacing, without_local_paths


def test_the_earlier_file_stands_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("earlier", encoding="utf-8")
    with pytest.raises(KeyError), replacing(path) as draft:
        draft.write_text("half", encoding="utf-8")
        raise KeyError
    assert path.read_text(encoding="utf-8") == "earlier"
    with replacing(path) as draft:
        draft.write_text("new", encoding="utf-8")
        assert path.read_text(encoding="utf-8") == "earlier" and draft.suffix == ".txt"
    assert path.read_text(encoding="utf-8") == "new" and list(tmp_path.iterdir()) == [path]


def test_what_cannot_be_written_is_named(tmp_path: Path) -> None:
    message = r"a\.txt could not be written: "
    with pytest.raises(OSError, match=message) as caught, replacing(tmp_path / "absent" / "a.txt") as draft:
        draft.write_text("x", encoding="utf-8")
    assert "untouched" not in str(caught.value)
    (tmp_path / "a.txt").touch()
    with pytest.raises(OSError, match=f"{message}.*What was there before is untouched"), replacing(tmp_path / "a.txt"):
        raise OSError("no space")


def test_a_folder_is_tried_without_a_trace(tmp_path: Path) -> None:
    check_writable(tmp_path / "runs" / "new")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"run cannot be written \(Not a directory\); choose another folder"):
        check_writable(tmp_path / "file" / "run")


@pytest.mark.parametrize(
    ("text", "published"),
    [
        (
            "advcl-hub evaluate /home/me/runs/slf --root /data/cifar10/ --eps 8/255",
            "advcl-hub evaluate slf --root cifar10 --eps 8/255",
        ),
        ("folder:/home/me/pets", "folder:pets"),
        ("data.root=/home/me/c10,/home/me/labels.safetensors", "data.root=c10,labels.safetensors"),
        ("~/data/cifar10", "cifar10"),
        (r"C:\Users\Alice Smith\pets", "pets"),
        (r"\\server\me\pets", "pets"),
        ("file:///home/me/x", "x"),
        ("a file:///home/me/x, ~me/y", "a x, y"),
        ("/Users/Alice Smith/Secret Project/x", "x"),
        ("folder:/Users/Alice Smith/pets", "folder:pets"),
        (
            "advcl-hub finetune e --data 'folder:/a/Alice Smith/p 1' -o '/b c/d e'",
            "advcl-hub finetune e --data 'folder:p 1' -o 'd e'",
        ),
        ("$HOME/alice/x", "x"),
        ("folder:../alice/pets", "folder:pets"),
        ("at //nas/alice/data and $HOME/alice/x and ../../alice/y: /z/z", "at data and x and y: z"),
        ("https://me:password@host/x, token hf_abcdefghijklmnopqrstuvwxyz", "https://host/x, token "),
        ("sqrt(d)/2, 5 %/10 %, [a]/b, </b>", "sqrt(d)/2, 5 %/10 %, [a]/b, </b>"),
        ("https://github.com/LijieFan/AdvCL", "https://github.com/LijieFan/AdvCL"),
        ("github.com/LijieFan/AdvCL, see https://x.org/y/z", "github.com/LijieFan/AdvCL, see https://x.org/y/z"),
        ("runs/advcl/export and ./here, and/or 1/2", "runs/advcl/export and ./here, and/or 1/2"),
    ],
)
def test_of_absolute_paths_the_last_part_stays(text: str, published: str) -> None:
    record = {"a": [text, 1, None], text: {"c": text}}
    assert without_local_paths(record) == {"a": [published, 1, None], published: {"c": published}}


def test_where_files_have_no_locks_everybody_has_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows has no fcntl."""
    monkeypatch.setitem(sys.modules, "fcntl", None)  # importing it fails
    spec = importlib.util.spec_from_file_location("without_fcntl", files.__file__)
    assert spec is not None and spec.loader is not None
    spec.loader.exec_module(without := importlib.util.module_from_spec(spec))
    with (tmp_path / "a").open("w", encoding="utf-8") as first, (tmp_path / "a").open("w", encoding="utf-8") as second:
        assert without.lock(first) and without.lock(second)
        assert files.lock(first) and not files.lock(second)
