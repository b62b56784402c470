"""The folder that an evaluation leaves: which files, and that every picture shows something."""

import csv
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn

from advcl_hub.data import ImageData
from advcl_hub.data.corruptions import CORRUPTIONS, corrupt
from advcl_hub.evaluation import Evaluation, Protocol, evaluate
from advcl_hub.records.tables import page
from advcl_hub.training.pictures import save_figure
from tests.support.slow import slow
from tests.support.tiny_classifiers import TinyNet, labelled_by

pytestmark = pytest.mark.usefixtures("rendered")


class GreyNet(nn.Sequential):
    """One layer on (1, 8, 8)."""

    def __init__(self, classes: int) -> None:
        torch.manual_seed(0)
        super().__init__(nn.Flatten(), nn.Linear(64, classes))


def grey(model: nn.Module, n: int) -> ImageData:
    images = torch.randint(0, 256, (n, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    with torch.no_grad():
        logits = model(images / 255)
    return ImageData(images, logits.argmax(1), torch.arange(n), tuple(map(str, range(logits.shape[1]))), "grey")


def measured(
    output: Path | None, model: nn.Module, data: ImageData, corruptions: str | None = None, **settings: Any
) -> Evaluation:
    protocol = Protocol(**{"eps": 0.01, "steps": 3, "check_images": 12, **settings})
    return evaluate(model, data, protocol, corruptions=corruptions, output=output, progress=False, command="evaluate it")


def assert_drawn(path: Path) -> None:
    """A PNG that opens and shows something in its left and right half."""
    with Image.open(path) as image:
        assert image.format == "PNG"
        pixels = np.asarray(image.convert("L"), float)
    half = pixels.shape[1] // 2
    assert pixels.shape[0] >= 200 and half >= 150
    assert min(pixels[:, :half].std(), pixels[:, half:].std()) > 5 and (pixels[0] > 250).all()


ALWAYS = {"results.json", "images.csv", "report.md", "per_class.png"}


ATTACKED = ALWAYS | {"curves.png", "examples.png"}


@pytest.mark.parametrize(
    ("classes", "channels", "settings", "files"),
    [
        slow(2, 3, {}, ATTACKED),
        slow(10, 3, {"norm": "L2", "eps": 0.1}, ATTACKED),
        (5, 1, {}, ATTACKED),
        (10, 3, {"steps": 0}, ALWAYS),
        slow(10, 3, {"check_images": 0}, ATTACKED - {"curves.png"}),
        (10, 3, {"corruptions": "generated", "steps": 0}, ALWAYS | {"corruptions.png"}),
    ],
    ids=["2 classes", "l2", "grey", "no attack", "no checks", "corruptions"],
)
def test_a_folder_holds_what_was_measured_and_every_picture_shows_something(
    tmp_path: Path, classes: int, channels: int, settings: dict[str, Any], files: set[str]
) -> None:
    model = TinyNet(classes) if channels == 3 else GreyNet(classes)
    found = measured(tmp_path, model, labelled_by(model, 30, wrong=2) if channels == 3 else grey(model, 30), **settings)
    assert {path.name for path in tmp_path.iterdir()} == files, "nothing unfinished may be left"
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    for name in sorted(files):
        if name.endswith(".png"):
            assert_drawn(tmp_path / name)
            assert f"![{name}]({name})" in text
    assert json.loads((tmp_path / "results.json").read_text(encoding="utf-8")) == json.loads(json.dumps(found.record))
    with (tmp_path / "images.csv").open(newline="", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    assert len(table) == 30 and list(table[0]) == list(found.images)
    assert [row["index"] for row in table] == [str(index) for index in found.images["index"]]
    assert text == page(found.record, re.findall(r"!\[(.*?)\]", text)) and "Made by `evaluate it`" in text


def test_grey_images_are_drawn_grey(tmp_path: Path) -> None:
    model = GreyNet(5)
    measured(tmp_path, model, grey(model, 10), eps=0.1, check_images=0)
    with Image.open(tmp_path / "examples.png") as image:
        pixels = np.asarray(image.convert("RGB"), int)
    coloured = (pixels.max(2) - pixels.min(2)) > 30
    assert 0 < coloured.mean() < 0.02, "only the predictions are in red"


def test_of_many_classes_thirty_are_drawn(tmp_path: Path) -> None:
    model = TinyNet(40)
    data = labelled_by(model, 80)
    measured(tmp_path, model, replace(data, labels=torch.arange(80) % 40))
    assert_drawn(tmp_path / "per_class.png")
    with Image.open(tmp_path / "per_class.png") as image:
        assert 1800 < image.width < 2500  # 30 of them take 2,200 pixels


def test_corruptions_are_measured_at_every_severity(tmp_path: Path) -> None:
    model = TinyNet()
    data = labelled_by(model, 10)
    found = measured(tmp_path, model, data, corruptions="generated", steps=0, check_images=0).record["corruptions"]
    table = found["by_severity"]
    assert list(table) == list(CORRUPTIONS) and {len(row) for row in table.values()} == {5}
    assert isinstance(data.images, Tensor)
    for severity in (1, 5):
        with torch.no_grad():
            predictions = model(corrupt(data.images, "contrast", severity, data.indices) / 255).argmax(1)
        assert table["contrast"][severity - 1] == (predictions == data.labels).double().mean().item()
    assert found["mean"] == pytest.approx(np.mean(list(table.values()))) and found["mean"] < 1
    assert f"{100 * found['mean']:.1f} %" in (tmp_path / "report.md").read_text(encoding="utf-8")


def test_where_everything_is_wrong_there_are_no_examples(tmp_path: Path) -> None:
    model = TinyNet()
    measured(tmp_path, model, labelled_by(model, 10, wrong=10))
    assert {path.name for path in tmp_path.iterdir()} == ATTACKED - {"examples.png"}


def test_names_with_dollar_signs_are_no_formulas(tmp_path: Path) -> None:
    model = TinyNet()
    data = replace(labelled_by(model, 30), name="$\\frac$", classes=tuple(f"${i}_{{$" for i in range(10)))
    measured(tmp_path, model, data)
    for name in ("per_class.png", "curves.png", "examples.png"):
        assert_drawn(tmp_path / name)


@pytest.mark.parametrize("scale", ["linear", "log"])
def test_numbers_of_an_axis_may_be_formulas(tmp_path: Path, scale: str) -> None:
    """As those of a logarithmic axis are, and all of them where matplotlib is set so."""
    with matplotlib.rc_context({"axes.formatter.use_mathtext": True}):
        figure = Figure()
        axis = figure.subplots()
        axis.plot([1, 2, 5])
        axis.set(yscale=scale, title="$x")
        axis.set_xticks([0, 1], ["$a", "b$"])
        save_figure(figure, tmp_path / "a.png")
    assert all(text.get_parse_math() for text in axis.get_yticklabels(which="both"))
    assert not any(text.get_parse_math() for text in (axis.title, *axis.get_xticklabels()))
