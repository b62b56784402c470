"""A file is what was released only if its content is."""

import hashlib
from pathlib import Path

import pytest

from advcl_hub.hub import download
from advcl_hub.hub.download import check_file, fetch


@pytest.mark.parametrize(
    ("content", "wrong"), [(b"weights", None), (b"weightz", "its sha256 is"), (b"weight", "6 bytes instead of 7")]
)
@pytest.mark.parametrize("sized", [True, False])
def test_content_of_the_right_size_is_compared_too(tmp_path: Path, content: bytes, wrong: str | None, sized: bool) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    expected = {"sha256": hashlib.sha256(b"weights").hexdigest()} | ({"size": 7} if sized else {})
    if wrong is None:
        check_file(path, expected)
    else:
        with pytest.raises(ValueError, match=wrong if sized else "its sha256 is"):
            check_file(path, expected)


@pytest.mark.parametrize("inside", [True, False])
def test_a_damaged_file_that_cannot_be_removed_is_named_and_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inside: bool
) -> None:
    """On a system without links, where the client would not replace it: one in its cache, or one that lies elsewhere."""
    path = tmp_path / "cache" / "models--a--b" / "snapshots" / "c" / "model.safetensors"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"WEIGHTS")
    monkeypatch.setattr(download, "hf_hub_download", lambda *_, **__: str(path))
    if inside:
        monkeypatch.setattr(Path, "unlink", lambda *_, **__: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    expected = {"sha256": hashlib.sha256(b"weights").hexdigest()}
    with pytest.raises(
        ValueError, match=r"is damaged \(its sha256 is .* and cannot be removed: delete it, and it is"
    ) as caught:
        fetch("a/b", path.name, cache_dir=tmp_path / ("cache" if inside else "other"), expected=expected)
    assert str(path) in str(caught.value) and path.read_bytes() == b"WEIGHTS"
