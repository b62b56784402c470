"""A chain of records, with a teacher, LP-AFF and a classifier, read in all its directions; what a card says of its checks."""

from typing import Any

import pytest

from advcl_hub.hub.cards import provenance, text

TEACHER = {"recipe": {"method": "simclr"}, "sha256": {"model.safetensors": "t"}}
STUDENT = {
    "recipe": {"method": "deacl", "attack": {"steps": 3}},
    "sha256": {"model.safetensors": "s"},
    "provenance": {"start_from": {"name": "teacher", "provenance": TEACHER}},
}
CLUSTERED = {
    "method": "LP-AFF, stage 2",
    "settings": {"protocol": "aff"},
    "sha256": {"model.safetensors": "c16"},
    "rounded_from": {"sha256": "c32"},
    "encoder": {"name": "student", "provenance": STUDENT},
}
HEAD = {
    "settings": {"protocol": "slf"},
    "sha256": {"model.safetensors": "h"},
    "encoder": {"name": "again", "provenance": CLUSTERED},
}


def test_a_classifier_is_followed_down_to_its_teacher() -> None:
    assert provenance.pretraining(HEAD) is STUDENT
    assert provenance.pretrainings(HEAD) == [STUDENT, TEACHER]
    assert provenance.finetunings(HEAD) == [HEAD, CLUSTERED] and provenance.is_lp_aff(CLUSTERED)
    assert provenance.started_from(STUDENT)["name"] == "teacher" and provenance.started_from(TEACHER) == {}


def test_weights_come_from_those_before_them_and_not_from_themselves() -> None:
    assert provenance.ancestors(HEAD) == {"c16", "c32", "s"}
    assert provenance.ancestors(STUDENT) == set()


@pytest.mark.parametrize(
    "record",
    [None, {}, {"settings": {"protocol": "slf"}, "encoder": None}, {"encoder": {"name": "x"}}, {"encoder": "x", "sha256": "x"}],
)
def test_where_nothing_is_known_of_a_pretraining_nothing_is_told(record: dict[str, Any] | None) -> None:
    assert provenance.pretraining(record) is None and provenance.pretrainings(record) == []
    assert len(provenance.finetunings(record)) == bool(record and "settings" in record)
    assert provenance.ancestors(record or {}) == set()
    for damaged in ({"recipe": {}, "provenance": "x"}, {"recipe": {}, "provenance": {"start_from": "x"}}):
        assert provenance.started_from(damaged) == {} and provenance.pretrainings(damaged) == [damaged]


@pytest.mark.parametrize(
    ("recipe", "name", "robust"),
    [
        ({"method": "advcl", "attack": {"steps": 5}, "objective": {"pseudo_label_weight": 0.2}}, "AdvCL", True),
        ({"method": "advcl", "attack": {"steps": 0}, "objective": {"pseudo_label_weight": 0.2}}, "AdvCL", False),
        ({"method": "advcl", "attack": {"steps": 5}}, "AdvCL without pseudo-labels", True),
        ({"method": "simclr", "attack": {"steps": 5}}, "contrastive learning on clean views (SimCLR)", False),
        # Records of before the methods had names.
        (
            {"objective": {"adversarial_views": []}, "attack": {"steps": 5}},
            "contrastive learning on clean views (SimCLR)",
            False,
        ),
        ({"objective": {"pairing": "separate"}, "attack": {"steps": 5}}, "adversarial contrastive learning (ACL)", True),
    ],
)
def test_methods_have_the_names_of_the_field(recipe: dict[str, Any], name: str, robust: bool) -> None:
    made = {"recipe": recipe}
    assert provenance.method(made) == name and provenance.is_robust(made) is robust
    assert provenance.is_advcl({}, made) is name.startswith("AdvCL")


def test_a_card_says_which_classifier_was_not_checked() -> None:
    """That all checks passed must not stand for those that never ran."""
    checked = {"model": {"name": "SLF"}, "checks": [{"passed": True}, {"passed": True}]}
    failed = {"model": {"name": "ALF"}, "checks": [{"passed": False}]}
    unchecked = {"model": {"name": "AFF"}, "checks": []}
    assert text._checks([checked]) == "2 of 2 passed."
    assert text._checks([checked, unchecked]) == "2 of 2 passed; not run on AFF."
    assert text._checks([checked, failed]) == "2 of 3 passed; the warnings above say which did not."
    assert text._checks([unchecked]) is None


def test_a_card_tells_a_file_of_labels_from_the_labels_in_it() -> None:
    labels = {"file": "labels.safetensors", "file_sha256": "a" * 64, "sha256": "b" * 64}
    line = text._pseudo_labels(labels)
    assert line == f"labels.safetensors, sha256 of the file `{'a' * 16}`, sha256 of the labels `{'b' * 16}`"
