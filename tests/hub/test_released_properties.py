"""Properties of names of releases and of their data file."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from advcl_hub.hub.download import split_revision
from advcl_hub.hub.released import RELEASED, check_name, load_releases, row
from tests.support.properties import DEEP, LETTERS, damaged, odd_text

ENTRIES = json.loads(RELEASED.read_text(encoding="utf-8"))
NAMES = sorted(ENTRIES["releases"])[:2]
DATA = ENTRIES | {"releases": {name: ENTRIES["releases"][name] for name in NAMES}}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("released") / "released.json"


@given(odd_text | st.text(st.sampled_from("ab.-_9/"), max_size=10), st.none() | st.sampled_from(["a", "b9"]))
@example("a.b\n", None)
@example("a.b..c", None)
@example("a../b", None)
@example("a.bé", None)
@example("é.a", None)
def test_an_accepted_name_is_a_folder_s_and_a_timm_name(name: str, architecture: str | None) -> None:
    try:
        check_name(name, architecture)
    except ValueError as error:
        assert repr(name) in str(error)
        return
    start, dot, tag = name.partition(".")
    assert (
        dot and tag and name.isascii() and not set(name) & set("/\\ \n") and ".." not in name and not tag.endswith(("-", "."))
    )
    assert architecture in (None, start) and Path(name).name == name


@given(st.text(st.sampled_from("ab9_"), min_size=1, max_size=6), st.text(st.sampled_from("ab9_"), min_size=1, max_size=6))
def test_usual_names_are_accepted(architecture: str, tag: str) -> None:
    check_name(f"{architecture}.a{tag}", architecture)
    with pytest.raises(ValueError, match="no name of a release"):
        check_name(f"{architecture}.a{tag}", f"{architecture}x")


@given(damaged(DATA))
@example(DATA | {"releases": [["a", 1]]})
@example(DATA | {"releases": {"a.b": {"config": {"architecture": "a"}, "bundled": True, "files": {}, "facts": 1}}})
def test_a_damaged_data_file_gives_releases_or_a_refusal_that_names_it(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data), encoding="utf-8")
    try:
        found = load_releases(path)
    except ValueError as error:
        assert path.name in str(error)
        return
    assert all(release.name.startswith(f"{release.architecture}.") for release in found)


@given(st.binary(max_size=20))
@example(DEEP.encode())
@example(b"[]")
def test_another_file_is_refused_by_name(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"released\.json is damaged"):
        load_releases(path)


def test_a_row_has_the_same_columns_for_all() -> None:
    columns = {tuple(row(release)) for release in load_releases()}
    assert len(columns) == 1 and all(isinstance(cell, str) for release in load_releases() for cell in row(release).values())


@given(st.text(st.sampled_from(LETTERS.replace("@", ""))), st.text(st.sampled_from(LETTERS)))
def test_a_revision_is_what_follows_the_first_at_sign(repository: str, revision: str) -> None:
    for name in (f"hf-hub:{repository}@{revision}", f"{repository}@{revision}"):
        assert split_revision(name) == (repository, revision or None)
    assert split_revision(f"hf-hub:{repository}") == (repository, None)
