"""Presets: the values are those of their sources, and what replaces them is checked."""

import itertools
from dataclasses import replace
from typing import Any

import pytest

from advcl_hub.finetuning.presets import ONE, PRESETS, TWO, choose_settings, fit_to_images, table, without_effect
from tests.support import ROOT

README = ROOT / "README.md"

BENCHMARK = "RobustSSL benchmark"  # Finetuning_Methods/Vanilla_Finetuning: utils.py (setup_hyperparameter, get_model)
OLD = "RobustSSL benchmark, old commit"  # Finetuning_Methods/Vanilla, commit 08e268e: what its options default to
DYNACL = "DynACL's code"  # test_LF.py, test_AFF.py
DEACL = "DeACL's code"  # adv_finetune.py --mode aff

# (epochs, batch, lr, milestones, branches, whether the new head is zero, whose code) as the published code has them.
PUBLISHED: dict[tuple[str, str], tuple[Any, ...]] = {
    ("advcl", "slf"): (25, 512, 0.01, (15, 20), ONE, True, BENCHMARK),
    ("advcl", "alf"): (25, 512, 0.01, (15, 20), ONE, True, BENCHMARK),
    ("advcl", "aff"): (25, 128, 0.1, (15, 20), ONE, True, BENCHMARK),
    ("advcl", "sff"): (25, 512, 0.01, (10, 20), ONE, True, OLD),
    ("dynacl", "slf"): (25, 512, 0.01, (10, 20), ONE, True, DYNACL),
    ("dynacl", "alf"): (25, 512, 0.01, (10, 20), ONE, True, DYNACL),
    ("dynacl", "aff"): (25, 128, 0.1, (15, 20), TWO, True, DYNACL),
    ("dynacl", "sff"): (25, 512, 0.01, (10, 20), ONE, True, OLD),
    ("acl", "slf"): (25, 512, 0.01, (10, 20), ONE, True, BENCHMARK),
    ("acl", "alf"): (25, 512, 0.01, (10, 20), ONE, True, BENCHMARK),
    ("acl", "aff"): (100, 128, 0.1, (40, 60), TWO, True, BENCHMARK),
    ("acl", "sff"): (25, 512, 0.01, (10, 20), ONE, True, OLD),
    ("deacl", "slf"): (25, 512, 0.01, (15, 20), ONE, True, BENCHMARK),
    ("deacl", "alf"): (25, 512, 0.01, (15, 20), ONE, True, BENCHMARK),
    ("deacl", "aff"): (25, 512, 0.01, (15, 20), ONE, False, DEACL),
}


def test_every_preset_has_the_published_values() -> None:
    assert PRESETS.keys() == PUBLISHED.keys()
    for (preset, protocol), (*expected, source) in PUBLISHED.items():
        s = choose_settings(protocol, preset)
        assert [s.epochs, s.batch_size, s.lr, s.milestones, s.branches, s.zero_head] == expected, (preset, protocol)
        assert (s.momentum, s.weight_decay, s.eps, s.step_size, s.steps, s.beta) == (0.9, 2e-4, 8 / 255, 2 / 255, 10, 6)
        assert s.objective == {"slf": "ce", "alf": "pgd", "aff": "trades", "sff": "ce"}[protocol]
        assert PRESETS[preset, protocol][1] == source


@pytest.mark.parametrize(
    ("data", "size", "lr", "batch"),
    [
        ("cifar10", 32, 0.01, 512),
        ("cifar100", 32, 0.05, 512),
        ("parquet:cifar100", None, 0.05, 512),
        ("stl10", 96, 0.1, 512),
        ("stl10", 32, 0.01, 128),
        ("folder:pets", 32, 0.01, 512),
    ],
)
def test_linear_protocols_of_dynacl_depend_on_the_data(data: str, size: int | None, lr: float, batch: int) -> None:
    for preset, protocol in itertools.product(("dynacl", "acl"), ("slf", "alf")):
        s = choose_settings(protocol, preset, data=data, size=size)
        assert (s.lr, s.batch_size, s.milestones) == (lr, batch, (10, 20))
    assert choose_settings("aff", "dynacl", data=data, size=size).lr == 0.1
    for preset, protocol in itertools.product(("advcl", "deacl"), ("slf", "alf")):
        assert choose_settings(protocol, preset, data=data, size=size) == choose_settings(protocol, preset)


@pytest.mark.parametrize(
    ("preset", "data", "size", "milestones"),
    [
        ("dynacl", "cifar10", 32, (15, 20)),
        ("dynacl", "stl10", 32, (15, 20)),
        ("dynacl", "stl10", 96, (10, 20)),
        ("dynacl", "parquet:stl10", 96, (10, 20)),
        ("acl", "stl10", 96, (40, 60)),
        ("advcl", "stl10", 96, (15, 20)),
    ],
)
def test_aff_of_dynacl_divides_the_rate_earlier_on_large_images_of_stl10(
    preset: str, data: str, size: int, milestones: tuple[int, ...]
) -> None:
    assert choose_settings("aff", preset, data=data, size=size).milestones == milestones


def test_the_readme_shows_the_table_in_the_code() -> None:
    assert table() in README.read_text(encoding="utf-8")


def test_epochs_move_milestones_and_eps_the_step() -> None:
    s = choose_settings("aff", "advcl", overrides={"epochs": 10, "eps": 4 / 255})
    assert s.milestones == (6, 8) and s.step_size == 1 / 255
    s = choose_settings("aff", "advcl", overrides={"epochs": 10, "milestones": (5,), "eps": 4 / 255, "step_size": 0.01})
    assert s.milestones == (5,) and s.step_size == 0.01
    s = choose_settings("aff", "dynacl", data="stl10", size=96, overrides={"epochs": 50})
    assert s.milestones == (20, 40), "those of the data set move"


@pytest.mark.parametrize(
    ("protocol", "preset", "overrides", "message"),
    [
        ("lsf", "advcl", {}, "protocol is 'lsf', expected one of slf, alf, aff, sff. Did you mean slf"),
        ("slf", "dynalc", {}, "preset is 'dynalc'.*Did you mean dynacl"),
        ("sff", "deacl", {}, "The preset deacl has no sff; these have: advcl, dynacl, acl"),
        ("slf", "advcl", {"learning_rate": 1}, "Unknown setting 'learning_rate'"),
        ("slf", "advcl", {"epoch": 1}, "Did you mean 'epochs'"),
        ("slf", "advcl", {"objective": "pgd"}, "objective is 'pgd', expected one of ce with protocol slf"),
        ("aff", "advcl", {"objective": "ce"}, "expected one of trades, pgd with protocol aff"),
        ("aff", "advcl", {"eps": 8}, "did you mean 8/255"),
        ("aff", "advcl", {"step_size": 0.0}, "step_size is 0"),
        ("aff", "advcl", {"epochs": 0}, "epochs is 0, expected at least 1"),
        ("aff", "advcl", {"lr": 0}, "lr is 0"),
        ("aff", "advcl", {"lr": float("inf")}, "lr is inf"),
        ("aff", "advcl", {"weight_decay": float("nan")}, "weight_decay is nan, expected at least 0"),
        ("aff", "advcl", {"milestones": (-3,)}, "expected epochs above 0"),
        ("aff", "advcl", {"ema_decay": 1}, "ema_decay is 1, expected less than 1"),
        ("aff", "advcl", {"val_fraction": -0.1}, "val_fraction is -0.1"),
        ("aff", "advcl", {"branches": ("clean",)}, "expected adv, or clean and adv"),
        ("aff", "advcl", {"branches": TWO, "objective": "pgd"}, "Two batch-norm branches need"),
        ("slf", "advcl", {"branches": TWO}, "Two batch-norm branches need"),
        ("slf", "advcl", {"augment": "flip"}, "augment is 'flip', expected one of crop-flip, crop, none"),
        ("slf", "advcl", {"precision": "float16"}, "precision is 'float16'"),
    ],
)
def test_nonsense_is_refused(protocol: str, preset: str, overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose_settings(protocol, preset, overrides=overrides)


@pytest.mark.parametrize(
    ("protocol", "overrides", "idle"),
    [
        ("slf", {"eps": 0.1, "lr": 1, "beta": 2, "steps": 3, "step_size": 0.1}, ["eps", "beta", "steps", "step_size"]),
        ("alf", {"eps": 0.1, "beta": 2}, ["beta"]),
        ("aff", {"eps": 0.1, "beta": 2}, []),
        ("aff", {"beta": 2, "objective": "pgd"}, ["beta"]),
    ],
)
def test_what_changes_nothing_is_known(protocol: str, overrides: dict[str, Any], idle: list[str]) -> None:
    assert without_effect(protocol, overrides) == idle


def test_lists_are_as_good_as_tuples() -> None:
    s = choose_settings("aff", "advcl", overrides={"branches": ["clean", "adv"], "milestones": [5, 7]})
    assert s == choose_settings("aff", "advcl", overrides={"branches": TWO, "milestones": (5, 7)})


def test_pgd_training_of_a_preset_with_two_branches_has_one() -> None:
    assert choose_settings("aff", "dynacl", overrides={"objective": "pgd"}).branches == ONE


@pytest.mark.parametrize(
    ("images", "processes", "accumulate", "expected"),
    [
        (50_000, 1, 1, 512),
        (5_000, 1, 1, 512),
        (100, 1, 1, 12),
        (100, 4, 1, 12),
        (100, 5, 1, 10),
        (50_000, 2, 3, 510),
        (3, 1, 1, 2),
    ],
)
def test_a_small_set_gets_smaller_batches(images: int, processes: int, accumulate: int, expected: int) -> None:
    s = replace(choose_settings("slf", "advcl"), accumulate=accumulate)
    assert fit_to_images(s, images, processes) == replace(s, batch_size=expected)


@pytest.mark.parametrize(
    ("protocol", "images", "processes", "given", "batch_size", "lr"),
    [
        ("aff", 500, 1, (), 62, 0.1 * 62 / 128),
        ("aff", 500, 5, (), 60, 0.1 * 60 / 128),
        ("sff", 800, 1, (), 100, 0.01),  # low enough already: lower, the encoder would hardly move
        ("sff", 30, 1, (), 3, 0.1 * 3 / 128),
        ("alf", 100, 1, (), 12, 0.01),  # a linear head does not diverge, and has few steps
        ("aff", 100, 1, ("lr",), 12, 0.1),
        ("aff", 100, 1, ("batch_size", "lr"), 3, 0.1),
        ("aff", 50_000, 1, ("batch_size",), 3, 0.1 * 3 / 128),
        ("aff", 50_000, 1, ("batch_size",), 512, 0.1),
        ("aff", 50_000, 1, (), 128, 0.1),
        ("aff", 50_000, 3, (), 126, 0.1 * 126 / 128),
    ],
)
def test_all_weights_in_smaller_batches_learn_at_a_smaller_rate(
    protocol: str, images: int, processes: int, given: tuple[str, ...], batch_size: int, lr: float
) -> None:
    overrides = {"batch_size": batch_size} if "batch_size" in given else {}
    s = fit_to_images(choose_settings(protocol, "advcl", overrides=overrides), images, processes, given)
    assert s.batch_size == batch_size and s.lr == pytest.approx(lr)
