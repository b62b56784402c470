"""LP-AFF in this process: the authors' values, clusters in place of labels, the plain composition, exact continuation."""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from sklearn.cluster import KMeans
from torch import Tensor

import advcl_hub
from advcl_hub.data import ImageData, decoding, load_data
from advcl_hub.finetuning import Finetuned
from advcl_hub.finetuning import trainer as training
from advcl_hub.finetuning.presets import choose_settings
from advcl_hub.hub.cards import add_to_results, card
from advcl_hub.hub.export import export_folder, load_folder, verify_folder
from advcl_hub.pretraining import make_pseudo_labels
from advcl_hub.training.state import FILE
from tests.support.image_files import encode, write
from tests.support.slow import slow
from tests.support.small_encoders import SMALL_RESNET, SMALL_VIT, export_encoder

MODULE = sys.modules["advcl_hub.finetuning.lp_aff"]  # the function of that name hides it
QUICK: dict[str, Any] = {"epochs": 1, "head_epochs": 1, "batch_size": 25, "steps": 1, "clusters": 4, "cpu": True}


@pytest.fixture(scope="module")
def digits() -> ImageData:
    return load_data("digits", "train", size=16).sample(100)


@pytest.fixture
def run(resnet: Path, digits: ImageData, tmp_path: Path) -> Callable[..., Finetuned]:
    def lp_aff(output: str = "run", model: Any = None, data: Any = None, **options: Any) -> Finetuned:
        chosen = digits if data is None else data
        return advcl_hub.lp_aff(model or resnet, chosen, output=tmp_path / output, **{**QUICK, **options})

    return lp_aff


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def assert_same(a: Path, b: Path) -> None:
    first, second = weights(a), weights(b)
    assert first.keys() == second.keys()
    assert [key for key in first if not torch.equal(first[key], second[key])] == []


# Of assign_label.py, LPAFT.py and LPAFT_AFF.py in github.com/PKU-ML/DYNACL, and of `trades_loss` in its utils.py.
AUTHORS = {
    "batch_size": 512,
    "momentum": 0.9,
    "weight_decay": 1e-4,
    "augment": "crop-flip",
    "val_fraction": 0.0,
    "ema_decay": 0.0,
}
AUTHORS_HEAD = {**AUTHORS, "objective": "ce", "epochs": 10, "lr": 0.01, "milestones": [], "zero_head": True}
AUTHORS_FULL = {**AUTHORS, "objective": "trades", "epochs": 25, "lr": 0.1, "milestones": [10, 20], "branches": ["adv"]}
AUTHORS_FULL |= {"beta": 6.0, "steps": 10, "eps": 8 / 255, "step_size": 2 / 255}


def test_both_stages_have_the_authors_values(resnet: Path, digits: ImageData, tmp_path: Path) -> None:
    """Also on a data set where the preset has others. The batch is that of 16 images."""
    few = replace(digits.sample(16), name="cifar100")
    done = advcl_hub.lp_aff(resnet, few, batch_size=16, output=tmp_path / "run", cpu=True)
    for name, stage, expected in ((MODULE.HEAD, "head_settings", AUTHORS_HEAD), (MODULE.FULL, "settings", AUTHORS_FULL)):
        record = json.loads((tmp_path / "run" / name / "classifier" / "results.json").read_text(encoding="utf-8"))
        for found in (record["settings"], done.record[stage]):
            rate = 0.1 * 16 / 128 if stage == "settings" else 0.01  # all weights learn at a smaller rate in a smaller batch
            assert {key: found[key] for key in expected} == expected | {"batch_size": 16, "lr": rate}
    assert (done.record["clusters"], done.record["pseudo_labels"]["k"], done.record["head"]["step"]) == (10, "10", 10)
    assert done.record["step"] == 25


def test_the_batch_is_the_authors_but_for_small_sets() -> None:
    for images, expected in ((50_000, 512), (800, 100)):
        values = MODULE.stage_values(10, {}, images=images)
        assert [values[protocol]["batch_size"] for protocol in ("slf", "aff")] == [expected, expected]
        assert values["aff"]["lr"] == min(0.1, 0.1 * expected / 128) and values["slf"]["lr"] == 0.01
    assert MODULE.stage_values(10, {}, images=50_000, processes=3)["aff"]["batch_size"] == 510


def test_batch_and_rate_fit_the_images_that_are_trained_on(
    run: Callable[..., Finetuned], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, original = [], MODULE.stage_values

    def seen(*args: Any, **options: Any) -> dict[str, dict[str, Any]]:
        asked.append(options.get("images"))
        return original(*args, **options)

    monkeypatch.setattr(MODULE, "stage_values", seen)
    with pytest.raises(ValueError, match="A batch of 81"):
        run(batch_size=81, val_fraction=0.2)
    assert asked == [None, 80]


def test_which_overrides_reach_which_stage() -> None:
    given = {"epochs": 50, "eps": 4 / 255, "lr": 0.2, "ema_decay": 0.9, "batch_size": 64, "seed": 3, "precision": "bfloat16"}
    values = MODULE.stage_values(7, given, images=1000)
    head, full = (choose_settings(protocol, "dynacl", overrides=values[protocol]) for protocol in ("slf", "aff"))
    assert (head.epochs, head.batch_size, head.lr, head.seed, head.precision) == (7, 64, 0.01, 3, "bfloat16")
    assert (head.ema_decay, head.milestones) == (0.0, ())
    assert (full.epochs, full.milestones, full.step_size, full.lr, full.ema_decay) == (50, (20, 40), 1 / 255, 0.2, 0.9)


def test_the_labels_are_k_means_of_the_features(
    run: Callable[..., Finetuned], resnet: Path, digits: ImageData, monkeypatch: pytest.MonkeyPatch
) -> None:
    taught: list[ImageData] = []
    original = MODULE.finetune

    def finetune(model: Any, data: ImageData, *args: Any, **options: Any) -> Finetuned:
        taught.append(data)
        return original(model, data, *args, **options)

    monkeypatch.setattr(MODULE, "finetune", finetune)
    run()
    assert isinstance(digits.images, Tensor)
    with torch.no_grad():
        features = F.normalize(load_folder(resnet)(digits.images / 255), dim=1).numpy()
    expected = torch.from_numpy(KMeans(4, n_init=3, random_state=0).fit_predict(features)).long()
    assert len(taught) == 2
    for data in taught:
        assert isinstance(data.images, Tensor) and torch.equal(data.images, digits.images)
        assert torch.equal(data.labels, expected) and data.classes == ("cluster 0", "cluster 1", "cluster 2", "cluster 3")


@pytest.mark.slow
def test_true_labels_change_nothing(run: Callable[..., Finetuned], digits: ImageData, tmp_path: Path) -> None:
    """Shuffled, unknown, or of fewer classes than there are clusters."""
    shuffled = digits.labels[torch.randperm(len(digits), generator=torch.Generator().manual_seed(1))]
    given = {
        "whole": digits,
        "shuffled": replace(digits, labels=shuffled),
        "unknown": replace(digits, labels=torch.full_like(shuffled, -1), classes=()),
        "one class": replace(digits, labels=torch.zeros_like(shuffled), classes=("digit",)),
    }
    records = [run(name, data=data).record for name, data in given.items()]
    for name, record in zip(given, records, strict=True):
        assert_same(tmp_path / "whole" / "export", tmp_path / name / "export")
        for key in ("images", "data", "settings", "sha256"):
            assert record[key] == records[0][key]
        assert record["pseudo_labels"]["sha256"] == records[0]["pseudo_labels"]["sha256"]


def test_the_result_is_that_of_the_stages_by_hand(
    run: Callable[..., Finetuned], resnet: Path, digits: ImageData, tmp_path: Path
) -> None:
    found = run(epochs=2, seed=1, zero_head=False, ema_decay=0.5)
    labels = make_pseudo_labels(replace(digits, labels=-torch.ones_like(digits.labels)), f"local-dir:{resnet}", (4,), 1)
    pseudo = replace(digits, labels=labels.labels[:, 0], classes=tuple("abcd"))
    shared = {"preset": "dynacl", "weight_decay": 1e-4, "batch_size": 25, "seed": 1, "cpu": True}
    head = advcl_hub.finetune(
        resnet, pseudo, "slf", epochs=1, lr=0.01, milestones=(), zero_head=False, output=tmp_path / "slf", **shared
    )
    options = {"epochs": 2, "milestones": (0.8, 1.6), "branches": ("adv",), "steps": 1, "ema_decay": 0.5}
    full = advcl_hub.finetune(head.folder, pseudo, "aff", keep_head=True, output=tmp_path / "aff", **options, **shared)
    expected = weights(full.folder)
    assert found.record["pseudo_labels"]["sha256"] == labels.fingerprint()
    exported = weights(found.folder)
    assert exported.keys() == {key for key in expected if not key.startswith("fc.")} == weights(resnet).keys()
    assert [key for key in exported if not torch.equal(exported[key], expected[key])] == []


@pytest.mark.slow
def test_another_encoder_can_be_clustered(run: Callable[..., Finetuned], resnet: Path, vit: Path, digits: ImageData) -> None:
    own, other = run("own"), run("other", clean=vit)
    labels = make_pseudo_labels(digits, f"local-dir:{vit}", (4,))
    assert other.record["pseudo_labels"]["sha256"] == labels.fingerprint() != own.record["pseudo_labels"]["sha256"]
    assert own.record["clustered"] is None and other.record["clustered"]["name"] == "/".join(vit.parts[-2:])
    assert other.record["encoder"] == own.record["encoder"] and other.record["encoder"]["name"] == "/".join(resnet.parts[-2:])
    scratch = run("scratch", model=f"random:{resnet}", clean=resnet)  # the baseline without pretraining
    assert scratch.record["pseudo_labels"]["sha256"] == own.record["pseudo_labels"]["sha256"]
    assert not torch.equal(weights(scratch.folder)["conv1.weight"], weights(own.folder)["conv1.weight"])


def test_stopped_anywhere_it_ends_with_the_same_encoder(run: Callable[..., Finetuned], tmp_path: Path) -> None:
    options: dict[str, Any] = {"val_fraction": 0.2, "ema_decay": 0.5, "batch_size": 20}
    whole, starts = run("whole", **options), 0
    while not (pieces := run("pieces", time_budget=0, **options)).finished:
        starts += 1
        assert pieces.record == {} and not pieces.folder.exists()
        stages = [(tmp_path / "pieces" / stage / FILE).is_file() for stage in ("head", "full")]
        assert sum(stages) == 1, "one stage at a time has a checkpoint"
    assert starts == whole.record["head"]["step"] + whole.record["step"] - 2 == 7
    assert_same(whole.folder, pieces.folder)
    for key in ("settings", "head_settings", "encoder", "images", "data", "epoch", "step", "figures", "sha256"):
        assert whole.record[key] == pieces.record[key]


@pytest.mark.parametrize("lost", ["make_pseudo_labels", slow("labels written"), slow("finetune"), slow("_export")])
def test_killed_between_the_stages_it_goes_on(
    run: Callable[..., Finetuned], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    whole = run("whole")

    def killed(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if lost == "make_pseudo_labels":
            patch.setattr("advcl_hub.pretraining.pseudo_labels._cluster", killed)
        elif lost == "labels written":
            patch.setattr(MODULE, "labelled", killed)
        else:
            patch.setattr(MODULE, lost, killed)
        with pytest.raises(KeyboardInterrupt):
            run()
    assert not (tmp_path / "run" / "export").exists()
    assert len(list((tmp_path / "run").glob("labels/*.safetensors"))) == (lost != "make_pseudo_labels")
    if lost == "_export":
        monkeypatch.setattr(training.Finetuner, "train_step", killed)  # both stages are finished
    if lost != "make_pseudo_labels":
        monkeypatch.setattr("advcl_hub.pretraining.pseudo_labels._cluster", killed)  # the labels are there
    assert_same(whole.folder, run().folder)


def test_a_finished_run_costs_nothing_and_another_is_refused(
    run: Callable[..., Finetuned], vit: Path, digits: ImageData, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run()
    monkeypatch.setattr(training, "Finetuner", None)
    monkeypatch.setattr("advcl_hub.pretraining.pseudo_labels.make_pseudo_labels", None)
    again = run()
    assert again.finished and again.record == first.record and again.folder == first.folder
    others: list[tuple[dict[str, Any], str]] = [
        ({"model": vit}, r"encoder.architecture: 'resnet8_cifar' there, 'vit_tiny"),
        ({"clean": vit}, r"clustered"),
        ({"clusters": 5}, r"clusters: 4 there, 5 now"),
        ({"head_epochs": 2}, r"head_settings.epochs: 1 there, 2 now"),
        ({"steps": 2}, r"settings.steps: 1 there, 2 now"),
        ({"data": digits.sample(99)}, r"images.sha256"),
    ]
    for options, message in others:
        with pytest.raises(ValueError, match=rf"(?s)export holds a run of something else: choose another output.*{message}"):
            run(**options)


@pytest.mark.parametrize("stage", ["head", "full"])
def test_an_unfinished_run_of_something_else_is_refused_before_work(
    run: Callable[..., Finetuned], vit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    while not (tmp_path / "run" / stage / FILE).is_file():
        run(time_budget=0)
    monkeypatch.setattr("advcl_hub.pretraining.pseudo_labels.make_pseudo_labels", None)
    with pytest.raises(ValueError, match=r"(?s)unfinished run of something else.*undo:\n  settings.beta: 6.0 there, 1.0 now"):
        run(beta=1.0)
    with pytest.raises(ValueError, match=r"(?s)unfinished run of something else.*encoder.architecture"):
        run(model=vit)


def test_clusters_alone_bind_the_folder_to_nothing(run: Callable[..., Finetuned], monkeypatch: pytest.MonkeyPatch) -> None:
    def mistaken(*args: Any, **options: Any) -> None:
        raise ValueError("a mistake that only finetuning notices")

    with monkeypatch.context() as patch:
        patch.setattr(MODULE, "finetune", mistaken)
        with pytest.raises(ValueError, match="only finetuning notices"):
            run(seed=1)
    assert run(seed=2).finished


@pytest.mark.parametrize("place", ["export", "head/classifier", "full/classifier"])
def test_what_others_made_is_not_replaced(run: Callable[..., Finetuned], tmp_path: Path, place: str) -> None:
    """Neither a stranger's folder nor, in the folder of a pretraining run, its export."""
    write(tmp_path / "run" / place / "thesis.tex", b"years of work")
    with pytest.raises(ValueError, match="exists and is not an earlier export"):
        run()
    export_encoder(tmp_path / "pretraining" / "export", **SMALL_RESNET)
    write(tmp_path / "pretraining" / FILE, b"a checkpoint")
    before = weights(tmp_path / "pretraining" / "export")
    with pytest.raises(ValueError, match=r"export holds a run of something else"):
        run("pretraining")
    after = weights(tmp_path / "pretraining" / "export")
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert {path.name for path in (tmp_path / "pretraining").iterdir()} == {"export", FILE}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clusters": 1}, "clusters is 1, expected at least 2"),
        ({"head_epochs": 0}, "epochs is 0, expected at least 1"),
        ({"epoch": 3}, "Unknown setting 'epoch'. Did you mean 'epochs'"),
        ({"shots": 3}, "Unknown setting 'shots'"),
        ({"preset": "advcl"}, "Unknown setting 'preset'"),
        ({"eps": 8}, "did you mean 8/255"),
        ({"batch_size": 101}, "A batch of 101 needs as many training images; there are 100"),
        ({"batch_size": 81, "val_fraction": 0.2}, "A batch of 81 needs as many training images; there are 80"),
        ({"model": torch.nn.Linear(2, 2)}, "model is a Linear, expected a name or a folder"),
        ({"clean": torch.nn.Linear(2, 2)}, "clean is a Linear, expected a name or a folder"),
        ({"model": "random:resnet8_cifar"}, "random:resnet8_cifar has new weights"),
        ({"clean": "no/such/folder"}, "neither a folder nor a model that timm knows"),
        ({"data": "cifar11"}, "unknown data source 'cifar11'"),
        (
            {"data": load_data("digits", "train", size=16, channels=1)},
            "The model takes 3 channels, the images of digits have 1",
        ),
        ({"clusters": 101}, "K = 101 clusters need at least as many images, digits has 100"),
    ],
)
def test_refusals_come_before_anything_is_written(
    run: Callable[..., Finetuned], tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises((ValueError, OSError), match=message):
        run(**options)
    assert not list(tmp_path.glob("run/*"))


def test_a_head_that_is_not_linear_is_refused_before_the_clustering(run: Callable[..., Finetuned], tmp_path: Path) -> None:
    encoder = export_encoder(tmp_path / "encoder", "deit_tiny_distilled_patch16_224", **SMALL_VIT)
    with pytest.raises(ValueError, match="needs a model whose classifier is one Linear layer"):
        run(model=encoder)
    assert not (tmp_path / "run").exists()


def test_overrides_without_effect_are_said_and_left_out(run: Callable[..., Finetuned]) -> None:
    with pytest.warns(UserWarning, match="Without effect in aff, and left out: beta.") as warned:
        done = run(objective="pgd", beta=1.0)
    assert done.record["settings"]["objective"] == "pgd" and done.record["settings"]["beta"] == 6.0
    assert len([w for w in warned if "Without effect" in str(w.message)]) == 1


@pytest.mark.slow
def test_the_encoder_is_one_like_any_other(run: Callable[..., Finetuned], digits: ImageData, tmp_path: Path) -> None:
    """timm opens it, finetuning and evaluations take it, its card says what it is. It started as a classifier."""
    model = load_folder(export_encoder(tmp_path / "start", num_classes=10, **SMALL_RESNET))
    recipe = {"kind": "classifier", "encoder": {"name": "before", "provenance": None}}
    start = export_folder(model, tmp_path / "named", results=recipe, model_args=SMALL_RESNET, label_names=[*"abcdefghij"])
    done = run(model=start, command="advcl-hub lp-aff x")
    assert done.folder == tmp_path / "run" / "export" and done.load().num_classes == 0
    assert verify_folder(done.folder) < 1e-3
    encoder = timm.create_model(f"local-dir:{done.folder}", pretrained=True)
    assert encoder(torch.rand(2, 3, 16, 16)).shape == (2, 16)
    config = (done.folder / "config.json").read_text(encoding="utf-8")
    assert "cluster" not in config and "label_names" not in config, "the head's classes are gone with it"
    record = done.record
    assert (record["kind"], record["protocol"], record["command"]) == ("encoder", "aff", "advcl-hub lp-aff x")
    assert record["encoder"]["provenance"]["encoder"]["name"] == "before", "the chain goes on to where it began"
    assert len(record["encoder"]["weights_sha256"]) == 64 and record["seconds"] >= record["head"]["seconds"]

    tuned = advcl_hub.finetune(done.folder, digits, "slf", output=tmp_path / "slf", epochs=1, batch_size=25, cpu=True)
    assert tuned.record["encoder"]["provenance"] == record
    attack = advcl_hub.Protocol(eps=1 / 255, steps=1, check_images=0)
    advcl_hub.evaluate(tuned.folder, digits, attack, output=tmp_path / "evaluation", progress=False, device="cpu")
    add_to_results(done.folder, [tmp_path / "evaluation"])
    text = card(done.folder)
    assert "adversarial finetuning on 4 clusters of the features of local-dir:named in place of labels" in text
    assert "image encoder for" in text and "linear head on the frozen encoder (SLF)" in text
    assert "eps 8/255, 1 step of 2/255" in text and "`advcl-hub lp-aff x`" in text
    assert "adversarial-robustness" in text.partition("# export")[0]


@pytest.mark.slow
def test_images_that_are_decoded_when_needed(
    run: Callable[..., Finetuned], tmp_path: Path, digits: ImageData, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same encoder as from memory; images of several sizes, without a sensible label."""
    assert isinstance(digits.images, Tensor)
    for number, image in enumerate(digits.images[:60]):
        size = 16 + number % 3
        array = image.permute(1, 2, 0).numpy().repeat(2, 0).repeat(2, 1)[: 2 * size, : 2 * size]
        write(tmp_path / "photos" / "train" / "all" / f"{number:02}.png", encode(array))
    options = {"data": f"folder:{tmp_path / 'photos'}", "batch_size": 20, "clusters": 3}
    memory = run("memory", **options)
    monkeypatch.setattr(decoding, "IN_MEMORY_BYTES", 0)
    lazy = run("lazy", **options)
    assert_same(memory.folder, lazy.folder)
    assert lazy.record["data"]["split"] == "train" and lazy.record["data"]["name"] == "folder:photos"


@pytest.mark.slow
def test_another_size_than_the_encoders_own(run: Callable[..., Finetuned]) -> None:
    done = run(data="digits", size=24, batch_size=300)
    assert done.record["images"]["shape"] == [3, 24, 24] and done.load().pretrained_cfg["input_size"] == (3, 24, 24)


def test_the_default_folder_names_what_was_said(
    resnet: Path, digits: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = advcl_hub.lp_aff(resnet, digits, time_budget=0, **QUICK)
    assert not done.finished and done.output.parts[:2] == ("runs", "finetuned")
    assert done.output.name == "digits-lp-aff-clusters4-head_epochs1-epochs1-batch_size25-steps1"
