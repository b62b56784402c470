"""Model cards: what stands in them, for people and for the Hub, and that released ones are not stale."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

import advcl_hub
from advcl_hub.hub import push_pull
from advcl_hub.hub.cards import add_to_results, card, read_export, write_card
from advcl_hub.hub.export import PICTURE, WEIGHTS, verify_folder
from advcl_hub.hub.released import BUNDLED, RELEASED
from advcl_hub.records import RESULTS
from model_cards import release
from tests.support.hub_store import read_card
from tests.support.small_encoders import export_encoder
from train.recipe import load_recipe


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An encoder, a classifier finetuned from it, and an evaluation of that, with AutoAttack."""
    folder = tmp_path_factory.mktemp("cards")
    encoder = export_encoder(folder / "encoder")
    tuned = advcl_hub.finetune(encoder, "digits", "slf", epochs=2, output=folder / "run", cpu=True, lr=0.1)
    protocol = advcl_hub.Protocol(steps=2, autoattack="standard", check_images=0, batch_size=20)
    advcl_hub.evaluate(tuned.folder, "digits", protocol, n=20, output=folder / "evaluation", progress=False)
    return {"encoder": encoder, "classifier": tuned.folder, "evaluation": folder / "evaluation"}


@pytest.fixture
def copies(made: dict[str, Path], tmp_path: Path) -> dict[str, Path]:
    return {name: Path(shutil.copytree(folder, tmp_path / name)) for name, folder in made.items()}


def evaluation_record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / RESULTS).read_text(encoding="utf-8"))


def test_the_figures_of_an_evaluation_reach_card_and_metadata(copies: dict[str, Path]) -> None:
    folder = copies["classifier"]
    add_to_results(folder, [copies["evaluation"]], ["Digits are easy."], "cc-by-4.0")
    text = write_card(folder, "acme/digits", "hf-hub:acme/digits").read_text(encoding="utf-8")
    record = evaluation_record(copies["evaluation"])
    for key in ("standard", "pgd", "autoattack"):
        assert f"{100 * record['accuracy'][key]['value']:.2f} [" in text
    header = next(line for line in text.splitlines() if line.startswith("| model | SA"))
    assert header == "| model | SA | PGD-2 | APGD-CE | APGD-T | FAB-T | Square | AA |"
    assert 'timm.create_model("hf-hub:acme/digits", pretrained=True)' in text and "import advcl_hub, timm" in text
    for part in ("SLF", "8/255", "Digits are easy.", "20 test images of 359", "batch 179", "cc-by-4.0", PICTURE):
        assert part in text, part
    assert (folder / PICTURE).is_file() and verify_folder(folder) < 1e-3

    data: Any = ModelCard(text).data
    assert (data.library_name, data.license, data.pipeline_tag) == ("timm", "cc-by-4.0", "image-classification")
    metrics = {result.metric_args["attack"]: result for result in data.eval_results or ()}
    assert metrics.keys() == {"none", "PGD-2", "AutoAttack standard"}
    attacked = metrics["PGD-2"]
    assert attacked.metric_value == round(100 * record["accuracy"]["pgd"]["value"], 2)
    expected = {"attack": "PGD-2", "norm": "Linf", "eps": "8/255", "images": 20, "seed": 0, "model": "this model"}
    assert attacked.metric_args == expected
    assert read_card(text.encode())[1] == []


def test_an_encoder_shows_what_was_finetuned_from_it(copies: dict[str, Path]) -> None:
    add_to_results(copies["encoder"], [copies["evaluation"]])
    text = card(copies["encoder"], "acme/encoder", "hf-hub:acme/encoder")
    assert "| linear head on the frozen encoder (SLF)" in text and "pipeline_tag: image-feature-extraction" in text
    assert "advcl-hub finetune hf-hub:acme/encoder" in text
    assert "keep adversarial robustness" not in text  # nothing is known of how it was pretrained
    tuned = read_export(copies["encoder"])[0]["evaluations"][0]["finetuning"]
    assert tuned["settings"]["protocol"] == "slf" and tuned["settings"]["epochs"] == 2


def test_evaluations_of_other_weights_are_refused(copies: dict[str, Path], tmp_path: Path) -> None:
    other = export_encoder(tmp_path / "other", seed=7)
    before = (other / RESULTS).read_bytes()
    with pytest.raises(ValueError, match="neither these weights nor finetuned from them"):
        add_to_results(other, [copies["evaluation"]])
    assert (other / RESULTS).read_bytes() == before and not (other / PICTURE).exists()


def test_adding_twice_changes_nothing_and_a_repetition_replaces(copies: dict[str, Path]) -> None:
    folder = copies["classifier"]
    first = add_to_results(folder, [copies["evaluation"]], ["A note."])
    assert add_to_results(folder, [copies["evaluation"]], ["A note."]) == first
    record = evaluation_record(copies["evaluation"])
    record["accuracy"]["standard"]["value"] = 0.5
    (copies["evaluation"] / RESULTS).write_text(json.dumps(record), encoding="utf-8")
    assert [e["accuracy"]["standard"]["value"] for e in add_to_results(folder, [copies["evaluation"]])["evaluations"]] == [0.5]


def test_no_more_is_claimed_than_is_known(copies: dict[str, Path]) -> None:
    text = card(copies["encoder"])  # nobody said how it was made, or under which licence it is
    assert "Robustness has not been measured." in text
    assert "Not stated." in text and "license:" not in text and "Citation" not in text
    assert "adversarial-robustness" not in text and "contrastive-learning" not in text
    record = evaluation_record(copies["evaluation"])
    record["accuracy"] = {"standard": record["accuracy"]["standard"]}
    record["protocol"]["precision"] = "bfloat16"
    (copies["evaluation"] / RESULTS).write_text(json.dumps(record), encoding="utf-8")
    add_to_results(copies["classifier"], [copies["evaluation"], copies["evaluation"]])
    text = card(copies["classifier"])
    assert "Measured against an attacker" not in text and "model-index" not in text
    assert text.count("| this model") == 1


def test_what_people_type_stays_text(copies: dict[str, Path]) -> None:
    folder = copies["encoder"]
    results = evaluation_record(folder) | {"origin": "a\n---\n# b {{ 7 * 7 }}", "notes": ["x\n\n## y", "</script>, /a/b | c"]}
    (folder / RESULTS).write_text(json.dumps(results), encoding="utf-8")
    text = card(folder, "title\n---\nname: x")
    assert "converted from a --- # b {{ 7 * 7 }}." in text and "\n- x ## y\n- &lt;/script>, /a/b / c\n" in text
    assert "\n# title --- name: x\n" in text and ModelCard(text).data.to_dict()["library_name"] == "timm"


def test_a_converted_file_is_named_with_its_layout(copies: dict[str, Path]) -> None:
    folder = copies["encoder"]
    results = evaluation_record(folder) | {"origin": "ACL", "file": "</b>\n# model.pt", "layout": "acl"}
    (folder / RESULTS).write_text(json.dumps(results), encoding="utf-8")
    assert "\n- Origin: ACL\n- Converted from: &lt;/b> # model.pt, layout acl\n" in card(folder)


def test_warnings_of_an_evaluation_stand_in_the_card(copies: dict[str, Path]) -> None:
    record = evaluation_record(copies["evaluation"]) | {"warnings": ["gradients are masked."]}
    (copies["evaluation"] / RESULTS).write_text(json.dumps(record), encoding="utf-8")
    add_to_results(copies["classifier"], [copies["evaluation"]])
    assert "> **Warning.** this model: gradients are masked." in card(copies["classifier"])


def test_pretraining_is_told_with_its_pseudo_labels(copies: dict[str, Path]) -> None:
    folder = copies["encoder"]
    results = evaluation_record(folder) | {
        "recipe": {
            "epochs": 3,
            "attack": {"steps": 3, "eps": 8 / 255, "step_size": 4 / 255},
            "objective": {"pseudo_label_weight": 0.2},
        },
        "step": 1200,
        "finished": False,
        "seconds": 61.0,
        "branch": "adv",
        "ema": True,
        "provenance": {
            "data": {"name": "parquet:cifar10", "images": 49000, "sha256": "ab" * 32},
            "pseudo_labels": {"encoder": "SimCLR on ImageNet", "file": "labels.safetensors", "sha256": "cd" * 32},
            "versions": {"torch": "2.14.1"},
            "hardware": {"device": "cpu, 1 threads"},
        },
    }
    (folder / RESULTS).write_text(json.dumps(results), encoding="utf-8")
    text = card(folder)
    assert "pretrained with AdvCL on parquet:cifar10 without its labels" in text and "keep adversarial robustness" in text
    assert "not learning from scratch" in text and "stopped before the end of its schedule" in text
    assert "encoder SimCLR on ImageNet" in text and "batch norm `adv`, averaged weights" in text and "49,000" in text
    assert "datasets:\n- uoft-cs/cifar10" in text and '"step_size": 0.0156' in text


RUN: dict[str, Any] = {
    "step": 1200,
    "finished": True,
    "seconds": 61.0,
    "branch": "adv",
    "provenance": {
        "data": {"name": "parquet:cifar10", "images": 49000, "sha256": "ab" * 32},
        "versions": {"torch": "2.14.1"},
        "hardware": {"device": "cpu, 1 threads"},
    },
}
ATTACK = {"steps": 5, "eps": 8 / 255, "step_size": 2 / 255}
TEACHER = RUN | {"recipe": {"epochs": 40, "method": "simclr", "attack": ATTACK, "objective": {}}}


@pytest.mark.parametrize(
    ("recipe", "told", "robust"),
    [
        ({"method": "simclr"}, "contrastive learning on clean views (SimCLR)", False),
        ({"objective": {"adversarial_views": [], "pairing": "joint"}}, "contrastive learning on clean views (SimCLR)", False),
        (
            {"objective": {"adversarial_views": ["a", "b"], "pairing": "separate"}},
            "adversarial contrastive learning (ACL)",
            True,
        ),
        ({"method": "acl"}, "adversarial contrastive learning (ACL)", True),
        ({"method": "deacl"}, "DeACL", True),
        ({"method": "profeat"}, "ProFeAT", True),
        ({"method": "pseudo_label_at"}, "adversarial training on pseudo-labels", True),
        ({"objective": {"pseudo_label_weight": 0.2}}, "AdvCL", True),
        ({"objective": {"pseudo_label_weight": 0}}, "AdvCL without pseudo-labels", True),
    ],
)
def test_each_method_is_told_by_its_name_and_only_those_that_attack_as_robust(
    copies: dict[str, Path], recipe: dict[str, Any], told: str, robust: bool
) -> None:
    results = evaluation_record(copies["encoder"]) | RUN | {"recipe": {"epochs": 3, "attack": ATTACK, "objective": {}} | recipe}
    (copies["encoder"] / RESULTS).write_text(json.dumps(results), encoding="utf-8")
    text = card(copies["encoder"])
    assert f"pretrained with {told} on parquet:cifar10 without its labels" in text
    assert ("keep adversarial robustness" in text) == robust
    assert ("Pretraining made adversarial views within l_inf 8/255 (5 steps of 2/255)." in text) == robust
    assert "61 s on cpu, 1 thread\n" in text  # records say `1 threads`, and must: runs are compared by them
    assert ("2111.01124" in text) == told.startswith("AdvCL")
    assert ("\n- contrastive-learning\n" in text) == any(word in told for word in ("AdvCL", "contrastive"))


@pytest.mark.parametrize("known", [True, False])
def test_a_card_names_the_teacher_and_says_what_is_not_known_of_it(copies: dict[str, Path], known: bool) -> None:
    start = {"name": "teacher/export", "weights_sha256": "ef" * 32, "provenance": TEACHER if known else None}
    run = RUN | {"recipe": {"epochs": 3, "method": "deacl", "attack": ATTACK, "objective": {}}}
    run["provenance"] = {**RUN["provenance"], "start_from": start}
    (copies["encoder"] / RESULTS).write_text(json.dumps(evaluation_record(copies["encoder"]) | run), encoding="utf-8")
    text = card(copies["encoder"])
    took = f"{TEACHER['seconds']:,.0f} s"
    how = f", contrastive learning on clean views (SimCLR), 40 epochs, {took}" if known else ""
    assert f"teacher/export{how} (weights sha256 `efefefefefefefef`)" in text
    assert ("Nothing says how teacher/export was made" in text) != known
    total = run["seconds"] + TEACHER["seconds"]
    assert (f"; with what it started from {total:,.0f} s" in text) == known
    assert text.count("<summary>The recipe") == 1 + known and ("first train what it started from" in text) == known


def test_each_attack_of_the_pretraining_is_told(copies: dict[str, Path]) -> None:
    first = RUN | {"recipe": {"epochs": 40, "method": "pseudo_label_at", "attack": ATTACK | {"steps": 1}, "objective": {}}}
    start = {"name": "first/export", "weights_sha256": "ef" * 32, "provenance": first}
    run = RUN | {"recipe": {"epochs": 3, "method": "pseudo_label_at", "attack": ATTACK, "objective": {}}}
    run["provenance"] = {**RUN["provenance"], "start_from": start}
    (copies["encoder"] / RESULTS).write_text(json.dumps(evaluation_record(copies["encoder"]) | run), encoding="utf-8")
    text = card(copies["encoder"])
    before = "; before that, adversarial training on pseudo-labels, 40 epochs\n"
    assert f"3 epochs, 1,200 steps{before}" in text
    assert "within l_inf 8/255 (5 steps of 2/255), before that within l_inf 8/255 (1 step of 2/255)." in text
    stopped = evaluation_record(copies["encoder"]) | run | {"finished": False}
    (copies["encoder"] / RESULTS).write_text(json.dumps(stopped), encoding="utf-8")
    assert f"3 epochs, 1,200 steps, stopped before the end of the schedule{before}" in card(copies["encoder"])


@pytest.mark.parametrize(
    ("labels", "told"),
    [
        ({"file_sha256": "26b90406be84225f8a3fa9c80d625f8d53edb53da25638c4383eb009eebd17be"}, "the authors of AdvCL published"),
        ({"encoder": "resnet18.a1_in1k"}, "of resnet18.a1_in1k, which may have seen labels or other images."),
        ({"encoder": "resnet10_cifar.advcl_c10"}, "of resnet10_cifar.advcl_c10, which may have seen labels or other images."),
        ({"encoder": "resnet10_cifar.simclr_c10_slf"}, "_slf, which may have seen labels or other images."),
        ({"encoder": "resnet10_cifar.simclr_c10"}, None),
        ({"encoder": "pixels"}, None),
    ],
)
def test_what_is_not_known_of_pseudo_labels_is_a_limit(
    copies: dict[str, Path], labels: dict[str, Any], told: str | None
) -> None:
    run = RUN | {"recipe": {"epochs": 3, "method": "advcl", "attack": ATTACK, "objective": {}}}
    run["provenance"] = {**RUN["provenance"], "pseudo_labels": {"file": "renamed.safetensors", "sha256": "cd" * 32} | labels}

    def limits() -> list[str]:
        (copies["encoder"] / RESULTS).write_text(json.dumps(evaluation_record(copies["encoder"]) | run), encoding="utf-8")
        return [line for line in card(copies["encoder"]).splitlines() if line.startswith("- The pseudo-labels")]

    found = limits()
    assert len(found) == 1 and told in found[0] if told else not found
    first = {**run, "provenance": run["provenance"]}  # the same labels in the stage before are told once, as are they alone
    for latest in (run["provenance"]["pseudo_labels"], None):
        start = {"name": "first/export", "weights_sha256": "ef" * 32, "provenance": first}
        run["provenance"] = {**RUN["provenance"], "pseudo_labels": latest, "start_from": start}
        assert limits() == found


def test_no_finetuning_on_the_way_is_left_out(copies: dict[str, Path]) -> None:
    run = RUN | {"recipe": {"epochs": 3, "method": "advcl", "attack": ATTACK, "objective": {}}}
    full = {"settings": {"protocol": "aff", "epochs": 7}, "data": {"name": "digits"}, "encoder": {"provenance": run}}
    clusters = {
        "method": "LP-AFF (arXiv 2303.01289)",
        "settings": {"protocol": "aff", "epochs": 2},
        "images": {"name": "faces"},
    }
    folder = copies["classifier"]
    for between, told in (
        (full, "finetuned with labels of digits (AFF)"),
        (clusters, "finetuned on clusters of faces (LP-AFF)"),
    ):
        results = evaluation_record(folder)
        results["encoder"]["provenance"] = between | {"encoder": {"provenance": run}}
        (folder / RESULTS).write_text(json.dumps(results), encoding="utf-8")
        text = card(folder)
        assert f"without its labels, then {told}." in text
        assert f"- Finetuned before: {told}, {between['settings']['epochs']} epochs\n" in text
        assert ("Labels came in before this finetuning, too" in text) == (between is full)


def test_the_recipe_in_a_card_is_one(copies: dict[str, Path], tmp_path: Path) -> None:
    recipe = load_recipe("digits_demo", ["seed=3", "attack.eps=1e-5"])
    run = RUN | {"recipe": recipe.to_dict()}
    (copies["encoder"] / RESULTS).write_text(json.dumps(evaluation_record(copies["encoder"]) | run), encoding="utf-8")
    text = card(copies["encoder"])
    (tmp_path / "recipe.yaml").write_text(text.partition("```json")[2].partition("```")[0], encoding="utf-8")
    assert load_recipe(str(tmp_path / "recipe.yaml")) == recipe
    assert "python -m train.pretrain recipe.yaml --output runs/again" in text


def test_the_picture_is_that_of_the_first_evaluation(copies: dict[str, Path], tmp_path: Path) -> None:
    """The table of releases shows its figures, too."""
    second = shutil.copytree(copies["evaluation"], tmp_path / "second")
    record = evaluation_record(second)
    record["protocol"]["steps"] += 1
    (second / RESULTS).write_text(json.dumps(record), encoding="utf-8")
    (second / PICTURE).write_bytes(b"another one")
    add_to_results(copies["encoder"], [copies["evaluation"], second])
    add_to_results(copies["encoder"], [second])
    assert (copies["encoder"] / PICTURE).read_bytes() == (copies["evaluation"] / PICTURE).read_bytes()


@pytest.mark.parametrize("content", ["{", "{}", "[]"])
def test_what_is_no_export_is_refused(content: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"has no results\.json"):
        card(tmp_path)
    for name in (RESULTS, "config.json"):
        (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=r"damaged|names no sha256"):
        card(tmp_path)


# ----------------------------------------------------------------------------------------------------- released weights

DATA = json.loads(RELEASED.read_text(encoding="utf-8"))["releases"]


def test_cards_and_the_readme_are_not_stale() -> None:
    for path, text in release.cards().items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name} is stale: python -m model_cards.release"
    folders = {path.name for path in release.CARDS.iterdir() if path.is_dir() and path.name not in ("__pycache__", "weights")}
    assert folders == set(DATA) >= {path.name for path in BUNDLED.glob("*")}


def test_all_weights_in_the_package_take_less_than_20_mb() -> None:
    assert sum(path.stat().st_size for path in BUNDLED.rglob("*.safetensors")) < 20_000_000


@pytest.mark.parametrize("name", DATA)
def test_released_json_says_what_the_folder_says(name: str, tmp_path: Path) -> None:
    found = DATA[name]
    if not found.get("bundled") and not found.get("parts"):
        pytest.skip("its weights are on the Hub")
    assert push_pull.verify(name) < 1e-3
    assert "hub_id" in found or found["files"][WEIGHTS]["size"] < release.BUNDLED_BYTES
    where = {key: found[key] for key in ("bundled", "hub_id", "revision", "parts") if key in found}
    folder = push_pull.pull(name, tmp_path / "export")
    assert release.entry(folder, where, robustbench=found.get("robustbench")) == found


@pytest.mark.parametrize("name", DATA)
def test_released_cards_are_complete(name: str) -> None:
    text = (release.CARDS / name / "README.md").read_text(encoding="utf-8")
    data, errors = read_card(text.encode())[:2]
    assert not errors and data == yaml.safe_load(text.split("---\n")[1]) and data["model-index"]
    assert PICTURE in text and (release.CARDS / name / PICTURE).is_file()
    assert data["license"] == "apache-2.0" and ("2111.01124" in text) == ("advcl" in name.partition(".")[2])
    for heading in ("Use it", "Results", "Threat model", "How it was made", "Intended use and limits", "Licence"):
        assert f"## {heading}\n" in text
    assert "Nothing was measured" not in text and "not recorded" not in text
