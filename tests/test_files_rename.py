"""A file that is replaced while somebody reads it."""

from pathlib import Path

from advcl_hub.files import replacing


def test_who_has_the_earlier_file_open_reads_it_to_its_end(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("earlier", encoding="utf-8")
    with path.open("rb", buffering=0) as file:  # a buffer would hold the whole file at once
        first = file.read(3)
        with replacing(path) as draft:
            draft.write_text("new", encoding="utf-8")
        assert first + file.read() == b"earlier"
    assert path.read_text(encoding="utf-8") == "new"
