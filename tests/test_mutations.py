"""Every fault of `tests.mutations` can still be made, and leaves code that Python reads. `make mutate` tries them."""

import ast
import re
from pathlib import Path

import pytest

from tests.mutate import Run, fault, table
from tests.mutations import MUTATIONS, Mutation
from tests.support import ROOT


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.fault)
def test_a_fault_has_its_place_and_its_tests(mutation: Mutation) -> None:
    text = (ROOT / mutation.file).read_text(encoding="utf-8")
    assert text.count(mutation.old) == 1
    changed = text.replace(mutation.old, mutation.new)
    assert ast.dump(ast.parse(changed)) != ast.dump(ast.parse(text))
    for test in mutation.tests:
        file, _, name = test.partition("::")
        assert re.search(rf"^def {name + '[(]' if name else 'test_'}", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE)


def test_faults_have_sentences_of_their_own() -> None:
    sentences = [mutation.fault for mutation in MUTATIONS]
    assert len(set(sentences)) == len(sentences)
    assert [sentence for sentence in sentences if not re.fullmatch(r"[A-Zk`][^|\n]+\.", sentence)] == []


def test_a_fault_is_made_and_mended(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("a = 1\n", encoding="utf-8")
    made = Mutation("A is another.", "a.py", "1", "2", ())
    with pytest.raises(KeyError), fault(tmp_path, made):
        assert (tmp_path / "a.py").read_text(encoding="utf-8") == "a = 2\n"
        raise KeyError
    assert (tmp_path / "a.py").read_text(encoding="utf-8") == "a = 1\n"
    with pytest.raises(ValueError, match=r"a\.py has 0 times"), fault(tmp_path, made._replace(old="3")):
        pass


def test_the_table_names_what_noticed_a_fault_and_what_survived() -> None:
    found = [(MUTATIONS[0], Run(False, "tests/test_a.py::test_b[x|y]", "", 2.4)), (MUTATIONS[1], Run(True, "", "", 3.6))]
    lines = table(found).splitlines()
    assert lines[2] == f"| {MUTATIONS[0].fault} | {MUTATIONS[0].file} | test_a.py::test_b[x/y] | 2 |"
    assert lines[3].endswith("| **nothing** | 4 |") and lines[-1] == "1 of 2 faults were noticed."
