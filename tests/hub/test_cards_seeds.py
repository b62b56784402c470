"""Mean and spread over seeds in a card, and that only the same training counts as another seed."""

import json
import shutil
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import advcl_hub
from advcl_hub.cli import main
from advcl_hub.hub.cards import add_to_results, card, read_export
from advcl_hub.records import RESULTS, load_record
from tests.support.small_encoders import export_encoder

RECIPE = {"method": "advcl", "model": "resnet8_cifar", "objective": {}}


@pytest.fixture(scope="module")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """For three seeds an encoder, a classifier on it and its evaluation; the second encoder is said to have another recipe."""
    folders = []
    for seed, epochs in ((0, 3), (1, 4), (2, 3)):
        folder = tmp_path_factory.mktemp(f"seed{seed}")
        encoder = export_encoder(folder / "encoder", seed=seed)
        data = {"name": "digits", "images": 100, "sha256": "0" * 64}
        place = {"data": data, "pseudo_labels": None, "versions": {}, "hardware": {"device": "cpu"}}
        recipe = RECIPE | {"seed": seed, "epochs": epochs, "data": {"source": "digits", "root": f"/home/{seed}"}}
        made = {"kind": "encoder", "recipe": recipe, "provenance": place, "step": 1, "seconds": 1.0, "branch": "adv"}
        edit(encoder, partial(dict.update, **made))
        tuned = advcl_hub.finetune(encoder, "digits", "slf", epochs=1, lr=0.1, seed=seed, output=folder / "run", cpu=True)
        protocol = advcl_hub.Protocol(steps=1, check_images=0)
        advcl_hub.evaluate(tuned.folder, "digits", protocol, n=40, output=folder / "evaluation", progress=False)
        folders.append(folder)
    return folders


@pytest.fixture
def copies(seeds: list[Path], tmp_path: Path) -> list[Path]:
    return [Path(shutil.copytree(folder, tmp_path / folder.name)) for folder in seeds]


def edit(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    results = json.loads((folder / RESULTS).read_text(encoding="utf-8"))
    change(results)
    (folder / RESULTS).write_text(json.dumps(results), encoding="utf-8")


@pytest.mark.parametrize(
    ("kind", "name"), [("encoder", "linear head on the frozen encoder (SLF)"), ("run/classifier", "this model")]
)
def test_mean_lowest_and_highest_stand_in_the_card(copies: list[Path], kind: str, name: str) -> None:
    first, _, third = copies
    arguments = [first / kind, first / "evaluation", "--other-seed", third / "evaluation"]
    for _ in range(2):  # the second time changes nothing
        done = CliRunner().invoke(main, ["card", *map(str, arguments)])
        assert done.exit_code == 0, done.output
    found = [load_record(folder / "evaluation")["accuracy"] for folder in (first, third)]
    cells = []
    for key in ("standard", "pgd"):
        low, high = sorted(100 * accuracy[key]["value"] for accuracy in found)
        cells.append(f"{(low + high) / 2:.1f} ({low:.1f} to {high:.1f})")
    text = (first / kind / "README.md").read_text(encoding="utf-8")
    assert f"| {name} | digits, Linf 8/255 | 0, 2 | {cells[0]} | {cells[1]} | - |" in text
    assert "These weights have seed 0." in text
    assert "/home" not in json.dumps(read_export(first / kind)[0]["other_seeds"])


def test_a_seed_without_autoattack_counts_for_the_other_columns(copies: list[Path]) -> None:
    first, _, third = copies

    def attacked(record: dict[str, Any], value: float) -> None:
        record["protocol"]["autoattack"] = "standard"
        record["accuracy"]["autoattack"] = {"value": value, "interval_95": [0.0, 1.0]}

    edit(first / "evaluation", partial(attacked, value=0.2))
    encoder = first / "encoder"
    add_to_results(encoder, [first / "evaluation"], other_seeds=[third / "evaluation"])
    row = next(line for line in card(encoder).splitlines() if "| 0, 2 |" in line)
    assert row.endswith("| - |") and row.count(" to ") == 2
    shutil.copytree(third / "evaluation", third / "full")
    edit(third / "full", partial(attacked, value=0.1))
    add_to_results(encoder, other_seeds=[third / "full"])
    rows = [line for line in card(encoder).splitlines() if "| 0, 2 |" in line]
    assert len(rows) == 1 and rows[0].endswith("| 15.0 (10.0 to 20.0) |")


@pytest.mark.parametrize("checked", [0, 8])
def test_other_seeds_without_checks_are_told(copies: list[Path], checked: int) -> None:
    first, _, third = copies
    edit(third / "evaluation", lambda record: record["protocol"].update(check_images=checked))
    add_to_results(first / "encoder", [first / "evaluation"], other_seeds=[third / "evaluation"])
    assert ("The other seeds were not checked for false robustness." in card(first / "encoder")) == (not checked)
    edit(first / "encoder", lambda results: results["other_seeds"].append(deepcopy(results["other_seeds"][0]) | {"seed": 3}))
    edit(first / "encoder", lambda results: results["other_seeds"][1]["protocol"].update(check_images=8))
    assert ("Some of the other seeds were not checked" in card(first / "encoder")) == (not checked)


def test_what_is_not_the_same_training_is_refused(copies: list[Path]) -> None:
    first, second, third = copies
    encoder = first / "encoder"
    with pytest.raises(ValueError, match="has no counterpart: add an evaluation of these weights"):
        add_to_results(encoder, other_seeds=[third / "evaluation"])
    before = (encoder / RESULTS).read_bytes()
    for other, message in ((second, r"\(now\):\n  recipe.epochs: 4 there, 3 now"), (first, "the same seed of pretraining, 0")):
        with pytest.raises(ValueError, match=message):
            add_to_results(encoder, [first / "evaluation"], other_seeds=[other / "evaluation"])
    assert (encoder / RESULTS).read_bytes() == before
    assert "several seeds" not in card(encoder)


def test_two_models_of_the_same_other_seed_are_refused(copies: list[Path]) -> None:
    """Which of them would the table show?"""
    first, _, third = copies
    add_to_results(first / "encoder", [first / "evaluation"], other_seeds=[third / "evaluation"])
    before = (first / "encoder" / RESULTS).read_bytes()
    edit(third / "evaluation", lambda record: record["model"].update(file_sha256="1" * 64))
    message = f"^{third / 'evaluation'}: there is an evaluation of another model of seed 2 already"
    with pytest.raises(ValueError, match=message):
        add_to_results(first / "encoder", other_seeds=[third / "evaluation"])
    assert (first / "encoder" / RESULTS).read_bytes() == before


def classifier(record: dict[str, Any]) -> dict[str, Any]:
    return record["model"]["provenance"]


def pretraining(record: dict[str, Any]) -> dict[str, Any]:
    return classifier(record)["encoder"]["provenance"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: classifier(r)["settings"].update(lr=0.2), r"finetuning.1.settings.lr: 0\.2 there, 0\.1 now"),
        (lambda r: classifier(r)["data"].update(shots=10), r"finetuning.1.data.shots: 10 there, None now"),
        (lambda r: pretraining(r).update(step=2), "  step: 2 there, 1 now"),
        (lambda r: pretraining(r)["provenance"]["data"].update(sha256="1"), r"images: '1' there, '0+' now"),
        (
            lambda r: pretraining(r)["provenance"].update(pseudo_labels={"file_sha256": "1"}),
            r"pseudo_labels.file_sha256: '1' there, None now",
        ),
        (
            lambda r: pretraining(r)["provenance"].update(start_from={"provenance": {"recipe": RECIPE | {"seed": 5}}}),
            r"start_from.recipe.method: 'advcl' there, None now",
        ),
        (
            lambda r: classifier(r)["encoder"].update(
                provenance={"settings": {"protocol": "aff"}, "encoder": {"provenance": pretraining(r)}}
            ),
            "has no counterpart",
        ),
        (lambda r: r["model"].pop("provenance"), r"the pretraining of .* is not on record"),
    ],
)
def test_a_record_that_shows_another_training_is_refused(
    copies: list[Path], change: Callable[[dict[str, Any]], None], message: str
) -> None:
    first, _, third = copies
    edit(third / "evaluation", change)
    with pytest.raises(ValueError, match=message):
        add_to_results(first / "encoder", [first / "evaluation"], other_seeds=[third / "evaluation"])


@pytest.mark.parametrize("seed", [0, 1])
def test_every_stage_of_the_pretraining_has_another_seed(copies: list[Path], seed: int) -> None:
    """Else most of the training would be the same, and the spread too small."""
    first, _, third = copies

    def start(made: dict[str, Any], seed: int) -> None:
        before = {"recipe": RECIPE | {"seed": seed, "epochs": 9}, "step": 5, "provenance": {"data": made["provenance"]["data"]}}
        made["provenance"]["start_from"] = {"name": "before", "weights_sha256": str(seed), "provenance": before}

    edit(first / "encoder", lambda results: start(results, 0))
    edit(third / "evaluation", lambda record: start(pretraining(record), seed))
    if seed == 0:
        with pytest.raises(ValueError, match="the same seed of the pretraining that it started from, 0"):
            add_to_results(first / "encoder", [first / "evaluation"], other_seeds=[third / "evaluation"])
    else:
        add_to_results(first / "encoder", [first / "evaluation"], other_seeds=[third / "evaluation"])
        assert "| 0, 2 |" in card(first / "encoder")


def test_labels_clustered_anew_and_other_places_are_the_same_training(copies: list[Path]) -> None:
    """Every seed clusters the features of one encoder with its own seed; where the run's files lay does not count."""
    first, _, third = copies
    clusters = {"encoder": "resnet18", "weights_sha256": "a", "method": "k-means", "k": "2 10", "preprocessing": "none"}

    def labels(seed: int) -> dict[str, Any]:
        return {"pseudo_labels": clusters | {"seed": str(seed), "file": f"{seed}.safetensors", "file_sha256": str(seed)}}

    edit(first / "encoder", lambda results: results["provenance"].update(labels(0)))
    edit(third / "evaluation", lambda record: pretraining(record)["provenance"].update(labels(2)))
    results = add_to_results(first / "encoder", [first / "evaluation"], other_seeds=[third / "evaluation"])
    assert [other["seed"] for other in results["other_seeds"]] == [2]


def test_other_seeds_of_an_evaluation_that_is_gone_show_no_table(copies: list[Path]) -> None:
    first, _, third = copies
    add_to_results(first / "encoder", [first / "evaluation"], other_seeds=[third / "evaluation"])
    edit(first / "encoder", lambda results: results["evaluations"][0]["protocol"].update(steps=7))
    assert "several seeds" not in card(first / "encoder")
