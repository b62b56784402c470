"""A file is what was released only if its content is."""

import hashlib
from pathlib import Path

import pytest

from advcl_hub.hub.download import check_file


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
