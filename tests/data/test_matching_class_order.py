"""A class is the same one for the model and for the data, however a tool numbers folders or spells their names."""

import os
import unicodedata
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from timm.utils.misc import natural_key

import advcl_hub
from advcl_hub.cli import main
from advcl_hub.data import load_data
from advcl_hub.data.matching import class_names
from advcl_hub.data.sources import natural
from advcl_hub.evaluation import Protocol, evaluate
from advcl_hub.evaluation.results import folder_name
from tests.support.image_files import encode, write
from tests.support.small_encoders import export_encoder
from tests.support.tiny_classifiers import TinyNet, labelled_by

NUMBERS = tuple(map(str, range(12)))
CLEAN = Protocol(steps=0, check_images=0)


def folder_of(root: Path, names: tuple[str, ...]) -> tuple[Path, TinyNet]:
    """A folder whose classes are named so, in timm's order, and a network that gets each image right by that number."""
    model = TinyNet(len(names))
    data = labelled_by(model, 400)
    assert isinstance(data.images, torch.Tensor)
    for label, name in enumerate(names):
        for row in (data.labels == label).nonzero()[:3, 0].tolist() or [0]:
            write(root / "test" / name / f"{row}.png", encode(data.images[row].permute(1, 2, 0).numpy()))
    return root, model


@pytest.mark.parametrize("names", [NUMBERS, ("b10", "B9", "a2", "A", "a", "x1y2", "x1y10", "Z", "3.5", "")])
def test_the_order_is_timms(names: tuple[str, ...]) -> None:
    assert [natural_key(name) for name in sorted(names, key=natural)] == sorted(map(natural_key, names))
    disk = list(names[::-1])
    assert sorted(names, key=natural) == sorted(disk, key=natural), "whatever the order of the disk"


def test_a_number_that_is_no_digit_is_sorted_too() -> None:
    assert sorted(["m²", "²", "1"], key=natural) == ["1", "m²", "²"]  # timm's own key raises ValueError for the second


def test_a_model_without_class_names_is_judged_in_timms_order_with_a_warning(tmp_path: Path) -> None:
    folder, model = folder_of(tmp_path, NUMBERS)
    with pytest.warns(
        UserWarning, match="class 2 is 2 for timm .*natural.* and 10 for torchvision's ImageFolder .*plain"
    ) as heard:
        found = evaluate(model, f"folder:{folder}", CLEAN)
    assert found.standard > 0.8 and str(heard[0].message) in found.warnings
    assert found.record["classes"] == list(NUMBERS) and "class_order" not in found.record["data"]


def test_the_order_can_be_chosen(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    folder, model = folder_of(tmp_path, NUMBERS)
    timm = evaluate(model, f"folder:{folder}", CLEAN, class_order="natural")
    plain = evaluate(model, f"folder:{folder}", CLEAN, class_order="plain")
    assert not [w for w in recwarn if "number the folders" in str(w.message)]
    assert timm.standard > 0.8 and plain.standard < 0.4
    assert plain.record["classes"] == sorted(NUMBERS) and plain.record["data"]["class_order"] == "plain"
    assert [sorted(NUMBERS)[label] for label in plain.images["label"]] == [NUMBERS[label] for label in timm.images["label"]]
    with pytest.raises(ValueError, match="class_order is 'timm', expected natural or plain"):
        evaluate(model, f"folder:{folder}", CLEAN, class_order="timm")


def test_another_order_is_another_evaluation(tmp_path: Path) -> None:
    folder, model = folder_of(tmp_path / "data", NUMBERS)
    evaluate(model, f"folder:{folder}", CLEAN, class_order="natural", output=tmp_path / "out")
    with pytest.raises(ValueError, match="holds an evaluation with another data"):
        evaluate(model, f"folder:{folder}", CLEAN, class_order="plain", output=tmp_path / "out")


def test_no_warning_where_all_tools_agree_or_the_model_names_its_classes(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    folder, model = folder_of(tmp_path / "letters", ("ant", "bee", "cat"))
    evaluate(model, f"folder:{folder}", CLEAN)
    folder, model = folder_of(tmp_path / "numbers", NUMBERS)
    model.pretrained_cfg = {"label_names": NUMBERS}  # type: ignore[assignment]
    for class_order in (None, "natural", "plain"):  # names decide
        assert evaluate(model, f"folder:{folder}", CLEAN, class_order=class_order).standard > 0.8
    assert not [w for w in recwarn if "folders" in str(w.message)]


def test_names_with_gaps_are_read_as_timm_writes_them() -> None:
    model = TinyNet(4)
    model.pretrained_cfg = {"label_names": {"0": "ant", "3": "dog", 1: "bee"}}  # type: ignore[assignment]
    assert class_names(model) == ("ant", "bee", "class 2", "dog")
    model.pretrained_cfg = {"label_names": {"bee": 1, "ant": 0}}  # type: ignore[assignment]
    assert class_names(model) == ("ant", "bee", "class 2", "class 3"), "a name for every logit, however it is written"


def test_a_name_that_a_model_has_twice_cannot_be_matched() -> None:
    model = TinyNet(3)
    data = labelled_by(model, 20)
    model.pretrained_cfg = {"label_names": ["class0", "class1", "class1"]}  # type: ignore[assignment]
    with pytest.raises(ValueError, match="several classes of the name class1"):
        evaluate(model, replace(data, classes=("class0", "class1"), labels=data.labels.clamp(max=1)), CLEAN)


def test_accents_are_matched_however_they_are_spelt(tmp_path: Path) -> None:
    composed, other = unicodedata.normalize("NFC", "école"), unicodedata.normalize("NFD", "école")
    folder, model = folder_of(tmp_path, ("zoo", composed))
    for name in ("zoo", other):
        write(folder / "train" / name / "0.png", encode(torch.zeros(8, 8, 3, dtype=torch.uint8).numpy()))
    train, test = (load_data(f"folder:{folder}", split) for split in ("train", "test"))
    assert train.classes == test.classes == (other, "zoo"), "numbered as timm numbers the training split"
    model.pretrained_cfg = {"label_names": ["zoo", composed]}  # type: ignore[assignment]
    assert evaluate(model, f"folder:{folder}", CLEAN).standard > 0.8
    write(folder / "test" / other / "0.png", b"")
    with pytest.raises(ValueError, match=r"has two folders .*a name that Unicode spells in two ways"):
        load_data(f"folder:{folder}", "test")


def test_file_names_that_are_no_text_are_read_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = folder_of(tmp_path, ("zoo", "école"))
    image = next((folder / "test" / "zoo").iterdir())
    try:
        os.rename(image, os.fsencode(image.parent) + b"/\xe9.png")
    except OSError:
        pytest.skip("this file system takes no such names")
    monkeypatch.setattr("advcl_hub.data.decoding.IN_MEMORY_BYTES", 0)
    data = load_data(f"folder:{folder}", "test")
    assert len(data.fingerprint()) == 64
    write(tmp_path / "test" / "zoo" / "0.png", b"no image")
    with pytest.warns(UserWarning, match=r"test/zoo/0\.png"):
        load_data(f"folder:{folder}", "test")


def test_inner_folders_that_timm_would_number_otherwise_are_told(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    image = encode(torch.zeros(8, 8, 3, dtype=torch.uint8).numpy())
    for name in ("cat/images/0.png", "dog/images/0.png"):  # as in Tiny ImageNet: for timm that is one class
        write(tmp_path / "tiny" / "test" / name, image)
    assert load_data(f"folder:{tmp_path / 'tiny'}", "test").labels.tolist() == [0, 1]
    assert not recwarn.list
    for name in ("animals/zebra/0.png", "plants/aster/0.png"):
        write(tmp_path / "nested" / "test" / name, image)
    with pytest.warns(UserWarning, match="timm takes the inner ones, and numbers them aster, zebra"):
        assert load_data(f"folder:{tmp_path / 'nested'}", "test").classes == ("animals", "plants")


@pytest.mark.slow
def test_a_kept_head_keeps_its_classes(tmp_path: Path) -> None:
    """Of two finetunings that keep a head without names, each takes the labels in the order that it was told."""
    names = ("1", "2", "10")
    for split in ("train", "test"):
        for label, name in enumerate(names):
            for i in range(4):
                write(
                    tmp_path / split / name / f"{i}.png", encode(torch.full((16, 16, 3), 80 * label, dtype=torch.uint8).numpy())
                )
    encoder = export_encoder(tmp_path / "model", num_classes=3)
    settings = {"epochs": 1, "batch_size": 4, "lr": 1e-3, "augment": "none", "keep_head": True}
    classes = {}
    for order in ("natural", "plain"):
        run = advcl_hub.finetune(encoder, f"folder:{tmp_path}", "sff", output=tmp_path / order, class_order=order, **settings)
        classes[order] = tuple(run.record["data"]["classes"])
    assert classes == {"natural": names, "plain": ("1", "10", "2")}
    with pytest.warns(UserWarning, match="class 1 is 2 for timm"):
        advcl_hub.finetune(encoder, f"folder:{tmp_path}", "sff", output=tmp_path / "unsaid", **settings)
    # Its result names its classes: they are found in any order.
    again = advcl_hub.finetune(
        tmp_path / "plain" / "classifier", f"folder:{tmp_path}", "sff", output=tmp_path / "again", **settings
    )
    assert again.record["data"]["classes"] == ["1", "10", "2"]
    with pytest.raises(ValueError, match="give it with keep_head"):
        advcl_hub.finetune(encoder, f"folder:{tmp_path}", output=tmp_path / "x", class_order="plain")


def test_the_command_has_the_option(tmp_path: Path) -> None:
    folder, _ = folder_of(tmp_path / "data", ("1", "2", "10"))
    encoder = export_encoder(tmp_path / "model", num_classes=3)
    command = ["evaluate", str(encoder), "--data", f"folder:{folder}", "--steps", "0", "--check-images", "0"]
    with CliRunner().isolated_filesystem(tmp_path):  # the name of the folder does not change with an option that is not used
        protocol = Protocol(steps=0, check_images=0)
        options = {"root": None, "split": "test", "n": None, "first": False, "corruptions": None, "device": None}
        assert CliRunner().invoke(main, command).exit_code == 0
        (left,) = Path("evaluations").glob("*/*")
        assert left.name == folder_name(f"folder:{folder}", protocol, options)
    said = CliRunner().invoke(main, [*command, "--output", str(tmp_path / "a")])
    assert said.exit_code == 0 and "--class-order" in said.output
    chosen = CliRunner().invoke(main, [*command, "--class-order", "plain", "--output", str(tmp_path / "b")])
    assert chosen.exit_code == 0 and "number the folders" not in chosen.output
